"""Where there is no induction, none is found: the natural controls that the bundled model leaves behind."""

from __future__ import annotations

import numpy as np
import pytest

from common import models, scores
from common.detection import detect
from common.sequences import Battery, battery

CHECKPOINTS = models.MINI.with_name("mini-checkpoints")


def draw(model: models.Model, seed: int) -> Battery:
    return battery(model.ordinary(), model.bos, rows=16, length=128, seed=seed)


def detected(model: models.Model, rows, controls) -> set[tuple[int, int]]:
    measured, null = (scores.score(model, batch, batch_size=16) for batch in (rows, controls))
    spread = null.std("prefix_matching")
    return set(detect(measured.mean("prefix_matching"), null.mean("prefix_matching"), spread).ranked())


@pytest.mark.parametrize(("step", "expected"), [("0100", False), ("0600", True)])
def test_induction_is_found_after_it_formed_and_not_before(step, expected):
    model = models.load(str(CHECKPOINTS / f"step-{step}"))
    drawn = draw(model, seed=0)
    assert bool(detected(model, drawn.repeats, drawn.controls)) == expected


def test_without_repeats_in_the_rows_nothing_is_found(mini):
    drawn, other = draw(mini, seed=0), draw(mini, seed=1)
    assert len(detected(mini, drawn.repeats, drawn.controls)) >= 2
    assert detected(mini, other.controls, drawn.controls) == set()


def test_the_detected_set_does_not_depend_on_the_seed(mini):
    found = [detected(mini, drawn.repeats, drawn.controls) for drawn in (draw(mini, seed) for seed in range(3))]
    assert found[0] == found[1] == found[2]


def test_what_the_model_card_promises(mini):
    drawn = draw(mini, seed=7)
    measured = scores.score(mini, drawn.repeats, batch_size=16)
    assert measured.mean("previous_token").max() >= 0.7
    assert (np.sort(measured.mean("prefix_matching"), axis=None)[-2:] >= 0.6).all()
