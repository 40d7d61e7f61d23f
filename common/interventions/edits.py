"""How a part of a model is changed and put back exactly: edits, the interventions they make up, recordings.

1. An edit names one head's activation (its output, pattern, query, key or values), says what to put there, and how much
   of it: in which rows and positions, in which subspace, with which coefficient. An intervention is a set of edits;
   `a + b` is both. `common.interventions` has the list of them.
2. `with applied(model, intervention):` hooks the edits in for the length of a block. Each hook works on a copy, writes
   its heads' columns alone, and is removed at the end whatever happens.
3. What is put there comes from `Recordings`: the model's own activations on rows of tokens (the clean rows, their
   control rows), read when they are needed and kept.
"""

from __future__ import annotations

import inspect
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from common import UserError
from common.heads.statistics import Ints
from common.loading.models import Model

Head = tuple[int, int]
Hook = tuple[str, Callable[..., Any]]

POINTS = {  # what is edited or read, as the bridge names it inside a block
    "resid_pre": "hook_in",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_out",
    "z": "attn.hook_z",
    "pattern": "attn.hook_pattern",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "o": "attn.o.hook_out",
    "scale": "ln1.hook_scale",
}


# TransformerLens says so when a layer computes its attention elsewhere and an edit comes too late to matter.
DISCARDED = r"[\s\S]*The edit is discarded"


def hook_name(layer: int, point: str) -> str:
    """The bridge's name of a hook point, such as `blocks.3.attn.hook_z`."""
    return f"blocks.{layer}.{POINTS[point]}"


# --- what an edit is ---


@dataclass(frozen=True)
class Run:
    """The forward pass under way: which `rows` of those an intervention was made for it runs, and, by point, the
    layer's activations `seen` so far in it."""

    rows: slice
    seen: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Amount:
    """How much of an edit: `coefficient` from 0 (clean) to 1 (whole), `mask` [rows, pos] bool of the places it touches,
    `subspace` [d_head, k] with orthonormal columns in which alone it changes the activation. None: no limit."""

    coefficient: float = 1.0
    mask: torch.Tensor | None = None
    subspace: torch.Tensor | None = None

    def blend(self, old: torch.Tensor, new: torch.Tensor, rows: slice) -> torch.Tensor:
        """`old` moved towards `new`, both [rows, pos, width]; exactly `old` at 0 and, unprojected, `new` at 1."""
        if self.subspace is not None:
            basis = self.subspace.to(old)
            new = old + (new - old) @ basis @ basis.T
        if self.mask is None:
            return torch.lerp(old, new.to(old), self.coefficient)
        mask = self.mask if len(self.mask) == 1 else self.mask[rows]
        weight = self.coefficient * mask.to(old)[..., None]
        return torch.lerp(old, new.to(old), weight.expand_as(old))


Change = Callable[[torch.Tensor, Run], torch.Tensor]


@dataclass(frozen=True)
class Edit:
    """One change: what `change(old, run)` gives replaces column `head` of `point` in `layer`.

    `old` is the head's activation, [rows, pos, d_head], or [rows, query, key] for a pattern.
    """

    layer: int
    point: str
    head: int
    change: Change
    amount: Amount = Amount()

    @property
    def reads(self) -> tuple[str, ...]:
        """Points of the same layer that the edit finds in `run.seen`."""
        return ()

    def ready(self, rows: slice) -> Edit:
        """The edit to hook in for a run of `rows`."""
        return self

    def write(self, activation: torch.Tensor, run: Run) -> None:
        """Edit `activation` in place: the head axis is 1 for a pattern, else 2."""
        old = activation.select(1 if self.point == "pattern" else 2, self.head)
        old.copy_(self.amount.blend(old, self.change(old, run), run.rows))


@dataclass(frozen=True)
class ValueEdit(Edit):
    """New values for one query head, its pattern kept: the head's output moves by pattern x (new - old values).

    Written at the output, because grouped query heads share values. `change` sees the values, [rows, pos, d_head].
    """

    group: int = 0  # the key-value head that the query head reads

    @property
    def reads(self) -> tuple[str, ...]:
        return "v", "pattern"

    def write(self, activation: torch.Tensor, run: Run) -> None:
        if "pattern" not in run.seen:
            raise UserError("this model shows its pattern only after it was used: values cannot be edited alone")
        old = run.seen["v"][:, :, self.group]
        moved = self.amount.blend(old, self.change(old, run), run.rows) - old
        activation[:, :, self.head] += run.seen["pattern"][:, self.head] @ moved


@dataclass(frozen=True)
class GroupedKeyEdit(Edit):
    """A new key for one query head of a group that shares its key.

    The whole group's key is edited in a run of its own on the `clean` rows, which recomputes attention; the head's
    pattern there is then given to that head alone. Layers below are clean in that run.
    """

    group: int = 0
    clean: Recordings | None = None

    def ready(self, rows: slice) -> Edit:
        assert self.clean is not None
        shared = Edit(self.layer, "k", self.group, self.change, self.amount)
        under = Intervention("shared key", ((self.layer, self.head),), (shared,))
        place = self.layer, "pattern"
        pattern = record(self.clean.model, self.clean.tokens[rows], {place}, under, rows)[place]
        return Edit(self.layer, "pattern", self.head, lambda old, run: pattern[:, self.head])


@dataclass(frozen=True)
class Intervention:
    """A named set of edits on `heads`, (layer, head)."""

    name: str
    heads: tuple[Head, ...]
    edits: tuple[Edit, ...]

    def __add__(self, other: Intervention) -> Intervention:
        """Both, this one's edits first where they meet at the same activation."""
        heads = self.heads + tuple(head for head in other.heads if head not in self.heads)
        return Intervention(f"{self.name} + {other.name}", heads, self.edits + other.edits)

    @property
    def first_layer(self) -> int:
        """The lowest layer it touches: what lies below is as in the clean run."""
        return min(edit.layer for edit in self.edits)

    def at_outputs(self, layer: int) -> bool:
        """Whether it changes heads' outputs in that layer and nothing before them."""
        return all(type(edit) is Edit and edit.point == "z" for edit in self.edits if edit.layer == layer)

    def of(self, head: Head) -> Intervention:
        """The edits of one head alone."""
        return replace(self, heads=(head,), edits=tuple(e for e in self.edits if (e.layer, e.head) == head))

    def limited(
        self,
        *,
        coefficient: float = 1.0,
        rows: NDArray[np.bool_] | None = None,
        positions: NDArray[np.bool_] | None = None,
        subspace: torch.Tensor | None = None,
    ) -> Intervention:
        """The same, in part. `coefficient`: 0 (clean) to 1 (whole). `rows`: [rows]; `positions`: [rows, pos], or [pos]
        for every row: for a pattern or an output the query's position, for a key the key's. `subspace`: [d_head, k]
        with orthonormal columns, for queries, keys and outputs.

        Raises UserError for a coefficient outside 0 to 1, or a subspace of a pattern.
        """
        if not 0.0 <= coefficient <= 1.0:
            raise UserError(f"a coefficient of {coefficient} is not between 0 (clean) and 1 (the whole intervention)")
        if subspace is not None and any(edit.point == "pattern" for edit in self.edits):
            raise UserError(f"'{self.name}' edits a pattern, which has no subspace: use a query, key or output")
        amount = Amount(coefficient, _mask(rows, positions), subspace)
        return replace(self, edits=tuple(replace(edit, amount=amount) for edit in self.edits))


def _mask(rows: NDArray[np.bool_] | None, positions: NDArray[np.bool_] | None) -> torch.Tensor | None:
    """Both limits as one [rows, pos] mask (a size of 1 where one side sets no limit)."""
    if rows is None and positions is None:
        return None
    mask = np.ones((1, 1), dtype=bool) if positions is None else np.atleast_2d(positions)
    if rows is not None:
        mask = mask & rows[:, None]
    return torch.from_numpy(mask)


# --- applying it ---


@contextmanager
def applied(model: Model, intervention: Intervention | None, rows: slice = slice(None)) -> Iterator[None]:
    """Hold the intervention in place for the length of a `with` block; None leaves the model clean.

    Every forward pass in the block must run the `rows` (of those the intervention was made for) that are named here.
    """
    hooks = [] if intervention is None else hooks_of(intervention, rows)
    _check_shown(model, [name for name, _ in hooks])
    with model.bridge.hooks(fwd_hooks=hooks), warnings.catch_warnings():
        warnings.filterwarnings("error", message=DISCARDED)
        try:
            yield
        except UserWarning as warning:
            raise UserError(
                f"'{model.name}' ignores the intervention '{intervention.name if intervention else ''}': {warning}"
            ) from None


def _check_shown(model: Model, names: Iterable[str]) -> None:
    """Raise UserError for the name of a hook point that the model has not."""
    shown = model.bridge.hook_dict
    for name in names:
        if name not in shown:
            raise UserError(f"'{model.name}' has no {name}: TransformerLens does not show it on this architecture")


def hooks_of(intervention: Intervention, rows: slice = slice(None)) -> list[Hook]:
    """The intervention as (hook name, function) for `bridge.hooks`: readers first, then one writer per hook point."""
    ready = [edit.ready(rows) for edit in intervention.edits]
    by_point: dict[tuple[int, str], list[Edit]] = defaultdict(list)
    for edit in ready:
        by_point[edit.layer, edit.point].append(edit)
    runs = {layer: Run(rows) for layer, _ in by_point}
    wanted = {(edit.layer, point) for edit in ready for point in edit.reads}
    writers = [
        (hook_name(layer, point), _writer(edits, runs[layer])) for (layer, point), edits in sorted(by_point.items())
    ]
    # A reader comes after the writers of its own point: what is read is what the rest of the layer sees.
    return writers + [(hook_name(layer, point), _reader(point, runs[layer])) for layer, point in sorted(wanted)]


def _writer(edits: Sequence[Edit], run: Run) -> Callable[..., torch.Tensor]:
    def write(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        edited = activation.clone()
        for edit in edits:
            edit.write(edited, run)
        return edited

    return write


def _reader(point: str, run: Run) -> Callable[..., None]:
    def read(activation: torch.Tensor, hook: Any) -> None:
        run.seen[point] = activation

    return read


# --- an MLP by itself ---


def has_lone_mlp(block: Any) -> bool:
    """Whether a block has a norm and an MLP after its attention, and the MLP asks for nothing but what the norm gives
    (Bloom's is given the residual stream too, and adds to it itself)."""
    if not (hasattr(block, "ln2") and hasattr(block, "mlp")):
        return False
    asked = inspect.signature(block.mlp.original_component.forward).parameters.values()
    return sum(one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD for one in asked) <= 1


def mlp_output(block: Any, middle: torch.Tensor) -> torch.Tensor:
    """What the block's MLP makes of the residual stream after attention, [..., d_model]."""
    out = block.mlp(block.ln2(middle))
    return out[0] if isinstance(out, tuple) else out


# --- recordings ---


class Enough(Exception):
    """Raised when everything wanted was seen, to leave the forward pass there."""


def record(
    model: Model,
    tokens: Ints,
    wanted: set[tuple[int, str]],
    under: Intervention | None = None,
    rows: slice = slice(None),
) -> dict[tuple[int, str], torch.Tensor]:
    """The (layer, point) activations of one forward pass over [rows, pos] ids, left after the last layer wanted.

    `rows` are the ids' rows among those that `under` was made for.
    """
    found: dict[tuple[int, str], torch.Tensor] = {}
    _check_shown(model, [hook_name(*place) for place in wanted])

    def keep(layer: int, point: str) -> Callable[..., None]:
        return lambda activation, hook: found.__setitem__((layer, point), activation.detach().clone())

    last = max(layer for layer, _ in wanted)
    door = "ln_final.hook_in" if last == model.n_layers - 1 else hook_name(last + 1, "resid_pre")
    with applied(model, under, rows), model.bridge.hooks(fwd_hooks=[(hook_name(*at), keep(*at)) for at in wanted]):
        run_until(model, tokens, door)
    missing = wanted - set(found)
    if missing:
        layer, point = min(missing)
        raise UserError(f"'{model.name}' shows no {POINTS[point]} in layer {layer}: it cannot be intervened on there")
    return found


def run_until(model: Model, tokens: Ints, door: str) -> None:
    """Run [rows, pos] ids under whatever hooks are in place, and leave at the hook point `door`."""

    def leave(activation: torch.Tensor, hook: Any) -> None:
        raise Enough

    with model.bridge.hooks(fwd_hooks=[(door, leave)]), suppress(Enough):
        run_forward(model, tokens)


def run_forward(model: Model, tokens: Ints) -> torch.Tensor:
    """Logits [rows, pos, d_vocab] of [rows, pos] ids, under whatever hooks are in place."""
    ids = torch.from_numpy(tokens).to(model.bridge.cfg.device)
    with torch.no_grad():
        return model.bridge.original_model(ids, use_cache=False).logits


class Recordings:
    """A model's activations on [rows, pos] ids, recorded when asked for and kept; clean, or `under` an intervention."""

    def __init__(self, model: Model, tokens: Ints, *, batch_size: int = 8, under: Intervention | None = None):
        self.model = model
        self.tokens = tokens
        self.batch_size = batch_size
        self._under = under
        self._kept: dict[tuple[int, str], torch.Tensor] = {}

    def get(self, layer: int, point: str) -> torch.Tensor:
        """[rows, ...] of one point; see `POINTS`. Columns are heads (key-value heads for k and v)."""
        self.fetch({(layer, point)})
        return self._kept[layer, point]

    def fetch(self, wanted: set[tuple[int, str]]) -> None:
        """Record all (layer, point) in one pass over the rows: cheaper than one by one."""
        missing = wanted - set(self._kept)
        if not missing:
            return
        parts = []
        for start in range(0, len(self.tokens), self.batch_size):
            rows = slice(start, start + self.batch_size)
            parts.append(record(self.model, self.tokens[rows], missing, self._under, rows))
        for place in missing:
            self._kept[place] = torch.cat([part[place] for part in parts])
