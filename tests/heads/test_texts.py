"""One text: its control rows, its few cells, and what that does to the threshold."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import stdtrit

from common.heads import texts
from common.heads.scores import per_query
from common.heads.texts import CONTROL_ROWS, score_text
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


def test_queries_of_one_text_are_one_draw(model, monkeypatch):
    """With every query of a control text said ten times over, nothing is surer: thresholds stay what they are."""
    text = [*range(100, 112), *range(100, 112)]
    plain, honest = scored(model, *text).attention, texts.per_query

    def ten_times(model, batch, *, batch_size):
        rows, paid = len(batch.tokens), honest(model, batch, batch_size=batch_size)
        return np.tile(paid.reshape(rows, -1, *paid.shape[1:]), (1, 10, 1, 1)).reshape(-1, *paid.shape[1:])

    monkeypatch.setattr(texts, "per_query", ten_times)
    again = scored(model, *text).attention
    assert again.threshold == pytest.approx(plain.threshold, abs=1e-12)
    assert np.isnan([plain.low, plain.high]).all(), "one text has no interval"


def test_the_null_is_the_scores_of_whole_control_texts(model):
    """The threshold and the highest control by hand; control texts differ in their words alone."""
    ids = np.array([model.bos, 5, 6, 7, 5, 6, 7])
    found = score_text(model, ids, seed=0, batch_size=8)
    batch = TokenBatch.of([ids], pad=model.bos)
    _, controls = with_controls(batch, model.ordinary(), rows=CONTROL_ROWS, seed=0)
    null = np.stack(
        [per_query(model, controls.rows(row, row + 1), batch_size=1).mean(0) for row in range(CONTROL_ROWS)]
    )
    assert found.highest == pytest.approx(null.max(0), abs=1e-6)
    assert found.attention.control == pytest.approx(null.mean(0), abs=1e-6)
    wide = np.random.default_rng(0).uniform(size=(CONTROL_ROWS, 2, 2))  # here the spread of the null decides
    deviations = max(1.0, stdtrit(31, 1 - 0.01 / 4) * np.sqrt(1 + 1 / 32))  # four heads
    for drawn, attention in ((null, found.attention), (wide, texts._against_control_texts(wide[0], wide, None))):
        limit = drawn.mean(0) + np.maximum(deviations * drawn.std(0, ddof=1), 0.05)
        assert attention.threshold == pytest.approx(limit, abs=1e-6)


@pytest.mark.parametrize("shared", [0.0, 0.9], ids=["queries differ", "queries agree"])
def test_a_head_that_ignores_the_repeat_passes_seldom_however_its_queries_agree(shared):
    """A hundred heads, texts of 12 queries: of a hundred such models one in a hundred may have a head that passes."""
    rng, passed = np.random.default_rng(0), 0
    for _ in range(40):
        common, own = rng.normal(size=(33, 1, 100)), rng.normal(size=(33, 12, 100))
        drawn = 0.3 + 0.05 * (np.sqrt(shared) * common + np.sqrt(1 - shared) * own).mean(1)[:, :, None]
        passed += texts._against_control_texts(drawn[0], drawn[1:], None).attends.any()
    assert passed <= 3


def test_nothing_repeats_nothing_is_said(model):
    found = scored(model, 5, 6, 7, 8)
    assert found.attention is None and found.highest is None and found.queries == 0 and found.cells == []
    assert np.isnan(found.scores.mean("prefix_matching")).all()
