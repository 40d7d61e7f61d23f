"""Weight circuits against the scores of models in which nothing else enters."""

from __future__ import annotations

import numpy as np
import pytest

from common.attention.head import Head
from common.circuits import weights
from common.circuits.decomposition import decompose, sides_of, split_heads
from common.circuits.maps import interact

TOKENS = np.array([0, 5, 9, 700, 41, 33, 1900, 12, 77, 803])


@pytest.mark.parametrize("name", ["llama", "neox", "qwen3", "gemma2", "bloom", "gptj"])
def test_layer_0_without_added_positions_is_its_token_circuit(name, model_of):
    model, head = model_of(name), 1
    met = interact(model, TOKENS[None], 0)
    sides, embedded = sides_of(model, Head.at(0, head)), weights.read_embeddings(model, TOKENS, 0)
    for distance in (0, 1, 4):
        circuit = weights.token_circuit(*(side.read(embedded) for side in sides), met.rules, distance)
        for query in range(distance, len(TOKENS)):
            expected = met.products[0, head, query, query - distance]
            assert circuit[query, query - distance] == pytest.approx(expected, abs=1e-4)


def test_rotation_makes_the_token_circuit_depend_on_distance(model_of):
    found = weights.head_circuits(model_of("llama"), Head.at(1, 0), Head.at(0, 2), TOKENS, distances=(1, 4, 16))
    assert list(found.by_distance) == [1, 4]  # the text is too short for 16
    assert np.abs(found.by_distance[1] - found.by_distance[4]).max() > 0.1
    assert found.position is None
    unrotated = weights.head_circuits(model_of("gpt2"), Head.at(1, 0), None, TOKENS, distances=(1, 4))
    assert list(unrotated.by_distance) == [0]


def test_every_different_token_comes_once_and_in_order(model_of):
    found = weights.head_circuits(model_of("gpt2"), Head.at(1, 0), None, np.array([0, 9, 5, 9, 5, 700]), distances=())
    assert found.tokens.tolist() == [0, 9, 5, 700]
    assert found.composed is None and found.by_distance[0].shape == (4, 4)


def test_the_position_circuit_is_that_part_of_the_decomposition(model_of):
    model = model_of("gpt2")
    met = interact(model, TOKENS[None], 1)
    found = weights.position_circuit(split_heads(model, TOKENS, 1, [2], met.rules)[2], met.rules)
    split = decompose(model, TOKENS, met, [2], [(7, 3), (9, 2)])[2]
    at = split.sources.index("pos_embed")
    assert split.raw[at, at] == pytest.approx((found[7, 3] + found[9, 2]) / 2)


def test_singular_directions_sum_to_the_token_circuit(model_of):
    model = model_of("llama")  # no bias, and at distance 0 no rotation
    rules = interact(model, TOKENS[None], 1).rules
    sides, embedded = sides_of(model, Head.at(1, 3)), weights.read_embeddings(model, TOKENS, 1)
    found = weights.singular_directions(sides, embedded, rules.scale, 8)
    expected = weights.token_circuit(*(side.read(embedded) for side in sides), rules, 0)
    total = sum(np.outer(one.query, one.key) for one in found)
    assert total == pytest.approx(expected, abs=1e-6)
    assert sum(one.share for one in found) == pytest.approx(1.0)
    assert [one.share for one in found] == sorted((one.share for one in found), reverse=True)
    assert all(one.query[np.abs(one.query).argmax()] > 0 for one in found)
    listed = found[0].record([str(token) for token in TOKENS], 2)
    assert listed["query"][0] == (str(TOKENS[np.abs(found[0].query).argmax()]), pytest.approx(found[0].query.max()))


def test_through_the_previous_token_head_a_token_looks_for_itself(planted):
    tokens = np.concatenate([[planted.bos], np.arange(300, 308)])
    found = weights.head_circuits(planted, Head.at(1, 0), Head.at(0, 1), tokens, distances=())
    own = np.diagonal(found.composed)[1:]
    rest = found.composed[1:, 1:][~np.eye(8, dtype=bool)]
    assert own.min() > 3 * np.abs(rest).max()
    assert np.abs(found.by_distance[0]).max() < 0.05 * own.min()  # its own token tells the key nothing
    idle = weights.head_circuits(planted, Head.at(1, 0), Head.at(0, 0), tokens, distances=())
    assert np.abs(idle.composed).max() < 1e-6
