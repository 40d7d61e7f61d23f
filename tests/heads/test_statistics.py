"""Sums per row, and intervals over rows, against the obvious way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.heads.statistics import RowSums, bootstrap_weights, interval_over_rows, mean_per_row, resampled_mean

rows_of_values = st.lists(
    st.lists(st.floats(0, 1, allow_subnormal=False), min_size=1, max_size=5), min_size=1, max_size=6
)


def row_sums(rows: list[list[float]]) -> RowSums:
    return RowSums(
        np.array([[sum(row)] for row in rows]),
        np.array([len(row) for row in rows]),
    )


@given(rows_of_values)
def test_the_mean_is_that_of_all_values(rows):
    assert row_sums(rows).mean().item() == pytest.approx(np.concatenate(rows).mean())


@given(rows_of_values, st.integers(0, 100))
def test_a_resample_is_the_rows_drawn_and_put_together(rows, seed):
    drawn = np.random.default_rng(seed).integers(len(rows), size=len(rows))
    weights = np.bincount(drawn, minlength=len(rows)).astype(float)[None]
    values = np.concatenate([rows[row] for row in drawn])
    assert row_sums(rows).resampled(weights).item() == pytest.approx(values.mean())


@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=2, max_size=6), st.integers(0, 100))
def test_squares_between_rows_of_one_length_are_those_of_their_means(rows, seed):
    drawn = np.random.default_rng(seed).integers(len(rows), size=len(rows))
    weights = np.bincount(drawn, minlength=len(rows)).astype(float)[None]
    expected = np.var([np.mean(rows[row]) for row in drawn]) * len(rows)
    assert row_sums(rows).squares_between(weights).item() == pytest.approx(expected, abs=1e-9)


def test_squares_between_rows_of_different_lengths():
    """Rows 0, 0, 0 and 1: mean 1/4; their sums 0 and 1 differ by -3/4 and 3/4 from 3 and 1 times that; mean count 2."""
    measured = row_sums([[0.0, 0.0, 0.0], [1.0]]).squares_between(np.ones((1, 2)))
    assert measured.item() == pytest.approx(2 * (0.75 / 2) ** 2)


def test_one_row_differs_from_none():
    assert row_sums([[0.5, 0.7]]).squares_between(np.ones((1, 1))) == pytest.approx(0.0)


@given(rows_of_values, st.integers(0, 5))
def test_adding_is_putting_the_rows_together(rows, cut):
    if 0 < cut < len(rows):
        both = row_sums(rows[:cut]) + row_sums(rows[cut:])
        assert both.mean() == pytest.approx(row_sums(rows).mean())
        assert len(both.counts) == len(rows)


def test_every_resample_draws_as_many_rows():
    assert (bootstrap_weights(7).sum(1) == 7).all()
    assert np.array_equal(bootstrap_weights(7), bootstrap_weights(7))


def test_an_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        low, high = interval_over_rows(rng.normal(1.0, 0.5, size=(40, 1)))
        covered += bool(low <= 1.0 <= high)
    assert 0.88 <= covered / 200 <= 0.99


def test_weighted_means_of_rows():
    values = np.array([[1.0], [3.0]])
    assert resampled_mean(values, np.array([[2.0, 0.0], [1.0, 1.0]])).ravel().tolist() == [1.0, 2.0]


@given(rows_of_values, st.integers(0, 3))
def test_a_mean_per_row_is_that_of_the_rows_own_values(rows, empty):
    """However the values are ordered, and NaN for a row without any."""
    row = np.repeat(np.arange(len(rows)), [len(values) for values in rows])
    order = np.random.default_rng(0).permutation(len(row))
    values = np.concatenate(rows)[order]
    found = mean_per_row(np.stack([values, -values], axis=1), row[order], len(rows) + empty)
    expected = np.array([np.mean(values) for values in rows] + [np.nan] * empty)
    assert found.dtype == np.float64
    assert found == pytest.approx(np.stack([expected, -expected], axis=1), nan_ok=True)
    assert mean_per_row(values, row[order], len(rows) + empty) == pytest.approx(expected, nan_ok=True)
