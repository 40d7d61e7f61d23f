"""How well a detection agrees with labels. The labels always have a name: no number without saying against what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from common.heads.statistics import Floats, resampled_range

if TYPE_CHECKING:
    from common.heads.labels import Labels

HeadMask = NDArray[np.bool_]  # [layers, heads]


@dataclass(frozen=True)
class Metrics:
    """Agreement with the `labels` of that name, each number in [0, 1], higher is better.

    `average_precision` is None if no head is labelled. `intervals`: between which values `precision`, `recall` and `f1`
    lie in 95 % of the resamples of the rows that detection drew; the labels stay the same. That is how far the numbers
    hang on the rows. It is no confidence interval: heads and labels are not drawn.
    """

    precision: float
    recall: float
    f1: float
    average_precision: float | None
    labels: str
    intervals: dict[str, tuple[float, float]]

    def sentence(self) -> str:
        """Precision, recall and F1 for a reader, and F1 when rows are drawn again."""
        within = "{:.2f} to {:.2f} in 95 % of resamples of the rows".format(*self.intervals["f1"])
        return f"precision {self.precision:.2f}, recall {self.recall:.2f}, F1 {self.f1:.2f} ({within})"


def evaluate(detected: HeadMask, score: Floats, resampled: HeadMask, labels: Labels) -> Metrics:
    """Precision, recall and F1 of `detected`, average precision of `score`, both [layers, heads]. `resampled`:
    [resamples, layers, heads], what is detected when rows are drawn again."""
    from sklearn.metrics import average_precision_score  # not above: importing sklearn writes to os.environ

    truth = labels.mask(detected.shape)
    average = float(average_precision_score(truth.ravel(), score.ravel())) if truth.any() else None
    low, high = resampled_range(agreement(truth, resampled).T)
    names = ("precision", "recall", "f1")
    intervals = dict(zip(names, zip(low.tolist(), high.tolist(), strict=True), strict=True))
    precision, recall, f1 = agreement(truth, detected).tolist()
    return Metrics(precision, recall, f1, average, labels.source, intervals)


def agreement(truth: HeadMask, detected: HeadMask) -> Floats:
    """Precision, recall and F1 of `detected` [..., layers, heads] against `truth` [layers, heads], each in [0, 1].

    The result is [3, ...]. Undefined cases are decided: if nothing is labelled and nothing detected, all three are 1.0;
    otherwise a share of nothing is 0.0.
    """
    hits, found = (truth & detected).sum((-2, -1)), detected.sum((-2, -1))
    both = found + truth.sum()
    shares = np.stack([hits / np.maximum(found, 1), hits / max(truth.sum(), 1), 2 * hits / np.maximum(both, 1)])
    # Otherwise "nothing to find, nothing found" would be 0.0, and a right answer would look like the worst one.
    return np.where(both == 0, 1.0, shares)
