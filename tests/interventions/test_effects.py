"""Losses where they belong, intervals that hold what they should, controls that are none of the heads, and what the
bundled model does when its induction heads are gone."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from common.interventions.bench import Bench, Reads
from hypothesis import given
from hypothesis import strategies as st

from common.heads import detection, scores
from common.heads.tokens import TokenBatch, battery, continuing
from common.interventions import effects, interventions
from common.interventions.edits import Recordings, applied
from common.results import files
from tests.oracle import Oracle, assert_no_hooks, bridge_logits


def test_repeats_are_the_tokens_an_earlier_copy_predicts():
    rows = [np.array([0, 5, 6, 7, 5, 6, 8]), np.array([0, 4, 4, 4, 3])]
    batch = TokenBatch.of(rows, pad=0)
    # Row 0: 6 follows 5 again; 8 does not follow 6. Row 1: the third 4 has a target, a 4, but a 3 comes next.
    assert np.argwhere(continuing(batch)).tolist() == [[0, 5]]
    fresh = [(0, position) for position in range(1, 5)] + [(1, position) for position in range(1, 5)]
    assert [tuple(place) for place in np.argwhere(effects.fresh(batch))] == fresh


def test_padding_is_neither_fresh_nor_a_repeat():
    rows = [np.array([9, 5, 6, 5]), np.array([9, 1, 2, 3, 4, 5, 6, 7])]
    batch = TokenBatch.of(rows, pad=6)  # the pad is the token that would continue the repeat
    assert not continuing(batch).any()
    assert effects.fresh(batch).sum(1).tolist() == [3, 7]


def test_losses_are_those_of_transformers_alone(random_gpt2, random_gpt2_folder, drawn):
    tokens = drawn.repeats.tokens
    log_probs = torch.log_softmax(Oracle(random_gpt2_folder).logits(tokens).double(), -1).numpy()
    measured = effects.losses(random_gpt2, drawn.repeats, batch_size=2)
    assert np.isnan(measured[:, 0]).all()
    for row in range(len(tokens)):
        for position in range(1, tokens.shape[1]):
            expected = -log_probs[row, position - 1, tokens[row, position]]
            assert measured[row, position] == pytest.approx(expected, abs=1e-4)


def test_row_means_skip_what_is_not_asked_for():
    values = np.array([[np.nan, 1.0, 3.0], [np.nan, 5.0, 7.0]])
    mask = np.array([[False, True, True], [False, False, False]])
    assert effects.row_means(values, mask) == pytest.approx([2.0, np.nan], nan_ok=True)


def test_the_interval_holds_the_true_mean_about_95_times_in_100():
    rng = np.random.default_rng(0)
    held = 0
    for trial in range(200):
        _, low, high = effects.interval(rng.normal(1.0, 2.0, size=40), seed=trial)
        held += low <= 1.0 <= high
    assert 180 <= held <= 198


def test_the_interval_is_seeded_and_leaves_out_rows_without_a_value():
    values = np.array([1.0, 2.0, np.nan, 4.0])
    assert effects.interval(values, seed=3) == effects.interval(values[[0, 1, 3]], seed=3)
    assert effects.interval(values)[0] == pytest.approx(7 / 3)
    assert np.isnan(effects.interval(np.array([np.nan]))).all()


def test_row_metrics_by_hand(random_gpt2, drawn):
    """Read by read from whole logits; a row without a repeat has nothing at repeats."""
    rows = [*drawn.repeats.tokens[:2], np.concatenate([[random_gpt2.bos], np.arange(20, 33)])]
    batch = TokenBatch.of(rows, pad=0)
    ablation = interventions.zero([(1, 0)])
    found = effects.RowMetrics(random_gpt2, batch, batch_size=2).of(ablation)
    with applied(random_gpt2, ablation):
        changed = bridge_logits(random_gpt2, batch.tokens).double()
    clean = bridge_logits(random_gpt2, batch.tokens).double()
    repeated, fresh = continuing(batch), effects.fresh(batch)
    for row in range(3):
        at = {"repeats": np.flatnonzero(repeated[row]), "fresh": np.flatnonzero(fresh[row])}
        assert len(at["repeats"]) == 0 if row == 2 else len(at["repeats"]) > 0
        loss = {}
        for kind, places in at.items():
            each = [-changed[row, at - 1].log_softmax(-1)[batch.tokens[row, at]].item() for at in places]
            loss[kind] = np.mean(each) if each else np.nan
        right = [(changed[row, p - 1], clean[row, p - 1], batch.tokens[row, p]) for p in at["repeats"]]
        ranks = [(new > new[token]).sum().item() + 1 for new, _, token in right]
        kls = [(old.softmax(-1) * (old.log_softmax(-1) - new.log_softmax(-1))).sum().item() for new, old, _ in right]
        expected = {
            "loss_at_repeats": loss["repeats"],
            "loss_at_fresh": loss["fresh"],
            "loss_difference": loss["repeats"] - loss["fresh"],
            "log_prob_at_repeats": -loss["repeats"],
            "rank_at_repeats": np.mean(ranks) if ranks else np.nan,
            "kl_at_repeats": np.mean(kls) if kls else np.nan,
        }
        assert {name: values[row] for name, values in found.items()} == pytest.approx(expected, abs=1e-4, nan_ok=True)


@pytest.mark.parametrize("intervene", [None, interventions.uniform], ids=["clean", "uniform below"])
def test_a_heads_own_prefix_matching_is_the_score_of_it(random_gpt2, drawn, intervene):
    intervention = intervene([(0, 1), (0, 2)]) if intervene else None
    cells = drawn.repeats.cells["prefix_matching"]
    with applied(random_gpt2, intervention), torch.no_grad():
        cache = random_gpt2.bridge.run_with_cache(torch.from_numpy(drawn.repeats.tokens))[1]
    for layer, head in ((0, 1), (2, 3)):
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"][:, head]
        own = effects.prefix_matching(random_gpt2, drawn.repeats, (layer, head), intervention, batch_size=2)
        for row in range(3):
            at = [(query, key) for r, query, key in zip(cells.row, cells.query, cells.key, strict=True) if r == row]
            paid = sum(pattern[row, query, key].item() for query, key in at)
            assert own[row] == pytest.approx(paid / len({query for query, _ in at}), abs=1e-6)


def test_needed_is_the_rise_of_the_loss_when_a_heads_cells_are_forbidden(random_gpt2, drawn):
    batch, heads = drawn.repeats, [(2, 0), (0, 1)]
    bench = Bench(random_gpt2, batch.tokens, Reads.of(batch.tokens, continuing(batch)), batch_size=2)
    found = dict(effects.needed(bench, batch, heads))
    assert list(found) == sorted(heads)
    for head in heads:
        forbidden = interventions.forbid([head], batch.cells["prefix_matching"])
        rise = effects.losses(random_gpt2, batch, forbidden) - effects.losses(random_gpt2, batch)
        assert found[head] == pytest.approx(effects.row_means(rise, continuing(batch)), abs=1e-4)
        assert np.abs(found[head]).max() > 1e-3


# --- controls ---


@given(
    heads=st.sets(st.tuples(st.integers(0, 3), st.integers(0, 7)), min_size=1, max_size=10),
    avoid=st.sets(st.tuples(st.integers(0, 3), st.integers(0, 7)), max_size=6),
    seed=st.integers(0, 1000),
)
def test_controls_match_the_layers_and_hold_none_of_the_heads(heads, avoid, seed):
    drawn = effects.layer_matched(sorted(heads), 8, count=5, avoid=avoid, seed=seed)
    assert (not drawn) == (effects.no_control(sorted(heads), 8, avoid) is not None)
    assert len(set(drawn)) == len(drawn) <= 5
    for control in drawn:
        assert not set(control) & (heads | avoid)
        assert sorted(layer for layer, _ in control) == sorted(layer for layer, _ in heads)
        assert len(set(control)) == len(control)


def test_every_control_there_is_is_found_and_a_full_layer_has_none():
    assert sorted(effects.layer_matched([(2, 1)], 4, count=9, seed=0)) == [((2, 0),), ((2, 2),), ((2, 3),)]
    assert effects.layer_matched([(1, 0), (1, 1), (1, 2)], 4, count=3, seed=0) == []
    assert effects.no_control([(1, 0), (1, 1), (1, 2)], 4) == "no control: layer 1 has 1 other heads, 3 are needed"


def test_an_effect_is_the_mean_change_beside_that_of_its_controls():
    clean, changed = np.array([1.0, 2.0, np.nan]), np.array([3.0, 5.0, np.nan])
    controls = [([(0, 1)], np.array([1.5, 2.0, np.nan])), ([(0, 2)], np.array([1.5, 3.0, np.nan]))]
    found = effects.effect(interventions.zero([(0, 0), (0, 3)]), "loss", clean, changed, controls)
    assert (found.name, found.head, found.metric, found.rows) == ("zero", "0.0 0.3", "loss", 2)
    assert (found.clean, found.effect) == (1.5, 2.5)
    assert 2.0 <= found.interval[0] <= 2.5 <= found.interval[1] <= 3.0
    assert found.control["effect"] == pytest.approx(0.5)
    assert found.control["heads"] == ["0.1", "0.2"]
    assert json.loads(json.dumps(files.jsonable(found.plain())))["control"]["heads"] == ["0.1", "0.2"]


# --- the bundled model ---


@pytest.fixture(scope="module")
def mini_rows(mini):
    return battery(mini.ordinary(), mini.bos, rows=8, length=64, seed=11)


@pytest.fixture(scope="module")
def mini_scores(mini, mini_rows):
    return scores.score(mini, mini_rows.repeats, batch_size=8), scores.score(mini, mini_rows.controls, batch_size=8)


@pytest.fixture(scope="module")
def induction(mini_scores):
    """The detected heads, highest score first."""
    repeats, controls = (measured.sums["prefix_matching"] for measured in mini_scores)
    found = detection.attend(repeats, controls, detection.deviations(repeats.sums[0].size, 0.5, 7))
    return [head for head in detection.by_score(found.score) if found.attends[head]]


def mean_ablation(model, batch):
    clean, classes = Recordings(model, batch.tokens), interventions.position_classes(batch)
    return lambda heads: interventions.mean(heads, clean, classes, classes)


def test_without_its_induction_heads_mini_cannot_repeat(mini, mini_rows, induction):
    batch = mini_rows.repeats
    ablate, metrics = mean_ablation(mini, batch), effects.RowMetrics(mini, batch)
    ticks: list[int] = []
    found = effects.effects_with_controls(
        metrics, [induction, induction[:1]], ablate, controls=2, avoid=induction, advance=ticks.append
    )
    by_heads = {some[0].head: {one.metric: one for one in some} for some in found}
    gone, one = by_heads[effects.names(induction)], by_heads[effects.names(induction[:1])]
    assert 0 < one["loss_at_repeats"].effect < gone["loss_at_repeats"].effect
    for kind in (gone, one):
        assert (kind["loss_at_repeats"].control is None) == (kind["loss_at_repeats"].note is not None)
    assert gone["loss_at_repeats"].interval[0] > 1.0
    assert abs(gone["loss_at_fresh"].effect) < 0.1 * gone["loss_at_repeats"].effect
    assert gone["rank_at_repeats"].effect > 10
    assert gone["kl_at_repeats"].interval[0] > 0.1
    assert sum(ticks) >= 2
    assert_no_hooks(mini)


def test_the_previous_token_head_acts_through_the_key(mini, mini_rows, mini_scores, induction):
    """Ablated, it takes the induction pattern away; so does its path into the key alone, with what the MLPs in between
    make of it, and the other paths do not."""
    batch = mini_rows.repeats
    ablate, clean = mean_ablation(mini, batch), Recordings(mini, batch.tokens)
    receiver = induction[0]
    sender = next(head for head in detection.by_score(mini_scores[0].mean("previous_token")) if head[0] < receiver[0])
    before = effects.prefix_matching(mini, batch, receiver).mean()

    def lost(intervention) -> float:
        return before - effects.prefix_matching(mini, batch, receiver, intervention).mean()

    whole = lost(ablate([sender]))
    by_part = {
        part: lost(interventions.path(ablate([sender]), [receiver], part, clean, through_mlps=True)) for part in "qkv"
    }
    assert whole > 0.5 * before
    assert by_part["k"] > 0.8 * whole
    assert by_part["q"] < 0.1 * whole
    assert by_part["v"] == pytest.approx(0.0, abs=1e-9)


def test_every_earlier_head_into_the_key_singles_out_the_previous_token_head(mini, mini_rows, mini_scores, induction):
    batch, receiver = mini_rows.repeats, induction[0]
    ablate, clean = mean_ablation(mini, batch), Recordings(mini, batch.tokens)
    paths = interventions.paths_into(receiver, "k", ablate, clean, through_mlps=True)
    assert len(paths) == receiver[0] * mini.n_heads
    left = [effects.prefix_matching(mini, batch, receiver, one).mean() for one in paths]
    sender = int(np.argmin(left))
    scored = mini_scores[0].mean("previous_token")[: receiver[0]]
    assert divmod(sender, mini.n_heads) == np.unravel_index(scored.argmax(), scored.shape)


def test_forbidding_the_induction_cells_changes_what_mini_writes(mini, mini_rows, induction):
    batch = mini_rows.repeats
    row = int(np.argmax(continuing(batch).sum(1)))
    first = int(np.argmax(continuing(batch)[row]))
    start, right = batch.tokens[row, : first + 1], batch.tokens[row, first + 1 : first + 4]
    written = effects.continuation(mini, start, 3)
    assert written.tolist() == right.tolist()
    forbidden = effects.continuation(
        mini, start, 3, lambda grown: interventions.forbid(induction, grown.cells["prefix_matching"])
    )
    assert forbidden.tolist() != right.tolist()
    assert_no_hooks(mini)
