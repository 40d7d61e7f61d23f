"""The recipe of the models that judge the detector: what their rows hold, and that a folder loads as any other."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from common.loading import load
from training import train_judges
from training.train_judges import JUDGES, Judge

SMALL = Judge("small", "gpt2", 2, 4, 4, 32, 40, 16, seed=5)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(train_judges, "TEXT", 3000)
    monkeypatch.setattr(train_judges, "BATCH", 4)
    monkeypatch.setattr(train_judges, "FIRST", 2)


def test_there_are_three_seeds_of_each_family_and_some_that_see_no_repeats():
    families = [judge.family for judge in JUDGES if judge.repeats]
    assert all(families.count(family) >= 3 for family in ("gpt2", "llama", "neox"))
    assert {judge.family for judge in JUDGES if not judge.repeats} == {"gpt2", "llama", "neox"}
    assert len({judge.seed for judge in JUDGES}) == len({judge.name for judge in JUDGES}) == len(JUDGES)
    assert all(judge.key_heads < judge.heads for judge in JUDGES if judge.family == "llama")


def test_rows_without_repeats_hold_none_and_have_something_to_learn():
    quiet = replace(SMALL, repeats=False)
    for batch in train_judges.batches(quiet, 5):
        assert all(len(set(row)) == len(row) for row in batch.tolist())
    text = train_judges.language(quiet)
    pairs = [len(set(text[1:][text[:-1] == word].tolist())) for word in range(1, 40)]
    assert np.median(pairs) < 20, "few words follow a word, so that something can be learned"
    with_repeats = torch.cat([*train_judges.batches(SMALL, 5)]).tolist()
    assert any(len(set(row)) < len(row) for row in with_repeats)


def test_a_seed_gives_the_same_rows_again_and_another_seed_others():
    one, two = ([*train_judges.batches(SMALL, 4)] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    other = [*train_judges.batches(replace(SMALL, seed=6), 4)]
    assert not torch.equal(one[3], other[3])


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox"])
def test_a_trained_folder_says_what_came_of_it_and_loads(tmp_path, family):
    judge = replace(SMALL, family=family, key_heads=2 if family == "llama" else 4)
    train_judges.train(judge, tmp_path, steps=3)
    record = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))
    assert record["judge"]["family"] == family and record["steps"] == 3
    assert record["formed"] is False, "three steps are too few"
    model = load(str(tmp_path))
    assert (model.n_layers, model.n_heads, len(model.ordinary())) == (2, 4, 39)
