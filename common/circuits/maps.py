"""How the queries and keys of one layer meet, in maps that are checked against the model's own attention.

1. Read q and k as they meet: after bias, query-key norm and rotation, the keys of grouped-query models given to every
   query head.
2. Score every cell: scale · q·k, then the soft-cap, then the position bias (ALiBi). The pattern is the softmax over
   the keys that the layer's own mask (causal, sliding window) leaves visible, and over the head's sink if it has one.
3. Self-check: compare scores and pattern with those that attention had in the same run. A map that does not reproduce
   them is refused, with the cell that differs most.

Arrays are float64 NumPy arrays on the CPU, whatever the model computes in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from einops import einsum
from safetensors.numpy import save_file

from common import UserError
from common.attention.head import Head
from common.heads.statistics import Bools, Floats, Ints
from common.loading.families import plain

if TYPE_CHECKING:
    from common.attention.call import Call, Edit
    from common.loading.model import Model


SCORE_ERRORS = 1e-4, 2e-2  # largest error of a score or pattern: in float32, and in float16 or bfloat16
ROUNDINGS = 8  # roundings of its own precision that the model may make in a sum of products, where that is more


@dataclass(frozen=True)
class Rotation:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864): pairs of dimensions turned by an angle that grows with pos.

    `cos`, `sin`: [pos, rotated], of the first `rotated` dimensions; the others stay. Dimension i is paired with
    i + rotated / 2, or with its neighbour where `interleaved`.
    """

    cos: Floats
    sin: Floats
    interleaved: bool

    @classmethod
    def of(cls, angles: Sequence[Floats]) -> Rotation:
        """From the two arrays [pos, angles] of transformers: which columns hold the same angle shows how dimensions are
        paired."""
        sin_first = bool((angles[0][0] == 0).all())  # at position 0 nothing is turned
        cos, sin = reversed(angles) if sin_first else angles
        half = cos.shape[-1] // 2
        if np.array_equal(cos[:, :half], cos[:, half:]):
            return cls(cos, sin, interleaved=False)
        if np.array_equal(cos[:, ::2], cos[:, 1::2]):
            return cls(cos, sin, interleaved=True)
        # Every angle is there once: GPT-J, which gives sin first, turns neighbours by it, GPT-OSS the two halves.
        cos, sin = (np.repeat(part, 2, -1) if sin_first else np.tile(part, 2) for part in (cos, sin))
        return cls(cos, sin, interleaved=sin_first)

    def turn(self, vectors: Floats, places: slice = slice(None)) -> Floats:
        """`vectors` [..., pos, d_head] turned as the positions `places` turn them."""
        rotated = self.cos.shape[-1]
        turned, kept = vectors[..., :rotated], vectors[..., rotated:]
        if self.interleaved:
            across = np.stack([-turned[..., 1::2], turned[..., ::2]], -1).reshape(turned.shape)
        else:
            across = np.concatenate([-turned[..., rotated // 2 :], turned[..., : rotated // 2]], -1)
        return np.concatenate([turned * self.cos[places] + across * self.sin[places], kept], -1)


@dataclass(frozen=True)
class Rules:
    """What a layer does to q·k on its way to the pattern, in this order.

    `scale` multiplies the product; `softcap` c makes c·tanh(x / c) of it; `bias`, to be broadcast over [batch, head,
    query, key], is added; `visible` [batch, query, key] says which keys a query may see; a sink [head] takes part in
    the softmax as a key without a value; `rotation` says how positions turned q and k.
    """

    scale: float
    softcap: float | None
    bias: Floats | None
    visible: Bools
    rotation: Rotation | None
    sinks: Floats | None = None

    def scores(self, products: Floats) -> Floats:
        """What softmax gets, from scaled products [batch, head, query, key]."""
        capped = products if self.softcap is None else self.softcap * np.tanh(products / self.softcap)
        return capped if self.bias is None else capped + self.bias

    def pattern(self, scores: Floats) -> Floats:
        """Softmax over the visible keys of each query; 0 elsewhere."""
        seen = np.where(self.visible[:, None], scores, -np.inf)
        sinks = np.full((1, 1, 1, 1), -np.inf) if self.sinks is None else self.sinks.reshape(1, -1, 1, 1)
        highest = np.maximum(seen.max(-1, keepdims=True), sinks)  # taken off, as exp overflows from 710 on
        weight = np.exp(seen - highest)
        return weight / (weight.sum(-1, keepdims=True) + np.exp(sinks - highest))


@dataclass(frozen=True)
class Check:
    """Largest absolute errors of our scores and pattern against the model's."""

    scores: float
    pattern: float

    @property
    def max_abs_error(self) -> float:
        return max(self.scores, self.pattern)


@dataclass(frozen=True)
class Interaction:
    """Queries and keys of a layer, and how they meet.

    `q`, `k`: [batch, pos, head, d_head], after bias, norm and rotation, keys repeated to the query heads;
    `products`: [batch, head, query, key], scale · q·k; `scores`: the same after soft-cap and position bias (cells that
    a query may not see hold a number too: mask them with `rules.visible`); `pattern`: after softmax, in [0, 1].
    """

    layer: int
    q: Floats = field(repr=False)
    k: Floats = field(repr=False)
    products: Floats = field(repr=False)
    scores: Floats = field(repr=False)
    pattern: Floats = field(repr=False)
    rules: Rules = field(repr=False)
    check: Check


def interact(model: Model, tokens: Ints, layer: int, edits: Sequence[Edit] = ()) -> Interaction:
    """Read q and k of `layer` on [batch, pos] token ids, let them meet, and check the maps against the model.

    `edits` of queries and keys of the layer, and any edits of the layers below, hold during the run.
    Raises UserError if the layer does not exist, or if scores or pattern differ from the model's by more than 1e-4
    (float32; 2e-2 in 16 bits) and by more than the rounding of the model's own sums.
    """
    check_exists(model, layer, None)
    call, given = _see(model, tokens, layer, edits)
    rules = _rules(call, given)
    q, k = (plain(part.transpose(1, 2)) for part in (call.queries(), call.keys()))
    q = q / _within(call)  # in float64: a division in 16 bits would round once more
    products = rules.scale * dot_products(q, k)
    scores = rules.scores(products)
    pattern = rules.pattern(scores)
    allowed = _allowed(q, k, rules.scale, model.dtype)
    theirs = torch.stack([call.scores_of(head) for head in range(call.n_heads)], 1)
    both = {"pattern": (pattern, plain(call.pattern())), "score": (scores, plain(theirs))}
    errors = _errors(model, layer, both, rules.visible, allowed)
    return Interaction(layer, q, k, products, scores, pattern, rules, Check(errors["score"], errors["pattern"]))


def export(interaction: Interaction, tokens: Ints, path: Path) -> None:
    """Write q and k [pos, head, d_head] (float32) and the ids [pos] of one row to a safetensors file."""
    arrays = {"q": interaction.q[0].astype(np.float32), "k": interaction.k[0].astype(np.float32), "tokens": tokens}
    packed = {key: np.ascontiguousarray(value) for key, value in arrays.items()}  # safetensors writes memory as it lies
    save_file(packed, path, {"layer": str(interaction.layer)})


def check_exists(model: Model, layer: int | None, head: int | None) -> None:
    """Raise UserError if the layer or the head does not exist. None skips the check."""
    if layer is not None and not 0 <= layer < model.n_layers:
        raise UserError(f"{model.name} has no layer {layer}: its layers are 0 to {model.n_layers - 1}")
    if head is not None and not 0 <= head < model.n_heads:
        raise UserError(f"{model.name} has no head {head} in a layer: its heads are 0 to {model.n_heads - 1}")


def dot_products(q: Floats, k: Floats) -> Floats:
    """[batch, head, query, key] from q and k [batch, pos, head, d_head]: every query with every key, head by head."""
    # Named axes, because the best-known wrong map multiplies head with head and looks right on short texts.
    pattern = "batch query head d_head, batch key head d_head -> batch head query key"
    return einsum(torch.from_numpy(q), torch.from_numpy(k), pattern).numpy()


def largest_allowed(errors: tuple[float, float], dtype: torch.dtype) -> float:
    """Which of the `errors` counts: the first in float32 and wider, the second in 16 bits."""
    return errors[0] if dtype in (torch.float32, torch.float64) else errors[1]


# --- what the layer was called with ---


def _see(model: Model, tokens: Ints, layer: int, edits: Sequence[Edit]) -> tuple[Call, Mapping[str, object]]:
    """The call of the layer's attention, and the keyword arguments that its module got."""
    calls: list[Call] = []
    given: dict[str, object] = {}
    module = model.parts.layers[layer].attention
    # In the call q and k are rotated already, so the angles are read one step before it.
    handle = module.register_forward_pre_hook(lambda _, args, kwargs: given.update(kwargs), with_kwargs=True)
    try:
        model.read(tokens, lambda _, call: calls.append(call), [layer], edits)
    finally:
        handle.remove()
    return calls[0], given


def _rules(call: Call, given: Mapping[str, object]) -> Rules:
    visible, bias = _mask(call)
    if call.bias is not None:
        bias = plain(call.bias) + (0.0 if bias is None else bias)
    sinks = None if call.sinks is None else plain(call.sinks)
    angles = cast("Sequence[torch.Tensor] | None", given.get("position_embeddings"))
    # All rows stand at the same positions, so the angles of the first hold for all.
    rotation = None if angles is None else Rotation.of([plain(part)[0] for part in angles])
    return Rules(call.scale * _within(call), call.softcap, bias, visible, rotation, sinks)


def _within(call: Call) -> float:
    """The part of the scale that the layer has put into its queries: OPT scales those and calls attention with 1."""
    own = getattr(call.module, "scaling", None)
    return own if call.scale == 1.0 and isinstance(own, float) else 1.0


def _mask(call: Call) -> tuple[Bools, Floats | None]:
    """[batch, query, key]: which keys a query may see; and what the mask adds to the scores of those, or None."""
    visible = np.ones((len(call.q), call.q.shape[2], call.k.shape[2]), dtype=bool)
    visible = np.tril(visible) if call.causal else visible  # no mask comes where the kernel knows it is causal
    if call.mask is None:
        return visible, None
    if call.mask.dtype == torch.bool:
        return visible & call.mask[:, 0].cpu().numpy(), None
    # A mask in numbers hides a key by the lowest number of its type; the others may be ALiBi (Falcon has both in one).
    numbers = plain(call.mask)
    within = numbers > torch.finfo(call.mask.dtype).min / 2
    return visible & within[:, 0], np.where(within, numbers, 0.0)


# --- the self-check ---


def _allowed(q: Floats, k: Floats, scale: float, dtype: torch.dtype) -> float:
    # Rounding grows with the size of the terms of a sum of products, which may cancel in the score itself.
    largest = float(scale * dot_products(np.abs(q), np.abs(k)).max())
    return max(largest_allowed(SCORE_ERRORS, dtype), ROUNDINGS * torch.finfo(dtype).eps * largest)


def _errors(
    model: Model, layer: int, maps: dict[str, tuple[Floats, Floats]], visible: Bools, allowed: float
) -> dict[str, float]:
    """Largest difference of our and the model's `maps` [batch, head, query, key] in visible cells, by what they show;
    UserError with the worst cell where it is above `allowed`."""
    errors = {}
    for what, (ours, theirs) in maps.items():
        error = np.where(visible[:, None], np.abs(ours - theirs), 0.0)
        _, head, query, key = worst = tuple(int(place) for place in np.unravel_index(int(error.argmax()), error.shape))
        errors[what] = float(error[worst])
        if not errors[what] <= allowed:  # so for NaN, too, which argmax finds first
            raise UserError(
                f"layer {layer} of {model.name} is not reproduced: head {Head.at(layer, head)}, query {query}, key "
                f"{key} has the {what} {theirs[worst]:.6g} in the model and {ours[worst]:.6g} by our rules (off by "
                f"{errors[what]:.2g}, allowed {allowed:.2g}); no map of it is drawn"
            )
    return errors
