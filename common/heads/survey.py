"""Survey a model: draw battery rows, score every head, give a verdict on each.

Rows come in lots of `LOT`. After each lot every verdict has a confidence (common/heads/detection.py). Rows are added
until every verdict's confidence reaches `SURE`, or until there are `MOST_ROWS`. Effects are estimated to first order,
which is for small changes: of a head that attends notably the effect is measured exactly (common/heads/attribution.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from common.attention.batches import Advance, Progress, silent
from common.attention.head import Head
from common.heads.attribution import attribute, exact_effect, ov_copying, why_no_direct_path
from common.heads.detection import NOTABLE, Attention, Detection, attend, detect
from common.heads.scores import HeadScores, score
from common.heads.statistics import Floats
from common.heads.tokens import ROW_LENGTH, Battery, TokenBatch, battery

if TYPE_CHECKING:
    from common.loading.model import Model

LOT = 32  # battery rows with a repeat, and as many controls
MOST_ROWS = 64  # a head whose score lies on its threshold would ask for more rows without end
EFFECT_ROWS = 16  # of each lot: the effects need a backward pass
SURE = 0.95  # the level of every interval


@dataclass(frozen=True)
class Evidence:
    """What was measured of every head.

    `repeats`, `controls`: the scores on rows with a repeat and on their controls. `total`, `direct`: the effects on the
    correct token's logit, [effect rows, layers, heads], in nats. `no_direct_path`: why the model has no direct path
    from a head to the logits, and then `direct` is NaN; None if it has one. `exact`: the total effect not to first
    order, in the shape of `total`, NaN for the heads that it was not measured of; None before it was asked for.
    """

    repeats: HeadScores
    controls: HeadScores
    total: Floats
    direct: Floats
    no_direct_path: str | None = None
    exact: Floats | None = None

    @property
    def effect(self) -> Floats:
        """The total effect, [effect rows, layers, heads]: exact where it was measured so, else to first order."""
        return self.total if self.exact is None else np.where(np.isnan(self.exact), self.total, self.exact)

    def __add__(self, other: Evidence) -> Evidence:
        total = np.concatenate([self.total, other.total])
        direct = np.concatenate([self.direct, other.direct])
        repeats, controls = self.repeats + other.repeats, self.controls + other.controls
        return Evidence(repeats, controls, total, direct, self.no_direct_path)

    def attention(self, threshold: float | None) -> Attention:
        """Each head's score against its threshold."""
        kind = "prefix_matching"
        return attend(self.repeats.sums[kind], self.controls.sums[kind], threshold=threshold)

    def decide(self, threshold: float | None) -> Detection:
        """The verdict on every head, each against its own threshold (None) or against one for all."""
        return detect(self.repeats.sums, self.controls.sums, self.effect, threshold=threshold)


@dataclass(frozen=True)
class Survey:
    """The verdicts `found`, the `evidence` they rest on, the number of `rows` with a repeat and their `length`."""

    found: Detection
    evidence: Evidence
    rows: int
    length: int
    sure: float = SURE

    @property
    def settled(self) -> bool:
        """Whether every verdict has a confidence of at least `sure`."""
        return bool(self.found.confidence.min() >= self.sure)


def survey(
    model: Model, *, seed: int, batch_size: int, threshold: float | None = None, length: int = ROW_LENGTH,
    progress: Progress = silent,
) -> Survey:  # fmt: skip
    """Score the heads of `model` on battery rows, and add rows until every verdict's confidence reaches `SURE`.

    `length`: tokens of a row, or the context if that is shorter. `threshold`: one number in [0, 1] for all heads in
    place of their own. `progress` is entered for each lot of rows. Raises UserError if no battery can be drawn.
    """
    length = min(length, model.context)
    steps = 2 * LOT + EFFECT_ROWS  # repeats and controls are scored, effects measured on some of them
    reason = why_no_direct_path(model)
    state: Survey | None = None
    lots: list[TokenBatch] = []
    while state is None or not (state.settled or state.rows >= MOST_ROWS):
        first = state.rows if state else 0
        lot = battery(model.ordinary(), model.bos, rows=LOT, length=length, seed=seed, first=first)
        lots.append(for_effects(lot.repeats))
        with progress(f"scoring heads, rows {first + 1} to {first + LOT}", steps) as advance:
            evidence = gather_evidence(model, lot, batch_size=batch_size, advance=advance, no_direct_path=reason)
        evidence = state.evidence + evidence if state else evidence
        known = None if state is None else state.evidence.exact
        heads = notable(evidence.attention(threshold))
        if steps_left := len(heads) * len(lots):
            with progress(f"measuring the effects of {len(heads)} heads", steps_left) as advance:
                exact = _exact(model, lots, heads, known, batch_size=batch_size, advance=advance)
            evidence = replace(evidence, exact=exact)
        state = Survey(evidence.decide(threshold), evidence, first + LOT, lot.repeats.tokens.shape[1])
    return state


def _exact(
    model: Model, lots: Sequence[TokenBatch], heads: Sequence[Head], known: Floats | None, *, batch_size: int,
    advance: Advance,
) -> Floats:  # fmt: skip
    """The exact total effect of `heads` on the rows in `lots`, [effect rows, layers, heads]; NaN for all others.
    `known`: the same for the lots before, which are not measured again."""
    exact = np.full((EFFECT_ROWS * len(lots), model.n_layers, model.n_heads), np.nan)
    if known is not None:
        for head in heads:
            exact[: len(known), head.layer, head.head] = known[:, head.layer, head.head]
    for part, rows in zip(np.split(exact, len(lots)), lots, strict=True):  # views: what is put there is in `exact`
        missing = [head for head in heads if np.isnan(part[:, head.layer, head.head]).all()]
        measured = exact_effect(model, rows, missing, batch_size=batch_size).T if missing else ()
        for head, values in zip(missing, measured, strict=True):
            part[:, head.layer, head.head] = values
        advance(len(heads))
    return exact


def notable(found: Attention) -> list[Head]:
    """The heads that reach their threshold and score `NOTABLE` or more above their null."""
    return [
        Head.at(*place)
        for place in np.argwhere((found.score >= found.threshold) & (found.score >= found.control + NOTABLE))
    ]


def gather_evidence(
    model: Model, drawn: Battery, *, batch_size: int, advance: Advance, no_direct_path: str | None = None
) -> Evidence:
    """The evidence of one lot of rows; `advance` is told how many rows each pass has finished."""
    repeats = score(model, drawn.repeats, batch_size=batch_size, advance=advance)
    controls = score(model, drawn.controls, batch_size=batch_size, advance=advance)
    found = attribute(model, for_effects(drawn.repeats), batch_size=batch_size, advance=advance)
    # No verdict needs the direct effect, so its absence stops nothing.
    direct = np.full_like(found.direct, np.nan) if no_direct_path else found.direct
    return Evidence(repeats, controls, found.total, direct, no_direct_path)


def for_effects(repeats: TokenBatch) -> TokenBatch:
    """`EFFECT_ROWS` of the rows, or all if they are fewer, from the nearest repeat to the farthest in equal steps.

    Some heads act at short distances alone. On SmolLM2-135M the first eight rows of the battery have distances of 45 to
    86 tokens, and two heads whose attention knockout costs 0.1 and 0.4 nats had no effect on them.
    """
    cells = repeats.cells["prefix_matching"]
    row, first = np.unique(cells.row, return_index=True)
    nearest = row[np.argsort((cells.query - cells.key)[first], kind="stable")]
    count = min(EFFECT_ROWS, len(nearest))
    chosen = nearest[((np.arange(count) + 0.5) * len(nearest) / count).astype(np.int64)]
    return TokenBatch.of([repeats.tokens[row, : repeats.lengths[row]] for row in chosen], pad=int(repeats.tokens[0, 0]))


def copying(model: Model, surveyed: Survey) -> Floats:
    """OV copying of every head, [layers, heads], in [-1, 1]; NaN if no direct path leads from a head to the logits."""
    if surveyed.evidence.no_direct_path:
        return np.full((model.n_layers, model.n_heads), np.nan)
    return ov_copying(model)
