"""What a head's attention to its targets does to the prediction by itself, past all later layers.

1. Run clean. For each head, take its output with and without its target cells (the pattern renormalised), the values as
   they are.
2. Put the difference, through W_O, into the final residual stream at the reads; everything else stays clean.
3. Recompute the final norm and the unembedding there: exact, not the linear approximation of direct logit attribution.

The direct effect is the clean value minus the value without the cells: above 0, the head's attention to its targets
raises the right token. It says what a head writes, where forbidding the cells in the whole model says what is missed
when it is gone; heads that cover for each other show in the first and not in the second (path head -> logits; Wang et
al. 2022, arXiv 2211.00593; McGrath et al. 2023, arXiv 2307.15771, on self-repair).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from common.heads.statistics import Floats, Ints
from common.heads.tokens import Cells, TokenBatch
from common.interventions.bench import Reads
from common.interventions.edits import Head, Recordings, run_forward
from common.interventions.interventions import check_same, check_values, without_cells, written
from common.loading.models import Model

AT_ONCE = 1 << 24  # logits held in memory at once


@dataclass(frozen=True)
class DirectEffect:
    """Per row and head, [rows, heads], the mean over the row's reads: `log_prob` of the right token, in nats, and its
    `logit` less the mean logit of all tokens. Higher: the head's target cells raise it. NaN: a row without a read."""

    log_prob: Floats
    logit: Floats


def direct_effect(
    model: Model,
    batch: TokenBatch,
    reads: Reads,
    heads: Sequence[Head],
    *,
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda rows: None,
) -> DirectEffect:
    """The direct effect of each head's prefix-matching cells at the reads. `advance` is told of finished rows.

    Costs an unembedding per read and head; `direct_logit_effect` gives the logits alone for a fraction of that, enough
    to choose the heads worth it. Raises UserError for a model whose logits are not an unembedding of its normed
    residual stream, or whose heads' outputs do not reach that stream as they are.
    """
    found = np.full((2, len(reads.row), len(heads)), np.nan)
    for part in _parts(model, batch, reads, heads, batch_size, advance):
        at_once = max(1, AT_ONCE // (len(part.token) * model.bridge.cfg.d_vocab))
        clean = _judge(model, part.stream[:, None], part.token)
        for start in range(0, len(heads), at_once):
            some = slice(start, start + at_once)
            lost = clean - _judge(model, part.stream[:, None] + part.moves[:, some], part.token)
            found[:, part.which, some] = lost.double().cpu().numpy()
    log_prob, logit = (_row_means(reads, values, len(batch.tokens)) for values in found)
    return DirectEffect(log_prob, logit)


def direct_logit_effect(
    model: Model,
    batch: TokenBatch,
    reads: Reads,
    heads: Sequence[Head],
    *,
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda rows: None,
) -> Floats:
    """`DirectEffect.logit` alone, [rows, heads]: projected on the right token's direction, with no logits of others."""
    found = np.full((len(reads.row), len(heads)), np.nan)
    for part in _parts(model, batch, reads, heads, batch_size, advance):
        clean = _centred_logit(model, part.stream[:, None], part.token)
        lost = clean - _centred_logit(model, part.stream[:, None] + part.moves, part.token)
        found[part.which] = lost.double().cpu().numpy()
    return _row_means(reads, found, len(batch.tokens))


# --- reading the final stream ---


def _judge(model: Model, stream: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Log-probability and centred logit of `token` [reads], from the final stream [reads, heads, d_model]:
    [2, reads, heads]."""
    logits = _readout(model, stream).float()
    right = logits.gather(-1, token[:, None, None].expand(-1, stream.shape[1], -1))[..., 0]
    return torch.stack([right - logits.logsumexp(-1), right - logits.mean(-1)])


def _readout(model: Model, stream: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.bridge.unembed(model.bridge.ln_final(stream))


def _centred_logit(model: Model, stream: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Logit of `token` [reads] less the mean over all tokens, from the final stream [reads, heads, d_model]."""
    weights, bias = model.bridge.W_U, model.bridge.b_U  # [d_model, d_vocab], [d_vocab]
    with torch.no_grad():
        direction = weights[:, token] - weights.mean(-1, keepdim=True)
        projected = torch.einsum("nhm,mn->nh", model.bridge.ln_final(stream), direction)
        return projected + (bias[token] - bias.mean())[:, None]


def _row_means(reads: Reads, values: Floats, rows: int) -> Floats:
    """[reads, heads] to [rows, heads]."""
    return np.stack([reads.row_means(column, rows) for column in values.T], axis=1)


# --- what forbidding the cells moves ---


@dataclass(frozen=True)
class _Part:
    """Of a group of rows: its reads, the clean final stream there [reads, d_model], the right token [reads], and
    what each head writes less with its cells forbidden, [reads, heads, d_model]."""

    which: Ints
    stream: torch.Tensor
    token: torch.Tensor
    moves: torch.Tensor


def _parts(
    model: Model,
    batch: TokenBatch,
    reads: Reads,
    heads: Sequence[Head],
    batch_size: int,
    advance: Callable[[int], None],
) -> Iterator[_Part]:
    """The groups of rows that have a read, one after another."""
    _check_readout(model, batch.tokens[:1])
    for start in range(0, len(batch.tokens), batch_size):
        rows = batch.rows(start, start + batch_size)
        which = np.flatnonzero((reads.row >= start) & (reads.row < start + batch_size))
        if len(which):
            places = reads.row[which] - start, reads.position[which]
            yield _part(Recordings(model, rows.tokens, batch_size=batch_size), rows, reads, which, places, heads)
        advance(len(rows.tokens))


def _part(
    clean: Recordings,
    rows: TokenBatch,
    reads: Reads,
    which: Ints,
    places: tuple[Ints, Ints],
    heads: Sequence[Head],
) -> _Part:
    last = (clean.model.n_layers - 1, "resid_post")
    points = {(layer, point) for layer, _ in heads for point in ("pattern", "v", "z", "o", "attn_out")}
    clean.fetch(points | {last})
    moves = [_move(clean, head, rows.cells["prefix_matching"], places) for head in heads]
    stream = clean.get(*last)[places]
    token = torch.from_numpy(reads.token[which]).to(stream.device)
    return _Part(which, stream, token, torch.stack(moves, 1))


def _move(clean: Recordings, head: Head, cells: Cells, places: tuple[Ints, Ints]) -> torch.Tensor:
    """What a head writes without the cells minus what it writes with them, [reads, d_model]."""
    pattern, values = check_values(clean, head)
    row, query, key = (torch.from_numpy(index) for index in (cells.row, cells.query, cells.key))
    less = (without_cells(pattern, row, query, key) - pattern) @ values
    return written(clean, head, less[places])


def check_direct(model: Model, tokens: Ints) -> None:
    """Raise UserError unless what a head writes reaches the final stream as it is, and the logits are an unembedding of
    the normed final stream. Looks at one run of [rows, pos] ids."""
    _check_readout(model, tokens)
    clean = Recordings(model, tokens)
    points = ("resid_pre", "resid_post", "pattern", "v", "z", "o", "attn_out", "mlp_out")
    clean.fetch({(layer, point) for layer in range(model.n_layers) for point in points})
    for layer in range(model.n_layers):
        output = clean.get(layer, "z")
        for head in range(model.n_heads):
            check_values(clean, (layer, head))
        heads = [written(clean, (layer, head), output[:, :, head]) for head in range(model.n_heads)]
        summed = torch.stack(heads).sum(0)
        bias = (clean.get(layer, "o") - summed)[:1, :1]
        check_same(summed + bias, clean.get(layer, "o"), f"layer {layer} writes more than its heads' outputs")
        after = torch.stack([clean.get(layer, point) for point in ("resid_pre", "attn_out", "mlp_out")]).sum(0)
        complaint = f"layer {layer} adds to the residual stream something else than its attention and its MLP put out"
        check_same(after, clean.get(layer, "resid_post"), complaint)


def _check_readout(model: Model, tokens: Ints) -> None:
    stream = Recordings(model, tokens).get(model.n_layers - 1, "resid_post")
    complaint = f"'{model.name}' does something else between its last block and its logits than norm and unembed"
    check_same(_readout(model, stream), run_forward(model, tokens), complaint)
