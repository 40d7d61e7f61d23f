"""Causal labels: forbidding cells does what it says, and the labels come from effects alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.sequences import TokenBatch, battery
from training.evaluate_mini import continuing
from training.label_mini import forbid, interval, loss_at_repeats


@pytest.fixture(scope="module")
def rows(random_gpt2) -> TokenBatch:
    return battery(random_gpt2.ordinary(), random_gpt2.bos, rows=4, length=40, seed=1).repeats


def test_forbidden_cells_are_empty_and_the_row_still_sums_to_one():
    rows = TokenBatch.of([np.array([0, 7, 8, 9, 7, 8, 9])], pad=0)
    pattern = torch.full((1, 2, 7, 7), 1 / 7)
    changed = forbid(rows, [1])(pattern, None)
    assert changed[0, 0] == pytest.approx(pattern[0, 0])
    for query, key in ((4, 2), (5, 3), (6, 4)):
        assert changed[0, 1, query, key] == 0
    assert changed.sum(-1) == pytest.approx(torch.ones(1, 2, 7), abs=1e-6)


def test_only_tokens_that_something_predicts_count_as_continuing():
    rows = TokenBatch.of([np.array([0, 7, 8, 9, 7, 8, 5])], pad=0)
    assert np.flatnonzero(continuing(rows)[0]).tolist() == [5], "8 after 7; not 7 itself, not 5 after 8"


def test_an_intervention_changes_the_loss_and_leaves_nothing_behind(random_gpt2, rows):
    clean = loss_at_repeats(random_gpt2, rows, [])
    every = [(layer, head) for layer in range(3) for head in range(4)]
    assert not np.allclose(loss_at_repeats(random_gpt2, rows, every), clean)
    assert np.array_equal(loss_at_repeats(random_gpt2, rows, []), clean)
    assert not any(point.fwd_hooks for point in random_gpt2.bridge.hook_dict.values())


def test_an_interval_holds_its_mean():
    mean, low, high = interval(np.random.default_rng(0).normal(1.0, 0.5, size=200))
    assert low < mean < high
    assert (low, high) == pytest.approx((1.0, 1.0), abs=0.15)
