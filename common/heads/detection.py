"""Decide what each head is. NumPy arrays only, never a model.

1. A head's score is its prefix matching on rows with a repeat; its null is what it pays to the same cells of the
   control rows, where the second segment is no copy of the first.
2. Its threshold is dynamic, from the mean and the variance of its null:
   `threshold = control + max(deviations · std(control), LEAST_LIFT)`.
   `deviations` is at least `LEAST_DEVIATIONS`, and enough that of all models whose heads ignore the repeat at most a
   share `FALSE_POSITIVES` has a head that passes, whatever the number of heads (Bonferroni). `LEAST_LIFT` is the size
   of effect that matters: below it a head can be real and is negligible.
3. A head whose score reaches its threshold attends to its targets. What that does to the correct token's logit is its
   total effect (common/attribution.py): `induction` raises it by `LEAST_EFFECT` nats or more, `suppression` lowers it
   by as much, `attends-only` does neither.
4. Of the other heads, one whose attention to earlier copies reaches the threshold of the same rule is
   `duplicate-token`; one that pays most of its attention, at the same queries, to the previous token or to BOS is
   `previous-token` or `first-token`; the rest is `none`.
5. Rows are drawn again with replacement and steps 1 to 4 repeated: the confidence of a verdict is the share of
   resamples that agree with it.

With a fixed threshold (`--threshold 0.4`, the habit of the field) only step 2 changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from common.heads.statistics import RowSums, bootstrap_weights, percentile_interval, resampled_mean

Floats = NDArray[np.float64]

LEAST_DEVIATIONS = 1.0
LEAST_LIFT = 0.05
LEAST_EFFECT = 0.05
FALSE_POSITIVES = 0.01  # chance that a model without induction has a head that passes by chance
MOST = 0.5  # "most of its attention"

VERDICTS = ("none", "first-token", "previous-token", "duplicate-token", "attends-only", "suppression", "induction")


@dataclass(frozen=True)
class Attention:
    """Attention to the targets against the head's own null.

    Per head, [layers, heads]: `score`, `control` and `threshold` in [0, 1], the `low` and `high` end of the score's
    95 % interval, and the `confidence` of the decision in [0, 1].
    """

    score: Floats
    control: Floats
    threshold: Floats
    low: Floats
    high: Floats
    confidence: Floats

    @property
    def attends(self) -> NDArray[np.bool_]:
        """Heads whose score reaches their threshold (`score >= threshold`), whatever they do with it."""
        return self.score >= self.threshold


@dataclass(frozen=True)
class Detection(Attention):
    """With each head's `verdict` (one of `VERDICTS`), [layers, heads]; `confidence` is that of the verdict.

    `resampled`: which heads are induction heads when rows are drawn again, [resamples, layers, heads].
    """

    verdict: NDArray[np.str_]
    resampled: NDArray[np.bool_]

    @property
    def induction(self) -> NDArray[np.bool_]:
        """Heads that attend to their targets and raise them."""
        return self.verdict == "induction"

    def ranked(self) -> list[tuple[int, int]]:
        """The induction heads as (layer, head), highest score first."""
        return [head for head in by_score(self.score) if self.induction[head]]


class Precision(NamedTuple):
    """How well chance is known. `error`: standard error of the difference of score and control for a head that ignores
    the repeat, in standard deviations of its control cells; `freedom`: degrees of freedom of that deviation."""

    error: float
    freedom: int

    @classmethod
    def of_rows(cls, rows: int) -> Precision:
        """For as many control rows as rows, at worst with all queries of a row alike."""
        return cls(float(np.sqrt(2 / rows)), rows - 1)


def attend(repeats: RowSums, controls: RowSums, precision: Precision, *, threshold: float | None = None) -> Attention:
    """Compare each head's score with its own threshold, or with one `threshold` for all.

    `repeats`, `controls`: prefix matching, [rows, layers, heads], at the same cells with and without the repeat.
    """
    whole = np.ones((1, len(repeats.counts)))
    score, limit, control = (value[0] for value in _attention(repeats, controls, whole, precision, threshold))
    weights = bootstrap_weights(len(repeats.counts))
    scores, limits, _ = _attention(repeats, controls, weights, precision, threshold)
    low, high = percentile_interval(scores)
    confidence = ((scores >= limits) == (score >= limit)).mean(0)
    return Attention(score, control, limit, low, high, confidence)


def detect(
    repeats: Mapping[str, RowSums],
    controls: Mapping[str, RowSums],
    effect: Floats,
    *,
    threshold: float | None = None,
) -> Detection:
    """The verdict on every head.

    `repeats`, `controls`: attention sums per head type, [rows, layers, heads], on battery rows and on their controls.
    `effect`: total effect on the correct token, [rows, layers, heads], in nats, on any rows with a repeat.
    `threshold`: one number for all heads in place of their own.
    """
    rows = len(repeats["prefix_matching"].counts)
    precision = Precision.of_rows(rows)
    found = attend(repeats["prefix_matching"], controls["prefix_matching"], precision, threshold=threshold)
    verdict = _verdicts(repeats, controls, effect.mean(0), np.ones((1, rows)), precision, threshold)[0]
    effects = resampled_mean(effect, bootstrap_weights(len(effect), seed=1))
    resampled = _verdicts(repeats, controls, effects, bootstrap_weights(rows), precision, threshold)
    return Detection(
        found.score,
        found.control,
        found.threshold,
        found.low,
        found.high,
        confidence=(resampled == verdict).mean(0),
        verdict=np.array(VERDICTS)[verdict],
        resampled=resampled == VERDICTS.index("induction"),
    )


def deviations(heads: int, precision: Precision) -> float:
    """How many standard deviations of its control cells a head's score must lie above their mean.

    A head that ignores the repeat passes with a probability of `FALSE_POSITIVES / heads` at the most (Student's t).
    """
    return max(LEAST_DEVIATIONS, float(stdtrit(precision.freedom, 1 - FALSE_POSITIVES / heads)) * precision.error)


def _attention(
    repeats: RowSums, controls: RowSums, weights: Floats, precision: Precision, threshold: float | None
) -> tuple[Floats, Floats, Floats]:
    """Score, threshold and control, each [resamples, layers, heads], with rows weighted by `weights`."""
    score, _ = repeats.resampled(weights)
    control, spread = controls.resampled(weights)
    if threshold is not None:
        return score, np.full_like(score, threshold), control
    heads = int(np.prod(score.shape[1:]))
    return score, control + np.maximum(deviations(heads, precision) * spread, LEAST_LIFT), control


def _verdicts(
    repeats: Mapping[str, RowSums],
    controls: Mapping[str, RowSums],
    effect: Floats,
    weights: Floats,
    precision: Precision,
    threshold: float | None,
) -> NDArray[np.int64]:
    """Each head's verdict as its place in `VERDICTS`, [resamples, layers, heads]."""
    kind = "prefix_matching"
    score, limit, _ = _attention(repeats[kind], controls[kind], weights, precision, threshold)
    attends = score >= limit
    kind = "duplicate_token"
    score, limit, _ = _attention(repeats[kind], controls[kind], weights, precision, None)
    conditions = {
        "induction": attends & (effect >= LEAST_EFFECT),
        "suppression": attends & (effect <= -LEAST_EFFECT),
        "attends-only": attends,
        "duplicate-token": score >= limit,
        "previous-token": _share(repeats, "budget_previous", weights) > MOST,
        "first-token": _share(repeats, "budget_bos", weights) > MOST,
    }
    return np.select(list(conditions.values()), [VERDICTS.index(name) for name in conditions], VERDICTS.index("none"))


def _share(repeats: Mapping[str, RowSums], part: str, weights: Floats) -> Floats:
    """What queries with a target pay to a part of the budget, [resamples, layers, heads]."""
    queries = weights @ repeats["prefix_matching"].counts
    return np.tensordot(weights, repeats[part].sums, 1) / queries[:, None, None]


def by_score(score: Floats) -> list[tuple[int, int]]:
    """Every (layer, head), highest score first; NaN last."""
    order = np.argsort(-np.nan_to_num(score, nan=-np.inf), axis=None, kind="stable")
    return [(int(layer), int(head)) for layer, head in zip(*np.unravel_index(order, score.shape), strict=True)]


def name(layer: int, head: int) -> str:
    """`5.1`: layer 5, head 1, both from 0."""
    return f"{layer}.{head}"
