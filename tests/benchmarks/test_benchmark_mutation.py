"""The benchmark that changes the code: which changes it makes, that a child sees them, and what its last run says."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT


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


CHILDREN = """
import sys
from benchmarks import mutation

module, line = "common.attention.head", "return cls(stack, int(layer), int(head))"
source = open("common/attention/head.py").read()
mutation.TESTS[module] = ["--noconftest", "--rootdir=" + sys.argv[1], sys.argv[1] + "/test_head.py"]
for changed in (line, line.replace("int(head)", "7"), line.replace("int(layer)", "int(layer) + 1"), "while True: pass"):
    print(mutation.run(module, source.replace(line, changed), 2.0)[0])
"""


def test_what_a_test_notices_is_killed_what_none_does_survives_and_what_hangs_is_stopped(benchmark, tmp_path):
    test = "from common.attention.head import Head\ndef test_it():\n    assert Head.at(1, 2).layer == 1\n"
    (tmp_path / "test_head.py").write_text(test)
    command = [sys.executable, "-c", CHILDREN, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["survived", "survived", "killed", "timed out"]


def test_in_the_last_run_nine_in_ten_were_killed_each_survivor_has_a_reason_and_the_readme_says_how_many():
    last = json.loads((ROOT / "benchmarks" / "results" / "mutation.json").read_text(encoding="utf-8"))
    names = ("heads.tokens", "heads.scores", "heads.statistics", "heads.detection", "interventions.effects")
    assert set(last) == {f"common.{name}" for name in names}
    for module, found in last.items():
        assert found["mutants"] == found["killed"] + len(found["survivors"]) > 40
        assert found["killed_percent"] == round(100 * found["killed"] / found["mutants"], 1) >= 90, module
        assert [one["change"] for one in found["survivors"] if not one["reason"]] == [], module
