"""The benchmark of intervals runs, and what README and docstring say of coverage is what it measured."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from benchmarks import intervals as benchmark
from common.heads import statistics

METHODS = ("skew-t", "t", "BCa", "percentile")  # the columns of the README's table
ROWS = (5, 8, 16, 32)


@pytest.fixture(scope="module")
def committed() -> dict[tuple[str, int], dict[str, dict[str, float]]]:
    cells = json.loads(benchmark.RESULTS.read_text(encoding="utf-8"))["cells"]
    return {(cell["distribution"], cell["rows"]): cell["methods"] for cell in cells}


def test_the_benchmark_runs(capsys):
    assert benchmark.main(["--quick"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * len(benchmark.SEEN | benchmark.UNSEEN)
    assert lines[0].startswith("normal, 5 rows: skew-t ")


def test_the_means_that_it_takes_for_true_are_those_of_its_data():
    for name, (draw, mean) in (benchmark.SEEN | benchmark.UNSEEN).items():
        values = draw(np.random.default_rng(0), (200, 1000))
        assert values.mean() == pytest.approx(mean, abs=5 * values.std() / np.sqrt(values.size)), name


def test_its_bootstraps_are_those_of_scipy():
    """Apart from which rows are drawn again: wide apart means another method."""
    values, rng = np.random.default_rng(1).lognormal(size=(1, 12)), np.random.default_rng(0)
    ours = benchmark.bootstraps(values, rng)
    for name in ("percentile", "BCa"):
        theirs = stats.bootstrap(values, np.mean, method=name, n_resamples=4000, rng=0).confidence_interval
        assert np.concatenate(ours[name]) == pytest.approx([theirs.low, theirs.high], rel=0.12)


def table(text: str, first: str) -> list[list[str]]:
    """The cells of the lines that begin with `| ` below the line that begins with `first`."""
    lines = [line.strip() for line in text.splitlines()]
    start = next(place for place, line in enumerate(lines) if line.startswith(first)) + 2
    end = next(place for place in range(start, len(lines)) if not lines[place].startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:end]]


def test_the_docstring_says_what_was_measured(committed):
    for data, *cells in table(statistics.interval_over_rows.__doc__ or "", "| data |"):
        assert cells == [f"{100 * committed[data, n]['skew-t']['coverage']:.1f}" for n in ROWS]
