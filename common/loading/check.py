"""The self-check of a loaded model: what the door shows is its attention, and an edit made there acts and is undone.

1. Every layer of TransformerLens' bridge must show a pattern whose rows sum to 1 and which never attends ahead. All
   weights and the logits must be finite.
2. The door's patterns on the same row must be the bridge's. The row is longer than any window or period that the
   configuration names: on a short row a forgotten window shows in no pattern. Windows of thousands of tokens are set to
   `SHORT` for the check, in both, because a row as long as they are would take minutes.
3. An edit of a head's output must reach the projection behind it, and the logits of the run after it must be those of
   the run before it, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common import UserError
from common.attention.call import Call, Edit
from common.attention.head import Head

if TYPE_CHECKING:
    from transformer_lens.hook_points import HookPoint

    from common.loading.model import Model

AGREES, AGREES_HALF = 1e-5, 5e-2  # largest difference between two ways to a pattern, in float32 and in 16 bits
SCORE_ROUNDINGS = 8  # roundings of its own precision that a score may differ by
NO_ROUNDING = 0.25  # of all attention: in 16 bits eight roundings of large scores would allow any pattern at all
LEAST_CHECKED = 32  # tokens of the checked row, where no window is named
BEYOND = 8  # tokens that the row goes on behind the longest window
MOST_CELLS = 1 << 26  # cells of one layer's whole pattern that the bridge may make: 256 MB in float32
LONG, SHORT = 500, 20  # windows longer than the first are set to the second while the check runs
PERIODS = ("window", "chunk", "local", "period", "stride", "span", "block")  # in the names of what a mask may depend on


def checked(model: Model) -> Model:
    """The model; `refused` says which of its parts cannot be edited. Raises UserError where the self-check fails."""
    with _short_windows(model):
        return _checked(model)


def _checked(model: Model) -> Model:
    tokens = _row(model)
    own = _bridge_patterns(model, tokens)
    missing = [layer for layer in range(model.n_layers) if layer not in own]
    if missing:
        raise UserError(f"'{model.name}' shows no attention pattern in layer {missing[0]}: its heads cannot be scored")
    for layer, pattern in own.items():
        if complaint := _complaint(pattern):
            raise UserError(f"'{model.name}' fails the self-check in layer {layer}: {complaint}")
    _check_finite(model, tokens)
    _compare(model, tokens, own)
    slow = _unfused(model, tokens)
    why = f"no fused attention in {len(slow)} of {model.n_layers} layers, which run block by block: each"
    notes = (*model.notes, *[f"{why} {reason}" for reason in slow[:1]])
    return replace(model, refused=_refused(model, tokens), unfused_layers=len(slow), notes=notes)


def _row(model: Model) -> NDArray[np.int64]:
    """BOS and ordinary tokens, [1, pos]."""
    periods = [value for _, _, value in _periods(model.door.network.config) if value < model.context]
    length = min(
        max([LEAST_CHECKED, *(period + BEYOND for period in periods)]),
        model.context,
        int((MOST_CELLS / model.n_heads) ** 0.5),
    )
    ordinary = model.ordinary()
    if not len(ordinary):
        raise UserError(f"the tokenizer of '{model.name}' has special tokens alone: there is nothing to read")
    spread = ordinary[np.linspace(0, len(ordinary) - 1, length - 1).astype(int)]
    return np.concatenate([[model.bos], spread])[None]


def _periods(config: object) -> Iterator[tuple[object, str, int]]:
    """The windows and periods that a configuration names, and those of its parts: where each stands, and its size."""
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            yield from _periods(value)
        elif any(word in name for word in PERIODS) and type(value) is int and value > 0:
            yield config, name, value


@contextmanager
def _short_windows(model: Model) -> Iterator[None]:
    """Windows too long for the checked row, made short in the door's network and in the bridge's for a `with` block."""
    configs = model.door.network.config, model.bridge.original_model.config
    named = [one for config in configs for one in _periods(config)]
    long = [one for one in named if "window" in one[1] and one[2] > LONG]
    try:
        for config, name, _ in long:
            setattr(config, name, SHORT)
        yield
    finally:
        for config, name, value in long:
            setattr(config, name, value)


def _bridge_patterns(model: Model, tokens: NDArray[np.int64]) -> dict[int, Tensor]:
    """What TransformerLens shows of each layer, [1, head, query, key]; layers that show nothing are left out."""
    names = {f"blocks.{layer}.attn.hook_pattern": layer for layer in range(model.n_layers)}
    found: dict[int, Tensor] = {}

    def keep(pattern: Tensor, hook: HookPoint) -> None:
        found[names[hook.name]] = pattern.detach()

    hooks = [(name, keep) for name in names if name in model.bridge.hook_dict]
    with torch.inference_mode(), model.bridge.hooks(fwd_hooks=hooks):
        model.bridge.original_model(torch.from_numpy(tokens).to(model.device), use_cache=False)
    return found


def _complaint(pattern: Tensor) -> str | None:
    """What is wrong with a pattern [batch, head, query, key], or None."""
    values = pattern.double()
    if not torch.isfinite(values).all():
        return "the attention pattern holds NaN or infinite values (damaged weights, or a dtype too small)"
    tolerance = 1e-4 if pattern.dtype == torch.float32 else 2e-2
    if torch.triu(values, diagonal=1).abs().max() > tolerance:
        return "queries attend to the future, so this is no causal language model"
    if (values.sum(-1) - 1).abs().max() > tolerance:
        return "rows of the attention pattern do not sum to 1"
    return None


def _check_finite(model: Model, tokens: NDArray[np.int64]) -> None:
    """Raise UserError unless all weights, and the logits of [batch, pos] ids, are finite."""
    weights = model.door.network.named_parameters()
    damaged = next((name for name, weight in weights if not torch.isfinite(weight).all()), None)
    if damaged:
        raise UserError(f"'{model.name}' fails the self-check: its weights {damaged} are NaN or infinite")
    if not torch.isfinite(model.logits(tokens)).all():
        raise UserError(f"'{model.name}' fails the self-check: its logits are NaN or infinite")


def _compare(model: Model, tokens: NDArray[np.int64], own: dict[int, Tensor]) -> None:
    """Raise UserError unless the door shows the bridge's patterns."""
    floor = AGREES if own[0].dtype == torch.float32 else AGREES_HALF

    def compare(layer: int, call: Call) -> None:
        off = float((call.pattern() - own[layer]).abs().max())
        # Both ways round their sums of products. Where these are large, so is the rounding, and softmax passes it on.
        rounding = SCORE_ROUNDINGS * torch.finfo(own[layer].dtype).eps * _largest_sum(call)
        allowed = max(floor, min(rounding, NO_ROUNDING))
        if not off <= allowed:
            raise UserError(
                f"'{model.name}' fails the self-check in layer {layer}: its attention and what TransformerLens shows "
                f"of it differ by {off:.1e} (allowed {allowed:.0e}), so neither is trusted"
            )

    model.read(tokens, compare)


def _unfused(model: Model, tokens: NDArray[np.int64]) -> list[str]:
    """Of each layer that no fused kernel can run, why."""
    found: list[str | None] = []
    model.read(tokens, lambda layer, call: found.append(call.unfused))
    return [reason for reason in found if reason]


def _largest_sum(call: Call) -> float:
    """The largest sum of the sizes of the products that a score is made of."""
    keys = call.k.abs().float().repeat_interleave(call.n_heads // call.k.shape[1], dim=1)
    return float((call.q.abs().float() @ keys.transpose(-1, -2)).max()) * call.scale


def _refused(model: Model, tokens: NDArray[np.int64]) -> dict[str, str]:
    """{"edits": why} where edits do not act or are not undone; else empty."""
    before = model.logits(tokens)
    for layer, parts in enumerate(model.parts.layers):
        read: list[Tensor] = []
        edit = Edit(Head.at(layer, 0), "z", lambda old, rows: old + 1.0)
        for edits in ((), (edit,)):
            tap = (parts.projection, "input", partial(_append, read))
            model.record(tokens, {(layer, "projected")}, edits, taps=[tap])
        if torch.equal(*read):
            return {
                "edits": f"'{model.name}' does not use what its heads put out in layer {layer}: no intervention acts"
            }
    if not torch.equal(model.logits(tokens), before):
        return {"edits": f"'{model.name}' gives other logits after an edit was taken back: no intervention is trusted"}
    return {}


def _append(read: list[Tensor], value: Tensor) -> None:
    read.append(value)
