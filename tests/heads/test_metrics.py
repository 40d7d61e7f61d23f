"""Metrics with their undefined cases decided, and their intervals."""

from __future__ import annotations

import numpy as np
import pytest

from common.attention.head import Head
from common.heads.detection import Detection
from common.heads.labels import Labels
from common.heads.metrics import compared_with, evaluate


def flags(*heads: tuple[int, int]) -> np.ndarray:
    grid = np.zeros((2, 3), dtype=bool)
    for head in heads:
        grid[head] = True
    return grid


def test_precision_and_recall_count_heads():
    detected = flags((0, 0), (0, 1), (1, 2))
    known = Labels(frozenset({Head.at(0, 0), Head.at(1, 0)}), "made up")
    measured = evaluate(detected, flags((0, 0)).astype(float), detected[None], known)
    assert measured.precision == pytest.approx(1 / 3)
    assert measured.recall == pytest.approx(1 / 2)
    assert measured.f1 == pytest.approx(2 / 5)
    assert measured.labels == "made up"


@pytest.mark.parametrize(
    ("detected", "labelled", "expected"),
    [((), (), (1.0, 1.0, 1.0)), (((0, 0),), (), (0.0, 0.0, 0.0)), ((), ((0, 0),), (0.0, 0.0, 0.0))],
)
def test_undefined_cases_are_decided(detected, labelled, expected):
    found = flags(*detected)
    measured = evaluate(
        found, np.zeros((2, 3)), found[None], Labels(frozenset(Head.at(*place) for place in labelled), "x")
    )
    assert (measured.precision, measured.recall, measured.f1) == expected
    assert (measured.average_precision is None) == (not labelled)


def test_intervals_are_over_what_other_rows_would_have_detected():
    found, known = flags((0, 0)), Labels(frozenset({Head.at(0, 0)}), "x")
    resampled = np.stack([flags((0, 0))] * 90 + [flags((0, 0), (1, 1))] * 10)
    measured = evaluate(found, found.astype(float), resampled, known)
    assert measured.intervals["recall"] == (1.0, 1.0)
    assert measured.intervals["precision"] == (pytest.approx(0.5), 1.0)
    assert measured.intervals["f1"] == (pytest.approx(2 / 3), 1.0)
    assert "0.67 to 1.00" in measured.sentence()


def detection(verdicts: dict[tuple[int, int], str]) -> Detection:
    """A detection in which the heads of `verdicts` attend to their targets and no other does."""
    verdict, attends = np.full((2, 3), "none", dtype="<U12"), flags(*verdicts)
    for head, said in verdicts.items():
        verdict[head] = said
    score = attends.astype(float)
    low = np.full((2, 3), 0.5)
    again = np.stack([verdict == "induction"] * 3), np.stack([attends] * 3)
    return Detection(score, low, low, low, low, low, verdict, *again)


@pytest.mark.parametrize(("kind", "f1"), [("attention", 1.0), ("causal", 0.0), ("ablation", 0.0), ("unknown", 0.0)])
def test_attention_based_labels_judge_where_heads_look_and_nothing_else(kind, f1):
    found, known = detection({(0, 1): "attends-only"}), Labels(frozenset({Head.at(0, 1)}), "x", kind)
    compared, detected, resampled = compared_with(found, known)
    measured = evaluate(detected, found.score, resampled, known, compared)
    assert measured.f1 == f1 and measured.intervals["f1"] == (f1, f1)
    assert ("notably without one" in measured.sentence()) == (kind == "attention")
    assert ("where heads look, not what they do" in measured.sentence()) == (kind == "attention")


def test_heads_with_less_support_count_neither_way():
    detected = flags((0, 0), (0, 1))
    known = Labels(frozenset({Head.at(0, 0)}), "x", uncertain=frozenset({Head.at(0, 1), Head.at(1, 2)}))
    measured = evaluate(detected, flags((0, 1)).astype(float), detected[None], known)
    assert (measured.precision, measured.recall, measured.f1) == (1.0, 1.0, 1.0)
    assert measured.average_precision == pytest.approx(1 / 4), "one of the four counted heads, all of one score"
    assert measured.not_counted == ("0.1", "1.2") and "not counted: 0.1, 1.2" in measured.sentence()


def test_labels_of_one_task_have_a_recall_and_no_precision():
    detected = flags((0, 0), (0, 1), (1, 1))
    known = Labels(frozenset({Head.at(0, 0), Head.at(1, 0)}), "x", "path patching", complete=False)
    measured = evaluate(detected, detected.astype(float), detected[None], known)
    assert measured.recall == 0.5 and measured.precision is measured.f1 is measured.average_precision is None
    assert measured.intervals == {"recall": (0.5, 0.5)} and "recall 0.50" in measured.sentence()
    assert "precision 0" not in measured.sentence()
