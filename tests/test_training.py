"""The rows that the bundled model was trained on."""

from __future__ import annotations

import numpy as np
import pytest

from training import rows

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


def test_a_batch_starts_with_bos_and_depends_on_its_generator_alone():
    mix = {"english": 0.4, "chain": 0.2, "random": 0.2, "natural": 0.2}
    draws = [
        rows.make_batch(np.random.default_rng([0, 7]), TEXT, ORDINARY, 0, rows=40, length=64, mix=mix) for _ in range(2)
    ]
    assert np.array_equal(draws[0][0], draws[1][0])
    tokens, kinds = draws[0]
    assert tokens.shape == (40, 64) and (tokens[:, 0] == 0).all()
    assert set(kinds) <= set(rows.KINDS)
