"""The decision rule on scores whose answer is plain."""

from __future__ import annotations

import numpy as np

from common.detection import LEAST_LIFT, STANDARD_DEVIATIONS, by_score, detect, name


def decide(score: float, control: float, spread: float, threshold: float | None = None) -> bool:
    arrays = [np.array([[value]]) for value in (score, control, spread)]
    return bool(detect(*arrays, threshold=threshold).induction.item())


def test_threshold_follows_the_spread_of_the_null():
    assert decide(0.10 + STANDARD_DEVIATIONS * 0.1, 0.10, 0.1)
    assert not decide(0.09 + STANDARD_DEVIATIONS * 0.1, 0.10, 0.1)


def test_a_tiny_lift_is_no_induction_however_steady_the_null():
    assert not decide(0.01 + 0.9 * LEAST_LIFT, 0.01, 1e-6)
    assert decide(0.01 + 1.1 * LEAST_LIFT, 0.01, 1e-6)


def test_a_head_that_scores_the_same_in_the_control_is_rejected_however_high():
    assert not decide(0.99, 0.99, 0.01)


def test_a_fixed_threshold_looks_at_the_score_alone():
    assert decide(0.4, 0.4, 0.3, threshold=0.4)
    assert not decide(0.39, 0.0, 0.0, threshold=0.4)


def test_ranking_is_by_score_with_undefined_scores_last():
    score = np.array([[0.2, np.nan], [0.9, 0.5]])
    assert by_score(score) == [(1, 0), (1, 1), (0, 0), (0, 1)]
    found = detect(np.nan_to_num(score), np.zeros((2, 2)), np.zeros((2, 2)))
    assert [name(*head) for head in found.ranked()] == ["1.0", "1.1", "0.0"]
