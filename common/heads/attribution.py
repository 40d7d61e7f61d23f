"""What a head does to the token it attends to: three measures, from what happens to what the weights say.

"Because it attends to its targets" means: the head's output as it is, less its output with attention to the target
cells knocked out and the rest renormalised, the values as they are. The correct token is the one that induction
predicts, its logit is taken above the mean logit of all tokens.

1. Total effect: the change of the correct token's logit, through all later layers, because a head attends to its
   targets. To first order (attribution patching: Nanda 2023; Syed et al. 2023, arXiv 2310.10348): the gradient of the
   logit at the head's output times what its output owes to the targets. As sum dL/dP * dP = sum dL/dO * (dP V), one
   forward and one backward pass measure all heads, and no pattern is kept. Behind a saturated softmax or a steep MLP a
   gradient says nothing of a large change; so the effect of a head that attends notably is measured exactly: a forward
   pass with its attention to the targets knocked out.
2. Direct effect, from the same pass: the part of it that goes straight into the last residual stream, through the final
   norm with its scale frozen (direct logit attribution: Elhage et al. 2021; Wang et al. 2022, arXiv 2211.00593). Heads
   that act through later heads have a total effect and no direct one.
3. OV copying, from weights alone: the sum of the eigenvalues of the full OV circuit, from attended token to logits,
   over the sum of their sizes (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits", Summarizing
   OV/QK matrices): they are positive where tokens raise themselves. The token enters as the layer really reads it: the
   residual stream after block 0 on the row (BOS, token), through the layer's own norm; in layer 0 the embedding itself.
   A constant that all tokens share is taken off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from common import UserError
from common.attention.batches import Advance, in_batches
from common.attention.call import Edit, knocked_out
from common.attention.head import ONLY_STACK, Head, Place
from common.heads.statistics import Floats, Ints, mean_per_row
from common.heads.tokens import TokenBatch, continuing
from common.loading.families import plain, unembedding_weights

if TYPE_CHECKING:
    from common.attention.call import Call
    from common.loading.model import Model

Kept = dict[int, Tensor]  # by layer, [batch, query, head, d_head]

CHECKED = 16  # tokens that the direct path is checked on
SAMPLE = 2048  # tokens of the vocabulary that OV copying is measured on
CLOSE, CLOSE_HALF = 1e-4, 3e-2  # relative differences that are rounding, in float32 and in 16 bits


@dataclass(frozen=True)
class Attribution:
    """Effects of attending to the targets on the correct token's logit, [rows, layers, heads], in nats; above 0: raises
    it. Means over the tokens of a row that continue a repeat; NaN for a row that has none."""

    total: Floats
    direct: Floats


def attribute(model: Model, batch: TokenBatch, *, batch_size: int, advance: Advance = lambda rows: None) -> Attribution:
    """The attribution patching estimate of the total effect, and the direct effect, of every head.

    `direct` is meaningful only where `why_no_direct_path` gives None. `advance` is told of each finished group of rows.
    Raises UserError where edits do not act on this model: then what its heads put out is not what it uses.
    """
    if "edits" in model.refused:
        raise UserError(f"{model.refused['edits']}; so no verdict can be given")
    rows = len(batch.tokens)
    parts = in_batches(lambda group: _attribute_at_once(model, batch.rows(*group)), rows, batch_size, advance)
    return Attribution(*np.concatenate(parts, axis=1))


def exact_effect(model: Model, batch: TokenBatch, heads: Sequence[Head], *, batch_size: int) -> Floats:
    """The total effect of each of `heads`, not to first order, [rows, heads]: what the correct token's logit, above the
    mean logit, loses under attention knockout of the head's target cells. NaN for a row without a repeat."""

    def at_once(group: tuple[int, int]) -> Floats:
        rows = batch.rows(*group)
        cells, (row, position) = rows.cells["prefix_matching"], np.nonzero(continuing(rows))
        at, correct = (row, position - 1), torch.from_numpy(rows.tokens[row, position])

        def above_mean(logits: Tensor) -> Floats:
            return plain(logits.gather(1, correct.to(logits.device)[:, None])[:, 0] - logits.float().mean(1))

        clean, found = above_mean(model.logits(rows.tokens, at=at)), np.full((len(rows.tokens), len(heads)), np.nan)
        start: tuple[int, Tensor] | None = None
        for number in sorted(range(len(heads)), key=lambda number: heads[number].layer):
            layer = heads[number].layer  # below it all is as it was
            start = layer, model.record(rows.tokens, {(layer, "resid_pre")}, start=start)[layer, "resid_pre"]
            edit = Edit(heads[number], "scores", knocked_out(cells.row, cells.query, cells.key))
            changed = above_mean(model.logits(rows.tokens, [edit], at=at, start=start))
            found[:, number] = mean_per_row(clean - changed, row, len(rows.tokens))
        return found

    return np.concatenate(in_batches(at_once, len(batch.tokens), batch_size))


def _attribute_at_once(model: Model, batch: TokenBatch) -> Floats:
    """Total and direct effects, [2, rows, layers, heads], in one forward and one backward pass."""
    row, position = np.nonzero(continuing(batch))
    rows = len(batch.tokens)
    total, direct = effects = np.full((2, rows, model.n_layers, model.n_heads), np.nan)
    if not len(row):
        return effects
    outputs, due_to_targets, final = _run_backwards(model, batch, row, position)
    total[row] = 0.0
    correct = _centred_unembedding(model)[torch.from_numpy(batch.tokens[row, position]).to(model.device)]
    scale = torch.from_numpy(model.parts.norm.scale(plain(final[row, position - 1])))
    for layer, parts in enumerate(model.parts.layers):
        due, slope = due_to_targets.pop(layer), outputs.pop(layer).grad
        if slope is not None:  # the last layers may reach no token that is read
            total[:, layer] += plain((slope.float() * due).sum((1, 3)))  # NaN where the row has no such token
        read_off = torch.einsum("rm,hdm->rhd", correct, parts.weights.W_O.float())
        written = (due[row, position - 1] * read_off).sum(-1).double().cpu() / scale
        direct[:, layer] = mean_per_row(written.numpy(), row, rows)
    return effects


def _run_backwards(model: Model, batch: TokenBatch, row: Ints, position: Ints) -> tuple[Kept, Kept, Tensor]:
    """Run [rows, pos] ids, and the logits of the tokens at (`row`, `position`) back to the outputs of all heads.

    By layer: the outputs of the heads, [batch, query, head, d_head], with their gradients, and the part of them that is
    due to the targets; and the last residual stream.
    """
    outputs, due, final = Kept(), Kept(), list[Tensor]()
    cells = batch.cells["prefix_matching"]
    targets = [torch.from_numpy(index).to(model.device) for index in (cells.row, cells.query, cells.key)]

    def keep(layer: int, call: Call) -> None:
        call.output.retain_grad()
        outputs[layer] = call.output
        with torch.no_grad():
            due[layer] = call.due_to(*targets)

    readers = {Place(ONLY_STACK, layer): partial(keep, layer) for layer in range(model.n_layers)}
    # Weights ask for no gradients, so the graph begins where the first block is entered.
    begin = (model.parts.layers[0].block, "input", lambda stream: stream.detach().requires_grad_())
    end = (model.parts.final_norm, "input", lambda stream: final.append(stream.detach()))
    ids, at, token = (torch.from_numpy(array).to(model.device) for array in (row, position, batch.tokens))
    with torch.enable_grad():
        logits = model.door.run({"input_ids": token}, readers=readers, taps=[begin, end], predictions=(ids, at - 1))
        assert logits is not None
        logits = logits.float()
        correct = logits.gather(1, token[ids, at][:, None])[:, 0]
        share = torch.from_numpy(1.0 / np.bincount(row, minlength=len(batch.tokens))[row]).to(logits)
        ((correct - logits.mean(1)) * share).sum().backward()
    return outputs, due, final[0]


# --- the way from a head to the logits ---


def why_no_direct_path(model: Model) -> str | None:
    """None where what a head writes reaches the final stream as it is, and the logits are an unembedding of the normed
    final stream; else the reason. Looks at one short row."""
    tokens = np.array([[model.bos, *model.ordinary()[: CHECKED - 1]]])[:, : model.context]
    try:
        check_readout(model, tokens)
        for layer in range(model.n_layers):
            _check_layer(model, tokens, layer)
    except UserError as error:
        return str(error)
    return None


def _check_layer(model: Model, tokens: Ints, layer: int) -> None:
    """Raise UserError unless a layer adds to the stream its heads' outputs, a bias and what its MLP writes alone."""
    points = ("resid_pre", "resid_post", "z", "projected", "attn_out", "mlp_out")
    seen = model.record(tokens, {(layer, name) for name in points})
    before, after, z, projected, attention, mlp = (seen[layer, name] for name in points)
    check_written(model, layer, projected, attention)
    heads = torch.einsum("rphd,hdm->rpm", z, model.parts.layers[layer].weights.W_O)
    bias = (projected - heads)[:1, :1]
    check_same(heads + bias, projected, f"layer {layer} writes more than its heads' outputs")
    complaint = f"layer {layer} adds to the residual stream something else than its attention and its MLP put out"
    check_same(before + attention + mlp, after, complaint)


def check_written(model: Model, layer: int, projected: Tensor, attn_out: Tensor) -> None:
    """Raise UserError where something stands between the output projection of a layer and the residual stream."""
    check_same(projected, attn_out, f"'{model.name}' changes what layer {layer}'s heads write before it is added")


def check_readout(model: Model, tokens: Ints) -> None:
    """Raise UserError unless the logits of [rows, pos] ids are the unembedding of the normed final stream."""
    (stream,) = model.record(tokens, {(model.n_layers - 1, "resid_post")}).values()
    complaint = f"'{model.name}' does something else between its last block and its logits than norm and unembed"
    with torch.no_grad():
        check_same(model.parts.unembedding(model.parts.final_norm(stream)), model.logits(tokens), complaint)


def check_same(one: Tensor, other: Tensor, complaint: str) -> None:
    """Raise UserError with the complaint unless both are the same up to rounding."""
    scale = other.abs().max().item() + 1e-6
    tolerance = CLOSE if one.dtype == torch.float32 else CLOSE_HALF
    if (one - other).abs().max().item() > tolerance * scale:
        raise UserError(f"{complaint}: this intervention cannot be made on its architecture")


def _centred_unembedding(model: Model) -> Tensor:
    """What raises each token's logit above the mean logit, [d_vocab, d_model], read off the last residual stream: the
    unembedding behind the final norm's gain (and centring, if it centres), but for the scale it divides by."""
    weight = unembedding_weights(model.parts)[0].float()
    norm = model.parts.norm
    read_off = (weight - weight.mean(0)) * torch.from_numpy(norm.gain).to(weight)
    return read_off - read_off.mean(1, keepdim=True) if norm.centred else read_off


# --- weights alone ---


def ov_copying(model: Model) -> Floats:
    """Copying score of every head's OV circuit, [layers, heads], from -1 (suppresses what it reads) to 1 (copies);
    meaningful only where `why_no_direct_path` gives None."""
    tokens = model.ordinary()
    tokens = tokens[np.unique(np.linspace(0, len(tokens) - 1, min(SAMPLE, len(tokens))).astype(int))]
    # The residual stream of each token alone after BOS, [tokens, d_model]: entering block 0, and leaving it.
    points = [(layer, "resid_pre") for layer in range(min(2, model.n_layers))]
    shown = model.record(np.stack([np.full_like(tokens, model.bos), tokens], axis=1), set(points))
    outwards = _centred_unembedding(model)[torch.from_numpy(tokens).to(model.device)]  # [tokens, d_model]
    scores = np.zeros((model.n_layers, model.n_heads))
    with torch.no_grad():
        for layer, parts in enumerate(model.parts.layers):
            read = shown[points[min(layer, 1)]][:, 1]
            inwards = (read if parts.attention_in is None else parts.attention_in(read)).float()
            inwards = inwards - inwards.mean(0)
            group = model.n_heads // len(parts.weights.W_V)
            for head in range(model.n_heads):
                value = inwards @ parts.weights.W_V[head // group].float()
                circuit = parts.weights.W_O[head].float() @ (outwards.T @ value)
                scores[layer, head] = copying_score(circuit.double().cpu().numpy())
    return scores


def copying_score(circuit: Floats) -> float:
    """Sum of the eigenvalues over the sum of their sizes, in [-1, 1]; 0 for a circuit that does nothing."""
    eigenvalues = np.linalg.eigvals(circuit)
    size = np.abs(eigenvalues).sum()
    return float(eigenvalues.sum().real / size) if size > 1e-12 else 0.0
