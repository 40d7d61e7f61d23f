"""Means over queries whose uncertainty comes from rows.

1. Sums and counts are kept per row (`RowSums`) and divided once, so lots of rows can be added and nothing depends on
   the batch size.
2. Every interval is a skew-corrected t interval over whole rows (`interval_over_rows`). Queries of one row share its
   tokens and its layout, so they are no independent draws; rows are.
3. A ratio of sums over rows is linearised first: each row stands for the ratio plus what leaving it out would take from
   it (jackknife; Miller 1974, Biometrika 61:1).

Imports nothing of this project: every other module may use it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

RESAMPLES = 1000  # puts a share of resamples within about 3 % of what more of them would give
LEVEL = 0.95  # of every interval
# How much longer the long side of an interval is, and how much shorter the other, per unit of skewness and 1/rows²:
# chosen with `python -m benchmarks.intervals`, where the distributions called unseen took no part.
LONG_SIDE, SHORT_SIDE = 80.0, 4.0


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

    def interval(self) -> tuple[Floats, Floats]:
        """Lower and upper end of the `LEVEL` interval of `mean`, each [...]; NaN with fewer than two rows of values."""
        counted = self.counts > 0  # a row without values says nothing, and must not count as a row that agrees
        sums, counts, mean = self.sums[counted], self.counts[counted], self.mean()
        if len(counts) < 2:
            return interval_over_rows(sums)
        moves = (len(counts) - 1) * divided(sums - np.multiply.outer(counts, mean), counts.sum() - counts)
        return interval_over_rows(mean + moves - moves.mean(0))

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


def resampled_range(resampled: Floats) -> tuple[Floats, Floats]:
    """Between which values the middle `LEVEL` of [resamples, ...] values lie, each [...]. Ignores NaN.

    What rows drawn again give, and no confidence interval: over few rows it covers the truth less often than `LEVEL`.
    """
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile(resampled, [tail, 1 - tail], axis=0)
    return low, high


def resampled_mean(values: Floats, weights: Floats) -> Floats:
    """Mean over rows of [rows, ...] values, [resamples, ...], each row counted `weights` [resamples, rows] times."""
    return divided(np.tensordot(weights, values, 1), weights.sum(1))


def interval_over_rows(values: Floats) -> tuple[Floats, Floats]:
    """Lower and upper end of the `LEVEL` interval of the mean of [rows, ...] values, each [...]; NaN for one row.

    Student's t, mean ± t·s/√n, corrected for the sample skewness g. The side of the long tail is 1 + |g|·a times as
    long, a = (1 + 2t²)/(6t√n) + `LONG_SIDE`/n²: the first part is the correction of the t statistic for skewness
    (Johnson 1978, J. Am. Stat. Assoc. 73:536; Hall 1992, J. R. Stat. Soc. B 54:221), the second makes up for few rows,
    which seldom show how skewed they are. The other side is 1 - |g|·`SHORT_SIDE`/n² times as long: hardly shorter, for
    among heavy tails skewness is chance.

    Measured (`python -m benchmarks.intervals`, results/intervals.json), in per cent, where 95 is stated:

    | data | 5 rows | 8 | 16 | 32 |
    |---|---|---|---|---|
    | normal | 96.2 | 96.6 | 96.3 | 95.7 |
    | lognormal | 92.4 | 93.7 | 93.8 | 93.5 |
    | mixture, a tenth five times as wide | 96.7 | 97.1 | 96.7 | 96.2 |
    | mixture, two even peaks | 95.9 | 98.8 | 98.9 | 96.7 |
    | mixture, a tenth five deviations off | 93.8 | 93.3 | 92.0 | 95.3 |
    | mixture, a fifth far off | 83.8 | 86.8 | 96.4 | 97.6 |
    | exponential | 94.8 | 96.2 | 96.6 | 96.0 |
    | gamma, shape 0.5 | 94.3 | 95.4 | 95.6 | 95.5 |
    | t with 3 degrees | 96.3 | 96.6 | 96.1 | 95.5 |

    Not within two points: lognormal data at 5 rows, two peaks at 8 and 16 rows (too long), and data whose mean is made
    by rows so rare that often none is drawn: no interval sees what was not drawn.
    """
    rows = len(values)
    if rows < 2:
        return np.full(values.shape[1:], np.nan), np.full(values.shape[1:], np.nan)
    mean = values.mean(0)
    away = values - mean
    spread = np.sqrt((away**2).sum(0) / (rows - 1))
    t = stdtrit(rows - 1, (1 + LEVEL) / 2)
    lengthen = (1 + 2 * t**2) / (6 * t * np.sqrt(rows)) + LONG_SIDE / rows**2
    skew, reach = _skewness(away, spread), t * spread / np.sqrt(rows)
    longer, shorter = 1 + lengthen * np.abs(skew), 1 - SHORT_SIDE / rows**2 * np.abs(skew)
    return mean - reach * np.where(skew < 0, longer, shorter), mean + reach * np.where(skew > 0, longer, shorter)


def _skewness(away: Floats, spread: Floats) -> Floats:
    """Sample skewness, adjusted for its bias, of values that lie `away` [rows, ...] from their mean; 0 where all are
    equal and for two rows, which cannot be skewed."""
    rows = len(away)
    if rows < 3:
        return np.zeros_like(spread)
    cubes = rows * (away**3).sum(0) / ((rows - 1) * (rows - 2))
    return np.divide(cubes, spread**3, out=np.zeros_like(cubes), where=spread > 0)
