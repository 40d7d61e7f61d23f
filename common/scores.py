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
from common.sequences import Cells, Floats, TokenBatch, battery

ROWS = 32  # battery rows with a repeat, and as many controls
ROW_LENGTH = 128  # tokens of a battery row, BOS included; less where the context is shorter


@dataclass(frozen=True)
class HeadScores:
    """Per head type: `sums` and `squares` [rows, layers, heads] of the attention that a query pays to its cells,
    `counts` [rows] of queries, and the score `chance` of a head that attends uniformly."""

    sums: dict[str, Floats]
    squares: dict[str, Floats]
    counts: dict[str, NDArray[np.int64]]
    chance: dict[str, float]

    def mean(self, head_type: str) -> Floats:
        """[layers, heads], each in [0, 1]; NaN where no query has a cell."""
        with np.errstate(invalid="ignore"):
            return self.sums[head_type].sum(0) / np.float64(self.counts[head_type].sum())

    def std(self, head_type: str) -> Floats:
        """Standard deviation over queries, [layers, heads]; NaN where no query has a cell."""
        with np.errstate(invalid="ignore"):
            mean_square = self.squares[head_type].sum(0) / np.float64(self.counts[head_type].sum())
        return np.sqrt(np.maximum(mean_square - self.mean(head_type) ** 2, 0.0))

    def row_means(self, head_type: str) -> Floats:
        """[rows, layers, heads]; NaN for a row in which no query has a cell."""
        with np.errstate(invalid="ignore"):
            return self.sums[head_type] / self.counts[head_type][:, None, None].astype(np.float64)


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
    return HeadScores(
        sums={name: np.concatenate([sums[name] for sums, _ in parts]) for name in batch.cells},
        squares={name: np.concatenate([squares[name] for _, squares in parts]) for name in batch.cells},
        counts={name: np.bincount(cell.group_row, minlength=len(batch.tokens)) for name, cell in batch.cells.items()},
        chance={name: cell.chance() for name, cell in batch.cells.items()},
    )


def score_battery(
    model: Model,
    *,
    seed: int,
    batch_size: int,
    rows: int = ROWS,
    length: int = ROW_LENGTH,
    advance: Callable[[int], None] = lambda rows: None,
) -> tuple[HeadScores, HeadScores]:
    """Scores of every head on rows with a repeat and on their controls, which are read at the same cells.

    `rows` of each, `length` tokens or as many as the model reads; `advance` is told of each finished group of rows.
    """
    drawn = battery(model.ordinary(), model.bos, rows=rows, length=min(length, model.context), seed=seed)
    repeats = score(model, drawn.repeats, batch_size=batch_size, advance=advance)
    controls = score(model, drawn.controls, batch_size=batch_size, advance=advance)
    return repeats, controls


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
