"""Does a 95 % interval hold the truth in 95 of 100 cases? Ours beside others, on data whose mean is known.

    python -m benchmarks.intervals           # two minutes; writes benchmarks/results/intervals.json
    python -m benchmarks.intervals --quick   # seconds: does it still run

For each distribution and number of rows, `--trials` samples are drawn, each method makes its interval of the mean, and
counted is how often the true mean lies inside. Methods:

- skew-t: `common.heads.statistics.interval_over_rows`, what this project uses;
- ratio: the same on a ratio of sums over rows of 21 to 50 values, as many as a battery row has targets, all values of
  a row being equal (`RowSums.interval`);
- t: Student's t;
- Hall: Hall's monotone transformation of the t statistic (Hall 1992, J. R. Stat. Soc. B 54:221);
- percentile, BCa, bootstrap-t: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapters 12 to 14.

`SEEN` distributions chose the two constants of skew-t; `UNSEEN` ones took no part in that. Prints a table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from scipy.special import ndtr, ndtri, stdtrit

from common.heads.statistics import LEVEL, Floats, RowSums, interval_over_rows

RESULTS = Path(__file__).with_name("results") / "intervals.json"
ROWS = (5, 8, 16, 32, 64)
TAIL = (1 - LEVEL) / 2
RESAMPLES_EACH = 999  # of each bootstrap
AT_ONCE = 500  # trials whose resamples are in memory together

Ends = tuple[Floats, Floats]
Draw = Callable[[np.random.Generator, tuple[int, int]], Floats]


def _mixed(rng: np.random.Generator, size: tuple[int, int], share: float, first: Sequence[float]) -> Floats:
    """A `share` of normal (mean, deviation) `first[:2]`, the rest of `first[2:]`."""
    chosen = rng.random(size) < share
    return np.where(chosen, rng.normal(first[0], first[1], size), rng.normal(first[2], first[3], size))


SEEN: dict[str, tuple[Draw, float]] = {  # name: draw, true mean
    "normal": (lambda rng, size: rng.normal(size=size), 0.0),
    "lognormal": (lambda rng, size: rng.lognormal(size=size), float(np.exp(0.5))),
    "mixture, two even peaks": (lambda rng, size: _mixed(rng, size, 0.5, (2, 1, -2, 1)), 0.0),
    "mixture, a tenth five times as wide": (lambda rng, size: _mixed(rng, size, 0.1, (0, 5, 0, 1)), 0.0),
    "mixture, a tenth five deviations off": (lambda rng, size: _mixed(rng, size, 0.1, (5, 1, 0, 1)), 0.5),
    "mixture, a fifth far off": (lambda rng, size: _mixed(rng, size, 0.2, (4, 0.5, 0, 0.5)), 0.8),
}
UNSEEN: dict[str, tuple[Draw, float]] = {
    "mixture, three tenths off": (lambda rng, size: _mixed(rng, size, 0.3, (3, 1, 0, 1)), 0.9),
    "exponential": (lambda rng, size: rng.exponential(size=size), 1.0),
    "gamma, shape 0.5": (lambda rng, size: rng.gamma(0.5, size=size), 0.5),
    "t with 3 degrees": (lambda rng, size: rng.standard_t(3, size=size), 0.0),
    "uniform": (lambda rng, size: rng.uniform(size=size), 0.5),
    "beta, both ends": (lambda rng, size: rng.beta(0.5, 0.5, size=size), 0.5),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20_000, help="samples per cell (default 20,000)")
    parser.add_argument("--quick", action="store_true", help="few trials, 5 and 8 rows, nothing written")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file (default: the committed one)")
    args = parser.parse_args(argv)
    cells = measure(200 if args.quick else args.trials, ROWS[:2] if args.quick else ROWS)
    for cell in cells:
        shown = ", ".join(f"{name} {of['coverage']:.1%} ({of['width']:.2f})" for name, of in cell["methods"].items())
        print(f"{cell['distribution']}, {cell['rows']} rows: {shown}")
    if not args.quick:
        args.out.parent.mkdir(exist_ok=True)
        content = {"command": "python -m benchmarks.intervals", "level": LEVEL, "trials": args.trials, "cells": cells}
        args.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(trials: int, rows: Sequence[int]) -> list[dict]:
    """By distribution and number of rows, each method's `coverage` (a share) and median `width`."""
    cells = []
    for number, (name, (draw, mean)) in enumerate({**SEEN, **UNSEEN}.items()):
        for n in rows:
            rng = np.random.default_rng([number, n])
            samples, methods = draw(rng, (trials, n)), {}
            for method, (low, high) in intervals(samples, rng).items():
                inside = (low <= mean) & (mean <= high)
                methods[method] = {
                    "coverage": float(inside.mean()), "width": round(float(np.median(high - low)), 4),
                }  # fmt: skip
            cells.append({"distribution": name, "seen": name in SEEN, "rows": n, "methods": methods})
    return cells


def intervals(samples: Floats, rng: np.random.Generator) -> dict[str, Ends]:
    """The interval of each method for each of the samples [trials, rows]; each end [trials]."""
    resampling = [bootstraps(part, rng) for part in np.array_split(samples, max(1, len(samples) // AT_ONCE))]
    ends = {name: _joined([part[name] for part in resampling]) for name in resampling[0]}
    counts = rng.integers(21, 51, samples.shape)
    ratio = [RowSums(of * n, n).interval() for of, n in zip(samples, counts, strict=True)]
    return {
        "skew-t": interval_over_rows(samples.T),
        "ratio": (np.array([low for low, _ in ratio]), np.array([high for _, high in ratio])),
        "t": student(samples), "Hall": hall(samples), **ends,
    }  # fmt: skip


def _joined(parts: Sequence[Ends]) -> Ends:
    return np.concatenate([low for low, _ in parts]), np.concatenate([high for _, high in parts])


def moments(samples: Floats) -> tuple[Floats, Floats, Floats]:
    """Mean, its standard error and the adjusted skewness of each sample, [trials]."""
    n = samples.shape[1]
    mean, spread = samples.mean(1), samples.std(1, ddof=1)
    skew = n / ((n - 1) * (n - 2)) * ((samples - mean[:, None]) ** 3).sum(1) / spread**3
    return mean, spread / np.sqrt(n), skew


def student(samples: Floats) -> Ends:
    mean, error, _ = moments(samples)
    t = stdtrit(samples.shape[1] - 1, 1 - TAIL)
    return mean - t * error, mean + t * error


def hall(samples: Floats) -> Ends:
    mean, error, skew = moments(samples)
    n, t = samples.shape[1], stdtrit(samples.shape[1] - 1, 1 - TAIL)
    a = np.where(np.abs(skew) < 1e-9, 1e-9, skew) / np.sqrt(n)

    def back(quantile: float) -> Floats:
        return 3 / a * (np.cbrt(1 + a * (quantile - a / 6)) - 1)

    return mean - error * back(t), mean - error * back(-t)


def bootstraps(samples: Floats, rng: np.random.Generator) -> dict[str, Ends]:
    """The three bootstrap intervals, from the same resamples."""
    trials, n = samples.shape
    mean, error, _ = moments(samples)
    away = samples - mean[:, None]
    weights = rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES_EACH).T / n
    moved = away @ weights  # of the mean, [trials, resamples]
    variance = np.maximum((away**2) @ weights - moved**2, 0) / (n - 1)
    flat = variance <= 1e-12 * error[:, None] ** 2  # the same value n times: an endless t, on the side it lies on
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(flat, np.where(moved == 0, 0.0, np.copysign(np.inf, moved)), moved / np.sqrt(variance))
    order, t = np.sort(moved, axis=1), np.sort(t, axis=1)
    first, last = int(TAIL * RESAMPLES_EACH), RESAMPLES_EACH - 1 - int(TAIL * RESAMPLES_EACH)
    bias = ndtri(np.clip((moved < 0).mean(1) + (moved == 0).mean(1) / 2, 1e-3, 1 - 1e-3))
    acceleration = (away**3).sum(1) / (6 * (away**2).sum(1) ** 1.5)

    def accelerated(quantile: float) -> Floats:
        z = bias + ndtri(quantile)
        place = ndtr(bias + z / (1 - acceleration * z)) * RESAMPLES_EACH
        return mean + order[np.arange(trials), np.clip(place.astype(int), 0, RESAMPLES_EACH - 1)]

    return {
        "percentile": (mean + order[:, first], mean + order[:, last]),
        "BCa": (accelerated(TAIL), accelerated(1 - TAIL)),
        "bootstrap-t": (mean - error * t[:, last], mean - error * t[:, first]),
    }


if __name__ == "__main__":
    sys.exit(main())
