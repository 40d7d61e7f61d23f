"""Cells against a slow, obvious oracle, and the traps that other detectors fall into."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import UserError
from common.heads.tokens import TokenBatch, battery, continuing, head_type_cells

BOS = 0
short_rows = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=14), min_size=1, max_size=4)


def batch_of(*rows: list[int]) -> TokenBatch:
    return TokenBatch.of([np.array([BOS, *row]) for row in rows], pad=BOS)


def slow_cells(row: list[int]) -> dict[str, set[tuple[int, int]]]:
    """The definitions of the module's docstring, word for word."""
    n = len(row)
    return {
        "prefix_matching": {(i, j + 1) for i in range(n) for j in range(1, i) if row[j] == row[i] and j + 1 < i},
        "previous_token": {(i, i - 1) for i in range(2, n)},
        "duplicate_token": {(i, j) for i in range(n) for j in range(1, i) if row[j] == row[i]},
        "first_token": {(i, 0) for i in range(1, n)},
        "current_token": {(i, i) for i in range(1, n)},
    }


def cells_of(batch: TokenBatch, head_type: str, row: int) -> set[tuple[int, int]]:
    cells = batch.cells[head_type]
    mine = cells.row == row
    return set(zip(cells.query[mine].tolist(), cells.key[mine].tolist(), strict=True))


@given(short_rows)
def test_cells_are_those_of_the_definition(rows):
    batch = batch_of(*rows)
    for number, row in enumerate(rows):
        for head_type, expected in slow_cells([BOS, *row]).items():
            assert cells_of(batch, head_type, number) == expected


@given(short_rows)
def test_the_queries_of_cells_come_once_and_in_order(rows):
    for cells in batch_of(*rows).cells.values():
        pairs = set(zip(cells.row.tolist(), cells.query.tolist(), strict=True))
        assert list(zip(*(of.tolist() for of in cells.queries()), strict=True)) == sorted(pairs)


@given(short_rows)
def test_the_budget_gives_every_cell_to_one_part(rows):
    """Of queries with a target: targets first, then the previous token, the token itself, earlier copies, BOS."""
    batch = batch_of(*rows)
    for number, row in enumerate(rows):
        slow = slow_cells([BOS, *row])
        queries = {query for query, _ in slow["prefix_matching"]}
        taken = set(slow["prefix_matching"])
        for part, kind in (("previous", "previous_token"), ("self", "current_token"), ("duplicates", "duplicate_token"),
                           ("bos", "first_token")):  # fmt: skip
            expected = {(query, key) for query, key in slow[kind] if query in queries} - taken
            assert cells_of(batch, f"budget_{part}", number) == expected
            taken |= expected


@given(short_rows)
def test_continuing_tokens_follow_their_predecessor_as_they_followed_a_copy_of_it(rows):
    for mask, row in zip(continuing(batch_of(*rows)), rows, strict=True):
        ids = [BOS, *row]
        copies = {(ids[at], ids[at + 1]): at for at in reversed(range(1, len(ids) - 1))}  # where a pair comes first
        expected = [at for at in range(2, len(ids)) if copies.get((ids[at - 1], ids[at]), at) < at - 2]
        assert np.flatnonzero(mask).tolist() == expected


def test_continuing_tokens_are_those_that_something_predicts():
    batch = batch_of([7, 8, 9, 7, 8, 5])
    assert np.flatnonzero(continuing(batch)[0]).tolist() == [5], "8 after 7; not 7 itself, not 5 after 8"
    padded = TokenBatch.of([np.array([0, 7, 8, 7]), np.array([0, 7, 8, 7, 8])], pad=8)
    assert not continuing(padded)[0].any(), "padding continues nothing"


def test_target_is_the_token_after_the_copy_not_the_copy():
    assert cells_of(batch_of([7, 8, 9, 7]), "prefix_matching", 0) == {(4, 2)}
    assert cells_of(batch_of([7, 8, 9, 7]), "duplicate_token", 0) == {(4, 1)}


def test_adjacent_equal_tokens_are_not_their_own_target():
    assert cells_of(batch_of([7, 7]), "prefix_matching", 0) == set()
    assert cells_of(batch_of([7, 7, 7]), "prefix_matching", 0) == {(3, 2)}


def test_bos_is_no_earlier_copy():
    assert cells_of(batch_of([BOS, 7, BOS]), "prefix_matching", 0) == {(3, 2)}


def test_padding_adds_no_cells():
    alone, padded = batch_of([7, 8, 7, 8]), batch_of([7, 8, 7, 8], [1, 2, 3, 4, 5, 6, 7, 8, 9, 1])
    for head_type in alone.cells:
        assert cells_of(alone, head_type, 0) == cells_of(padded, head_type, 0)


def test_one_repeated_character_has_every_pair():
    row = np.full((1, 300), 3)
    cells = head_type_cells(row, np.array([300]))["duplicate_token"]
    assert len(cells.key) == 299 * 298 // 2


@given(st.integers(0, 2**32), st.integers(8, 80))
def test_battery_repeats_one_segment_and_its_control_does_not(seed, length):
    drawn = battery(np.arange(1, 200), BOS, rows=3, length=length, seed=seed)
    for row, (repeat, control) in enumerate(zip(drawn.repeats.tokens, drawn.controls.tokens, strict=True)):
        assert repeat[0] == control[0] == BOS and (repeat[1:] != BOS).all() and (control[1:] != BOS).all()
        assert len(set(control.tolist())) == length, "a control row repeats nothing"
        changed = np.flatnonzero(repeat != control)
        assert np.array_equal(changed, np.arange(changed[0], changed[0] + len(changed))), "only the second segment"
        assert cells_of(drawn.repeats, "prefix_matching", row) == cells_of(drawn.controls, "prefix_matching", row)
        assert len(changed) - 1 <= len(cells_of(drawn.repeats, "prefix_matching", row)) <= len(changed)


def layout(repeat: np.ndarray, control: np.ndarray) -> tuple[int, int, int]:
    """(start, gap, size) of the segment that comes twice, found by looking at the ids; places counted without BOS."""
    changed = np.flatnonzero(repeat != control) - 1
    start = int(np.flatnonzero(control[1:] == repeat[1 + changed[0]])[0])
    return start, int(changed[0]) - start - len(changed), len(changed)


@pytest.mark.parametrize(("length", "sizes"), [(8, {2}), (21, set(range(3, 9))), (22, set(range(3, 9)))])
def test_segments_gaps_and_places_take_every_value_that_they_may(length, sizes):
    """A segment is a sixth to two fifths of the tokens after BOS, at least 2; what is left over is filler or gap."""
    drawn = battery(np.arange(1, 60), BOS, rows=1500, length=length, seed=1)
    found = {layout(*pair) for pair in zip(drawn.repeats.tokens, drawn.controls.tokens, strict=True)}
    assert {size for _, _, size in found} == sizes
    for size in sizes:
        starts, gaps = np.array([(start, gap) for start, gap, some in found if some == size]).T
        room = length - 1 - 2 * size
        assert (starts.min(), gaps.min()) == (0, 0)
        assert gaps.max() == (starts + gaps).max() == room


def test_a_battery_has_the_rows_it_is_asked_for_from_the_row_it_is_asked_for_on():
    whole = battery(np.arange(1, 200), BOS, rows=5, length=40, seed=5)
    late = battery(np.arange(1, 200), BOS, rows=2, length=40, seed=5, first=3)
    assert whole.repeats.tokens.shape == whole.controls.tokens.shape == (5, 40)
    assert np.array_equal(late.repeats.tokens, whole.repeats.tokens[3:])
    assert np.array_equal(late.controls.tokens, whole.controls.tokens[3:])


def test_battery_rows_depend_on_seed_and_row_alone():
    few = battery(np.arange(1, 200), BOS, rows=2, length=40, seed=5)
    many = battery(np.arange(1, 200), BOS, rows=6, length=40, seed=5)
    other = battery(np.arange(1, 200), BOS, rows=2, length=40, seed=6)
    assert np.array_equal(few.repeats.tokens, many.repeats.tokens[:2])
    assert not np.array_equal(few.repeats.tokens, other.repeats.tokens)


def test_battery_varies_distance_so_that_no_fixed_offset_solves_it():
    drawn = battery(np.arange(1, 400), BOS, rows=32, length=128, seed=0).repeats.cells["prefix_matching"]
    distances = np.bincount(drawn.query - drawn.key)
    assert distances.max() / distances.sum() < 0.15


@pytest.mark.parametrize(
    ("ordinary", "length", "reason"),
    [
        (1, 20, "has 1 ordinary tokens.*needs at least 7"),
        (6, 20, "has 6 ordinary tokens.*needs at least 7"),
        (50, 7, "a row of 7 tokens is too short.*at least 8"),
    ],
)
def test_impossible_batteries_say_why(ordinary, length, reason):
    with pytest.raises(UserError, match=reason):
        battery(np.arange(1, ordinary + 1), BOS, rows=1, length=length, seed=0)
    assert battery(np.arange(1, 8), BOS, rows=1, length=8, seed=0).repeats.tokens.shape == (1, 8), "the least there is"
    assert battery(np.arange(1, 9), BOS, rows=1, length=20, seed=0).repeats.tokens.shape == (1, 9), "all 8 words"


def test_rows_of_a_batch_are_its_rows_with_their_cells():
    batch = batch_of([7, 8, 7, 8], [1, 2, 1], [5, 6, 5, 6, 5])
    part = batch.rows(1, 3)
    assert part.tokens.tolist() == [[0, 1, 2, 1, 0, 0], [0, 5, 6, 5, 6, 5]] and part.lengths.tolist() == [4, 6]
    for head_type in batch.cells:
        for row in (0, 1):
            assert cells_of(part, head_type, row) == cells_of(batch, head_type, row + 1)
        assert set(part.cells[head_type].row.tolist()) <= {0, 1}


def test_what_is_drawn_cannot_be_changed_by_hand():
    drawn = battery(np.arange(1, 9), BOS, rows=1, length=8, seed=0)
    for one, name in ((drawn, "repeats"), (drawn.repeats, "tokens"), (drawn.repeats.cells["first_token"], "row")):
        with pytest.raises(FrozenInstanceError):
            setattr(one, name, None)
