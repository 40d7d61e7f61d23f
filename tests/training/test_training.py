"""How the bundled model was trained: its rows, its optimiser, its silent heads, and that a run can be resumed."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
import torch

from training import muon, rows, train_mini

TEXT = np.arange(5000)
ORDINARY = np.arange(1, 400)


@pytest.mark.parametrize("length", [16, 95, 255])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("maker", [rows.random_repeat, rows.natural_repeat])
def test_a_repeat_row_holds_a_segment_twice(maker, length, seed):
    source = TEXT if maker is rows.natural_repeat else ORDINARY
    row = maker(np.random.default_rng(seed), source, length).tolist()
    assert len(row) == length
    triples = [tuple(row[place : place + 3]) for place in range(length - 2)]
    assert len(set(triples)) < len(triples)


def test_a_chain_follows_one_successor_map_most_of_the_time():
    row = rows.chain(np.random.default_rng(0), ORDINARY, 2000)
    after: dict[int, list[int]] = {}
    for token, following in zip(row[:-1], row[1:], strict=True):
        after.setdefault(int(token), []).append(int(following))
    usual = [np.unique(following, return_counts=True)[1].max() / len(following) for following in after.values()]
    assert np.mean(usual) == pytest.approx(rows.FOLLOW, abs=0.05)
    assert 4 <= len(after) <= 23


@pytest.mark.parametrize("seed", range(5))
def test_a_loop_says_short_stretches_of_different_tokens_again_and_again(seed):
    row = rows.loop(np.random.default_rng(seed), ORDINARY, 400)
    assert len(row) == 400
    again = [any(row[at] == row[at - back] for back in range(2, 7)) for at in range(6, 400)]
    assert np.mean(again) > 0.5, "most tokens stood a few places back already"
    assert len(set(row.tolist())) > 50, "and new ones keep coming"


def test_a_batch_starts_with_bos_and_depends_on_its_generator_alone():
    mix = {"english": 0.2, "loop": 0.2, "chain": 0.2, "random": 0.2, "natural": 0.2}
    draws = [
        rows.make_batch(np.random.default_rng([0, 7]), TEXT, ORDINARY, 0, rows=40, length=64, mix=mix) for _ in range(2)
    ]
    assert np.array_equal(draws[0][0], draws[1][0])
    tokens, kinds = draws[0]
    assert tokens.shape == (40, 64) and (tokens[:, 0] == 0).all()
    assert set(kinds) <= set(rows.KINDS)


@pytest.mark.parametrize("shape", [(24, 24), (24, 96), (96, 24)])
def test_an_orthogonal_update_keeps_the_singular_vectors_and_levels_the_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    core = left.T @ muon.orthogonal(matrix) @ right.T
    assert torch.linalg.svdvals(core).max() < 1.3
    assert core.diagonal().median() > 0.6, "the vectors are those of the matrix itself"
    assert (core - torch.diag(core.diagonal())).abs().max() < 0.1


def test_a_small_gradient_of_the_queries_is_not_drowned_by_a_large_one_of_the_values():
    weight = torch.nn.Parameter(torch.zeros(24, 72))
    weight.grad = torch.randn(24, 72, generator=torch.Generator().manual_seed(0))
    weight.grad[:, :24] *= 1e-3
    muon.Muon([weight], lr=1.0).step()
    queries, _, values = weight.detach().chunk(3, dim=1)
    assert queries.norm() / values.norm() == pytest.approx(1.0, abs=0.2)


@pytest.fixture
def small(monkeypatch):
    """The recipe at a size that trains in seconds: two stages, the state saved every second step."""
    monkeypatch.setattr(
        train_mini,
        "CONFIG",
        {"n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 3, "initializer_range": 0.05},
    )
    mix = {"english": 0.5, "random": 0.5}
    stages = (
        train_mini.Stage(0, 16, 4, {"chain": 1.0}, active=100, heads=1),
        train_mini.Stage(3, 32, 4, mix, heads=3),
    )
    monkeypatch.setattr(train_mini, "STAGES", stages)
    monkeypatch.setattr(train_mini, "SAVE_EVERY", 2)
    monkeypatch.setattr(train_mini, "KEEP", ())


@pytest.fixture
def tokenizer(mini):
    return mini.tokenizer


def run(folder, tokenizer, steps: int) -> dict[str, torch.Tensor]:
    folder.mkdir(exist_ok=True)
    train_mini.train(argparse.Namespace(seed=3, steps=steps, out=folder), np.arange(2000), tokenizer)
    return torch.load(folder / "state.pt", weights_only=True)["model"]


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, small, tokenizer):
    whole = run(tmp_path / "whole", tokenizer, 6)
    run(tmp_path / "parts", tokenizer, 4)
    log = tmp_path / "parts" / "log.csv"
    log.write_text(log.read_text() + "5,1.0,,,,\n")  # it was interrupted in a step whose state it had not saved
    parts = run(tmp_path / "parts", tokenizer, 6)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert log.read_bytes() == (tmp_path / "whole" / "log.csv").read_bytes()


def test_another_seed_gives_other_weights(tmp_path, small, tokenizer):
    whole = run(tmp_path / "one", tokenizer, 2)
    train_mini.train(argparse.Namespace(seed=4, steps=2, out=tmp_path), np.arange(2000), tokenizer)
    other = torch.load(tmp_path / "state.pt", weights_only=True)["model"]
    assert not torch.equal(whole["transformer.wte.weight"], other["transformer.wte.weight"])


def test_silent_heads_get_no_gradient_and_speak_again_afterwards(small):
    model = train_mini.make_model(100, 0)
    torch.nn.init.normal_(model.transformer.h[0].attn.c_proj.weight)
    tokens = torch.arange(10)[None]
    with train_mini.only_heads(model, 1):
        model(tokens, labels=tokens).loss.backward()
    attention = model.transformer.h[0].attn
    assert attention.c_proj.weight.grad[:8].abs().min() > 0 and (attention.c_proj.weight.grad[8:] == 0).all()
    of_heads = attention.c_attn.weight.grad.view(24, 3, 3, 8)  # [inputs, q k v, head, d_head]
    assert (of_heads[:, :, 1:] == 0).all() and (of_heads[:, :, 0] != 0).any()
    assert not attention.c_proj._forward_pre_hooks
