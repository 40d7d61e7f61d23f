"""Losses where they belong, and intervals that hold what they should."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common import effects
from common.sequences import TokenBatch, battery
from tests.oracle import Oracle


@pytest.fixture(scope="module")
def drawn(random_gpt2):
    return battery(random_gpt2.ordinary(), random_gpt2.bos, rows=3, length=20, seed=2)


def test_repeats_are_the_tokens_an_earlier_copy_predicts():
    rows = [np.array([0, 5, 6, 7, 5, 6, 8]), np.array([0, 4, 4, 4, 3])]
    batch = TokenBatch.of(rows, pad=0)
    # Row 0: 6 follows 5 again; 8 does not follow 6. Row 1: the third 4 has a target, a 4, but a 3 comes next.
    assert np.argwhere(effects.repeats(batch)).tolist() == [[0, 5]]
    fresh = [(0, position) for position in range(1, 5)] + [(1, position) for position in range(1, 5)]
    assert [tuple(place) for place in np.argwhere(effects.fresh(batch))] == fresh


def test_padding_is_neither_fresh_nor_a_repeat():
    rows = [np.array([9, 5, 6, 5]), np.array([9, 1, 2, 3, 4, 5, 6, 7])]
    batch = TokenBatch.of(rows, pad=6)  # the pad is the token that would continue the repeat
    assert not effects.repeats(batch).any()
    assert effects.fresh(batch).sum(1).tolist() == [3, 7]


def test_losses_are_those_of_transformers_alone(random_gpt2, random_gpt2_folder, drawn):
    tokens = drawn.repeats.tokens
    log_probs = torch.log_softmax(Oracle(random_gpt2_folder).logits(tokens).double(), -1).numpy()
    measured = effects.losses(random_gpt2, drawn.repeats, batch_size=2)
    assert np.isnan(measured[:, 0]).all()
    for row in range(len(tokens)):
        for position in range(1, tokens.shape[1]):
            expected = -log_probs[row, position - 1, tokens[row, position]]
            assert measured[row, position] == pytest.approx(expected, abs=1e-4)


def test_row_means_skip_what_is_not_asked_for():
    values = np.array([[np.nan, 1.0, 3.0], [np.nan, 5.0, 7.0]])
    mask = np.array([[False, True, True], [False, False, False]])
    assert effects.row_means(values, mask) == pytest.approx([2.0, np.nan], nan_ok=True)


def test_the_interval_holds_the_true_mean_about_95_times_in_100():
    rng = np.random.default_rng(0)
    held = 0
    for trial in range(200):
        _, low, high = effects.interval(rng.normal(1.0, 2.0, size=40), seed=trial, resamples=300)
        held += low <= 1.0 <= high
    assert 180 <= held <= 198


def test_the_interval_is_seeded_and_leaves_out_rows_without_a_value():
    values = np.array([1.0, 2.0, np.nan, 4.0])
    assert effects.interval(values, seed=3) == effects.interval(values[[0, 1, 3]], seed=3)
    assert effects.interval(values)[0] == pytest.approx(7 / 3)
    assert np.isnan(effects.interval(np.array([np.nan]))).all()
