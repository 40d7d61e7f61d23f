"""Scores of every head, summed as the forward pass goes by: no pattern is kept, no logits are computed.

1. Run the model. The door shows each layer's pattern some queries at a time (common/attention/call.py).
2. Of each block read the cells of all head types at once, add them up per query, then per row, on the model's device.
3. Leave the forward pass in the last layer: what follows (its output, the unembedding) is not needed.

Sums are kept in float64 (but on devices without it) with their counts and divided once, so neither the batch size nor
the blocks change a score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from common.attention.batches import Advance, in_batches
from common.heads.statistics import Floats, Ints, RowSums
from common.heads.tokens import BUDGET, Battery, Cells, TokenBatch

if TYPE_CHECKING:
    from common.attention.call import Call
    from common.loading.model import Model


@dataclass(frozen=True)
class HeadScores:
    """Per head type, and per part of the attention budget, the attention that a query pays to its cells: `sums` holds
    its sums per row, [rows, layers, heads], and `chance` the score of a head that attends uniformly."""

    sums: dict[str, RowSums]
    chance: dict[str, float]

    def mean(self, head_type: str) -> Floats:
        """[layers, heads], each in [0, 1]; NaN where no query has a cell."""
        return self.sums[head_type].mean()

    def std(self, head_type: str) -> Floats:
        """Standard deviation over queries, [layers, heads]; NaN where no query has a cell."""
        return self.sums[head_type].std()

    def budget(self) -> dict[str, Floats]:
        """What a query with a target pays to each part of `BUDGET`, [layers, heads] each; the parts sum to 1."""
        queries = self.sums["prefix_matching"].counts.sum()
        parts: dict[str, Floats] = {"targets": self.mean("prefix_matching")}
        for part in BUDGET[1:-1]:
            parts[part] = self.sums[f"budget_{part}"].sums.sum(0) / queries
        return {**parts, "other": 1.0 - np.sum(list(parts.values()), axis=0)}

    def __add__(self, other: HeadScores) -> HeadScores:
        """The scores of both lots of rows; `chance` is that of the first."""
        return HeadScores({kind: sums + other.sums[kind] for kind, sums in self.sums.items()}, self.chance)


def score(model: Model, batch: TokenBatch, *, batch_size: int, advance: Advance = lambda rows: None) -> HeadScores:
    """Score every head of every layer on every head type; `advance` is told of each finished group of rows.

    `batch.tokens`: [rows, pos] ids, at most `model.context` long.
    """
    parts = in_batches(lambda rows: _score_at_once(model, batch.rows(*rows)), len(batch.tokens), batch_size, advance)
    sums, squares = (np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True))
    summed = {}
    for kind, cells, its_sums, its_squares in zip(batch.cells, batch.cells.values(), sums, squares, strict=True):
        counts = np.bincount(cells.group_row, minlength=len(batch.tokens))
        summed[kind] = RowSums(its_sums, its_squares, counts)
    return HeadScores(summed, {kind: cells.chance() for kind, cells in batch.cells.items()})


def score_battery(
    model: Model, drawn: Battery, *, batch_size: int, advance: Advance = lambda rows: None
) -> tuple[HeadScores, HeadScores]:
    """Scores of every head on rows with a repeat and on their controls, which are read at the same cells."""
    repeats = score(model, drawn.repeats, batch_size=batch_size, advance=advance)
    return repeats, score(model, drawn.controls, batch_size=batch_size, advance=advance)


def per_query(model: Model, batch: TokenBatch, *, batch_size: int) -> Floats:
    """What each query with a target pays to its targets, [queries, layers, heads]; by row, then by query."""

    def at_once(rows: tuple[int, int]) -> Floats:
        part = batch.rows(*rows)
        cells = part.cells["prefix_matching"]
        every = np.arange(len(cells.group_row))
        return _summed(model, part.tokens, _CellsByQuery.of(model, part, [cells], [every]), len(every))[0]

    return np.concatenate(in_batches(at_once, len(batch.tokens), batch_size))


def patterns(model: Model, tokens: Ints, wanted: Sequence[tuple[int, int | None]]) -> list[Floats]:
    """The attention patterns on one row of ids that `wanted` names, each [query, key].

    A wanted (layer, head) is that head's pattern, (layer, None) the mean over the heads of the layer.
    """
    kept: dict[tuple[int, int | None], Floats] = {}

    def keep(layer: int, call: Call) -> None:
        pattern = call.pattern()[0]
        for at, head in wanted:
            if at == layer:
                kept[at, head] = (pattern.mean(0) if head is None else pattern[head]).double().cpu().numpy()

    model.read(tokens[None], keep, sorted({layer for layer, _ in wanted}))
    return [kept[which] for which in wanted]


def every_pattern(model: Model, tokens: Ints, places: Sequence[int]) -> Floats:
    """The patterns of all heads on one row of ids at the chosen positions, [layers, heads, place, place]."""
    found = np.zeros((model.n_layers, model.n_heads, len(places), len(places)))
    rows, columns = np.ix_(places, places)

    def keep(layer: int, call: Call) -> None:
        found[layer] = call.pattern()[0, :, rows, columns].double().cpu().numpy()

    model.read(tokens[None], keep)
    return found


def _score_at_once(model: Model, batch: TokenBatch) -> tuple[Floats, Floats]:
    """Sums and squares, [head types, rows, layers, heads] each, in one forward pass."""
    rows = len(batch.tokens)
    kinds = list(batch.cells.values())
    totals = [number * rows + cells.group_row for number, cells in enumerate(kinds)]
    sums, squares = _summed(model, batch.tokens, _CellsByQuery.of(model, batch, kinds, totals), len(kinds) * rows)
    shape = (len(kinds), rows, *sums.shape[1:])
    return sums.reshape(shape), squares.reshape(shape)


@dataclass(frozen=True)
class _CellsByQuery:
    """Cells of any kinds in the order of their queries, so that those of a block of queries lie side by side.

    `cells`: row, query, key and group of each, [4, cells]; a group is the cells of one kind that one query has.
    `total`: [groups], the number of the sum that each goes to.
    Before query i come `cells_before[i]` cells and `groups_before[i]` groups.
    """

    cells: torch.Tensor
    total: torch.Tensor
    cells_before: Ints
    groups_before: Ints

    @classmethod
    def of(cls, model: Model, batch: TokenBatch, kinds: Sequence[Cells], totals: Sequence[Ints]) -> _CellsByQuery:
        """The cells of all kinds, with the sums that the groups of each kind go to; on the model's device."""
        offsets = np.cumsum([0, *(len(cells.group_row) for cells in kinds)])
        group = np.concatenate([cells.group + offset for cells, offset in zip(kinds, offsets, strict=False)])
        row, query, key = (np.concatenate([getattr(cells, of) for cells in kinds]) for of in ("row", "query", "key"))
        query_of_group = np.zeros(offsets[-1], dtype=np.int64)
        query_of_group[group] = query
        groups = np.argsort(query_of_group, kind="stable")
        group = np.argsort(groups)[group]
        cells = np.argsort(group, kind="stable")
        every = np.arange(batch.tokens.shape[1] + 1)
        return cls(
            cells=torch.from_numpy(np.stack([row, query, key, group])[:, cells]).to(model.device),
            total=torch.from_numpy(np.concatenate(totals)[groups]).to(model.device),
            cells_before=np.searchsorted(query[cells], every),
            groups_before=np.searchsorted(query_of_group[groups], every),
        )

    def paid(self, pattern: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the queries of a block from `start` on pay to their cells, [groups, heads], and their totals [groups].

        `pattern`: [batch, head, queries, keys].
        """
        stop = start + pattern.shape[2]
        row, query, key, group = self.cells[:, self.cells_before[start] : self.cells_before[stop]]
        first, last = self.groups_before[start], self.groups_before[stop]
        read = pattern[row, :, query - start, key].to(_exact(pattern.device))
        paid = read.new_zeros(last - first, pattern.shape[1]).index_add_(0, group - first, read)
        return paid, self.total[first:last]


def _exact(device: torch.device) -> torch.dtype:
    """What to sum in: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def _summed(model: Model, tokens: Ints, cells: _CellsByQuery, n_totals: int) -> tuple[Floats, Floats]:
    """Per total, what its queries pay to their cells, summed, and the squares of what each query pays, summed: both
    [totals, layers, heads]."""
    shape = (model.n_layers, n_totals, model.n_heads)
    sums, squares = (torch.zeros(shape, dtype=_exact(model.device), device=model.device) for _ in range(2))

    def add(layer: int, call: Call) -> None:
        for start, pattern in call.blocks():
            paid, total = cells.paid(pattern, start)
            sums[layer].index_add_(0, total, paid)
            squares[layer].index_add_(0, total, paid.square())

    model.read(tokens, add)
    total, square = (of.movedim(0, 1).double().cpu().numpy() for of in (sums, squares))
    return total, square
