"""Means over queries whose uncertainty comes from rows.

1. Sums and counts are kept per row (`RowSums`) and divided once, so lots of rows can be added and nothing depends on
   the batch size.
2. Every interval is a bootstrap over whole rows (Efron 1979, percentile interval). Queries of one row share its tokens
   and its layout, so they are no independent draws; rows are.

Imports nothing of this project: every other module may use it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

RESAMPLES = 1000  # puts the ends of a normal interval within about 2 % of its width
LEVEL = 0.95  # of every interval


@dataclass(frozen=True)
class RowSums:
    """Values summed per row: `sums` [rows, ...] of the values, `counts` [rows], how many there are."""

    sums: Floats
    counts: Ints

    def __add__(self, other: RowSums) -> RowSums:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return RowSums(*(np.concatenate(pair) for pair in pairs))

    def mean(self) -> Floats:
        """Mean over all values, [...]; NaN if there are none."""
        return divided(self.sums.sum(0, keepdims=True), self.counts.sum(keepdims=True))[0]

    def resampled(self, weights: Floats) -> Floats:
        """Mean over all values, [resamples, ...], with each row counted `weights` [resamples, rows] times; NaN for a
        resample without values."""
        return divided(np.tensordot(weights, self.sums, 1), weights @ self.counts)

    def squares_between(self, weights: Floats) -> Floats:
        """Sum over rows of the squared distance of a row's mean from the mean over all values, [resamples, ...]; rows
        are weighted as in `resampled`. Divided by one less than the number of rows it is the variance of a row's mean.

        A row with more values counts more, as it does in the mean: its distance is that of its sum from `count * mean`,
        over the mean count (the usual linearised variance of a ratio: Cochran 1977, Sampling Techniques, chapter 6).
        """
        mean, rows = self.resampled(weights), weights.sum(1)
        squares, products, square_counts = (
            np.tensordot(weights, values, 1)
            for values in (self.sums**2, (self.sums.T * self.counts).T, self.counts.astype(np.float64) ** 2)
        )
        size = square_counts.reshape(-1, *[1] * (mean.ndim - 1))
        # Rounding can make the difference of equal numbers negative, and the root of that would be NaN.
        between = np.maximum(squares - 2 * mean * products + mean**2 * size, 0.0)
        return divided(between, (weights @ self.counts / rows) ** 2)


def divided(sums: Floats, counts: Ints | Floats) -> Floats:
    """Means from `sums` [n, ...] and how many values are in each, `counts` [n]; NaN where that is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums / np.asarray(counts, dtype=np.float64).reshape(-1, *[1] * (sums.ndim - 1))


def mean_per_row(values: Floats, row: Ints, rows: int) -> Floats:
    """Mean of the `values` [n, ...] of each row, [rows, ...] in float64; NaN for a row without values.

    `row`: [n], the row that each value belongs to, from 0 to `rows` - 1.
    """
    sums = np.zeros((rows, *values.shape[1:]))
    np.add.at(sums, row, values)  # `sums[row] += values` would count one value per row
    return divided(sums, np.bincount(row, minlength=rows))


def bootstrap_weights(rows: int, seed: int = 0) -> Floats:
    """How often each row is drawn in each of `RESAMPLES` resamples of `rows` rows, [resamples, rows]."""
    rng = np.random.default_rng([seed, rows])
    return rng.multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES).astype(np.float64)


def percentile_interval(resampled: Floats) -> tuple[Floats, Floats]:
    """Lower and upper end of the `LEVEL` interval of [resamples, ...] values, each [...]. Ignores NaN."""
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile(resampled, [tail, 1 - tail], axis=0)
    return low, high


def resampled_mean(values: Floats, weights: Floats) -> Floats:
    """Mean over rows of [rows, ...] values, [resamples, ...], each row counted `weights` [resamples, rows] times."""
    return divided(np.tensordot(weights, values, 1), weights.sum(1))


def interval_over_rows(values: Floats, seed: int = 0) -> tuple[Floats, Floats]:
    """Lower and upper end of the `LEVEL` bootstrap interval of the mean of [rows, ...] values, each [...]."""
    return percentile_interval(resampled_mean(values, bootstrap_weights(len(values), seed)))
