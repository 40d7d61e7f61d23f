"""One text: its control rows, its few cells, and what that does to the threshold."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.heads.scores import patterns
from common.heads.texts import score_text
from common.heads.tokens import TokenBatch, with_controls
from tests.handbuilt import COPY, Role
from tests.heads.test_tokens import cells_of

ROLES = {
    (0, 0): Role("previous-token", slot=0),
    (0, 1): Role("fixed-offset", offset=2),
    (1, 0): Role("induction", strength=0.9, slot=0, writing=COPY),
    (1, 1): Role("induction", strength=0.15, slot=0, writing=COPY),
}


@given(st.lists(st.integers(1, 6), min_size=2, max_size=14))
def test_controls_are_the_text_with_what_repeats_drawn_afresh(text):
    batch = TokenBatch.of([np.array([0, *text])], pad=0)
    compared, controls = with_controls(batch, np.arange(1, 60), rows=4, seed=3)
    assert cells_of(compared, "prefix_matching", 0) == cells_of(batch, "prefix_matching", 0)
    again = [place for place, token in enumerate(text, start=1) if token in text[: place - 1]]
    for row, tokens in enumerate(controls.tokens):
        changed = np.flatnonzero(tokens != batch.tokens[0])
        assert changed.tolist() == again
        assert not set(tokens[changed].tolist()) & set(text)
        assert cells_of(controls, "prefix_matching", row) == cells_of(batch, "prefix_matching", 0)


def test_as_many_unused_words_as_repeats_are_enough():
    batch = TokenBatch.of([np.array([0, 1, 2, 1, 2])], pad=0)
    _, controls = with_controls(batch, np.arange(1, 5), rows=20, seed=0)
    assert {tuple(row) for row in controls.tokens.tolist()} == {(0, 1, 2, 3, 4), (0, 1, 2, 4, 3)}


def test_a_text_that_holds_every_token_still_has_controls():
    batch = TokenBatch.of([np.array([0, 1, 2, 1, 2, 2])], pad=0)
    compared, controls = with_controls(batch, np.array([1, 2]), rows=3, seed=0)
    assert controls.tokens.shape == (3, 6)
    # the last 2 has two earlier copies, and any of the two words would be a copy of one of them
    assert {query for query, _ in cells_of(compared, "prefix_matching", 0)} == {3, 4}


@pytest.fixture(scope="module")
def model(hand_built):
    return hand_built(ROLES)[1]


def scored(model, *tokens: int):
    return score_text(model, np.array([model.bos, *tokens]), seed=0, batch_size=8)


def test_induction_is_at_work_where_something_repeats(model):
    found = scored(model, *range(100, 112), *range(100, 112))
    assert found.queries == 12
    attends = found.attention.attends
    assert attends[1, 0] and attends[1, 1]
    assert not attends[0].any()
    assert found.attention.control[1, 0] < 0.05


def test_the_fixed_offset_head_that_hits_the_targets_is_not_fooled_by(model):
    """In a row of period 3 the token two back is every target: its control says that it always looks there."""
    found = scored(model, 5, 6, 7, 5, 6, 7, 5, 6, 7)
    assert found.attention.score[0, 1] > 0.5
    assert not found.attention.attends[0, 1]
    assert found.attention.attends[1, 0]


def test_nothing_repeats_nothing_is_said(model):
    found = scored(model, 5, 6, 7, 8)
    assert found.attention is None and found.highest is None and found.queries == 0 and found.cells == []
    assert np.isnan(found.scores.mean("prefix_matching")).all()


def test_the_null_is_read_at_the_same_cells(model):
    """By hand: whole patterns of the text and of its controls, at the cells of the text."""
    tokens = np.array([model.bos, 5, 6, 7, 8, 5, 6, 7])
    found = scored(model, *tokens[1:])
    cells = [(5, 2), (6, 3), (7, 4)]
    batch = TokenBatch.of([tokens], pad=model.bos)
    controls = with_controls(batch, model.ordinary(), rows=32, seed=0)[1]
    for place in ROLES:
        paid = [patterns(model, row, [place])[0] for row in (tokens, *controls.tokens)]
        score, *null = [np.mean([pattern[cell] for cell in cells]) for pattern in paid]
        assert found.attention.score[place] == pytest.approx(score, abs=1e-6)
        assert found.attention.control[place] == pytest.approx(np.mean(null), abs=1e-6)
        assert found.highest[place] == pytest.approx(max(null), abs=1e-6)
        assert found.attention.threshold[place] == pytest.approx(max(null) + 0.01, abs=1e-6)


def test_a_users_threshold_holds_on_texts_too(model):
    found = score_text(model, np.array([model.bos, 5, 6, 7, 5, 6, 7]), seed=0, batch_size=8, threshold=0.2)
    assert (found.attention.threshold == 0.2).all()
