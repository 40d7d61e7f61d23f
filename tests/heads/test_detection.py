"""The decision rule on sums whose answer is plain."""

from __future__ import annotations

import numpy as np
import pytest

from common.heads import detection
from common.heads.detection import LEAST_EFFECT, LEAST_LIFT, VERDICTS, attend, by_score, detect, deviations
from common.heads.statistics import RowSums

ROWS, QUERIES = 32, 20


def sums(mean: float, spread: float = 0.0, *, seed: int = 0) -> RowSums:
    """One head: `QUERIES` values in each row, whose mean and standard deviation over all are these exactly."""
    values = np.random.default_rng(seed).normal(size=(ROWS, QUERIES))
    values = mean + spread * (values - values.mean()) / values.std()
    counts = np.full(ROWS, QUERIES)
    return RowSums(values.sum(1)[:, None, None], (values**2).sum(1)[:, None, None], counts)


def needed(heads: int, rows: int) -> float:
    """What `rows` rows and as many control rows ask for."""
    return deviations(heads, np.sqrt(2 / rows), rows - 1)


def decide(score: float, control: float, spread: float = 0.0, threshold: float | None = None) -> bool:
    return bool(attend(sums(score), sums(control, spread), needed(1, ROWS), threshold=threshold).attends.item())


def verdict(score=0.01, control=0.01, effect=0.0, threshold=None, spread=0.0, **others) -> str:
    """The verdict on one head with this prefix matching; `others`: duplicate_token and shares of the budget."""
    kinds = {"prefix_matching": score, "duplicate_token": 0.01, "budget_previous": 0.0, "budget_bos": 0.0} | others
    repeats = {kind: sums(value) for kind, value in kinds.items()}
    controls = {"prefix_matching": sums(control, spread), "duplicate_token": sums(0.01)}
    return str(detect(repeats, controls, np.full((8, 1, 1), effect), threshold=threshold).verdict.item())


def test_threshold_follows_the_spread_of_the_null():
    k = needed(1, ROWS)
    assert decide(0.101 + k * 0.1, 0.10, 0.1)
    assert not decide(0.099 + k * 0.1, 0.10, 0.1)


def test_a_tiny_lift_is_no_induction_however_steady_the_null():
    assert not decide(0.01 + 0.9 * LEAST_LIFT, 0.01, 1e-6)
    assert decide(0.01 + 1.1 * LEAST_LIFT, 0.01, 1e-6)


def test_a_head_that_scores_the_same_in_the_control_is_rejected_however_high():
    assert not decide(0.99, 0.99, 0.01)


def test_a_fixed_threshold_looks_at_the_score_alone():
    assert decide(0.4, 0.4, 0.3, threshold=0.4)
    assert not decide(0.39, 0.0, 0.0, threshold=0.4)


def test_more_heads_and_fewer_rows_ask_for_more():
    assert needed(1000, 4) > needed(10, 4) > needed(10, 16)
    assert needed(10, 10_000) == detection.LEAST_DEVIATIONS


def test_chance_passes_no_more_often_than_the_stated_rate(monkeypatch):
    """Heads that ignore the repeat, whose queries of one row say all the same: the worst case. No floor on the lift."""
    monkeypatch.setattr(detection, "LEAST_LIFT", 0.0)
    monkeypatch.setattr(detection, "LEAST_DEVIATIONS", 0.0)
    monkeypatch.setattr(detection, "FALSE_POSITIVES", 0.2)
    rng = np.random.default_rng(0)
    models, heads, rows = 2000, 12, 32
    on, off = rng.normal(0.5, 0.1, size=(2, models, rows, 1, heads))
    counts = np.ones(rows, dtype=np.int64)
    whole = np.ones((1, rows))
    passed = 0
    for repeat, control in zip(on, off, strict=True):
        score, limit, _ = detection._against_null(
            RowSums(repeat, repeat**2, counts),
            RowSums(control, control**2, counts),
            whole,
            needed(heads, rows),
            None,
        )
        passed += bool((score >= limit).any())
    assert 0.1 < passed / models < 0.25, "Bonferroni is close to exact for independent heads"


@pytest.mark.parametrize(
    ("evidence", "expected"),
    [
        ({"score": 0.5, "effect": 1.0}, "induction"),
        ({"score": 0.5, "effect": -1.0}, "suppression"),
        ({"score": 0.5, "effect": 0.5 * LEAST_EFFECT}, "attends-only"),
        ({"score": 0.5, "control": 0.5, "effect": 1.0}, "none"),
        ({"duplicate_token": 0.5}, "duplicate-token"),
        ({"budget_previous": 0.9}, "previous-token"),
        ({"budget_bos": 0.9}, "first-token"),
        ({"budget_previous": 0.4, "budget_bos": 0.4}, "none"),
        ({"score": 0.4, "effect": 1.0, "budget_bos": 0.6}, "induction"),
        ({"score": 0.997, "control": 0.53, "spread": 0.5, "effect": 1.0}, "undecided"),  # its null holds targets
        ({"score": 0.54, "control": 0.53, "spread": 0.5, "effect": 1.0}, "none"),  # no higher than its null
        ({"score": 0.997, "control": 0.9, "effect": 1.0}, "induction"),
        ({}, "none"),
    ],
)
def test_each_verdict_has_its_evidence(evidence, expected):
    assert verdict(**evidence) == expected
    assert expected in VERDICTS


def test_a_fixed_threshold_of_1_decides():
    """The user's own number is no error of the method."""
    assert verdict(score=0.5, effect=1.0, threshold=1.0) == "none"


def test_confidence_falls_where_a_head_sits_on_its_threshold():
    limit = 0.01 + LEAST_LIFT

    def confidence(score: float) -> float:
        return attend(sums(score, 0.3), sums(0.01), needed(1, ROWS)).confidence.item()

    assert confidence(limit + 0.5) == 1.0
    assert 0.3 < confidence(limit + 1e-4) < 0.8


def test_resamples_agree_with_the_confidence():
    kinds = ("prefix_matching", "duplicate_token", "budget_previous", "budget_bos")
    repeats = {kind: sums(0.061, 0.3) for kind in kinds}
    controls = {kind: sums(0.01) for kind in kinds[:2]}
    found = detect(repeats, controls, np.ones((8, 1, 1)))
    assert found.verdict.item() == "induction"
    assert found.resampled.mean() == pytest.approx(found.confidence.item())


def test_ranking_is_by_score_with_undefined_scores_last():
    assert by_score(np.array([[0.2, np.nan], [0.9, 0.5]])) == [(1, 0), (1, 1), (0, 0), (0, 1)]
