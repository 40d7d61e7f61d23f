"""Scores of every head, summed as the forward pass goes by: no pattern is kept, no logits are computed.

1. Run the model. The door shows each layer's pattern some queries at a time (common/attention/call.py).
2. Of each block read the cells of all head types at once, add them up per query, then per row, on the model's device.
3. Leave the forward pass in the last layer: what follows (its output, the unembedding) is not needed.

Sums are kept in float64 (but on devices without it) with their counts and divided once, so neither the batch size nor
the blocks change a score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from common.attention.batches import Advance, in_batches
from common.heads.statistics import Floats, Ints, RowSums
from common.heads.tokens import BUDGET, Cells, TokenBatch
from common.loading.families import plain

if TYPE_CHECKING:
    from common.attention.call import Call
    from common.loading.model import Model


@dataclass(frozen=True)
class HeadScores:
    """Per head type, and per part of the attention budget, the attention that a query pays to its cells: its `sums` per
    row, [rows, layers, heads]."""

    sums: dict[str, RowSums]

    def mean(self, head_type: str) -> Floats:
        """[layers, heads], each in [0, 1]; NaN where no query has a cell."""
        return self.sums[head_type].mean()

    def budget(self) -> dict[str, Floats]:
        """What a query with a target pays to each part of `BUDGET`, [layers, heads] each; the parts sum to 1."""
        queries = self.sums["prefix_matching"].counts.sum()
        kinds = ["prefix_matching", *(f"budget_{part}" for part in BUDGET[1:-1])]
        parts = [self.sums[kind].sums.sum(0) / queries for kind in kinds]
        return dict(zip(BUDGET, [*parts, 1.0 - np.sum(parts, axis=0)], strict=True))

    def __add__(self, other: HeadScores) -> HeadScores:
        return HeadScores({kind: sums + other.sums[kind] for kind, sums in self.sums.items()})


def score(model: Model, batch: TokenBatch, *, batch_size: int, advance: Advance = lambda rows: None) -> HeadScores:
    """Score every head of every layer on every head type; `advance` is told of each finished group of rows.

    `batch.tokens`: [rows, pos] ids, at most `model.context` long.
    """
    rows = len(batch.tokens)
    parts = in_batches(lambda group: _score_at_once(model, batch.rows(*group)), rows, batch_size, advance)
    counts = [np.bincount(cells.queries()[0], minlength=rows) for cells in batch.cells.values()]
    return HeadScores(dict(zip(batch.cells, map(RowSums, np.concatenate(parts, axis=1), counts), strict=True)))


def _score_at_once(model: Model, batch: TokenBatch) -> Floats:
    """What queries pay to their cells, summed: [head types, rows, layers, heads]."""
    totals: dict[int, torch.Tensor] = {}

    def add(layer: int, start: int, paid: torch.Tensor) -> None:
        totals[layer] = totals.get(layer, 0.0) + paid.sum(2)

    _read_cells(model, batch.tokens, list(batch.cells.values()), add)
    return np.stack([plain(totals[layer]) for layer in range(model.n_layers)], 2)


def _read_cells(
    model: Model, tokens: Ints, kinds: Sequence[Cells], take: Callable[[int, int, torch.Tensor], None]
) -> None:
    """Run [rows, pos] ids and hand on what queries pay to their cells, block by block: `take(layer, first query of the
    block, paid)`, `paid` being [kinds, rows, queries, heads]."""
    kind = np.repeat(np.arange(len(kinds)), [len(cells.row) for cells in kinds])
    row, query, key = (np.concatenate([getattr(cells, of) for cells in kinds]) for of in ("row", "query", "key"))
    order = np.argsort(query, kind="stable")  # so that the cells of a block lie side by side
    before = np.searchsorted(query[order], np.arange(tokens.shape[1] + 1))  # how many cells lie before each query
    sorted_cells = torch.from_numpy(np.stack([kind, row, query, key])[:, order]).to(model.device)

    exact = {"mps": torch.float32}.get(model.device.type, torch.float64)  # which Apple's GPUs do not have

    def read(layer: int, call: Call) -> None:
        for start, pattern in call.blocks():
            _, heads, length, _ = pattern.shape
            kind, row, query, key = sorted_cells[:, before[start] : before[start + length]]
            cells = pattern[row, :, query - start, key].to(exact)
            paid = cells.new_zeros(len(kinds) * len(tokens) * length, heads)
            paid.index_add_(0, (kind * len(tokens) + row) * length + query - start, cells)
            take(layer, start, paid.view(len(kinds), len(tokens), length, heads))

    model.read(tokens, read)


def patterns(
    model: Model, tokens: Ints, wanted: Sequence[tuple[int, int | None]], places: Sequence[int] | None = None
) -> list[Floats]:
    """The attention patterns on one row of ids that `wanted` names, each [query, key], at some `places` or all.

    A wanted (layer, head) is that head's pattern, (layer, None) the mean over the heads of the layer.
    """
    kept: dict[tuple[int, int | None], Floats] = {}
    places = range(len(tokens)) if places is None else places
    rows, columns = np.ix_(places, places)

    def keep(layer: int, call: Call) -> None:
        pattern = call.pattern()[0]
        for at, head in wanted:
            if at == layer:
                kept[at, head] = plain((pattern.mean(0) if head is None else pattern[head])[rows, columns])

    model.read(tokens[None], keep, sorted({layer for layer, _ in wanted}))
    return [kept[which] for which in wanted]
