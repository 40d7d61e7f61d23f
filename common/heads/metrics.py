"""How well a detection agrees with labels. The labels always have a name: no number without saying against what."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.heads.labels import Labels
from common.heads.statistics import Floats, percentile_interval

HeadMask = NDArray[np.bool_]  # [layers, heads]


@dataclass(frozen=True)
class Metrics:
    """Agreement with the `labels` of that name, each number in [0, 1], higher is better.

    `average_precision` is None if no head is labelled. `intervals`: the 95 % intervals of `precision`, `recall` and
    `f1` over the rows that detection drew; the labels stay the same.
    """

    precision: float
    recall: float
    f1: float
    average_precision: float | None
    labels: str
    intervals: dict[str, tuple[float, float]]

    def sentence(self) -> str:
        """Precision, recall and F1 for a reader, F1 with its interval."""
        low, high = self.intervals["f1"]
        return (
            f"precision {self.precision:.2f}, recall {self.recall:.2f}, "
            f"F1 {self.f1:.2f} (95 % over rows: {low:.2f} to {high:.2f})"
        )


def evaluate(detected: HeadMask, score: Floats, resampled: HeadMask, labels: Labels) -> Metrics:
    """Precision, recall and F1 of `detected`, average precision of `score`, both [layers, heads].

    `resampled`: [resamples, layers, heads], what is detected when rows are drawn again.
    """
    from sklearn.metrics import average_precision_score  # not above: importing sklearn writes to os.environ

    truth = labels.mask(detected.shape)
    precision, recall, f1 = agreement(truth, detected)
    average = float(average_precision_score(truth.ravel(), score.ravel())) if truth.any() else None
    # Most resamples detect the same heads, so each different outcome is evaluated once.
    different, which = np.unique(resampled.reshape(len(resampled), -1), axis=0, return_inverse=True)
    drawn = np.array([agreement(truth, again.reshape(truth.shape)) for again in different])[which.ravel()]
    low, high = percentile_interval(drawn)
    names = ("precision", "recall", "f1")
    intervals = {name: (float(low[place]), float(high[place])) for place, name in enumerate(names)}
    return Metrics(precision, recall, f1, average, labels.source, intervals)


def agreement(truth: HeadMask, detected: HeadMask) -> tuple[float, float, float]:
    """Precision, recall and F1 of `detected` against `truth`, both [layers, heads], each in [0, 1].

    Undefined cases are decided: if nothing is labelled and nothing detected, all three are 1.0; otherwise a share of
    nothing is 0.0.
    """
    from sklearn.metrics import precision_recall_fscore_support

    # sklearn would call "nothing to find, nothing found" 0.0, and a right answer would look like the worst one.
    if not truth.any() and not detected.any():
        return 1.0, 1.0, 1.0
    precision, recall, f1, _ = precision_recall_fscore_support(
        truth.ravel(), detected.ravel(), average="binary", zero_division=0.0
    )
    return float(precision), float(recall), float(f1)
