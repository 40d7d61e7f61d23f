"""Scores of every head, summed as the forward pass goes by: no pattern is kept, no logits are computed.

1. Hook the attention pattern of every layer.
2. In each hook, read the cells of each head type and add them up per row and head.
3. Leave the forward pass in the last layer's hook: what follows (its output, the unembedding) is not needed.

Sums are kept in float64 with their counts and divided once, so the batch size does not change a score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from common.models import Model, read_patterns
from common.sequences import BUDGET, Battery, Cells, Floats, TokenBatch
from common.statistics import RowSums


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

    def row_means(self, head_type: str) -> Floats:
        """[rows, layers, heads]; NaN for a row in which no query has a cell."""
        return self.sums[head_type].row_means()

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


def score(
    model: Model, batch: TokenBatch, *, batch_size: int, advance: Callable[[int], None] = lambda rows: None
) -> HeadScores:
    """Score every head of every layer on every head type; `advance` is told of each finished group of rows.

    `batch.tokens`: [rows, pos] ids, at most `model.context` long.
    """
    parts = []
    for start in range(0, len(batch.tokens), batch_size):
        part = batch.rows(start, start + batch_size)
        parts.append(_score_at_once(model, part))
        advance(len(part.tokens))
    summed = {}
    for kind, cells in batch.cells.items():
        counts = np.bincount(cells.group_row, minlength=len(batch.tokens))
        sums, squares = (np.concatenate([part[which][kind] for part in parts]) for which in (0, 1))
        summed[kind] = RowSums(sums, squares, counts)
    return HeadScores(summed, {kind: cells.chance() for kind, cells in batch.cells.items()})


def score_battery(
    model: Model, drawn: Battery, *, batch_size: int, advance: Callable[[int], None] = lambda rows: None
) -> tuple[HeadScores, HeadScores]:
    """Scores of every head on rows with a repeat and on their controls, which are read at the same cells."""
    repeats = score(model, drawn.repeats, batch_size=batch_size, advance=advance)
    return repeats, score(model, drawn.controls, batch_size=batch_size, advance=advance)


def per_query(model: Model, batch: TokenBatch, *, batch_size: int) -> Floats:
    """What each query with a target pays to its targets, [queries, layers, heads]; by row, then by query."""
    parts = []
    for start in range(0, len(batch.tokens), batch_size):
        part = batch.rows(start, start + batch_size)
        cells = part.cells["prefix_matching"]
        paid = np.zeros((len(cells.group_row), model.n_layers, model.n_heads))

        def keep(layer: int, pattern: torch.Tensor, cells: Cells = cells, paid: Floats = paid) -> None:
            paid[:, layer] = _attention_per_query(pattern, cells)

        read_patterns(model, part.tokens, keep)
        parts.append(paid)
    return np.concatenate(parts)


def patterns(model: Model, tokens: NDArray[np.int64], wanted: Sequence[tuple[int, int | None]]) -> list[Floats]:
    """The attention patterns on one row of ids that `wanted` names, each [query, key].

    A wanted (layer, head) is that head's pattern, (layer, None) the mean over the heads of the layer.
    """
    kept: dict[tuple[int, int | None], Floats] = {}

    def keep(layer: int, pattern: torch.Tensor) -> None:
        for at, head in wanted:
            if at == layer:
                chosen = pattern[0].mean(0) if head is None else pattern[0, head]
                kept[at, head] = chosen.double().cpu().numpy()

    read_patterns(model, tokens[None], keep)
    return [kept[which] for which in wanted]


def every_pattern(model: Model, tokens: NDArray[np.int64], places: Sequence[int]) -> Floats:
    """The patterns of all heads on one row of ids at the chosen positions, [layers, heads, place, place].

    A layer that shows no pattern is NaN.
    """
    found = np.full((model.n_layers, model.n_heads, len(places), len(places)), np.nan)
    rows, columns = np.ix_(places, places)

    def keep(layer: int, pattern: torch.Tensor) -> None:
        found[layer] = pattern[0, :, rows, columns].double().cpu().numpy()

    read_patterns(model, tokens[None], keep)
    return found


def _score_at_once(model: Model, batch: TokenBatch) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Sums and squares per head type, [rows, layers, heads], in one forward pass."""
    rows = len(batch.tokens)
    shape = (rows, model.n_layers, model.n_heads)
    sums = {name: np.zeros(shape) for name in batch.cells}
    squares = {name: np.zeros(shape) for name in batch.cells}

    def add(layer: int, pattern: torch.Tensor) -> None:
        for name, cells in batch.cells.items():
            attention = _attention_per_query(pattern, cells)
            np.add.at(sums[name][:, layer], cells.group_row, attention)
            np.add.at(squares[name][:, layer], cells.group_row, attention**2)

    read_patterns(model, batch.tokens, add)
    return sums, squares


def _attention_per_query(pattern: torch.Tensor, cells: Cells) -> Floats:
    """What each (row, query) pays to its cells, [groups, heads], from [batch, head, query, key]."""
    row, query, key = (torch.from_numpy(index).to(pattern.device) for index in (cells.row, cells.query, cells.key))
    read = pattern[row, :, query, key].double().cpu().numpy()
    paid = np.zeros((len(cells.group_row), pattern.shape[1]))
    np.add.at(paid, cells.group, read)
    return paid
