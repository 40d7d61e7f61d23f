"""The one door to attention: the one way to run a model, to read its attention, and to edit it, in whichever stack.

1. transformers lets the attention function of an architecture be exchanged (`AttentionInterface`). Ours is called by
   every layer of every stack with queries, keys and values as they meet (after bias, norms and rotation), the mask, the
   scale and whatever else the family adds to its scores. A few families compute attention inside their own modules;
   common/attention/inlets.py leads these to the same function.
2. A layer with neither reader nor edit runs its fused kernel. A reader sees the call of its layer: the pattern in
   blocks of queries or whole, q, k, v, and the output of the heads. An edit changes one of these for one head
   (common/attention/call.py); the other heads stay fused.
3. `Door.run` runs the model: whole, or from a layer on, up to a place, with logits where they are read. Edits and
   readers hold for that run alone: the next run without them gives the same bits as before.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from common import UserError
from common.attention.call import Call, Edit
from common.attention.head import ONLY_STACK, Head, Place
from common.attention.inlets import lead_to

IMPLEMENTATION = "one_door"  # the name that transformers knows our attention function by

Reader = Callable[[Call], None]
Tap = Callable[[Tensor], "Tensor | None"]


class _Left(Exception):
    """Raised inside a forward pass to leave it: all that was wanted has been seen."""


@dataclass
class _Visit:
    """One run: the edits and readers of each attention layer, which rows it holds, and after which layer it ends."""

    door: Door
    edits: Mapping[Place, list[Edit]]
    readers: Mapping[Place, Reader]
    rows: slice
    last: Place | None
    seen: set[Place] = field(default_factory=set)

    def attend(self, call: Call) -> Tensor:
        place = self.door.place_of(call.module)
        self.seen.add(place)
        if place in self.edits:
            call.under(self.edits[place], self.rows)
        if place in self.readers:
            self.readers[place](call)
        if place == self.last:
            raise _Left
        return call.output


_VISIT: ContextVar[_Visit | None] = ContextVar("visit", default=None)


def answer(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **given: Any) -> Tensor:
    """[batch, query, head, d_head]: what a layer's attention gives, in the run under way or outside of any. The
    arguments are those of a `Call`."""
    visit, call = _VISIT.get(), Call(module, q, k, v, mask, **given)
    return call.output if visit is None else visit.attend(call)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **options: object,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it; returns [batch, query, head, d_head] and no weights."""
    if options.get("dropout"):
        raise UserError("attention was called in training mode: dropout would make every run another one")
    given = {"scale": scaling, "causal": is_causal, "softcap": softcap, "bias": position_bias, "sinks": s_aux}
    return answer(module, query, key, value, attention_mask, **given), None


class Door:
    """A Hugging Face model whose attention is ours: the same weights, modules of its own.

    `network`: the model. Raises UserError where its attention cannot be exchanged.
    """

    def __init__(self, network: nn.Module):
        """To be opened before TransformerLens wraps `network`, which puts modules of its own into it."""
        _register()
        shared = {id(tensor): tensor for tensor in chain(network.parameters(), network.buffers())}
        self.network = copy.deepcopy(network, shared).eval()
        self._names = {module: name for name, module in self.network.named_modules()}
        if not lead_to(self.network, answer):
            self._exchange(type(network).__name__)
        self._two_stacks = bool(getattr(self.network.config, "is_encoder_decoder", False))

    def _exchange(self, name: str) -> None:
        reason = "it computes attention inside its own modules"
        try:
            self.network.set_attn_implementation(IMPLEMENTATION)  # type: ignore[operator]
        except (ValueError, AttributeError, TypeError, KeyError) as error:
            reason = str(error)
        # transformers only logs a warning for families such as XLNet, and goes on with their own attention.
        if getattr(getattr(self.network, "config", None), "_attn_implementation", None) != IMPLEMENTATION:
            raise UserError(
                f"the attention of {name} cannot be read or edited: transformers does not let it be exchanged "
                f"({reason})"
            )

    def place_of(self, module: nn.Module) -> Place:
        """Where an attention module stands, by its name, such as `decoder.block.3.layer.1.EncDecAttention`."""
        place = _place(self._names[module])
        alone = place.stack == "decoder" and not self._two_stacks  # OPT's one stack is called so
        return Place(ONLY_STACK, place.layer) if alone else place

    def run(
        self,
        inputs: Mapping[str, Tensor],
        *,
        edits: Sequence[Edit] = (),
        rows: slice = slice(None),
        readers: Mapping[Place, Reader] | None = None,
        taps: Sequence[tuple[nn.Module, str, Tap]] = (),
        last: Place | nn.Module | None = None,
        start: tuple[Sequence[nn.Module], Tensor] | None = None,
        predictions: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | None:
        """Run `inputs` (such as `input_ids` [rows, pos]) under `edits`, and show `readers` the attention they ask for.

        `rows`: which rows, of those that the edits were made for, the inputs are.
        `taps`: (module, "input" or "output", function): the function gets the module's first input, or its output; a
        tensor that it returns takes the value's place.
        `last`: the run is left after this attention layer was read, or before this module is entered.
        `start`: (blocks, stream): the blocks but the last are passed by, and the last is entered with `stream`.
        `predictions`: (row, position) [n] each: where logits are read; the model unembeds there alone.
        Returns logits, [n, d_vocab] with `predictions`, else [rows, pos, d_vocab]; None where the run was left.
        Raises UserError where an edit names a layer that the run did not reach.
        """
        by_place: dict[Place, list[Edit]] = defaultdict(list)
        for edit in edits:
            by_place[Place(edit.head.stack, edit.head.layer)].append(edit)
        visit = _Visit(self, by_place, readers or {}, rows, last if isinstance(last, Place) else None)
        with ExitStack() as held:
            # what a layer is entered with is put there before anybody looks at it
            for module, side, function in [*_start(start), *taps, *_predictions(self.network, predictions)]:
                held.callback(_tap(module, side, function).remove)
            if isinstance(last, nn.Module):
                held.callback(_tap(last, "input", _leave).remove)
            held.enter_context(_passed_by(start[0][:-1] if start else ()))
            token = _VISIT.set(visit)
            held.callback(_VISIT.reset, token)
            try:
                logits = cast(Tensor, self.network(**inputs, use_cache=False).logits)
            except _Left:
                return None  # a run may be left below an edit, which then changes nothing that was asked for
        if missing := by_place.keys() - visit.seen:
            raise UserError(f"the edit of {Head(*min(missing), 0)} was not made: the layer shows no attention")
        return logits[0] if predictions else logits


def _leave(value: Tensor) -> None:
    raise _Left


def _place(name: str) -> Place:
    parts = name.split(".")
    number = next(int(part) for part in parts if part.isdigit())
    words = name.lower()
    if any(word in words for word in ("encdec", "encoder_attn", "crossattention", "cross_attn")):
        return Place("cross", number)
    if any(word in words for word in ("visual", "vision", "image")):
        return Place("vision", number)
    if parts[0] == "encoder" or "encoder" in parts[:2]:
        return Place("encoder", number)
    return Place("decoder", number) if parts[0] == "decoder" or "decoder" in parts[:2] else Place(ONLY_STACK, number)


def _tap(module: nn.Module, side: str, function: Tap) -> RemovableHandle:
    """Hook a function in at a module's first input (positional or `hidden_states`) or its (first) output."""

    def before(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        new = function(cast(Tensor, args[0] if args else kwargs["hidden_states"]))
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": new})

    def after(module: nn.Module, args: object, output: object) -> object:
        if not isinstance(output, tuple):
            return function(cast(Tensor, output))
        new = function(output[0])
        return None if new is None else (new, *output[1:])

    if side == "input":
        return module.register_forward_pre_hook(before, with_kwargs=True)  # type: ignore[arg-type]
    return module.register_forward_hook(after)


def _start(start: tuple[Sequence[nn.Module], Tensor] | None) -> list[tuple[nn.Module, str, Tap]]:
    return [] if start is None else [(start[0][-1], "input", lambda value: start[1])]


def _predictions(network: nn.Module, places: tuple[Tensor, Tensor] | None) -> list[tuple[nn.Module, str, Tap]]:
    """Unembed the named places alone, as one row: the vocabulary is wide and few logits are read."""
    if places is None:
        return []
    unembedding = cast(nn.Module, network.get_output_embeddings())  # type: ignore[operator]
    return [(unembedding, "input", lambda stream: stream[places][None])]


@contextmanager
def _passed_by(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Blocks that do nothing for the length of a `with` block."""
    for block in blocks:
        block.forward = _nothing
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own is there again


def _nothing(hidden_states: object, *args: object, **kwargs: object) -> tuple[object]:
    """What goes in, in a tuple: some models take a tuple's first, the others hand it on as it is. Nobody computes with
    it, because the block after those passed by is entered with a stream of its own."""
    return (hidden_states,)


def _register() -> None:
    """Make our attention function known to transformers, with the masks of its fused one."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
