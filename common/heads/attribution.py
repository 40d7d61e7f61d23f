"""What a head does to the token it attends to: three measures, from what happens to what the weights say.

"Because it attends to its targets" means: the pattern as it is, less the pattern with the target cells forbidden and
the row renormalised. The correct token is the one that induction predicts, its logit is taken above the mean logit.

1. Total effect: the change of the correct token's logit, through all later layers, because a head attends to its
   targets. To first order in the pattern (attribution patching: Nanda 2023; Syed et al. 2023, arXiv 2310.10348), so one
   backward pass measures all heads. Heads that act through later heads show here and not in the direct effect.
2. Direct effect: the part of it that goes straight into the last residual stream, through the final norm with its scale
   frozen (direct logit attribution: Elhage et al. 2021; Wang et al. 2022, arXiv 2211.00593).
3. OV copying, from weights alone: the full OV circuit takes a token that is attended to into logits. Its eigenvalues
   are positive where tokens raise themselves; the score is their sum over the sum of their sizes (Elhage et al. 2021,
   "A Mathematical Framework for Transformer Circuits", Summarizing OV/QK matrices). The token enters as the layer
   really reads it: the residual stream after block 0 on the row (BOS, token), through the layer's own norm; in layer 0
   the embedding itself. A constant that all tokens share is taken off.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from einops import einsum
from numpy.typing import NDArray

from common import UserError
from common.attention.batching import in_batches
from common.heads.direct import check_direct
from common.heads.statistics import Floats
from common.heads.tokens import Cells, TokenBatch, continuing
from common.interventions.interventions import without_cells
from common.loading.models import Model, read

CHECKED = 16  # tokens that the direct path is checked on
SAMPLE = 2048  # tokens of the vocabulary that OV copying is measured on


def total_effect(
    model: Model, batch: TokenBatch, *, batch_size: int, advance: Callable[[int], None] = lambda rows: None
) -> Floats:
    """Total effect of attending to the targets on the correct token's logit, [rows, layers, heads], in nats.

    Mean over the tokens of a row that continue a repeat; NaN for a row that has none. Positive: raises the token.
    Raises UserError where the model shows other patterns than it uses.
    """
    return _in_parts(_total_effect_at_once, model, batch, batch_size, advance)


def direct_effect(
    model: Model, batch: TokenBatch, *, batch_size: int, advance: Callable[[int], None] = lambda rows: None
) -> Floats:
    """The direct part of the total effect, [rows, layers, heads], in nats; NaN for a row without a repeat.

    Raises UserError where something stands between heads and final stream, or final stream and logits.
    """
    check_direct(model, batch.tokens[:1, :CHECKED])
    return _in_parts(_direct_effect_at_once, model, batch, batch_size, advance)


def ov_copying(model: Model) -> Floats:
    """Copying score of every head's OV circuit, [layers, heads], from -1 (suppresses what it reads) to 1 (copies).

    Raises UserError where something stands between heads and final stream, or final stream and logits.
    """
    check_direct(model, np.array([[model.bos, *model.ordinary()[: CHECKED - 1]]])[:, : model.context])
    tokens = model.ordinary()
    tokens = tokens[np.unique(np.linspace(0, len(tokens) - 1, min(SAMPLE, len(tokens))).astype(int))]
    stream = _token_streams(model, tokens)
    outwards = _centred_unembedding(model)[torch.from_numpy(tokens)]  # [tokens, d_model]
    scores = np.zeros((model.n_layers, model.n_heads))
    with torch.inference_mode():
        for layer, block in enumerate(model.bridge.blocks):
            inwards = block.ln1(stream[min(layer, 1)][None])[0].float()
            inwards = inwards - inwards.mean(0)
            values = _per_query_head(block.attn.W_V, model.n_heads)
            for head in range(model.n_heads):
                circuit = block.attn.W_O[head].float() @ (outwards.T @ (inwards @ values[head].float()))
                scores[layer, head] = copying_score(circuit.double().cpu().numpy())
    return scores


def copying_score(circuit: Floats) -> float:
    """Sum of the eigenvalues over the sum of their sizes, in [-1, 1]; 0 for a circuit that does nothing."""
    eigenvalues = np.linalg.eigvals(circuit)
    size = np.abs(eigenvalues).sum()
    return float(eigenvalues.sum().real / size) if size > 1e-12 else 0.0


def _due_to(pattern: torch.Tensor, cells: Cells) -> torch.Tensor:
    """The pattern [batch, head, query, key] less the pattern with `cells` forbidden in every head."""
    row, query, key = (torch.from_numpy(index).to(pattern.device) for index in (cells.row, cells.query, cells.key))
    return pattern - without_cells(pattern.movedim(1, 3), row, query, key).movedim(3, 1)


def _in_parts(
    measure: Callable[[Model, TokenBatch], Floats],
    model: Model,
    batch: TokenBatch,
    batch_size: int,
    advance: Callable[[int], None],
) -> Floats:
    parts = in_batches(lambda rows: measure(model, batch.rows(*rows)), len(batch.tokens), batch_size, advance)
    return np.concatenate(parts)


def _total_effect_at_once(model: Model, batch: TokenBatch) -> Floats:
    """[rows, layers, heads]: each pattern's gradient times what the targets make of it, in one backward pass."""
    row, position = np.nonzero(continuing(batch))
    patterns: dict[int, torch.Tensor] = {}

    def begin(stream: torch.Tensor, hook: Any) -> torch.Tensor:
        return stream.detach().requires_grad_()

    def keep(pattern: torch.Tensor, hook: Any) -> None:
        if pattern.requires_grad:  # the tensor the layer uses: some families show it when it has been used already
            pattern.retain_grad()
        patterns[int(hook.name.split(".")[1])] = pattern

    hooks: list[tuple[str, Callable[..., Any]]] = [("blocks.0.hook_in", begin)]
    hooks += [(f"blocks.{layer}.attn.hook_pattern", keep) for layer in range(model.n_layers)]
    hooks += [("unembed.hook_in", _only(row, position - 1))]
    with torch.enable_grad(), model.bridge.hooks(fwd_hooks=hooks):
        logits = model.bridge.original_model(_ids(model, batch.tokens), use_cache=False).logits[0].float()
        correct = logits.gather(1, _ids(model, batch.tokens[row, position])[:, None])[:, 0]
        share = 1.0 / np.bincount(row, minlength=len(batch.tokens))[row]
        ((correct - logits.mean(1)) * torch.from_numpy(share).to(logits)).sum().backward()
    effects = np.full((len(batch.tokens), model.n_layers, model.n_heads), np.nan)
    for layer, pattern in patterns.items():
        if pattern.grad is None:
            raise UserError(
                f"the pattern that '{model.name}' shows in layer {layer} is not the one it uses: what its heads do "
                "cannot be measured, so no verdict can be given"
            )
        due = _due_to(pattern.detach(), batch.cells["prefix_matching"])
        effects[:, layer] = (pattern.grad * due).sum((2, 3)).double().cpu().numpy()
    effects[np.bincount(row, minlength=len(effects)) == 0] = np.nan
    return effects


def _only(row: NDArray[np.int64], position: NDArray[np.int64]) -> Callable[[torch.Tensor, Any], torch.Tensor]:
    """A hook that unembeds these places alone, as one row: the vocabulary is wide and few logits are read."""
    places = torch.from_numpy(row), torch.from_numpy(position)
    return lambda stream, hook: stream[places][None]


def _ids(model: Model, tokens: NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(tokens).to(model.bridge.cfg.device)


def _direct_effect_at_once(model: Model, batch: TokenBatch) -> Floats:
    """[rows, layers, heads], in one forward pass."""
    row, position = np.nonzero(continuing(batch))
    queries = torch.from_numpy(row), torch.from_numpy(position - 1)
    correct = _centred_unembedding(model)[torch.from_numpy(batch.tokens[row, position])]  # [repeats, d_model]
    effects = torch.zeros((len(row), model.n_layers, model.n_heads))
    values: dict[int, torch.Tensor] = {}
    scale: list[torch.Tensor] = []

    def keep_values(layer: int, shown: torch.Tensor) -> None:
        values[layer] = _per_query_head(shown.float().transpose(1, 2), model.n_heads, axis=1)

    def add(layer: int, pattern: torch.Tensor) -> None:
        due = _due_to(pattern, batch.cells["prefix_matching"]).float()
        written = (due @ values.pop(layer))[queries[0], :, queries[1]]
        out = model.bridge.blocks[layer].attn.W_O.float()
        read_off = einsum(correct, out, "repeat d_model, head d_head d_model -> repeat head d_head")
        effects[:, layer] = (written * read_off).sum(-1).cpu()

    readers: dict[str, Callable[[torch.Tensor], None]] = {"ln_final.hook_scale": scale.append}
    for layer in range(model.n_layers):
        readers[f"blocks.{layer}.attn.hook_v"] = partial(keep_values, layer)
        readers[f"blocks.{layer}.attn.hook_pattern"] = partial(add, layer)
    read(model, batch.tokens, readers, last="ln_final.hook_scale")
    effects /= scale[0][queries[0], queries[1]].float().cpu().reshape(-1, 1, 1)
    return _mean_per_row(effects.double().numpy(), row, len(batch.tokens))


def _mean_per_row(values: Floats, row: NDArray[np.int64], rows: int) -> Floats:
    """Means [rows, ...] of the values [n, ...] that belong to each `row` [n]; NaN for a row without any."""
    sums = np.zeros((rows, *values.shape[1:]))
    np.add.at(sums, row, values)
    with np.errstate(invalid="ignore"):
        return sums / np.bincount(row, minlength=rows).astype(np.float64).reshape(-1, *[1] * (values.ndim - 1))


def _centred_unembedding(model: Model) -> torch.Tensor:
    """What raises each token's logit above the mean logit, [d_vocab, d_model], read off the last residual stream.

    The unembedding behind the final norm's weight (and centring, if it centres), but for the scale it divides by.
    """
    with torch.inference_mode():
        unembedding = model.bridge.W_U.float().T
        weight, centres = _norm_weight(model)
        read_off = (unembedding - unembedding.mean(0)) * weight
        return read_off - read_off.mean(1, keepdim=True) if centres else read_off


def _norm_weight(model: Model) -> tuple[torch.Tensor, bool]:
    """The final norm's effective weight [d_model], and whether it takes the mean off (LayerNorm does, RMSNorm not).

    Read off the norm itself by what it makes of two vectors: families differ in how they store the weight.
    """
    width = model.bridge.cfg.d_model
    ones = torch.ones(1, 1, width, device=model.bridge.cfg.device, dtype=model.bridge.W_U.dtype)
    signs = ones.clone()
    signs[..., 1::2] = -1.0
    norm = model.bridge.ln_final
    weight = (norm(signs) - norm(-signs)) / 2 * signs
    centres = bool((norm(ones) - norm(-ones)).abs().max() < 1e-3)
    return weight.float().reshape(-1), centres


def _per_query_head(per_key_head: torch.Tensor, heads: int, axis: int = 0) -> torch.Tensor:
    """Repeat what key heads share along `axis` so that every query head has its own."""
    return per_key_head.repeat_interleave(heads // per_key_head.shape[axis], dim=axis)


def _token_streams(model: Model, tokens: NDArray[np.int64]) -> list[torch.Tensor]:
    """The residual stream of each token alone after BOS, [tokens, d_model]: entering block 0, and leaving it."""
    rows = np.stack([np.full_like(tokens, model.bos), tokens], axis=1)
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(min(2, model.n_layers))]
    shown: dict[str, torch.Tensor] = {}
    read(model, rows, {name: partial(shown.__setitem__, name) for name in names}, last=names[-1])
    return [shown[name][:, 1] for name in names]
