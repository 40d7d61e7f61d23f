"""Rows of token ids, and the cells of the attention pattern that each head type is about.

For a row x with BOS at 0, the targets of query i are T(i) = {j+1 : 0 < j < i, x[j] == x[i], j+1 < i}: the tokens
that came after earlier copies of the current token. A score is a mean over queries of the attention that the query
pays to its cells; queries without a cell are left out.

| head type | queries | cells of query i |
|---|---|---|
| prefix_matching | those with a target | T(i) |
| previous_token | i >= 2 | i-1 |
| duplicate_token | those with an earlier copy | {j : 0 < j < i, x[j] == x[i]} |
| first_token | i >= 1 | 0 |
| current_token | i >= 1 | i |

The attention budget divides all that a query with a target pays, so its parts sum to 1: first its targets, then, of
the cells left, the previous token, the token itself, earlier copies, BOS (`BUDGET`); the rest is `other`.

The battery draws rows of token ids (never text: text does not survive decoding and re-encoding). Each row is BOS,
filler, a segment, a gap, the segment again, filler. Its control row is the same with the second segment drawn afresh,
and is read at the same cells: what a head pays to them there is its null.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common import UserError
from common.heads.statistics import Ints

HEAD_TYPES = ("prefix_matching", "previous_token", "duplicate_token", "first_token", "current_token")
BUDGET = ("targets", "previous", "self", "duplicates", "bos", "other")
ROW_LENGTH = 128  # tokens of a battery row, BOS included; less where the context is shorter
SHORTEST = 8  # BOS, a segment of two tokens twice, and some room for a gap


@dataclass(frozen=True)
class Cells:
    """Cells of the attention pattern: the `row`, `query` and `key` of each, [cells]."""

    row: Ints
    query: Ints
    key: Ints

    def rows(self, start: int, stop: int) -> Cells:
        """The cells of rows start to stop - 1, rows counted from `start`."""
        inside = self.only((self.row >= start) & (self.row < stop))
        return Cells(inside.row - start, inside.query, inside.key)

    def only(self, chosen: NDArray[np.bool_]) -> Cells:
        return Cells(self.row[chosen], self.query[chosen], self.key[chosen])

    def queries(self) -> tuple[Ints, Ints]:
        """(row, query), each [queries]: the queries that have a cell; by row, then by query."""
        row, query = np.unique(np.stack([self.row, self.query]), axis=1)
        return row, query


@dataclass(frozen=True)
class TokenBatch:
    """Rows of token ids, padded on the right, and the cells to read in them.

    `tokens`: [rows, pos] ids. `lengths`: [rows]. `cells`: one entry per head type, and `budget_previous` and so on for
    the parts of the budget other than `targets` and `other`.
    """

    tokens: Ints
    lengths: Ints
    cells: dict[str, Cells]

    @classmethod
    def of(cls, rows: list[Ints], pad: int) -> TokenBatch:
        """Pad `rows` (each with BOS first) with `pad` and find the cells of every head type."""
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        # On the right: attention is causal, so no token ever sees the padding.
        tokens = np.full((len(rows), int(lengths.max())), pad, dtype=np.int64)
        tokens[np.arange(tokens.shape[1]) < lengths[:, None]] = np.concatenate(rows)
        cells = head_type_cells(tokens, lengths)
        return cls(tokens, lengths, cells | _budget_cells(cells, tokens.shape))

    def rows(self, start: int, stop: int) -> TokenBatch:
        """Rows start to stop - 1."""
        cells = {name: cell.rows(start, stop) for name, cell in self.cells.items()}
        return TokenBatch(self.tokens[start:stop], self.lengths[start:stop], cells)


def head_type_cells(tokens: Ints, lengths: Ints) -> dict[str, Cells]:
    """The cells of every head type in [rows, pos] ids, of which `lengths` [rows] count; the rest is padding."""
    row, query, key = _earlier_copies(tokens, lengths)
    follows = key + 1 < query  # the token after an adjacent copy is the query itself
    every_row, every_query = np.nonzero(np.arange(1, tokens.shape[1]) < lengths[:, None])
    every_query += 1  # BOS sees itself alone
    second = every_query >= 2  # the previous token of query 1 is BOS, which first_token is about
    return {
        "prefix_matching": Cells(row[follows], query[follows], key[follows] + 1),
        "previous_token": Cells(every_row[second], every_query[second], every_query[second] - 1),
        "duplicate_token": Cells(row, query, key),
        "first_token": Cells(every_row, every_query, np.zeros_like(every_query)),
        "current_token": Cells(every_row, every_query, every_query),
    }


def _budget_cells(cells: dict[str, Cells], batch_shape: tuple[int, ...]) -> dict[str, Cells]:
    """The cells of the budget's parts other than `targets` and `other`, of queries with a target; no cell is in two.

    `cells`: those of the head types, in rows and positions of `batch_shape`.
    """
    has_target = np.zeros(batch_shape, dtype=bool)
    has_target[cells["prefix_matching"].row, cells["prefix_matching"].query] = True
    parts: dict[str, Cells] = {}
    taken = np.zeros(0, dtype=np.int64)
    # In this order each part gets what no part before it took: a target that is also the previous token is a target.
    order = ("prefix_matching", "previous_token", "current_token", "duplicate_token", "first_token")
    for part, kind in zip(BUDGET[:-1], order, strict=True):
        its = cells[kind]
        number = (its.row * batch_shape[1] + its.query) * batch_shape[1] + its.key
        parts[f"budget_{part}"] = its.only(has_target[its.row, its.query] & ~np.isin(number, taken))
        taken = np.concatenate([taken, number])
    del parts["budget_targets"]  # that is prefix matching
    return parts


def _earlier_copies(tokens: Ints, lengths: Ints) -> tuple[Ints, Ints, Ints]:
    """(row, query, key), each [pairs]: all pairs with 0 < key < query and the same token at both, in linear time."""
    row, position = np.nonzero(np.arange(1, tokens.shape[1]) < lengths[:, None])
    position += 1  # BOS is no earlier copy, even of a BOS in the text
    token = tokens[row, position]
    # After sorting, the copies of a token in a row are a run of neighbours, in the order of their positions.
    order = np.lexsort((position, token, row))
    row, position, token = row[order], position[order], token[order]
    index = np.arange(len(order))
    starts = np.ones(len(order), dtype=bool)
    starts[1:] = (np.diff(row) != 0) | (np.diff(token) != 0)
    first = np.maximum.accumulate(np.where(starts, index, 0))
    n_earlier = index - first
    # Each copy is paired with all n_earlier members of its run before it: first, first + 1, and so on.
    later = np.repeat(index, n_earlier)
    earlier = np.arange(len(later)) + np.repeat(first - np.cumsum(n_earlier) + n_earlier, n_earlier)
    return row[later], position[later], position[earlier]


def continuing(batch: TokenBatch) -> NDArray[np.bool_]:
    """Which tokens, [rows, pos], induction predicts: those that follow their predecessor as an earlier copy of it did.
    The first token of a second copy is not among them."""
    cells = batch.cells["prefix_matching"]
    cells = cells.only(cells.query + 1 < batch.lengths[cells.row])
    same = batch.tokens[cells.row, cells.query + 1] == batch.tokens[cells.row, cells.key]
    mask = np.zeros(batch.tokens.shape, dtype=bool)
    mask[cells.row[same], cells.query[same] + 1] = True
    return mask


@dataclass(frozen=True)
class Battery:
    """Rows with a repeat, and their control rows, which are read at the same cells."""

    repeats: TokenBatch
    controls: TokenBatch


def battery(ordinary: Ints, bos: int, *, rows: int, length: int, seed: int, first: int = 0) -> Battery:
    """Draw `rows` rows of `length` ids, BOS first, the others from the `ordinary` tokens, from row number `first` on.

    In a control row no token comes twice, so rows are shorter where there are fewer ordinary tokens than `length`: a
    token that recurs by chance would be a real target, and a perfect head would find it in its own null.
    Row r depends on (seed, r) alone, so more rows can be drawn later.
    Raises UserError if a row is too short to hold a segment twice, or if there are too few ordinary tokens for one.
    """
    if length < SHORTEST:
        raise UserError(f"a row of {length} tokens is too short for a repeat: the model must read at least {SHORTEST}")
    if len(ordinary) < SHORTEST - 1:
        raise UserError(
            f"the vocabulary has {len(ordinary)} ordinary tokens, and a row in which nothing repeats needs at least "
            f"{SHORTEST - 1}: the heads of this model cannot be tested on random rows"
        )
    length = min(length, len(ordinary) + 1)
    pairs = [_battery_row(np.random.default_rng([seed, first + row]), ordinary, bos, length) for row in range(rows)]
    repeats = TokenBatch.of([repeat for repeat, _ in pairs], pad=bos)
    # The null of a head is what it pays to the cells of the repeats, so the control rows take over those cells.
    controls = TokenBatch(np.stack([control for _, control in pairs]), repeats.lengths, repeats.cells)
    return Battery(repeats, controls)


def _battery_row(rng: np.random.Generator, ordinary: Ints, bos: int, length: int) -> tuple[Ints, Ints]:
    """A row and its control, each [length]."""
    body = length - 1
    # Segment, gap and place vary from row to row: a head that looks a fixed distance back must not hit the targets.
    size = int(rng.integers(max(2, body // 6), 2 * body // 5 + 1))
    gap = int(rng.integers(0, body - 2 * size + 1))
    start = int(rng.integers(0, body - 2 * size - gap + 1))
    control = rng.choice(ordinary, size=body, replace=False)
    repeat = control.copy()
    again = start + size + gap
    repeat[again : again + size] = repeat[start : start + size]
    return np.concatenate([[bos], repeat]), np.concatenate([[bos], control])


def with_controls(text: TokenBatch, ordinary: Ints, *, rows: int, seed: int) -> tuple[TokenBatch, TokenBatch]:
    """The one text in `text` and `rows` control rows of it, both to be read at the same prefix-matching cells.

    As in the battery, what repeats is drawn afresh: every token with an earlier copy becomes an ordinary token that the
    text does not hold, or, where these are too few, any but those that now stand at the places of its earlier copies,
    so that no cell that is read is a target by chance. A query with as many earlier copies as there are ordinary tokens
    cannot be freed of chance targets and is left out of both.
    """
    tokens, copies, cells = text.tokens[0], text.cells["duplicate_token"], text.cells["prefix_matching"]
    again, count = np.unique(copies.query, return_counts=True)
    unused = np.setdiff1d(ordinary, tokens)
    rng = np.random.default_rng([seed, rows])
    controls = np.tile(tokens, (rows, 1))
    for row in controls:
        if len(unused) >= len(again):
            row[again] = rng.choice(unused, size=len(again), replace=False)
            continue
        for place in again:  # from left to right: what stands at the earlier copies is settled
            free = np.setdiff1d(ordinary, row[copies.key[copies.query == place]])
            row[place] = rng.choice(free if len(free) else ordinary)
    kept = cells.only(np.isin(cells.query, again[count < len(ordinary)]))
    every = np.repeat(np.arange(rows), len(kept.row))
    theirs = Cells(every, np.tile(kept.query, rows), np.tile(kept.key, rows))
    return (
        TokenBatch(text.tokens, text.lengths, {"prefix_matching": kept}),
        TokenBatch(controls, np.repeat(text.lengths, rows), {"prefix_matching": theirs}),
    )
