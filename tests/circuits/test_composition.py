"""Composition of heads against brute force, TransformerLens, and heads that are set by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.attention.head import Head
from common.circuits.composition import WAYS, compose
from common.loading import Model, load
from common.loading.families import plain
from tests import architectures
from tests.architectures import HEADS


def dense(model: Model, layer: int, head: int) -> dict[str, np.ndarray]:
    """The head's matrices in full, [d_model, d_model], norm weights folded in by hand."""
    attention, norm = model.bridge.blocks[layer].attn, model.bridge.blocks[layer].ln1.original_component
    width = model.bridge.cfg.d_model
    offset = 1.0 if model.bridge.blocks[layer].ln1.uses_weight_offset else 0.0
    fold = np.diag(plain(norm.weight) + offset)
    if isinstance(norm, torch.nn.LayerNorm):
        fold = (np.eye(width) - 1 / width) @ fold
    query, output = plain(attention.W_Q[head]), plain(attention.W_O[head])
    shared = head // (HEADS // len(attention.W_K))
    key, value = plain(attention.W_K[shared]), plain(attention.W_V[shared])
    if hasattr(model.bridge.blocks[layer], "ln1_post"):
        output = output @ np.diag(1.0 + plain(model.bridge.blocks[layer].ln1_post.original_component.weight))
    return {"QK": fold @ query @ (fold @ key).T, "OV": fold @ value @ output}


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_scores_are_the_norms_of_the_products(name, model_of):
    model = model_of(name)
    found = compose(model, 2, seed=0)
    assert found.senders == tuple(Head.at(layer, head) for layer in range(2) for head in range(HEADS))
    for row, sender in enumerate(found.senders):
        for head in range(HEADS):
            writes, reads = dense(model, *sender.place)["OV"], dense(model, 2, head)
            for way, matrix in {"Q": reads["QK"], "K": reads["QK"].T, "V": reads["OV"]}.items():
                norms = np.linalg.norm(writes) * np.linalg.norm(matrix)
                assert found.scores[way][row, head] == pytest.approx(np.linalg.norm(writes @ matrix) / norms, abs=1e-5)


def test_scores_are_those_of_transformer_lens_where_norms_have_no_weights(tmp_path, tokenizer):
    model = load(str(architectures.save("llama", tmp_path / "random-llama", tokenizer)))
    for block in model.bridge.blocks:
        block.ln1.original_component.weight.data.fill_(1.0)
    found = compose(model, 2, seed=0)
    for way in WAYS:
        theirs = model.bridge.all_composition_scores(way).scores[:2, :, 2].detach().numpy().reshape(-1, HEADS)
        assert found.scores[way] == pytest.approx(theirs, abs=1e-5)


def test_the_baseline_is_what_random_rotations_give(model_of):
    """Brute force: rotate what the sender writes by a random rotation of the whole residual stream."""
    model, rng = model_of("llama"), np.random.default_rng(1)
    writes, reads = dense(model, 0, 1)["OV"], dense(model, 1, 2)["QK"]
    norms = np.linalg.norm(writes) * np.linalg.norm(reads)
    drawn = []
    for _ in range(2000):
        rotation, upper = np.linalg.qr(rng.standard_normal((32, 32)))
        drawn.append(np.linalg.norm(writes @ (rotation * np.sign(np.diagonal(upper))) @ reads) / norms)
    found = compose(model, 1, seed=0)
    std = (found.scores["Q"] - found.baseline["Q"])[1, 2] / found.z["Q"][1, 2]
    assert found.baseline["Q"][1, 2] == pytest.approx(np.mean(drawn), rel=0.02)
    assert std == pytest.approx(np.std(drawn), rel=0.2)
    assert np.sqrt(np.mean(np.square(drawn))) == pytest.approx(1 / np.sqrt(32), rel=0.02)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_random_heads_do_not_compose(name, model_of):
    for layer in (1, 2):
        found = compose(model_of(name), layer, seed=0)
        assert all((found.z[way] < found.limit).all() for way in WAYS)


def test_the_planted_pair_is_found_in_k_and_there_alone(planted):
    planted_noise = np.random.default_rng(0)
    for block in planted.bridge.blocks:  # heads of nothing but 0 have no score
        for part in "qkvo":
            weight = getattr(block.attn, part).original_component.weight
            weight.data += 0.02 * torch.from_numpy(planted_noise.standard_normal(weight.shape)).float()
    found = compose(planted, 1, seed=0)
    above = {(way, *pair) for way in WAYS for pair in np.argwhere(found.z[way] > found.limit).tolist()}
    assert ("K", 1, 0) in above
    assert not {pair for pair in above if pair[0] == "Q"}
    previous_token = np.array([[0.95, 0.6], [0.1, 0.1]])  # both are previous-token heads; one composes
    both = [Head.at(1, 0), Head.at(1, 1)]
    assert found.from_previous_token(previous_token, both) == (Head.at(0, 1), Head.at(1, 0))
    pair = found.record((Head.at(0, 1), Head.at(1, 0)))["previous_token_to_induction"]
    assert (pair["writes"], pair["reads"]) == ("0.1", "1.0")
    assert pair["z"] > 10 * found.limit and pair["score"] > 1.3 * pair["baseline"]


def test_heads_of_zeros_compose_with_nothing(tmp_path, tokenizer):
    bare = load(str(architectures.save_induction(tmp_path / "set", tokenizer, 1, 0)))
    found = compose(bare, 1, seed=0)
    assert found.z["K"][1, 0] > found.limit
    others = np.ones((2, 2), dtype=bool)
    others[1, 0] = False
    assert (found.z["K"][others] == 0).all() and (found.scores["K"][others] == 0).all()
    assert (found.z["V"] == 0).all()


def test_where_no_head_is_a_previous_token_head_the_likest_counts(model_of):
    found = compose(model_of("gpt2"), 2, seed=0)
    previous_token = np.full((3, HEADS), 0.2)
    previous_token[1, 3] = 0.3
    previous_token[2, 0] = 0.9  # in the layer itself: it cannot write for it
    assert found.from_previous_token(previous_token, [Head.at(2, 0), Head.at(2, 1)])[0] == Head.at(1, 3)


def test_the_limit_is_corrected_for_the_number_of_pairs(model_of):
    one, two = (compose(model_of("gpt2"), layer, seed=0).limit for layer in (1, 2))
    assert one == pytest.approx(3.078, abs=1e-3)  # one-sided 0.05 over 3 × 4 × 4 pairs
    assert two > one


def test_the_first_layer_composes_with_nothing(model_of):
    assert compose(model_of("gpt2"), 0, seed=0) is None
