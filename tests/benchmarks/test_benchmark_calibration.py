"""The calibration changes one constant at a time, and reads its models as the judges do."""

from __future__ import annotations

import json

import pytest

from benchmarks import calibration
from common.heads import detection


def test_a_constant_is_changed_and_put_back():
    before = detection.LEAST_LIFT
    with calibration.changed(LEAST_LIFT=0.7):
        assert detection.LEAST_LIFT == 0.7
    assert before == detection.LEAST_LIFT


def test_a_null_that_is_rarely_far_needs_both_kinds_of_rows():
    found = calibration.null_rate("1 row in 20", models=300)
    assert found["control_rows"] > 0.5
    assert found["both"] <= 0.01


def test_the_calibration_runs_from_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(calibration, "trained_models", lambda folders: [])
    monkeypatch.setattr(calibration, "GRIDS", {"LEAST_LIFT": (0.01, 0.9), "LEAST_EFFECT": (0.05, 50.0)})
    monkeypatch.setattr(calibration, "LENGTH", 24)
    monkeypatch.setattr(calibration, "WEAK", 1.0)  # every planted head
    out = tmp_path / "calibration.json"
    assert calibration.main(["--models", "1", "--out", str(out)]) == 0
    for name, (used, extreme) in json.loads(out.read_text())["constants"].items():
        assert (used["f1"], used["recall_weak"], used["false_per_1000"]) == (1, 1, 0), name
        assert extreme["recall_weak"] < 1 and extreme["f1"] < 1, name
    assert "LEAST_LIFT" in capsys.readouterr().out


def test_no_judge_uses_the_models_of_the_calibration():
    from benchmarks import detection as judge

    assert abs(calibration.FIRST_SEED - judge.FIRST_SEED) >= 1_000_000
    assert pytest.approx(0.02) == judge.WEAKEST, "the judge plants heads as weak as the calibration saw"
