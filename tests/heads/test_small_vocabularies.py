"""Characters, proteins, chess: with few words a long random row repeats by chance. A null must hold no target."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.heads.survey import survey
from common.heads.tokens import TokenBatch, battery, head_type_cells, with_controls
from common.loading import load
from tests import handbuilt

VOCABULARIES = (8, 24, 33, 64, 100, 127)
BOS = 0


@pytest.mark.parametrize("context", [16, 300])
@pytest.mark.parametrize("words", VOCABULARIES)
def test_hand_built_heads_are_found_and_decoys_are_not(words, context, tmp_path):
    built = handbuilt.build(words, vocabulary=words + 1)
    model = load(str(handbuilt.save(built, tmp_path, handbuilt.word_tokenizer(words))))
    found = survey(model, seed=0, batch_size=32, length=context).found
    known = {place for place, role in built.roles.items() if handbuilt.VERDICTS[role.kind] == "induction"}
    assert known, "a model without induction heads shows nothing here"
    assert {head.place for head in found.ranked()} == known
    assert (found.threshold < 1).all()


@given(words=st.integers(7, 140), length=st.integers(8, 512), seed=st.integers(0, 99))
def test_no_control_row_holds_a_target(words, length, seed):
    drawn = battery(np.arange(1, words + 1), BOS, rows=3, length=length, seed=seed)
    controls = drawn.controls
    assert controls.tokens.shape[1] == min(length, words + 1)
    assert len(head_type_cells(controls.tokens, controls.lengths)["prefix_matching"].query) == 0
    assert len(drawn.repeats.cells["prefix_matching"].query) > 0


@given(st.lists(st.integers(1, 5), min_size=3, max_size=40), st.integers(0, 9))
def test_no_cell_of_a_text_is_a_target_in_its_controls(text, seed):
    """The text may hold every word there is: 5 ordinary tokens."""
    batch = TokenBatch.of([np.array([BOS, *text])], pad=BOS)
    compared, controls = with_controls(batch, np.arange(1, 6), rows=4, seed=seed)
    cells = controls.cells["prefix_matching"]
    assert len(cells.query) == 4 * len(compared.cells["prefix_matching"].query)
    assert (controls.tokens[cells.row, cells.key - 1] != controls.tokens[cells.row, cells.query]).all()
    untouched = np.setdiff1d(np.arange(len(text) + 1), batch.cells["duplicate_token"].query)
    assert (controls.tokens[:, untouched] == batch.tokens[:, untouched]).all()
