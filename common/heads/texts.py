"""What the heads do on one text of the user's. The same question as on the battery, asked of few cells.

1. The score is prefix matching on the text. Its null is what the head pays to the same cells of `CONTROL_ROWS` control
   rows: the text with every token that repeats drawn afresh.
2. The threshold lies `LEAST_LIFT` above the highest score on a control text. A head that ignores the repeat scores like
   one more control text, so it passes in at most one text of `CONTROL_ROWS` + 1, whatever law its scores follow: those
   of a short text are far from normal, and a bound by Student's t would be wrong on either side.
   Where the highest control leaves no room below 1, the text decides nothing about that head.
3. A score on one text has no interval. Its queries share their tokens, so they are no independent draws, and there is
   one text. What can be said is how it lies to the control texts, and the threshold says it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from common.heads.detection import LEAST_LIFT, Attention
from common.heads.scores import HeadScores, score
from common.heads.statistics import Floats, Ints, divided
from common.heads.tokens import TokenBatch, with_controls

if TYPE_CHECKING:
    from common.loading.model import Model

CONTROL_ROWS = 32  # as many as a lot of the battery has
FEW = 5  # queries; a sentence that rests on fewer says so


@dataclass(frozen=True)
class TextScores:
    """What the heads do on a text.

    `scores`: of every head type. `queries`: how many have a target. `attention`: to the targets, against the null;
    None if no query has a target that a control text can be free of. `highest`: each head's highest score
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
        paid, null = (
            score(model, rows, batch_size=batch_size).sums["prefix_matching"] for rows in (compared, controls)
        )
        highest = divided(null.sums, null.counts).max(0)
        limit = highest + LEAST_LIFT if threshold is None else np.full_like(highest, threshold)
        attention = Attention(paid.mean(), null.mean(), limit)
    pairs = list(zip(cells.query.tolist(), cells.key.tolist(), strict=True))
    return TextScores(score(model, batch, batch_size=1), len(cells.queries()[0]), attention, highest, pairs)
