"""What the heads do on one text of the user's. The same question as on the battery, asked of few cells.

1. The score is prefix matching on the text. Its null is what the head pays to the same cells of `CONTROL_ROWS` control
   rows: the text with every token that repeats drawn afresh.
2. The threshold follows the rule of common/heads/detection.py. A query of the text counts as a row does there, so the
   fewer queries there are, the higher a head must score to pass.
3. The interval is over queries. With fewer than `FEW` queries it is not shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from common.heads.detection import Attention, attend, deviations
from common.heads.scores import HeadScores, per_query, score
from common.heads.statistics import Ints, RowSums
from common.heads.tokens import TokenBatch, with_controls

if TYPE_CHECKING:
    from common.loading.model import Model

CONTROL_ROWS = 32  # as many as a lot of the battery has
FEW = 5  # a bootstrap of fewer values gives an interval that is too narrow


@dataclass(frozen=True)
class TextScores:
    """What the heads do on a text.

    `scores`: of every head type. `queries`: how many have a target. `attention`: to the targets, against the null; None
    if no query has a target that a control row can be free of. `cells`: the induction cells, as (query, key).
    """

    scores: HeadScores
    queries: int
    attention: Attention | None
    cells: list[tuple[int, int]]


def score_text(model: Model, tokens: Ints, *, seed: int, batch_size: int, threshold: float | None = None) -> TextScores:
    """Score every head on one row of ids, `tokens` [pos], BOS first.

    `threshold`: one number in [0, 1] for all heads in place of their own.
    """
    batch = TokenBatch.of([tokens], pad=model.bos)
    cells = batch.cells["prefix_matching"]
    attention = None
    compared, controls = with_controls(batch, model.ordinary(), rows=CONTROL_ROWS, seed=seed)
    if len(compared.cells["prefix_matching"].row):
        paid = per_query(model, compared, batch_size=1)
        null = per_query(model, controls, batch_size=batch_size).reshape(CONTROL_ROWS, *paid.shape)
        counts = np.ones(len(paid), dtype=np.int64)  # each query counts as a row
        # Variance of a mean over the text's queries, plus that of the null's mean, which is known from as many times
        # more values. The spread of the null comes from `CONTROL_ROWS` rows, whose queries share their tokens.
        error = float(np.sqrt((1 + 1 / CONTROL_ROWS) / len(paid)))
        attention = attend(
            RowSums(paid, paid**2, counts),
            RowSums(null.sum(0), (null**2).sum(0), counts * CONTROL_ROWS),
            deviations(paid[0].size, error, CONTROL_ROWS - 1),
            threshold=threshold,
        )
    pairs = list(zip(cells.query.tolist(), cells.key.tolist(), strict=True))
    return TextScores(score(model, batch, batch_size=1), len(cells.queries()[0]), attention, pairs)
