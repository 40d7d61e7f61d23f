"""What the heads do on one text of the user's. The same question as on the battery, asked of few cells.

1. The score is prefix matching on the text. Its null is what the head pays to the same cells of `CONTROL_ROWS` control
   rows: the text with every token that repeats drawn afresh.
2. The threshold follows the rule of common/heads/detection.py, with one row against `CONTROL_ROWS`. The fewer queries a
   row has, the more its null spreads, and the higher a head must score to pass.
3. A score on one text has no interval. Its queries share their tokens, so they are no independent draws, and there is
   one text. What can be said is how it lies to the control texts, and the threshold says it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.heads.detection import Attention, attend
from common.heads.scores import HeadScores, score
from common.heads.statistics import Ints
from common.heads.tokens import TokenBatch, with_controls

if TYPE_CHECKING:
    from common.loading.model import Model

CONTROL_ROWS = 32  # as many as a lot of the battery has
FEW = 5  # queries; a sentence that rests on fewer says so


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
        paid, null = (
            score(model, rows, batch_size=batch_size).sums["prefix_matching"] for rows in (compared, controls)
        )
        attention = attend(paid, null, threshold=threshold)
    pairs = list(zip(cells.query.tolist(), cells.key.tolist(), strict=True))
    return TextScores(score(model, batch, batch_size=1), len(cells.queries()[0]), attention, pairs)
