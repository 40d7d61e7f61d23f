"""Decide which heads are induction heads. NumPy arrays only, never a model.

1. A head's score is its prefix matching on rows with a repeat; its null is what it does in the control rows, at the
   same cells, where the second segment is no copy of the first.
2. Its threshold is dynamic: the mean of its null plus `STANDARD_DEVIATIONS` times the spread of its null.
3. A head that clears its threshold by a hair is real and negligible, so the lift over the null must also be at least
   `LEAST_LIFT`. A head is an induction head if `score >= threshold` and `score - control >= LEAST_LIFT`.

With a fixed threshold (`--threshold 0.4`, the habit of the field) only `score >= threshold` counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.sequences import Floats

STANDARD_DEVIATIONS = 2.0
LEAST_LIFT = 0.05


@dataclass(frozen=True)
class Detection:
    """Per head, [layers, heads]: `score` and `control` in [0, 1], `threshold`, and whether it is an induction head."""

    score: Floats
    control: Floats
    threshold: Floats
    induction: NDArray[np.bool_]

    def ranked(self) -> list[tuple[int, int]]:
        """The induction heads as (layer, head), highest score first."""
        return [head for head in by_score(self.score) if self.induction[head]]


def detect(score: Floats, control: Floats, control_std: Floats, *, threshold: float | None = None) -> Detection:
    """Compare each head's score with its own threshold, or with one `threshold` for all.

    `score`, `control`, `control_std`: [layers, heads], mean prefix matching on repeats and on controls, and the
    standard deviation of the latter over queries.
    """
    if threshold is not None:
        limit = np.full_like(score, threshold)
        return Detection(score, control, limit, score >= limit)
    limit = control + np.maximum(STANDARD_DEVIATIONS * control_std, LEAST_LIFT)
    return Detection(score, control, limit, score >= limit)


def by_score(score: Floats) -> list[tuple[int, int]]:
    """Every (layer, head), highest score first; NaN last."""
    order = np.argsort(-np.nan_to_num(score, nan=-np.inf), axis=None, kind="stable")
    return [(int(layer), int(head)) for layer, head in zip(*np.unravel_index(order, score.shape), strict=True)]


def name(layer: int, head: int) -> str:
    """`5.1`: layer 5, head 1, both from 0."""
    return f"{layer}.{head}"
