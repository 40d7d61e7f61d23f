"""Survey a model: draw battery rows, score every head, say what each one is; more rows until the verdicts hold still.

Rows come in lots of `LOT`. After each lot every verdict has a confidence (common/detection.py). Rows are drawn until
all confidences reach `SURE`, or `MOST_ROWS` are there: a head that sits on its threshold would go on for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import numpy as np

from common import UserError
from common.heads.attribution import direct_effect, ov_copying, total_effect
from common.heads.detection import Detection, detect
from common.heads.scores import HeadScores, score_battery
from common.heads.tokens import Battery, Floats, battery
from common.loading.models import Model

LOT = 32  # battery rows with a repeat, and as many controls
MOST_ROWS = 64
EFFECT_ROWS = 8  # of each lot: the effects need a backward pass, and settle sooner
ROW_LENGTH = 128  # tokens of a battery row, BOS included; less where the context is shorter
SURE = 0.95

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class Evidence:
    """What was measured: scores on rows with a repeat and on their controls, and on some of the rows the effects.

    `total` and `direct`: effect on the correct token, [rows, layers, heads], in nats; `no_direct_path`: why the model
    has no direct path from a head to the logits, and `direct` is NaN, or None.
    """

    repeats: HeadScores
    controls: HeadScores
    total: Floats
    direct: Floats
    no_direct_path: str | None = None

    def __add__(self, other: Evidence) -> Evidence:
        return Evidence(
            self.repeats + other.repeats,
            self.controls + other.controls,
            np.concatenate([self.total, other.total]),
            np.concatenate([self.direct, other.direct]),
            self.no_direct_path,
        )

    def decide(self, threshold: float | None) -> Detection:
        """The verdict on every head, each against its own threshold or against one for all."""
        return detect(self.repeats.sums, self.controls.sums, self.total, threshold=threshold)


@dataclass(frozen=True)
class Survey:
    """The verdicts, the evidence they rest on, and the number and length of the rows it comes from."""

    found: Detection
    evidence: Evidence
    rows: int
    length: int

    sure: float = SURE

    @property
    def settled(self) -> bool:
        """Whether every verdict has a confidence of `SURE` or more."""
        return bool(self.found.confidence.min() >= self.sure)


@contextmanager
def silent(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Progress that nobody watches."""
    yield lambda rows: None


def survey(
    model: Model,
    *,
    seed: int,
    batch_size: int,
    threshold: float | None = None,
    length: int = ROW_LENGTH,
    progress: Progress = silent,
) -> Survey:
    """Score the heads of `model` on battery rows of `length` tokens until the verdicts hold still.

    Rows are as long as the context where that is shorter.
    `threshold`: one number for all heads in place of their own. `progress(what, total)` is entered for each lot of rows
    and told of each finished group. Raises UserError where no battery can be drawn.
    """
    length = min(length, model.context)
    steps = 2 * (LOT + EFFECT_ROWS)
    state: Survey | None = None
    while state is None or not (state.settled or state.rows >= MOST_ROWS):
        first = state.rows if state else 0
        lot = battery(model.ordinary(), model.bos, rows=LOT, length=length, seed=seed, first=first)
        with progress(f"scoring heads, rows {first + 1} to {first + LOT}", steps) as advance:
            evidence = measure(model, lot, batch_size=batch_size, advance=advance)
        evidence = state.evidence + evidence if state else evidence
        state = Survey(evidence.decide(threshold), evidence, first + LOT, length)
    return state


def measure(model: Model, drawn: Battery, *, batch_size: int, advance: Callable[[int], None]) -> Evidence:
    """The evidence of one lot of rows; `advance` is told of each row of each pass."""
    repeats, controls = score_battery(model, drawn, batch_size=batch_size, advance=advance)
    some = drawn.repeats.rows(0, EFFECT_ROWS)
    total = total_effect(model, some, batch_size=batch_size, advance=advance)
    try:
        direct = direct_effect(model, some, batch_size=batch_size, advance=advance)
    except UserError as error:
        return Evidence(repeats, controls, total, np.full_like(total, np.nan), str(error))
    return Evidence(repeats, controls, total, direct)


def copying(model: Model, measured: Survey) -> Floats:
    """OV copying of every head, [layers, heads]; NaN for a model without a direct path from a head to the logits."""
    if measured.evidence.no_direct_path:
        return np.full((model.n_layers, model.n_heads), np.nan)
    return ov_copying(model)
