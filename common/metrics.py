"""How well a detection agrees with labels. The labels always have a name: no number without saying against what."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, precision_recall_fscore_support

from common.errors import UserError
from common.sequences import Floats


@dataclass(frozen=True)
class Labels:
    """Which heads are induction heads according to `source`, as (layer, head)."""

    heads: frozenset[tuple[int, int]]
    source: str


@dataclass(frozen=True)
class Metrics:
    """Agreement with labels, each in [0, 1]; `average_precision` is None where no head is labelled."""

    precision: float
    recall: float
    f1: float
    average_precision: float | None
    labels: str


def evaluate(detected: NDArray[np.bool_], score: Floats, labels: Labels) -> Metrics:
    """Precision, recall and F1 of `detected` and average precision of `score`, both [layers, heads].

    Decided where undefined: nothing labelled and nothing detected is a perfect 1.0 for all three; otherwise a share of
    nothing is 0.0.
    """
    truth = np.zeros(detected.shape, dtype=bool)
    for layer, head in labels.heads:
        truth[layer, head] = True
    if not truth.any() and not detected.any():
        return Metrics(1.0, 1.0, 1.0, None, labels.source)
    precision, recall, f1, _ = precision_recall_fscore_support(
        truth.ravel(), detected.ravel(), average="binary", zero_division=0.0
    )
    average = average_precision_score(truth.ravel(), score.ravel()) if truth.any() else None
    return Metrics(
        float(precision), float(recall), float(f1), None if average is None else float(average), labels.source
    )


def read_labels(path: Path, n_layers: int, n_heads: int) -> Labels:
    """Labels from a JSON file: {"source": "how they were made", "induction_heads": ["2.1", "3.0"]}.

    Raises UserError for a file that is not that, or that names a head the model has not.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read labels {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"labels {path} are not JSON: {error}") from None
    names = content.get("induction_heads") if isinstance(content, dict) else None
    if not isinstance(names, list):
        raise UserError(f'labels {path} need a list "induction_heads", such as ["5.1", "6.9"]')
    heads = frozenset(_head(name, path, n_layers, n_heads) for name in names)
    return Labels(heads, str(content.get("source", path)))


def _head(name: Any, path: Path, n_layers: int, n_heads: int) -> tuple[int, int]:
    layer, dot, head = name.partition(".") if isinstance(name, str) else ("", "", "")
    if not (dot and layer.isdecimal() and head.isdecimal()):
        raise UserError(f'labels {path}: {name!r} is no head; write layer.head, such as "5.1"')
    if int(layer) >= n_layers or int(head) >= n_heads:
        raise UserError(f"labels {path}: no head {name} in a model of {n_layers} layers with {n_heads} heads each")
    return int(layer), int(head)
