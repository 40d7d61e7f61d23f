"""Weight circuits against the scores of models in which nothing else enters; composition against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.circuits import circuits, qk
from common.loading import models
from tests import architectures
from tests.architectures import HEADS

TOKENS = np.array([0, 5, 9, 700, 41, 33, 1900, 12, 77, 803])


@pytest.fixture(scope="module")
def model_of(tmp_path_factory, tokenizer):
    root, loaded = tmp_path_factory.mktemp("architectures"), {}

    def model(name: str) -> models.Model:
        if name not in loaded:
            loaded[name] = models.load(str(architectures.save(name, root / f"random-{name}", tokenizer)))
        return loaded[name]

    return model


@pytest.fixture(scope="module")
def planted(tmp_path_factory, tokenizer) -> models.Model:
    """Induction set by hand: 0.1 copies the token before, 1.0 looks for it."""
    return models.load(str(architectures.save_induction(tmp_path_factory.mktemp("planted") / "set", tokenizer, 1, 0)))


@pytest.mark.parametrize("name", ["llama", "neox", "qwen3", "gemma2", "bloom"])
def test_layer_0_without_added_positions_is_its_token_circuit(name, model_of):
    model, head = model_of(name), 1
    met = qk.interact(model, TOKENS[None], 0)
    sides, embedded = qk.readers(model, 0, head), circuits.read_embeddings(model, TOKENS, 0)
    for distance in (0, 1, 4):
        circuit = circuits.token_circuit(sides, embedded, met.rules, distance)
        for query in range(distance, len(TOKENS)):
            expected = met.products[0, head, query, query - distance]
            assert circuit[query, query - distance] == pytest.approx(expected, abs=1e-4)


def test_rotation_makes_the_token_circuit_depend_on_distance(model_of):
    found = circuits.head_circuits(model_of("llama"), (1, 0), (0, 2), TOKENS, distances=(1, 4, 16))
    assert list(found.by_distance) == [1, 4]  # the text is too short for 16
    assert np.abs(found.by_distance[1] - found.by_distance[4]).max() > 0.1
    assert found.position is None
    assert list(circuits.head_circuits(model_of("gpt2"), (1, 0), None, TOKENS, distances=(1, 4)).by_distance) == [0]


def test_every_different_token_comes_once_and_in_order(model_of):
    found = circuits.head_circuits(model_of("gpt2"), (1, 0), None, np.array([0, 9, 5, 9, 5, 700]), distances=())
    assert found.tokens.tolist() == [0, 9, 5, 700]
    assert found.composed is None and found.by_distance[0].shape == (4, 4)


def test_the_position_circuit_is_that_part_of_the_decomposition(model_of):
    model = model_of("gpt2")
    met = qk.interact(model, TOKENS[None], 1)
    found = circuits.position_circuit(qk.parts(model, TOKENS, 1, [2], met.rules)[2], met.rules)
    split = qk.decompose(model, TOKENS, met, [2], [(7, 3), (9, 2)])[2]
    at = split.sources.index("pos_embed")
    assert split.raw[at, at] == pytest.approx((found[7, 3] + found[9, 2]) / 2)


def test_singular_directions_sum_to_the_token_circuit(model_of):
    model = model_of("llama")  # no bias, and at distance 0 no rotation
    rules = qk.interact(model, TOKENS[None], 1).rules
    sides, embedded = qk.readers(model, 1, 3), circuits.read_embeddings(model, TOKENS, 1)
    found = circuits.singular_directions(sides, embedded, rules.scale, 8)
    total = sum(np.outer(one.query, one.key) for one in found)
    assert total == pytest.approx(circuits.token_circuit(sides, embedded, rules, 0), abs=1e-6)
    assert sum(one.share for one in found) == pytest.approx(1.0)
    assert [one.share for one in found] == sorted((one.share for one in found), reverse=True)
    assert all(one.query[np.abs(one.query).argmax()] > 0 for one in found)
    listed = found[0].record([str(token) for token in TOKENS], 2)
    assert listed["query"][0] == (str(TOKENS[np.abs(found[0].query).argmax()]), pytest.approx(found[0].query.max()))


def test_through_the_previous_token_head_a_token_looks_for_itself(planted):
    tokens = np.concatenate([[planted.bos], np.arange(300, 308)])
    found = circuits.head_circuits(planted, (1, 0), (0, 1), tokens, distances=())
    own = np.diagonal(found.composed)[1:]
    rest = found.composed[1:, 1:][~np.eye(8, dtype=bool)]
    assert own.min() > 3 * np.abs(rest).max()
    assert np.abs(found.by_distance[0]).max() < 0.05 * own.min()  # its own token tells the key nothing
    idle = circuits.head_circuits(planted, (1, 0), (0, 0), tokens, distances=())
    assert np.abs(idle.composed).max() < 1e-6


# --- composition ---


def dense(model: models.Model, layer: int, head: int) -> dict[str, np.ndarray]:
    """The head's matrices in full, [d_model, d_model], norm weights folded in by hand."""
    attention, norm = model.bridge.blocks[layer].attn, model.bridge.blocks[layer].ln1.original_component
    width = model.bridge.cfg.d_model
    offset = 1.0 if model.bridge.blocks[layer].ln1.uses_weight_offset else 0.0
    fold = np.diag(qk.plain(norm.weight) + offset)
    if isinstance(norm, torch.nn.LayerNorm):
        fold = (np.eye(width) - 1 / width) @ fold
    query, output = qk.plain(attention.W_Q[head]), qk.plain(attention.W_O[head])
    shared = head // (HEADS // len(attention.W_K))
    key, value = qk.plain(attention.W_K[shared]), qk.plain(attention.W_V[shared])
    if hasattr(model.bridge.blocks[layer], "ln1_post"):
        output = output @ np.diag(1.0 + qk.plain(model.bridge.blocks[layer].ln1_post.original_component.weight))
    return {"QK": fold @ query @ (fold @ key).T, "OV": fold @ value @ output}


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_scores_are_the_norms_of_the_products(name, model_of):
    model = model_of(name)
    found = circuits.compose(model, 2, seed=0)
    assert found.senders == tuple((layer, head) for layer in range(2) for head in range(HEADS))
    for row, sender in enumerate(found.senders):
        for head in range(HEADS):
            writes, reads = dense(model, *sender)["OV"], dense(model, 2, head)
            for way, matrix in {"Q": reads["QK"], "K": reads["QK"].T, "V": reads["OV"]}.items():
                norms = np.linalg.norm(writes) * np.linalg.norm(matrix)
                assert found.scores[way][row, head] == pytest.approx(np.linalg.norm(writes @ matrix) / norms, abs=1e-5)


def test_scores_are_those_of_transformer_lens_where_norms_have_no_weights(tmp_path, tokenizer):
    model = models.load(str(architectures.save("llama", tmp_path / "random-llama", tokenizer)))
    for block in model.bridge.blocks:
        block.ln1.original_component.weight.data.fill_(1.0)
    found = circuits.compose(model, 2, seed=0)
    for way in circuits.WAYS:
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
    found = circuits.compose(model, 1, seed=0)
    std = (found.scores["Q"] - found.baseline["Q"])[1, 2] / found.z["Q"][1, 2]
    assert found.baseline["Q"][1, 2] == pytest.approx(np.mean(drawn), rel=0.02)
    assert std == pytest.approx(np.std(drawn), rel=0.2)
    assert np.sqrt(np.mean(np.square(drawn))) == pytest.approx(1 / np.sqrt(32), rel=0.02)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_random_heads_do_not_compose(name, model_of):
    for layer in (1, 2):
        found = circuits.compose(model_of(name), layer, seed=0)
        assert all((found.z[way] < found.limit).all() for way in circuits.WAYS)


def test_the_planted_pair_is_found_in_k_and_there_alone(planted):
    planted_noise = np.random.default_rng(0)
    for block in planted.bridge.blocks:  # heads of nothing but 0 have no score
        for part in "qkvo":
            weight = getattr(block.attn, part).original_component.weight
            weight.data += 0.02 * torch.from_numpy(planted_noise.standard_normal(weight.shape)).float()
    found = circuits.compose(planted, 1, seed=0)
    above = {(way, *pair) for way in circuits.WAYS for pair in np.argwhere(found.z[way] > found.limit).tolist()}
    assert ("K", 1, 0) in above
    assert not {pair for pair in above if pair[0] == "Q"}
    previous_token = np.array([[0.95, 0.6], [0.1, 0.1]])  # both are previous-token heads; one composes
    assert found.from_previous_token(previous_token, [0, 1]) == ((0, 1), 0)
    pair = found.record(((0, 1), 0))["previous_token_to_induction"]
    assert (pair["writes"], pair["reads"]) == ("0.1", "1.0")
    assert pair["z"] > 10 * found.limit and pair["score"] > 1.3 * pair["baseline"]


def test_heads_of_zeros_compose_with_nothing(tmp_path, tokenizer):
    bare = models.load(str(architectures.save_induction(tmp_path / "set", tokenizer, 1, 0)))
    found = circuits.compose(bare, 1, seed=0)
    assert found.z["K"][1, 0] > found.limit
    others = np.ones((2, 2), dtype=bool)
    others[1, 0] = False
    assert (found.z["K"][others] == 0).all() and (found.scores["K"][others] == 0).all()
    assert (found.z["V"] == 0).all()


def test_where_no_head_is_a_previous_token_head_the_likest_counts(model_of):
    found = circuits.compose(model_of("gpt2"), 2, seed=0)
    previous_token = np.full((3, HEADS), 0.2)
    previous_token[1, 3] = 0.3
    previous_token[2, 0] = 0.9  # in the layer itself: it cannot write for it
    assert found.from_previous_token(previous_token, [0, 1])[0] == (1, 3)


def test_the_limit_is_corrected_for_the_number_of_pairs(model_of):
    one, two = (circuits.compose(model_of("gpt2"), layer, seed=0).limit for layer in (1, 2))
    assert one == pytest.approx(3.078, abs=1e-3)  # one-sided 0.05 over 3 × 4 × 4 pairs
    assert two > one


def test_the_first_layer_composes_with_nothing(model_of):
    assert circuits.compose(model_of("gpt2"), 0, seed=0) is None
