"""Metrics with their undefined cases decided, and label files a user may get wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest

from common.errors import UserError
from common.metrics import Labels, evaluate, read_labels


def flags(*heads: tuple[int, int]) -> np.ndarray:
    grid = np.zeros((2, 3), dtype=bool)
    for head in heads:
        grid[head] = True
    return grid


def test_precision_and_recall_count_heads():
    measured = evaluate(
        flags((0, 0), (0, 1), (1, 2)), flags((0, 0)).astype(float), Labels(frozenset({(0, 0), (1, 0)}), "made up")
    )
    assert measured.precision == pytest.approx(1 / 3)
    assert measured.recall == pytest.approx(1 / 2)
    assert measured.f1 == pytest.approx(2 / 5)
    assert measured.labels == "made up"


@pytest.mark.parametrize(
    ("detected", "labelled", "expected"),
    [((), (), (1.0, 1.0, 1.0)), (((0, 0),), (), (0.0, 0.0, 0.0)), ((), ((0, 0),), (0.0, 0.0, 0.0))],
)
def test_undefined_cases_are_decided(detected, labelled, expected):
    measured = evaluate(flags(*detected), np.zeros((2, 3)), Labels(frozenset(labelled), "x"))
    assert (measured.precision, measured.recall, measured.f1) == expected
    assert (measured.average_precision is None) == (not labelled)


def test_labels_are_read(tmp_path):
    path = tmp_path / "labels.json"
    path.write_text(json.dumps({"source": "by hand", "induction_heads": ["1.2", "0.0"]}))
    assert read_labels(path, 2, 3) == Labels(frozenset({(1, 2), (0, 0)}), "by hand")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "induction_heads"),
        ('{"induction_heads": "5.1"}', "induction_heads"),
        ('{"induction_heads": [5.1]}', "no head"),
        ('{"induction_heads": ["a.b"]}', "no head"),
        ('{"induction_heads": ["2.0"]}', "no head 2.0"),
        ('{"induction_heads": ["0.3"]}', "no head 0.3"),
    ],
)
def test_wrong_label_files_say_what_is_wrong(tmp_path, text, reason):
    path = tmp_path / "labels.json"
    path.write_text(text)
    with pytest.raises(UserError, match=reason):
        read_labels(path, 2, 3)


def test_a_missing_label_file_is_said(tmp_path):
    with pytest.raises(UserError, match="cannot read labels"):
        read_labels(tmp_path / "none.json", 2, 3)
