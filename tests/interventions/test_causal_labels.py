"""Causal labels: the direct effect against transformers alone, the rule, and models whose labels construction knows."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from common import UserError
from common.attention.head import Head
from common.heads.statistics import mean_per_row
from common.heads.tokens import Cells, TokenBatch, continuing
from common.interventions import causal_labels
from common.interventions.causal_labels import CausalEffects, exact_direct_effect, measure_causal_effects
from common.interventions.edits import knockout
from common.interventions.runner import Predictions
from common.loading import load
from tests import architectures, handbuilt
from tests.handbuilt import COPY, Role
from tests.oracle import ARCHITECTURES, traces


def predictions_of(batch: TokenBatch) -> Predictions:
    return Predictions.of(batch.tokens, continuing(batch))


def every_head(model) -> list[Head]:
    return [Head.at(*place) for place in np.ndindex(model.n_layers, model.n_heads)]


def by_hand(oracle, batch: TokenBatch, predictions: Predictions, head: Head) -> np.ndarray:
    """[predictions]: the centred logit lost, one prediction at a time: softmax again without the cells, in float64."""
    seen, stream = oracle.record(batch.tokens), oracle.final_stream(batch.tokens)
    cells, lost = batch.cells["prefix_matching"], []
    for row, position, token in zip(predictions.row, predictions.position, predictions.token, strict=True):
        scores = seen["scores", head.layer, head.head, row][position].clone()
        scores[cells.key[(cells.row == row) & (cells.query == position)]] = -math.inf
        kept = scores.softmax(-1) if (scores > -math.inf).any() else torch.zeros_like(scores)
        move = (kept - seen["pattern", head.layer, head.head, row][position]) @ seen["v", head.layer, head.head, row]
        write = move @ oracle.output_weights(head.layer, head.head, len(move))
        before, after = (oracle.read_out(final) for final in (stream[row, position], stream[row, position] + write))
        lost.append((before[token] - before.mean() - after[token] + after.mean()).item())
    return np.array(lost)


# --- the direct effect ---


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_direct_effect_by_hand(loaded, oracles, drawn, name):
    batch, model, ticks = drawn.repeats, loaded[name], []
    predictions, before = predictions_of(batch), traces(model)
    clean = model.logits(batch.tokens)
    found = exact_direct_effect(model, batch, predictions, batch_size=2, advance=ticks.append)
    assert found.shape == (3, 3, 4)
    for head in every_head(model):
        expected = mean_per_row(by_hand(oracles[name], batch, predictions, head), predictions.row, 3)
        assert np.abs(expected).max() > 1e-4
        assert found[:, head.layer, head.head] == pytest.approx(expected, abs=3e-5)
    assert ticks == [2, 1]
    assert traces(model) == before
    assert torch.equal(model.logits(batch.tokens), clean)


def test_where_a_head_is_all_but_sure_of_its_cells_the_rest_is_the_softmax_of_the_other_scores(saturated, drawn):
    """The cells are those that have all but 1e-7 of their query's attention, in one head of layer 1 at a time; what is
    left of the float32 pattern's 1 is nothing."""
    model, oracle, tokens = saturated.model, saturated.oracle, drawn.repeats.tokens
    seen, counted = oracle.record(tokens), 0
    for head in range(4):
        patterns = torch.stack([seen["pattern", 1, head, row] for row in range(3)]).numpy()
        row, query, key = np.nonzero(patterns >= 1 - 1e-7)
        row, query, key = (index[(query > 0) & (query < tokens.shape[1] - 1)] for index in (row, query, key))
        counted += len(row)
        cells = {**drawn.repeats.cells, "prefix_matching": Cells(row, query, key)}
        batch = replace(drawn.repeats, cells=cells)
        predictions = Predictions(row, query, tokens[row, query + 1])
        expected = mean_per_row(by_hand(oracle, batch, predictions, Head.at(1, head)), predictions.row, 3)
        found = exact_direct_effect(model, batch, predictions)[:, 1, head]
        assert found == pytest.approx(expected, abs=1e-4, nan_ok=True)
        assert np.nanmax(np.abs(expected)) > 1e-2
    assert counted > 15


def test_a_query_whose_every_key_is_a_target_loses_all_the_head_writes(random_gpt2, oracles, drawn):
    tokens = drawn.repeats.tokens
    everything = Cells(np.zeros(4, int), np.full(4, 3), np.arange(4))
    batch = replace(drawn.repeats, cells={**drawn.repeats.cells, "prefix_matching": everything})
    predictions = Predictions(np.array([0]), np.array([3]), tokens[:1, 4])
    found = exact_direct_effect(random_gpt2, batch, predictions)
    for head in every_head(random_gpt2):
        expected = by_hand(oracles["gpt2"], batch, predictions, head)[0]
        assert found[0, head.layer, head.head] == pytest.approx(expected, abs=3e-5)
    assert np.isnan(found[1:]).all()


def test_rows_without_a_repeat_have_no_direct_effect(random_gpt2, drawn):
    plain = np.concatenate([[random_gpt2.bos], np.arange(20, 33)])
    batch, ticks = TokenBatch.of([plain, drawn.repeats.tokens[0]], pad=0), []
    found = exact_direct_effect(random_gpt2, batch, predictions_of(batch), batch_size=1, advance=ticks.append)
    alone = exact_direct_effect(random_gpt2, drawn.repeats, predictions_of(drawn.repeats))
    assert np.isnan(found[0]).all()
    assert found[1] == pytest.approx(alone[0], abs=1e-6)
    assert ticks == [1, 1]


def test_heads_that_do_not_look_at_their_targets_have_no_effect(random_gpt2, drawn):
    """Where there are no cells there is nothing to lose, whatever there is to predict."""
    nothing = Cells(*np.zeros((3, 0), int))
    batch = replace(drawn.repeats, cells={**drawn.repeats.cells, "prefix_matching": nothing})
    assert (exact_direct_effect(random_gpt2, batch, predictions_of(drawn.repeats)) == 0).all()


def test_in_the_last_layer_without_an_mlp_direct_is_all_there_is(random_gpt2, drawn):
    """With the last MLP silent, knockout of a last-layer head's cells in the whole model is its direct effect."""
    block = random_gpt2.door.network.transformer.h[2]
    silent = block.mlp.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    try:
        batch, predictions = drawn.repeats, predictions_of(drawn.repeats)
        found = exact_direct_effect(random_gpt2, batch, predictions)
        at = predictions.row, predictions.position
        for head in range(4):
            edits = knockout([Head.at(2, head)], batch.cells["prefix_matching"]).edits
            clean, changed = (random_gpt2.logits(batch.tokens, some)[at].double() for some in ((), edits))
            lost = [(logits - logits.mean(-1, keepdim=True)).numpy() for logits in (clean, changed)]
            lost = (lost[0] - lost[1])[np.arange(len(predictions.row)), predictions.token]
            assert np.abs(lost).max() > 1e-3
            assert found[:, 2, head] == pytest.approx(mean_per_row(lost, predictions.row, 3), abs=1e-5)
    finally:
        silent.remove()


def test_what_cannot_be_read_directly_is_refused(loaded, tmp_path, tokenizer, drawn):
    """Gemma 2 caps its logits; Gemma 3 does not, but norms what its heads write, as Gemma 2 does too."""
    batch = drawn.repeats
    with pytest.raises(UserError, match="between its last block and its logits"):
        exact_direct_effect(loaded["gemma2"], batch, predictions_of(batch))
    gemma3 = load(str(architectures.save("gemma3", tmp_path / "gemma3", tokenizer)))
    with pytest.raises(UserError, match="before it is added"):
        exact_direct_effect(gemma3, batch, predictions_of(batch))


# --- the rule ---


def test_the_rule_needs_size_and_certainty():
    """An effect of 0.05 nats counts, one of 0.0499 does not."""
    sure = np.full((16, 1, 1), 0.05)
    small = np.full((16, 1, 1), 0.0499)
    unsure = np.where(np.arange(16) % 8, -0.1, 2.0)[:, None, None] + 0.05
    nothing = np.zeros((16, 1, 1))
    assert unsure.mean() >= 0.05
    for needed, expected in ((sure, True), (small, False), (unsure, False), (nothing, False)):
        assert bool(CausalEffects(needed, nothing, "x").labels().heads) == expected
        assert bool(CausalEffects(nothing, needed, "x").labels().heads) == expected
        assert bool(CausalEffects(nothing, -needed, "x").heads(-1)) == expected
    assert CausalEffects(-sure, nothing, "x").heads(-1) == [Head.at(0, 0)]
    assert CausalEffects(-small, nothing, "x").heads(-1) == []
    assert CausalEffects(-sure, nothing, "x").labels().heads == frozenset()
    assert CausalEffects(sure, -sure, "x").heads(-1) == [], "needed for the loss: not suppression"


def test_each_head_is_judged_by_its_own_rows():
    effect = np.zeros((8, 2, 2))
    effect[:, 1, 0] = 0.1
    effect[:, 0, 1] = -0.1
    found = CausalEffects(effect, np.zeros_like(effect), "by hand")
    assert found.labels().heads == {Head.at(1, 0)}
    assert found.labels().source == "by hand"
    saved = json.loads(json.dumps(found.as_json()))
    assert (saved["source"], saved["induction_heads"], saved["suppression_heads"]) == ("by hand", ["1.0"], ["0.1"])
    numbers = saved["effects_in_nats_with_95_percent_intervals"]
    assert list(numbers) == ["0.0", "0.1", "1.0", "1.1"]
    assert numbers["1.0"] == {"needed": [0.1] * 3, "direct": [0.0] * 3}


# --- measured ---


def test_both_effects_by_hand(random_gpt2, monkeypatch):
    monkeypatch.setattr(causal_labels, "LABEL_ROWS", 3)
    told: dict[str, list[int]] = {}

    @contextmanager
    def progress(what, total):
        yield told.setdefault(f"{what}: {total}", []).append

    found = measure_causal_effects(random_gpt2, progress=progress, seed=4)
    assert {what: sum(counts) for what, counts in told.items()} == {
        "causal labels, direct effects: 3": 3, "causal labels, heads: 12": 12, "causal labels, control rows: 12": 12,
    }  # fmt: skip
    drawn = causal_labels.battery(random_gpt2.ordinary(), random_gpt2.bos, rows=3, length=64, seed=4, first=1_000_000)
    repeated = continuing(drawn.repeats)
    predictions = predictions_of(drawn.repeats)
    direct = [exact_direct_effect(random_gpt2, rows, predictions) for rows in (drawn.repeats, drawn.controls)]
    assert found.direct == pytest.approx(direct[0] - direct[1], abs=1e-5)

    def above_mean(rows: TokenBatch, edits=()) -> np.ndarray:
        """[rows, pos]: the logit of the token that the repeat brings, less the mean logit, read one place before it."""
        logits = random_gpt2.logits(rows.tokens, edits).double()
        logits = (logits - logits.mean(-1, keepdim=True)).numpy()[:, :-1]
        return np.take_along_axis(logits, drawn.repeats.tokens[:, 1:, None], -1)[..., 0]

    for head in every_head(random_gpt2):
        lost = []
        for rows in (drawn.repeats, drawn.controls):
            edits = knockout([head], rows.cells["prefix_matching"]).edits
            change = above_mean(rows) - above_mean(rows, edits)
            lost.append([row[mask].mean() for row, mask in zip(change, repeated[:, 1:], strict=True)])
        expected = np.subtract(*lost)
        assert found.needed[:, head.layer, head.head] == pytest.approx(expected, abs=1e-4)
    assert found.source.startswith("causal: attention knockout")


@pytest.mark.parametrize("seed", range(2))
def test_causal_labels_are_what_was_built(hand_built, seed):
    built, model = hand_built(seed)
    found = measure_causal_effects(model)
    assert {head.place for head in found.labels().heads} == set(built.heads("induction"))
    assert {head.place for head in found.heads(-1)} == set(built.heads("suppression"))


def test_a_head_that_copies_whatever_it_sees_is_no_induction_head(hand_built):
    """It copies the right token too, by chance: as much in rows where nothing repeats, and that is taken off."""
    roles = {
        (0, 0): Role("previous-token", slot=0),
        (0, 1): Role("uniform", writing=COPY),
        (1, 0): Role("induction", strength=0.5, slot=0, writing=COPY),
        (1, 1): Role("uniform"),
    }
    _, model = hand_built(roles)
    found = measure_causal_effects(model)
    assert found.labels().heads == {Head.at(1, 0)}
    assert found.direct.mean(0)[0, 1] == pytest.approx(0.0, abs=0.01)
    batch = causal_labels.battery(model.ordinary(), model.bos, rows=32, length=128, seed=0, first=1_000_000).repeats
    alone = exact_direct_effect(model, batch, predictions_of(batch)).mean(0)
    assert alone[0, 1] > 0.05, "without its control it would be one"
    assert found.needed.mean(0)[0, 1] == pytest.approx(0.0, abs=0.01)
    assert found.direct.mean(0)[1, 0] == pytest.approx(alone[1, 0], abs=0.01)


@pytest.mark.parametrize("words", [7, 12])
def test_copying_decoys_are_labelled_nothing_however_few_words_there_are(words, tmp_path):
    built = handbuilt.decoys(40_003, vocabulary=words + 1)
    model = load(str(handbuilt.save(built, tmp_path, handbuilt.word_tokenizer(words))))
    found = measure_causal_effects(model)
    assert found.labels().heads == frozenset() and found.heads(-1) == []


def test_shipped_labels_are_those_that_are_measured(mini):
    shipped = json.loads(mini.labels_file.read_text())
    measured = measure_causal_effects(mini).as_json()
    assert shipped["induction_heads"] == measured["induction_heads"]
    assert shipped["suppression_heads"] == measured["suppression_heads"]
    assert shipped["source"].startswith(measured["source"])
    kind = "effects_in_nats_with_95_percent_intervals"
    for head, numbers in measured[kind].items():
        for effect in ("needed", "direct"):
            assert numbers[effect] == pytest.approx(shipped[kind][head][effect], abs=2e-4)
