"""Metrics with their undefined cases decided, and their intervals."""

from __future__ import annotations

import numpy as np
import pytest

from common.attention.head import Head
from common.heads.labels import Labels
from common.heads.metrics import evaluate


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
