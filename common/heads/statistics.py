"""Means over queries whose uncertainty comes from rows: sums kept per row, divided once, resampled by whole rows.

Queries of one row share its tokens and its layout and are no independent draws; rows are. So every interval here is a
bootstrap over rows (Efron 1979, percentile interval).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 1000
LEVEL = 0.95  # of every interval


@dataclass(frozen=True)
class RowSums:
    """Values summed per row: `sums` and `squares` [rows, ...] of the values and of their squares, `counts` [rows]."""

    sums: Floats
    squares: Floats
    counts: NDArray[np.int64]

    def __add__(self, other: RowSums) -> RowSums:
        """The rows of both, these first."""
        return RowSums(
            np.concatenate([self.sums, other.sums]),
            np.concatenate([self.squares, other.squares]),
            np.concatenate([self.counts, other.counts]),
        )

    def mean(self) -> Floats:
        """Mean over all values, [...]; NaN where there are none."""
        with np.errstate(invalid="ignore"):
            return self.sums.sum(0) / np.float64(self.counts.sum())

    def std(self) -> Floats:
        """Standard deviation over all values, [...]; NaN where there are none."""
        with np.errstate(invalid="ignore"):
            mean_square = self.squares.sum(0) / np.float64(self.counts.sum())
        return np.sqrt(np.maximum(mean_square - self.mean() ** 2, 0.0))

    def row_means(self) -> Floats:
        """Mean per row, [rows, ...]; NaN for a row without values."""
        with np.errstate(invalid="ignore"):
            counts = self.counts.astype(np.float64).reshape(-1, *[1] * (self.sums.ndim - 1))
            return self.sums / counts

    def resampled(self, weights: Floats) -> tuple[Floats, Floats]:
        """Mean and standard deviation, [resamples, ...], with each row counted `weights` [resamples, rows] times."""
        with np.errstate(invalid="ignore", divide="ignore"):
            counts = (weights @ self.counts).reshape(-1, *[1] * (self.sums.ndim - 1))
            mean = np.tensordot(weights, self.sums, 1) / counts
            mean_square = np.tensordot(weights, self.squares, 1) / counts
        return mean, np.sqrt(np.maximum(mean_square - mean**2, 0.0))


def bootstrap_weights(rows: int, seed: int = 0) -> Floats:
    """How often each row is drawn in each of `RESAMPLES` resamples of `rows` rows, [resamples, rows]."""
    rng = np.random.default_rng([seed, rows])
    return rng.multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES).astype(np.float64)


def percentile_interval(resampled: Floats) -> tuple[Floats, Floats]:
    """Lower and upper end of the `LEVEL` interval of [resamples, ...] values, each [...]."""
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile(resampled, [tail, 1 - tail], axis=0)
    return low, high


def resampled_mean(values: Floats, weights: Floats) -> Floats:
    """Mean over rows of [rows, ...] values, [resamples, ...], each row counted `weights` [resamples, rows] times."""
    return np.tensordot(weights, values, 1) / weights.sum(1).reshape(-1, *[1] * (values.ndim - 1))


def interval_over_rows(values: Floats, seed: int = 0) -> tuple[Floats, Floats]:
    """Lower and upper end of the `LEVEL` bootstrap interval of the mean of [rows, ...] values, each [...]."""
    return percentile_interval(resampled_mean(values, bootstrap_weights(len(values), seed)))
