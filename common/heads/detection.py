"""Decide what each head is. NumPy arrays only, never a model.

1. A head's score is its prefix matching on rows with a repeat. Its null is what it pays to the same cells of the
   control rows, where the second segment is no copy of the first.
2. Its threshold is dynamic, from the mean and the spread of its null:
   `threshold = mean(control) + max(deviations * spread, LEAST_LIFT)`.
   `spread` is the standard deviation of the rows' means, pooled over rows with a repeat and control rows. Tokens of one
   row are no independent draws, rows are. Why pooled: a head that rarely looks far has control rows in which it never
   does, and they alone would say that it never varies.
   `deviations` is so large that at most a share `FALSE_POSITIVES` of all models whose heads ignore the repeat has one
   head that passes, whatever the number of heads (Student's t for two samples, Bonferroni).
3. A head whose score reaches its threshold (`score >= threshold`) attends to its targets more than chance explains.
   What that does to the correct token's logit, against the mean of all logits, is its total effect
   (common/heads/attribution.py): `induction` raises it by `LEAST_EFFECT` nats or more, `suppression` lowers it by as
   much. A head that does neither is `attends-only` if its score lies `NOTABLE` or more above its null: many heads of a
   trained model attend a little, to no effect.
   No score can pass a threshold of 1 or more. A head that has one, and scores higher than its null by `LEAST_LIFT` or
   more, is `undecided`: the method has failed on it, and that is no verdict.
4. Of the other heads, one whose attention to earlier copies reaches the threshold of the same rule, and lies `NOTABLE`
   or more above its null, is `duplicate-token`. One that pays most of its attention, at the same queries, to the
   previous token or to BOS is `previous-token` or `first-token`. All others are `none`.
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

# What each of these decides, measured on models that judge nothing else: `python -m benchmarks.calibration`.
LEAST_LIFT = 0.01  # a smaller lift over the control can be real and is negligible
NOTABLE = 0.05  # what a head that has no effect must lift its attention by to be named for where it looks
LEAST_EFFECT = 0.05  # nats; a smaller effect on the logit is negligible too
FALSE_POSITIVES = 0.01  # chance that a model without induction has a head that passes; the usual level of a strict test
MOST = 0.5  # "most of its attention": more than all the rest, by the word's meaning

Sums = Mapping[str, RowSums]  # per head type and part of the budget, [rows, layers, heads]

VERDICTS = (
    "none", "first-token", "previous-token", "duplicate-token", "attends-only", "suppression", "induction", "undecided",
)  # fmt: skip
ON_TARGETS = ("attends-only", "suppression", "induction")  # verdicts on heads that attend to their targets


@dataclass(frozen=True)
class Attention:
    """Each head's attention to the targets against its own null, [layers, heads] each and in [0, 1]."""

    score: Floats
    control: Floats
    threshold: Floats

    @property
    def attends(self) -> Bools:
        """Heads whose score reaches their threshold (`score >= threshold`), [layers, heads]."""
        return self.score >= self.threshold


@dataclass(frozen=True)
class Detection(Attention):
    """`Attention` with each head's `verdict`, one of `VERDICTS`, [layers, heads]; `confidence` is that of the verdict.

    `low`, `high`: the ends of the score's 95 % interval over rows. `resampled`, `resampled_attends`: [resamples,
    layers, heads], which heads are induction heads, or attend to their targets, when rows are drawn again.
    """

    low: Floats
    high: Floats
    confidence: Floats
    verdict: NDArray[np.str_]
    resampled: Bools
    resampled_attends: Bools

    @property
    def attends(self) -> Bools:
        """Heads that attend to their targets with an effect, or notably without one, [layers, heads]."""
        return np.isin(self.verdict, ON_TARGETS)

    @property
    def induction(self) -> Bools:
        """Heads that attend to their targets and raise the correct token, [layers, heads]."""
        return self.verdict == "induction"

    def ranked(self) -> list[Head]:
        """The induction heads, highest score first."""
        return [Head.at(*place) for place in by_score(self.score) if self.induction[place]]


def attend(repeats: RowSums, controls: RowSums, *, threshold: float | None = None) -> Attention:
    """Compare each head's score with its own threshold, or with one `threshold` in [0, 1] for all heads.

    `repeats`, `controls`: prefix matching, [rows, layers, heads], at the same cells with and without the repeat; one
    row with a repeat is enough, of controls there must be two or more.
    """
    once, each_control = (np.ones((1, len(sums.counts))) for sums in (repeats, controls))
    score, control, limit = _against_null(repeats, controls, once, each_control, threshold)
    return Attention(score[0], control[0], limit[0])


def detect(repeats: Sums, controls: Sums, effect: Floats, *, threshold: float | None = None) -> Detection:
    """The verdict on every head.

    `repeats`, `controls`: attention on battery rows and on their controls.
    `effect`: total effect on the correct token, [rows, layers, heads], in nats, on any rows with a repeat.
    `threshold`: one number in [0, 1] for all heads in place of their own.
    """
    queries = repeats["prefix_matching"].counts  # those with a target
    weights = _draws(len(queries))
    # Effects are measured on fewer rows than scores, so their rows are drawn again separately, from another seed.
    effects = resampled_mean(effect, _draws(len(effect), seed=1))

    def passes(kind: str, fixed: float | None = None) -> tuple[Bools, Bools, Bools]:
        """Which heads reach their threshold, which notably, and which cannot for want of one below 1."""
        score, control, limit = _against_null(repeats[kind], controls[kind], weights, weights, fixed)
        if fixed is not None:
            return score >= limit, score >= limit, np.zeros_like(score, dtype=bool)
        lift = score - control
        return score >= limit, (score >= limit) & (lift >= NOTABLE), (limit >= 1) & (lift >= LEAST_LIFT)

    def gets_most(part: str) -> Bools:
        # Divided by all queries with a target, not by those that have a cell of this part: the parts must sum to 1.
        return np.tensordot(weights, repeats[part].sums, 1) / (weights @ queries)[:, None, None] > MOST

    attends, notably, unreachable = passes("prefix_matching", threshold)
    # The first condition that holds decides. A fixed threshold is about prefix matching, not about earlier copies.
    conditions = {
        "undecided": unreachable,
        "induction": attends & (effects >= LEAST_EFFECT),
        "suppression": attends & (effects <= -LEAST_EFFECT),
        "attends-only": notably,
        "duplicate-token": passes("duplicate_token")[1],
        "previous-token": gets_most("budget_previous"),
        "first-token": gets_most("budget_bos"),
    }
    verdicts = np.select(list(conditions.values()), list(map(VERDICTS.index, conditions)), VERDICTS.index("none"))
    found = attend(repeats["prefix_matching"], controls["prefix_matching"], threshold=threshold)
    low, high = (np.clip(end, 0.0, 1.0) for end in repeats["prefix_matching"].interval())
    names = np.array(VERDICTS)[verdicts]
    return Detection(
        **vars(found), low=low, high=high, confidence=(verdicts[1:] == verdicts[0]).mean(0), verdict=names[0],
        resampled=names[1:] == "induction", resampled_attends=np.isin(names[1:], ON_TARGETS),
    )  # fmt: skip


def deviations(heads: int, rows: int, control_rows: int) -> float:
    """How many standard deviations of a row a head's score on `rows` rows must lie above its mean on control rows.

    A head that ignores the repeat passes with a probability of at most `FALSE_POSITIVES / heads`: score and control are
    then means of `rows` and `control_rows` draws of one kind, and Student's t says how far they part by chance.
    """
    error = np.sqrt(1 / rows + 1 / control_rows)
    return float(stdtrit(rows + control_rows - 2, 1 - FALSE_POSITIVES / heads) * error)


def _draws(rows: int, seed: int = 0) -> Floats:
    """How often each row counts, [1 + resamples, rows]: first each once, then as they are drawn again."""
    return np.concatenate([np.ones((1, rows)), bootstrap_weights(rows, seed)])


def _against_null(
    repeats: RowSums, controls: RowSums, rows: Floats, control_rows: Floats, threshold: float | None
) -> tuple[Floats, Floats, Floats]:
    """Score, control and threshold, [resamples, layers, heads] each. `rows`, `control_rows`: how often each row counts,
    [resamples, rows]."""
    score, control = repeats.resampled(rows), controls.resampled(control_rows)
    if threshold is not None:
        return score, control, np.full_like(score, threshold)
    n_rows, n_controls = rows.shape[1], control_rows.shape[1]
    squares = repeats.squares_between(rows) + controls.squares_between(control_rows)
    spread = np.sqrt(squares / (n_rows + n_controls - 2))
    needed = deviations(score[0].size, n_rows, n_controls)
    return score, control, control + np.maximum(needed * spread, LEAST_LIFT)


def by_score(score: Floats) -> list[tuple[int, int]]:
    """Every (layer, head) of the `score` [layers, heads], highest first; NaN last."""
    # Stable, so that of equal scores the lower layer comes first, then the lower head.
    order = np.argsort(-np.nan_to_num(score, nan=-np.inf), axis=None, kind="stable")
    return [(int(layer), int(head)) for layer, head in zip(*np.unravel_index(order, score.shape), strict=True)]
