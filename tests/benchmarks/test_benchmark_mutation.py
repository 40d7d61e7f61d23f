"""The benchmark that changes the code: which changes it makes, that a child sees them, and what its last run says."""

from __future__ import annotations

import json

import pytest

from tests.conftest import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "mutation.json"


@pytest.fixture(scope="module")
def benchmark():
    pytest.importorskip("cosmic_ray", reason="pip install -r benchmarks/requirements-mutation.txt")
    from benchmarks import mutation

    return mutation


def test_numbers_comparisons_and_operators_are_changed_and_annotations_are_not(benchmark):
    source = '''"""Some 3 words."""
LEAST = 0.5
def f(x: int | None, *, y: int = 2) -> int | None:
    return x - y
'''
    found = {mutant.change.split("→  ")[1]: mutant for mutant in benchmark.mutants_of(source)}
    changed = [f"def f(x: int | None, *, y: int = {y}) -> int | None:" for y in (1, 3)]
    assert set(found) == {"LEAST = 0.4", "LEAST = 0.625", "LEAST = 1.5", "LEAST = -0.5", *changed, "return x + y"}
    nudged = found["LEAST = 0.4"]
    assert (nudged.line, nudged.source) == (2, source.replace("0.5", "0.4"))
    assert nudged.change == "LEAST = 0.5  →  LEAST = 0.4"


def test_a_change_that_a_test_notices_is_killed_and_one_that_none_does_survives(benchmark, monkeypatch, tmp_path):
    test = tmp_path / "test_head.py"
    test.write_text("from common.attention.head import Head\ndef test_it():\n    assert Head.at(1, 2).layer == 1\n")
    module, source = "common.attention.head", (ROOT / "common/attention/head.py").read_text(encoding="utf-8")
    monkeypatch.setitem(benchmark.TESTS, module, ["--noconftest", f"--rootdir={tmp_path}", str(test)])
    monkeypatch.setattr(benchmark.sys, "modules", {**benchmark.sys.modules})
    for name in [name for name in benchmark.sys.modules if name.split(".")[0] == "common"]:
        monkeypatch.delitem(benchmark.sys.modules, name)
    line = "return cls(stack, int(layer), int(head))"
    for changed, outcome in ((line, "survived"), (line.replace("int(layer)", "int(layer) + 1"), "killed"),
                             (line.replace("int(head)", "7"), "survived"), ("while 1: 0", "timed out")):  # fmt: skip
        seconds = 3 if outcome == "timed out" else None
        assert benchmark.run(module, source.replace(line, changed), seconds)[0] == outcome, changed


def test_in_the_last_run_nine_in_ten_were_killed_and_each_survivor_has_a_reason():
    last = json.loads(RESULTS.read_text(encoding="utf-8"))
    names = ("heads.tokens", "heads.scores", "heads.statistics", "heads.detection", "interventions.effects")
    assert set(last) == {f"common.{name}" for name in names}
    for module, found in last.items():
        assert found["mutants"] == found["killed"] + len(found["survivors"]) > 40
        assert found["killed_percent"] == round(100 * found["killed"] / found["mutants"], 1) >= 90, module
        assert [one["change"] for one in found["survivors"] if not one["reason"]] == [], module
