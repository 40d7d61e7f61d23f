"""Decide what each head is. NumPy arrays only, never a model.

1. A head's score is its prefix matching on rows with a repeat. Its null is what it pays to the same cells of the
   control rows, where the second segment is no copy of the first.
2. Its threshold is dynamic, from the mean and the spread of its null:
   `threshold = mean(control) + max(deviations * std(control), LEAST_LIFT)`.
   `deviations` is at least `LEAST_DEVIATIONS`, and so large that of all models whose heads ignore the repeat at most a
   share `FALSE_POSITIVES` has a head that passes, whatever the number of heads (Bonferroni).
3. A head whose score reaches its threshold (`score >= threshold`) attends to its targets. What that does to the
   correct token's logit is its total effect (common/heads/attribution.py): `induction` raises it by `LEAST_EFFECT` nats
   or more, `suppression` lowers it by as much, `attends-only` does neither.
   No score can pass a threshold of 1 or more. A head that has one, and scores higher than its null by `LEAST_LIFT` or
   more, is `undecided`: the method has failed on it, and that is no verdict.
4. Of the other heads, one whose attention to earlier copies reaches the threshold of the same rule is
   `duplicate-token`. One that pays most of its attention, at the same queries, to the previous token or to BOS is
   `previous-token` or `first-token`. All others are `none`.
5. Rows are drawn again with replacement and steps 1 to 4 repeated. The confidence of a verdict is the share of these
   resamples that agree with it.

With a fixed threshold (`--threshold 0.4`, the habit of the field) only step 2 changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from common.attention.head import Head
from common.heads.statistics import Bools, Floats, RowSums, bootstrap_weights, resampled_mean

LEAST_DEVIATIONS = 1.0
LEAST_LIFT = 0.05  # a smaller lift over the control can be real and is negligible
LEAST_EFFECT = 0.05  # nats; a smaller effect on the logit is negligible too
FALSE_POSITIVES = 0.01  # chance that a model without induction has a head that passes
MOST = 0.5  # "most of its attention"

Sums = Mapping[str, RowSums]  # per head type and part of the budget, [rows, layers, heads]

VERDICTS = (
    "none", "first-token", "previous-token", "duplicate-token", "attends-only", "suppression", "induction", "undecided",
)  # fmt: skip


@dataclass(frozen=True)
class Attention:
    """Each head's attention to the targets against its own null, [layers, heads] each and in [0, 1].

    `low`, `high`: the ends of the score's 95 % interval. `confidence`: in the decision whether the head attends.
    """

    score: Floats
    control: Floats
    threshold: Floats
    low: Floats
    high: Floats
    confidence: Floats

    @property
    def attends(self) -> Bools:
        """Heads whose score reaches their threshold (`score >= threshold`), whatever their effect, [layers, heads]."""
        return self.score >= self.threshold


@dataclass(frozen=True)
class Detection(Attention):
    """`Attention` with each head's `verdict`, one of `VERDICTS`, [layers, heads]; `confidence` is that of the verdict.

    `resampled`: [resamples, layers, heads], which heads are induction heads when rows are drawn again.
    """

    verdict: NDArray[np.str_]
    resampled: Bools

    @property
    def induction(self) -> Bools:
        """Heads that attend to their targets and raise the correct token, [layers, heads]."""
        return self.verdict == "induction"

    def ranked(self) -> list[Head]:
        """The induction heads, highest score first."""
        return [Head.at(*place) for place in by_score(self.score) if self.induction[place]]


def attend(repeats: RowSums, controls: RowSums, needed: float, *, threshold: float | None = None) -> Attention:
    """Compare each head's score with its own threshold, or with one `threshold` in [0, 1] for all heads.

    `repeats`, `controls`: prefix matching, [rows, layers, heads], at the same cells with and without the repeat.
    `needed`: how many standard deviations of its control cells a score must lie above their mean (`deviations`).
    """
    weights = _draws(len(repeats.counts))
    score, limit, control = _against_null(repeats, controls, weights, needed, threshold)
    low, high = (np.clip(end, 0.0, 1.0) for end in repeats.interval())
    attends = score >= limit
    return Attention(score[0], control[0], limit[0], low, high, (attends[1:] == attends[0]).mean(0))


def detect(repeats: Sums, controls: Sums, effect: Floats, *, threshold: float | None = None) -> Detection:
    """The verdict on every head.

    `repeats`, `controls`: attention on battery rows and on their controls.
    `effect`: total effect on the correct token, [rows, layers, heads], in nats, on any rows with a repeat.
    `threshold`: one number in [0, 1] for all heads in place of their own.
    """
    queries = repeats["prefix_matching"].counts  # those with a target
    weights = _draws(len(queries))
    # At worst all queries of a row say the same: then each of the two means is one of as many values as there are rows.
    needed = deviations(effect[0].size, float(np.sqrt(2 / len(queries))), len(queries) - 1)
    # Effects are measured on fewer rows than scores, so their rows are drawn again separately, from another seed.
    effects = resampled_mean(effect, _draws(len(effect), seed=1))

    def passes(kind: str, fixed: float | None = None) -> tuple[Bools, Bools]:
        score, limit, control = _against_null(repeats[kind], controls[kind], weights, needed, fixed)
        return score >= limit, (limit >= 1) & (score >= control + LEAST_LIFT)

    def gets_most(part: str) -> Bools:
        # Divided by all queries with a target, not by those that have a cell of this part: the parts must sum to 1.
        return np.tensordot(weights, repeats[part].sums, 1) / (weights @ queries)[:, None, None] > MOST

    attends, unreachable = passes("prefix_matching", threshold)
    # The first condition that holds decides. A fixed threshold is about prefix matching, not about earlier copies.
    conditions = {
        "undecided": unreachable if threshold is None else np.zeros_like(attends),
        "induction": attends & (effects >= LEAST_EFFECT),
        "suppression": attends & (effects <= -LEAST_EFFECT),
        "attends-only": attends,
        "duplicate-token": passes("duplicate_token")[0],
        "previous-token": gets_most("budget_previous"),
        "first-token": gets_most("budget_bos"),
    }
    verdicts = np.select(list(conditions.values()), list(map(VERDICTS.index, conditions)), VERDICTS.index("none"))
    found = attend(repeats["prefix_matching"], controls["prefix_matching"], needed, threshold=threshold)
    parts = vars(found) | {"confidence": (verdicts[1:] == verdicts[0]).mean(0)}
    resampled = verdicts[1:] == VERDICTS.index("induction")
    return Detection(**parts, verdict=np.array(VERDICTS)[verdicts[0]], resampled=resampled)


def deviations(heads: int, error: float, freedom: int) -> float:
    """How many standard deviations of its control cells a head's score must lie above their mean.

    A head that ignores the repeat passes with a probability of at most `FALSE_POSITIVES / heads` (Student's t).
    `error`: standard error of score minus control for such a head, in standard deviations of its control cells.
    `freedom`: degrees of freedom of that standard deviation.
    """
    return max(LEAST_DEVIATIONS, float(stdtrit(freedom, 1 - FALSE_POSITIVES / heads)) * error)


def _draws(rows: int, seed: int = 0) -> Floats:
    """How often each row counts, [1 + resamples, rows]: first each once, then as they are drawn again."""
    return np.concatenate([np.ones((1, rows)), bootstrap_weights(rows, seed)])


def _against_null(
    repeats: RowSums, controls: RowSums, weights: Floats, needed: float, threshold: float | None
) -> tuple[Floats, Floats, Floats]:
    """Score, threshold and control, [resamples, layers, heads] each; rows count `weights` [resamples, rows] times."""
    score, _ = repeats.resampled(weights)
    control, spread = controls.resampled(weights)
    limit = control + np.maximum(needed * spread, LEAST_LIFT) if threshold is None else np.full_like(score, threshold)
    return score, limit, control


def by_score(score: Floats) -> list[tuple[int, int]]:
    """Every (layer, head) of the `score` [layers, heads], highest first; NaN last."""
    # Stable, so that of equal scores the lower layer comes first, then the lower head.
    order = np.argsort(-np.nan_to_num(score, nan=-np.inf), axis=None, kind="stable")
    return [(int(layer), int(head)) for layer, head in zip(*np.unravel_index(order, score.shape), strict=True)]
