"""Where there is no induction, none is found: the natural controls that the bundled model leaves behind."""

from __future__ import annotations

import numpy as np
import pytest

from common.attention.head import Head
from common.heads import scores
from common.heads.survey import survey
from common.heads.tokens import battery
from common.loading import Model, load
from common.loading.find import MINI
from tests.conftest import save_random_gpt2

CHECKPOINTS = MINI.with_name("mini-checkpoints")


def found_in(model: Model, seed: int = 0) -> set[Head]:
    return set(survey(model, seed=seed, batch_size=16).found.ranked())


def test_before_induction_formed_there_is_none_and_afterwards_there_is():
    steps = sorted(CHECKPOINTS.iterdir(), key=lambda folder: int(folder.name.removeprefix("step-")))
    assert found_in(load(str(steps[0]))) == set()
    assert found_in(load(str(steps[-1])))


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (2, 8), (6, 4)])
def test_random_models_have_none(tmp_path, tokenizer, layers, heads):
    model = load(str(save_random_gpt2(tmp_path, tokenizer, layers=layers, heads=heads)))
    assert not survey(model, seed=0, batch_size=16).found.attends.any()


def test_the_detected_set_does_not_depend_on_the_seed(mini):
    found = [found_in(mini, seed) for seed in range(4)]
    assert {str(head) for head in found[0]} == {"1.0", "1.1"}
    assert all(other == found[0] for other in found)


def test_what_the_model_card_promises(mini):
    drawn = battery(mini.ordinary(), mini.bos, rows=16, length=128, seed=7)
    measured = scores.score(mini, drawn.repeats, batch_size=16)
    assert measured.mean("previous_token").max() >= 0.7
    assert (np.sort(measured.mean("prefix_matching"), axis=None)[-2:] >= 0.6).all()
