"""How well a detection agrees with labels. The labels always have a name: no number without saying against what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from common.heads.statistics import Floats, resampled_range

if TYPE_CHECKING:
    from common.heads.detection import Detection
    from common.heads.labels import Labels

HeadMask = NDArray[np.bool_]  # [layers, heads]
INDUCTION = "induction heads"
ATTENDING = "heads that attend to their targets, with an effect or notably without one"


@dataclass(frozen=True)
class Metrics:
    """Agreement with the `labels` of that source, each number in [0, 1], higher is better.

    `kind`: what the labels rest on, `labels_are`: the same in words, `measured`: what was measured for them;
    `compared`: which of our heads are compared with them; `not_counted`: the heads that count neither way.
    `precision`, `f1` and `average_precision` are None for labels that say nothing of the heads outside their list, the
    last also if no head is labelled. `intervals`: between which values those that are not None lie in 95 % of the
    resamples of the rows that detection drew; the labels stay the same. That is how far the numbers hang on the rows.
    It is no confidence interval: heads and labels are not drawn.
    """

    precision: float | None
    recall: float
    f1: float | None
    average_precision: float | None
    labels: str
    intervals: dict[str, tuple[float, float]]
    kind: str
    labels_are: str
    measured: str
    compared: str
    not_counted: tuple[str, ...]

    def sentence(self) -> str:
        """What is compared with what, and precision, recall and F1, the last of them also when rows are drawn again."""
        said = [f"Agreement with {self.labels_are}; compared: {self.compared}; {self._numbers()}."]
        if self.not_counted:
            said.append(f"Named by the source with less support and not counted: {', '.join(self.not_counted)}.")
        return " ".join(said)

    def _numbers(self) -> str:
        name = "recall" if self.f1 is None else "f1"
        interval = "({:.2f} to {:.2f} in 95 % of resamples of the rows)".format(*self.intervals[name])
        if self.f1 is None or self.precision is None:
            why = "no precision, as the labels say nothing of other heads"
            return f"recall {self.recall:.2f} {interval}; {why}"
        return f"precision {self.precision:.2f}, recall {self.recall:.2f}, F1 {self.f1:.2f} {interval}"


def compared_with(found: Detection, labels: Labels) -> tuple[str, HeadMask, HeadMask]:
    """Which of our heads `labels` can judge: what they are called, [layers, heads], [resamples, layers, heads].

    Labels that rest on attention alone are compared with attention alone: that a head does nothing with what it attends
    to is no error against them, and that it does something no success.
    """
    if labels.kind == "attention":
        return ATTENDING, found.attends, found.resampled_attends
    return INDUCTION, found.induction, found.resampled


def evaluate(
    detected: HeadMask, score: Floats, resampled: HeadMask, labels: Labels, compared: str = INDUCTION
) -> Metrics:
    """Agreement of `detected` and of `score`, both [layers, heads], with `labels`. `resampled`: [resamples, layers,
    heads], what is detected when rows are drawn again. `compared`: what the detected heads are called; `compared_with`
    says which of them the labels can judge."""
    from sklearn.metrics import average_precision_score  # not above: importing sklearn writes to os.environ

    truth, counted = labels.mask(detected.shape), labels.counted(detected.shape)
    average = float(average_precision_score(truth[counted], score[counted])) if truth.any() else None
    numbers = agreement(truth, detected & counted).tolist()
    low, high = resampled_range(agreement(truth, resampled & counted).T)
    names = ("precision", "recall", "f1")
    measured = dict(zip(names, zip(numbers, low.tolist(), high.tolist(), strict=True), strict=True))
    known = {name: values for name, values in measured.items() if labels.complete or name == "recall"}
    return Metrics(
        precision=known["precision"][0] if labels.complete else None, recall=known["recall"][0],
        f1=known["f1"][0] if labels.complete else None, average_precision=average if labels.complete else None,
        labels=labels.source, intervals={name: (low, high) for name, (_, low, high) in known.items()},
        kind=labels.kind, labels_are=labels.called(), measured=labels.measured, compared=compared,
        not_counted=tuple(str(head) for head in sorted(labels.uncertain)),
    )  # fmt: skip


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
