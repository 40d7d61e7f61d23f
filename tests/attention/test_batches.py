"""How many rows at once: what fits, what is done where memory runs out, and that it is said."""

from __future__ import annotations

import pytest
import torch

from common import UserError
from common.attention import batches


def failing_above(most: int, error: Exception):
    """Work that runs out of memory with more than `most` rows, and notes what it did."""
    done = []

    def work(rows):
        if rows[1] - rows[0] > most:
            raise error
        done.append(rows)
        return rows

    return work, done


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("no"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_halves_the_rows_and_says_so(error, caplog):
    work, done = failing_above(2, error)
    ticks = []
    assert batches.in_batches(work, 11, 8, ticks.append) == done
    assert done == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10), (10, 11)]
    assert sum(ticks) == 11
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory with 8 rows at once: going on with 4",
        "out of memory with 4 rows at once: going on with 2",
    ]


def test_where_memory_suffices_nothing_is_halved_and_nothing_said(caplog):
    work, done = failing_above(8, MemoryError())
    assert batches.in_batches(work, 11, 8) == done == [(0, 8), (8, 11)]
    assert not caplog.records


def test_the_rows_that_are_halved_are_those_that_were_tried(caplog):
    work, done = failing_above(1, MemoryError())
    batches.in_batches(work, 3, 8)
    assert done == [(0, 1), (1, 2), (2, 3)]
    assert caplog.messages == ["out of memory with 3 rows at once: going on with 1"]


def test_one_row_that_does_not_fit_is_said(caplog):
    with pytest.raises(UserError, match="a single row does not fit"):
        batches.in_batches(failing_above(0, MemoryError())[0], 3, 2)


def test_other_errors_are_no_lack_of_memory():
    with pytest.raises(RuntimeError, match="shapes"):
        batches.in_batches(failing_above(0, RuntimeError("shapes do not match"))[0], 3, 2)


def test_no_rows_are_no_work():
    assert batches.in_batches(failing_above(0, MemoryError())[0], 0, 4) == []


def test_rows_at_once_follow_the_free_memory(random_gpt2, monkeypatch):
    need = batches.bytes_per_row(random_gpt2, 64)
    for free, rows in ((0, 1), (2 * need, 1), (10 * need, 5), (10**15, batches.ENOUGH // 64)):
        monkeypatch.setattr(batches, "free_memory", lambda device, free=free: free)
        assert batches.batch_size(random_gpt2, 64) == rows
    monkeypatch.undo()
    assert batches.free_memory(torch.device("cpu")) > 1 << 20


def test_short_rows_go_together_and_long_ones_by_few(random_gpt2, monkeypatch):
    monkeypatch.setattr(batches, "free_memory", lambda device: 10**15)
    assert [batches.batch_size(random_gpt2, length) for length in (128, 1000, 5000)] == [16, 2, 1]


def test_a_longer_row_needs_more_than_in_proportion(random_gpt2):
    """Its backward pass keeps patterns, which grow with the square of the length."""
    short, long = (batches.bytes_per_row(random_gpt2, length) for length in (64, 640))
    assert long > 12 * short


def test_progress_that_nobody_watches_takes_what_it_is_told():
    with batches.silent("rows", 3) as advance:
        assert advance(2) is None
