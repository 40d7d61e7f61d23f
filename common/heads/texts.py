"""What the heads do on one text of the user's. The same question as on the battery, asked of few cells.

1. The score is prefix matching on the text. Its null is the same score, at the same cells, on each of `CONTROL_ROWS`
   control texts: the text with every token that repeats drawn afresh.
2. The threshold follows the rule of common/heads/detection.py, with the scores of whole control texts as the null. The
   queries of one text share its tokens and are no independent draws: however many there are, the text is one draw.
3. So one text has no interval. `confidence` is the share of resamples of the control texts with the same decision.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from common.heads.detection import Attention, attend, deviations
from common.heads.scores import HeadScores, per_query, score
from common.heads.statistics import Floats, Ints, RowSums
from common.heads.tokens import TokenBatch, with_controls

if TYPE_CHECKING:
    from common.loading.model import Model

CONTROL_ROWS = 32  # as many as a lot of the battery has
FEW = 5  # queries; what rests on fewer is said to rest on few


@dataclass(frozen=True)
class TextScores:
    """What the heads do on a text.

    `scores`: of every head type. `queries`: how many have a target. `attention`: to the targets, against the null, its
    interval NaN; None if no query has a target that a control text can be free of. `highest`: each head's highest score
    on a control text, [layers, heads], or None likewise. `cells`: the induction cells, as (query, key).
    """

    scores: HeadScores
    queries: int
    attention: Attention | None
    highest: Floats | None
    cells: list[tuple[int, int]]


def score_text(model: Model, tokens: Ints, *, seed: int, batch_size: int, threshold: float | None = None) -> TextScores:
    """Score every head on one row of ids, `tokens` [pos], BOS first.

    `threshold`: one number in [0, 1] for all heads in place of their own.
    """
    batch = TokenBatch.of([tokens], pad=model.bos)
    cells = batch.cells["prefix_matching"]
    attention = highest = None
    compared, controls = with_controls(batch, model.ordinary(), rows=CONTROL_ROWS, seed=seed)
    if len(compared.cells["prefix_matching"].row):
        paid = per_query(model, compared, batch_size=1)
        null = per_query(model, controls, batch_size=batch_size).reshape(CONTROL_ROWS, *paid.shape).mean(1)
        attention, highest = _against_control_texts(paid.mean(0), null, threshold), null.max(0)
    pairs = list(zip(cells.query.tolist(), cells.key.tolist(), strict=True))
    return TextScores(score(model, batch, batch_size=1), len(cells.queries()[0]), attention, highest, pairs)


def _against_control_texts(text: Floats, null: Floats, threshold: float | None) -> Attention:
    """The score of a `text` [layers, heads] against those of control texts, `null` [texts, layers, heads]."""
    texts, counts = len(null), np.ones(len(null), dtype=np.int64)
    # A head that ignores the repeat scores like one more control text: what varies is that one score and the mean of
    # the others. The last factor: `attend` divides by `texts` where an unbiased variance divides by one less.
    error = float(np.sqrt((1 + 1 / texts) * texts / (texts - 1)))
    same = np.broadcast_to(text, null.shape)  # however control texts are drawn again, the text stays what it is
    found = attend(
        RowSums(same, same**2, counts), RowSums(null, null**2, counts), deviations(text.size, error, texts - 1),
        threshold=threshold,
    )  # fmt: skip
    return replace(found, low=np.full_like(text, np.nan), high=np.full_like(text, np.nan))
