"""The benchmark of the sweep runs, and both of its ways agree."""

from __future__ import annotations

import json

from benchmarks import interventions as benchmark


def test_the_benchmark_runs_and_both_ways_agree(capsys):
    assert benchmark.main(["--quick", "--rows", "2", "--length", "24"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["times_as_fast"] > 0
    assert result["largest_difference"] < 1e-4
