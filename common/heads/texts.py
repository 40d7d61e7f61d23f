"""What the heads do on a text of the user's: the battery's question asked again, with as much care, of few cells.

1. The score is prefix matching on the text. Its null is what the head pays to the same cells of `CONTROLS` control
   rows, the text with every token that repeats drawn afresh.
2. The threshold follows the rule of common/detection.py. A query of the text is what a row is in the battery, so the
   fewer queries there are, the higher a head must score to pass.
3. The interval is over queries, and is left out where they are fewer than `FEW`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common.heads.detection import Attention, Precision, attend
from common.heads.scores import HeadScores, per_query, score
from common.heads.statistics import RowSums
from common.heads.tokens import Floats, Ints, TokenBatch, text_controls
from common.loading.models import Model

CONTROLS = 32
FEW = 5


@dataclass(frozen=True)
class TextScores:
    """`scores` of every head type on a text; `queries` with a target; their `attention` against its null, None where
    no query has a target; the induction `cells`, as (query, key)."""

    scores: HeadScores
    queries: int
    attention: Attention | None
    cells: list[tuple[int, int]]


def score_text(model: Model, tokens: Ints, *, seed: int, batch_size: int, threshold: float | None = None) -> TextScores:
    """Score every head on one row of ids, BOS first. `threshold`: one number for all heads in place of their own."""
    batch = TokenBatch.of([tokens], pad=model.bos)
    cells = batch.cells["prefix_matching"]
    queries = len(cells.group_row)
    attention = None
    if queries:
        paid = per_query(model, batch, batch_size=1)
        controls = text_controls(batch, model.ordinary(), rows=CONTROLS, seed=seed)
        null = per_query(model, controls, batch_size=batch_size).reshape(CONTROLS, *paid.shape)
        attention = _against_null(paid, null, threshold)
    places = list(zip(cells.query.tolist(), cells.key.tolist(), strict=True))
    return TextScores(score(model, batch, batch_size=1), queries, attention, places)


def _against_null(paid: Floats, null: Floats, threshold: float | None) -> Attention:
    """`paid` [queries, layers, heads] on the text, `null` [controls, queries, layers, heads]; queries count as rows."""
    queries = len(paid)
    counts = np.ones(queries, dtype=np.int64)
    return attend(
        RowSums(paid, paid**2, counts),
        RowSums(null.sum(0), (null**2).sum(0), counts * len(null)),
        Precision(float(np.sqrt((1 + 1 / len(null)) / queries)), freedom=len(null) - 1),
        threshold=threshold,
    )
