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
    """Cells of the attention pattern, grouped by the query they belong to.

    `row`, `query`, `key`, `group`: [cells]. `group` numbers the (row, query) pair that a cell belongs to, and
    `group_row`: [groups] is the row of that pair.
    """

    row: Ints
    query: Ints
    key: Ints
    group: Ints
    group_row: Ints

    @classmethod
    def of(cls, row: Ints, query: Ints, key: Ints) -> Cells:
        """Group the cells by their (row, query)."""
        pairs = np.stack([row, query], axis=1).reshape(-1, 2)
        unique, group = np.unique(pairs, axis=0, return_inverse=True)
        # NumPy 2.0 returns the inverse as [cells, 1], other versions as [cells].
        return cls(row, query, key, group.reshape(-1), unique[:, 0])

    def rows(self, start: int, stop: int) -> Cells:
        """The cells of rows start to stop - 1, rows counted from `start`."""
        inside = (self.row >= start) & (self.row < stop)
        return Cells.of(self.row[inside] - start, self.query[inside], self.key[inside])

    def chance(self) -> float:
        """The score of a head that attends uniformly to what it may see, in [0, 1]; NaN without cells."""
        if not len(self.group_row):
            return float("nan")
        return float(np.sum(1.0 / (self.query + 1)) / len(self.group_row))


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
        """Pad `rows` (each with BOS first) with `pad` on the right and find the cells of every head type."""
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        # On the right: attention is causal, so no token ever sees the padding.
        tokens = np.full((len(rows), int(lengths.max(initial=0))), pad, dtype=np.int64)
        for padded, row in zip(tokens, rows, strict=True):
            padded[: len(row)] = row
        cells = head_type_cells(tokens, lengths)
        return cls(tokens, lengths, {**cells, **budget_cells(cells, tokens.shape[1])})

    def rows(self, start: int, stop: int) -> TokenBatch:
        """Rows start to stop - 1."""
        cells = {name: cell.rows(start, stop) for name, cell in self.cells.items()}
        return TokenBatch(self.tokens[start:stop], self.lengths[start:stop], cells)


def head_type_cells(tokens: Ints, lengths: Ints) -> dict[str, Cells]:
    """The cells of every head type.

    `tokens`: [rows, pos] ids. `lengths`: [rows], how many tokens of each row count; the rest is padding.
    """
    row, query, key = earlier_copies(tokens, lengths)
    follows = key + 1 < query  # the token after an adjacent copy is the query itself
    every_row, every_query = np.nonzero(np.arange(tokens.shape[1]) < lengths[:, None])
    later = every_query >= 1
    second = every_query >= 2  # the previous token of query 1 is BOS, which first_token is about
    return {
        "prefix_matching": Cells.of(row[follows], query[follows], key[follows] + 1),
        "previous_token": Cells.of(every_row[second], every_query[second], every_query[second] - 1),
        "duplicate_token": Cells.of(row, query, key),
        "first_token": Cells.of(every_row[later], every_query[later], np.zeros_like(every_query[later])),
        "current_token": Cells.of(every_row[later], every_query[later], every_query[later]),
    }


def budget_cells(cells: dict[str, Cells], width: int) -> dict[str, Cells]:
    """The cells of the budget's parts other than `targets` and `other`, of queries with a target; no cell is in two.

    `cells`: those of the head types, in rows of `width` tokens.
    """
    targets, copies = cells["prefix_matching"], cells["duplicate_token"]
    row, query = np.unique(np.stack([targets.row, targets.query]), axis=1)
    has_target = np.isin(_code(copies.row, copies.query, 0, width), _code(row, query, 0, width))
    candidates = {
        "previous": (row, query, query - 1),
        "self": (row, query, query),
        "duplicates": (copies.row[has_target], copies.query[has_target], copies.key[has_target]),
        "bos": (row, query, np.zeros_like(query)),
    }
    # In this order each part gets what no part before it took: a target that is also the previous token is a target.
    taken = _code(targets.row, targets.query, targets.key, width)
    parts = {}
    for part, indices in candidates.items():
        code = _code(*indices, width)
        free = ~np.isin(code, taken)
        parts[f"budget_{part}"] = Cells.of(*(index[free] for index in indices))
        taken = np.concatenate([taken, code])
    return parts


def _code(row: Ints, query: Ints, key: Ints | int, width: int) -> Ints:
    """One number per (row, query, key), so that sets of cells can be compared by `np.isin`."""
    return (row * width + query) * width + key


def earlier_copies(tokens: Ints, lengths: Ints) -> tuple[Ints, Ints, Ints]:
    """(row, query, key), each [pairs]: all pairs with 0 < key < query and the same token at both.

    Takes time linear in the number of pairs. `tokens`: [rows, pos] ids. `lengths`: [rows].
    """
    row, position = np.nonzero(np.arange(tokens.shape[1]) < lengths[:, None])
    row, position = row[position > 0], position[position > 0]  # BOS is no earlier copy, even of a BOS in the text
    token = tokens[row, position]
    # After sorting, the copies of a token in a row are a run of neighbours, in the order of their positions.
    order = np.lexsort((position, token, row))
    row, position, token = row[order], position[order], token[order]
    index = np.arange(len(order))
    starts = np.ones(len(order), dtype=bool)
    starts[1:] = (row[1:] != row[:-1]) | (token[1:] != token[:-1])
    first = np.maximum.accumulate(np.where(starts, index, 0))
    n_earlier = index - first
    # Each copy is paired with all n_earlier members of its run before it: first, first + 1, and so on.
    later = np.repeat(index, n_earlier)
    offset = np.arange(len(later)) - np.repeat(np.cumsum(n_earlier) - n_earlier, n_earlier)
    earlier = np.repeat(first, n_earlier) + offset
    return row[later], position[later], position[earlier]


def continuing(batch: TokenBatch) -> NDArray[np.bool_]:
    """Which tokens, [rows, pos], induction predicts: those that follow their predecessor as an earlier copy of it did.

    The first token of a second copy is not among them: nothing predicts it.
    """
    cells = batch.cells["prefix_matching"]
    inside = cells.query + 1 < batch.lengths[cells.row]
    row, query, key = cells.row[inside], cells.query[inside], cells.key[inside]
    same = batch.tokens[row, query + 1] == batch.tokens[row, key]
    mask = np.zeros(batch.tokens.shape, dtype=bool)
    mask[row[same], query[same] + 1] = True
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
    text does not hold. Where these are too few, it becomes any ordinary token but those that now stand at the places of
    its earlier copies, so that no cell that is read is a target by chance. A query with as many earlier copies as there
    are ordinary tokens cannot be freed of chance targets and is left out of both.
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
    kept = np.isin(cells.query, again[count < len(ordinary)])
    query, key = cells.query[kept], cells.key[kept]

    def read(rows: int) -> dict[str, Cells]:
        row = np.repeat(np.arange(rows), len(query))
        return {"prefix_matching": Cells.of(row, np.tile(query, rows), np.tile(key, rows))}

    lengths = np.repeat(text.lengths, rows)
    return TokenBatch(text.tokens, text.lengths, read(1)), TokenBatch(controls, lengths, read(rows))
