"""Losses where they belong, intervals that hold what they should, controls that are none of the heads, and what the
bundled model does when its induction heads are gone."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.attention.head import Head
from common.heads import detection, scores
from common.heads.statistics import interval_over_rows
from common.heads.tokens import TokenBatch, battery, continuing
from common.interventions import effects
from common.interventions.edits import Recordings, knockout, mean, pattern_from, position_classes, uniform, zero
from common.interventions.paths import path
from tests.conftest import ROOT
from tests.oracle import Changes, of, traces


def masked_means(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean of [rows, pos] values per row where the mask holds, by hand; NaN where it holds nowhere."""
    chosen = [row[places] for row, places in zip(values, mask, strict=True)]
    return np.array([row.mean() if len(row) else np.nan for row in chosen])


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


@pytest.mark.parametrize("how", ["clean", "zero", "pattern"])
def test_losses_are_those_of_transformers_alone(random_gpt2, oracles, drawn, how):
    """Two rows at a time; the pattern put in place is another one in every row."""
    tokens, heads = drawn.repeats.tokens, [Head.at(1, 2)]
    seen = oracles["gpt2"].record(drawn.controls.tokens)
    changes = {
        "clean": Changes(),
        "zero": Changes(z=of(heads, lambda layer, head, row, z: 0 * z)),
        "pattern": Changes(pattern=of(heads, lambda layer, head, row, p: seen["pattern", layer, head, row])),
    }[how]
    others = Recordings(random_gpt2, drawn.controls.tokens)
    intervention = {"clean": None, "zero": zero(heads), "pattern": pattern_from(heads, others)}[how]
    log_probs = oracles["gpt2"].logits(tokens, changes).log_softmax(-1).numpy()
    measured = effects.losses(random_gpt2, drawn.repeats, intervention, batch_size=2)
    assert np.isnan(measured[:, 0]).all()
    for row, position in np.ndindex(3, tokens.shape[1] - 1):
        expected = -log_probs[row, position, tokens[row, position + 1]]
        assert measured[row, position + 1] == pytest.approx(expected, abs=1e-4)


# --- intervals ---


def test_the_interval_is_that_over_rows_and_leaves_out_rows_without_a_value():
    values = np.array([1.0, 2.0, np.nan, 4.0])
    estimate, ends = effects.with_interval(values)
    assert (estimate, ends) == effects.with_interval(values[[0, 1, 3]])
    assert estimate == pytest.approx(7 / 3)
    assert ends == [end.item() for end in interval_over_rows(values[[0, 1, 3]])]
    assert np.isnan(effects.with_interval(np.array([2.0]))[1]).all(), "one row says nothing of others"
    estimate, ends = effects.with_interval(np.array([np.nan]))
    assert np.isnan([estimate, *ends]).all()


# --- per row ---


def test_row_metrics_by_hand(random_gpt2, oracles, drawn):
    """Prediction by prediction from the reference's logits; a row without a repeat has nothing at repeats."""
    rows = [*drawn.repeats.tokens[:2], np.concatenate([[random_gpt2.bos], np.arange(20, 33)])]
    batch, heads = TokenBatch.of(rows, pad=0), [Head.at(1, 0)]
    metrics = effects.RowMetrics(random_gpt2, batch, batch_size=2)
    found = metrics.of(zero(heads))
    changed = oracles["gpt2"].logits(batch.tokens, Changes(z=of(heads, lambda layer, head, row, z: 0 * z)))
    clean = oracles["gpt2"].logits(batch.tokens)
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
    alone = metrics.losses(zero(heads))
    assert tuple(alone) == effects.METRICS
    assert all(np.array_equal(alone[name], found[name], equal_nan=True) for name in alone)


@pytest.mark.parametrize("below", [False, True], ids=["clean", "uniform below"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_heads_own_prefix_matching_is_the_score_of_it(loaded, oracles, name, below):
    """Rows that say a thing twice, three times, and never: one query may have several targets, or none."""
    thrice, never = np.array([0, *[5, 6, 7] * 4]), np.arange(13)
    twice = np.array([0, 9, 8, 7, 6, 5, 4, 9, 8, 7, 6, 5, 4])
    batch = TokenBatch.of([twice, never, thrice, twice], pad=0)  # run two rows at a time
    edited, cells = [Head.at(0, 1), Head.at(0, 2)], batch.cells["prefix_matching"]
    flat = of(edited, lambda layer, head, row, p: p.tril().sign() / (torch.arange(len(p))[:, None] + 1))
    changes = Changes(pattern=flat) if below else Changes()
    oracles[name].logits(batch.tokens, changes)
    metrics = effects.RowMetrics(loaded[name], batch, batch_size=2)
    for head in (Head.at(0, 1), Head.at(2, 3)):
        own = metrics.prefix_matching(head, uniform(edited) if below else None)
        for row in (0, 2, 3):
            pattern = changes.seen["pattern", head.layer, head.head, row]
            at = [(query, key) for r, query, key in zip(cells.row, cells.query, cells.key, strict=True) if r == row]
            paid = sum(pattern[query, key].item() for query, key in at)
            assert own[row] == pytest.approx(paid / len({query for query, _ in at}), abs=1e-5)
        assert np.isnan(own[1])


# --- controls ---

HEADS = st.sets(st.builds(Head.at, st.integers(0, 3), st.integers(0, 7)), max_size=10)


@given(heads=HEADS.filter(bool), avoid=HEADS, seed=st.integers(0, 1000))
def test_controls_match_the_layers_and_hold_none_of_the_heads(heads, avoid, seed):
    drawn = effects.layer_matched(sorted(heads), 8, count=5, avoid=avoid, seed=seed)
    assert drawn == effects.layer_matched(sorted(heads), 8, count=5, avoid=avoid, seed=seed)
    assert (not drawn) == (effects.no_control(sorted(heads), 8, avoid) is not None)
    assert len(set(drawn)) == len(drawn) == min(5, effects.matched_sets(sorted(heads), 8, avoid))
    for control in drawn:
        assert not set(control) & (heads | avoid)
        assert sorted(head.layer for head in control) == sorted(head.layer for head in heads)
        assert len(set(control)) == len(control)
        assert all(0 <= head.head < 8 for head in control)


def test_every_control_there_is_is_found_and_a_full_layer_has_none():
    of_layer = [(Head.at(2, head),) for head in (0, 2, 3)]
    assert sorted(effects.layer_matched([Head.at(2, 1)], 4, count=9, seed=0)) == of_layer
    # two of the three others of layer 0, and one of the two others of layer 1
    pairs = effects.layer_matched([Head.at(1, 0), Head.at(0, 2), Head.at(0, 3)], 6, count=20, avoid=[Head.at(0, 0),
                                  Head.at(1, 5), Head.at(1, 4), Head.at(1, 3)], seed=0)  # fmt: skip
    assert len(set(pairs)) == 3 * 2 and {some[-1] for some in pairs} == {Head.at(1, 1), Head.at(1, 2)}
    full = [Head.at(1, head) for head in range(3)]
    assert effects.layer_matched(full, 4, count=3, seed=0) == []
    assert effects.no_control(full, 4) == "no control: layer 1 has 1 other heads, 3 are needed"
    assert effects.no_control(full[:2], 4) is None
    assert effects.no_control(full[:2], 4, [Head.at(1, 3)]) == "no control: layer 1 has 1 other heads, 2 are needed"


def test_an_effect_is_the_mean_change_beside_that_of_its_controls():
    clean, changed = np.array([1.0, 2.0, np.nan]), np.array([3.0, 5.0, np.nan])
    controls = [([Head.at(0, 1)], np.array([1.5, 2.0, np.nan])), ([Head.at(0, 2)], np.array([1.5, 3.0, np.nan]))]
    found = effects.effect("zero", [Head.at(0, 0), Head.at(0, 3)], "loss", clean, changed, controls)
    assert (found["name"], found["heads"], found["metric"], found["rows"]) == ("zero", ["0.0", "0.3"], "loss", 2)
    assert (found["clean"], found["effect"], found["note"]) == (1.5, 2.5, None)
    assert found["interval"] == pytest.approx([2.5 - 12.7062 / 2, 2.5 + 12.7062 / 2], abs=1e-3)  # t, one degree
    assert found["control"] == {
        "effect": 0.5, "lowest": 0.25, "median": 0.5, "highest": 0.75, "draws": 2, "exhaustive": False,
        "share_as_large": 0.0, "heads": [["0.1"], ["0.2"]], "effects": [0.25, 0.75],
    }  # fmt: skip
    assert json.loads(json.dumps(found))["control"]["heads"] == [["0.1"], ["0.2"]]
    keys = ["name", "heads", "metric", "clean", "effect", "interval", "rows", "control", "note"]
    assert list(found) == keys, "in the order of results.json"
    alone = effects.effect("zero", [Head.at(0, 0)], "loss", clean, changed, note="no control: one head")
    assert (alone["control"], alone["note"]) == (None, "no control: one head")


@pytest.mark.parametrize(
    ("real", "share"), [(0.2, 0.5), (0.1, 0.75), (1.5, 0.0), (-0.1, 0.25), (-0.4, 0.25), (-0.5, 0.0), (0.0, 0.75)]
)
def test_draws_as_large_as_the_real_effect_are_counted_in_its_direction(real, share):
    drawn = [(["0.0"], moved) for moved in (-0.4, 0.1, 0.3, 1.0)]
    found = effects.beside(real, drawn, exhaustive=True)
    assert found["share_as_large"] == share
    assert (found["lowest"], found["median"], found["highest"], found["draws"]) == (-0.4, 0.2, 1.0, 4)


def test_an_effect_on_no_row_is_nan_and_says_so():
    nothing = np.full(2, np.nan)
    found = effects.effect("zero", [Head.at(0, 0)], "loss", nothing, nothing)
    assert found["rows"] == 0
    assert np.isnan([found["clean"], found["effect"], *found["interval"]]).all()


def test_effects_with_controls_by_hand(random_gpt2, drawn):
    """Sets in the order of their layers; a control's effect is that of the same intervention on its own heads."""
    metrics = effects.RowMetrics(random_gpt2, drawn.repeats, batch_size=2)
    sets, avoid, ticks = [(Head.at(2, 0), Head.at(2, 1)), (Head.at(0, 3),)], [Head.at(0, 0), Head.at(2, 0)], []
    found = list(
        effects.effects_with_controls(metrics, "zero", sets, zero, controls=2, avoid=avoid, advance=ticks.append)
    )
    assert [one[0]["heads"] for one in found] == [["0.3"], ["2.0", "2.1"]]
    assert [one["metric"] for one in found[0]] == list(metrics.of(None))
    clean = metrics.of(None)
    for effects_of_set, heads in zip(found, reversed(sets), strict=True):
        changed = metrics.of(zero(heads))
        for one in effects_of_set:
            moved = changed[one["metric"]] - clean[one["metric"]]
            assert one["effect"] == pytest.approx(moved.mean(), abs=1e-9)
            assert one["name"] == "zero"
            drawn_sets = [tuple(Head.parse(head) for head in some) for some in one["control"]["heads"]]
            controls = [metrics.of(zero(some))[one["metric"]] - clean[one["metric"]] for some in drawn_sets]
            assert one["control"]["effect"] == pytest.approx(np.mean(controls), abs=1e-9)
    assert found[0][0]["control"]["heads"] and found[1][0]["control"]["heads"] == [["2.2", "2.3"]]
    assert [one[0]["control"]["exhaustive"] for one in found] == [True, True]  # 0.1, 0.2; and the two others of layer 2
    assert sum(ticks) == 2 + 2 + 1


def test_twenty_draws_that_several_sets_share_are_measured_once(random_gpt2, drawn, monkeypatch):
    """Two heads of one layer have the same other heads; a set across layers has controls of its own."""
    assert effects.CONTROLS >= 20
    metrics, ticks, measured = effects.RowMetrics(random_gpt2, drawn.repeats, batch_size=2), [], []
    monkeypatch.setattr(metrics, "of", lambda one: measured.append(one and one.heads) or {"loss": np.zeros(2)})
    two = Head.at(1, 0), Head.at(1, 1)
    found = list(effects.effects_with_controls(
        metrics, "zero", [two[:1], two[1:], two], zero, controls=effects.CONTROLS, avoid=two, advance=ticks.append
    ))  # fmt: skip
    assert [one["control"]["draws"] for (one,) in found] == [2, 1, 2]
    assert sum(ticks) == len(set(map(tuple, measured[1:]))) == len(measured) - 1 == 3 + 2 + 1
    asked = effects.with_their_controls([two[:1], two[1:], two], 4, count=effects.CONTROLS, avoid=two, seed=0)
    assert asked == {tuple(heads) for heads in measured[1:]}
    ((cut,),) = effects.effects_with_controls(metrics, "zero", [two[:1]], zero, controls=1, avoid=two)
    assert (cut["control"]["draws"], cut["control"]["exhaustive"]) == (1, False)
    wide = effects.layer_matched(two, 32, count=effects.CONTROLS, seed=0)
    assert len(set(wide)) == 20 < effects.matched_sets(two, 32)


def test_without_other_heads_there_is_a_note_and_no_control(random_gpt2, drawn):
    metrics = effects.RowMetrics(random_gpt2, drawn.repeats, batch_size=2)
    layer = tuple(Head.at(1, head) for head in range(4))
    (found,) = effects.effects_with_controls(metrics, "zero", [layer], zero, controls=2)
    assert {one["note"] for one in found} == {"no control: layer 1 has 0 other heads, 4 are needed"}
    assert all(one["control"] is None for one in found)


# --- an experiment's rows ---


def test_an_experiment_draws_rows_of_its_own_and_says_what_it_was_made_with(random_gpt2):
    attends = np.zeros((3, 4), dtype=bool)
    attends[1, 2] = attends[0, 3] = True
    found = SimpleNamespace(attends=attends)
    of_seed = effects.Experiment(random_gpt2, found, rows=2, first=77, seed=5, batch_size=2)
    expected = battery(random_gpt2.ordinary(), random_gpt2.bos, rows=2, length=random_gpt2.context, seed=5, first=77)
    assert np.array_equal(of_seed.drawn.repeats.tokens, expected.repeats.tokens)
    assert of_seed.avoid == [Head.at(0, 3), Head.at(1, 2)]
    assert of_seed.settings["fingerprint"] == random_gpt2.fingerprint
    assert {key: of_seed.settings[key] for key in ("seed", "batch_size", "rows", "controls", "avoided", "device")} == {
        "seed": 5, "batch_size": 2, "rows": 2, "controls": effects.CONTROLS, "avoided": ["0.3", "1.2"], "device": "cpu",
    }  # fmt: skip
    ablations = of_seed.ablations()
    assert list(ablations) == ["mean", "knockout"]
    assert {name: make([Head.at(1, 0)]).name for name, make in ablations.items()} == {
        "mean": "mean", "knockout": "knockout",
    }  # fmt: skip
    controls = Recordings(random_gpt2, expected.controls.tokens)
    classes = position_classes(expected.repeats)
    by_hand = {"mean": mean([Head.at(1, 0)], controls, classes)}
    by_hand["knockout"] = knockout([Head.at(1, 0)], expected.repeats.cells["prefix_matching"])
    for name, one in by_hand.items():
        losses = [effects.losses(random_gpt2, expected.repeats, some) for some in (one, ablations[name](one.heads))]
        assert losses[0][:, 1:] == pytest.approx(losses[1][:, 1:], abs=1e-5)
    assert of_seed.seconds() > 0


@pytest.mark.parametrize(("runs", "seconds", "made"), [(None, 2.5, 2), (4, 10.0, 2), (0, 0.0, 0)])
def test_the_time_that_all_runs_will_take_is_that_of_the_second_of_two(random_gpt2, monkeypatch, runs, seconds, made):
    """With nothing left to run, none is made to measure it; unless a plan says otherwise, there is one run."""
    none, ran, clock = SimpleNamespace(attends=np.zeros((3, 4), dtype=bool)), [], iter([10.0, 12.5])
    plan = effects.Experiment(random_gpt2, none, rows=2, first=7, seed=5, batch_size=2)
    monkeypatch.setattr(plan, "run_once", lambda: ran.append(len(ran)))
    monkeypatch.setattr(effects, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    if runs is not None:
        monkeypatch.setattr(effects.Experiment, "runs", property(lambda self: runs))
    assert plan.seconds() == seconds
    assert len(ran) == made


def test_a_gpu_is_named_by_its_kind_and_no_other_device_is_asked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    named = [effects.device_name(SimpleNamespace(device=torch.device(name))) for name in ("cpu", "mps", "cuda:1")]
    assert named == ["cpu", "mps", "cuda:1 (card 1)"]


def test_every_setting_that_could_change_a_number_tells(random_gpt2, monkeypatch, tmp_path):
    """Each is changed alone, and only what it should changes."""
    none = SimpleNamespace(attends=np.zeros((3, 4), dtype=bool))
    some = SimpleNamespace(attends=np.eye(3, 4, dtype=bool))

    def settings(model=random_gpt2, found=none, **changes) -> dict:
        options = {"rows": 2, "first": 7, "seed": 5, "batch_size": 2, **changes}
        return effects.Experiment(model, found, **options).settings

    def changed(after: dict) -> set[str]:
        return {key for key in {*first, *after} if first.get(key) != after.get(key)}

    first = settings()
    assert changed(settings()) == set()
    assert changed(settings(replace(random_gpt2, fingerprint="other"))) == {"fingerprint"}
    assert changed(settings(found=some)) == {"avoided"}
    assert changed(settings(rows=3)) == {"rows", "tokens"}
    assert changed(settings(first=8)) == {"tokens"}
    assert changed(settings(seed=6)) == {"seed", "tokens"}
    assert changed(settings(batch_size=1)) == {"batch_size"}
    fewer = replace(random_gpt2)
    monkeypatch.setattr(type(fewer), "ordinary", lambda self: np.arange(20, 400))  # another tokenizer
    assert changed(settings(fewer)) == {"tokens"}
    monkeypatch.undo()
    monkeypatch.setattr(effects, "CONTROLS", 3)
    assert changed(settings()) == {"controls"}
    monkeypatch.undo()
    monkeypatch.setattr(effects, "version", lambda name: "0")
    assert changed(settings()) == {"versions"}
    monkeypatch.undo()
    monkeypatch.setattr(type(random_gpt2), "dtype", torch.bfloat16)
    assert changed(settings()) == {"dtype"}
    monkeypatch.undo()
    monkeypatch.setattr(effects, "device_name", lambda model: "cuda:0 (other)")
    assert changed(settings()) == {"device"}
    monkeypatch.undo()
    monkeypatch.setattr(effects, "code_version", lambda: "edited")
    assert changed(settings()) == {"code"}


def test_the_code_version_is_over_every_file_that_computes(monkeypatch, tmp_path):
    shutil.copytree(ROOT / "common", tmp_path / "common", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(effects, "__file__", str(tmp_path / "common" / "interventions" / "effects.py"))
    version = effects.code_version.__wrapped__
    assert version() == effects.code_version(), "the same files elsewhere are the same code"
    for name, counts in (("results/page.py", False), ("heads/tokens.py", True), ("interventions/edits.py", True)):
        before, file = version(), tmp_path / "common" / name
        file.write_text(file.read_text() + "#\n")
        assert (version() != before) == counts, name


# --- the bundled model ---


@pytest.fixture(scope="module")
def mini_rows(mini):
    return battery(mini.ordinary(), mini.bos, rows=8, length=64, seed=11)


@pytest.fixture(scope="module")
def mini_scores(mini, mini_rows):
    return scores.score(mini, mini_rows.repeats, batch_size=8), scores.score(mini, mini_rows.controls, batch_size=8)


@pytest.fixture(scope="module")
def induction(mini_scores) -> list[Head]:
    """The detected heads, highest score first."""
    repeats, controls = (measured.sums["prefix_matching"] for measured in mini_scores)
    found = detection.attend(repeats, controls)
    return [Head.at(*place) for place in detection.by_score(found.score) if found.attends[place]]


@pytest.fixture(scope="module")
def metrics(mini, mini_rows):
    return effects.RowMetrics(mini, mini_rows.repeats)


def mean_ablation(model, batch):
    clean, classes = Recordings(model, batch.tokens), position_classes(batch)
    return lambda heads: mean(heads, clean, classes)


def previous_token_heads(mini_scores, below: int) -> list[Head]:
    ranked = detection.by_score(mini_scores[0].mean("previous_token"))
    return [Head.at(*place) for place in ranked if place[0] < below]


def test_without_its_induction_heads_mini_cannot_repeat(mini, mini_rows, induction, metrics):
    ablate, before, ticks = mean_ablation(mini, mini_rows.repeats), traces(mini), []
    sets = [tuple(induction), tuple(induction[:1])]
    found = effects.effects_with_controls(
        metrics, "mean", sets, ablate, controls=2, avoid=induction, advance=ticks.append
    )
    by_heads = {tuple(some[0]["heads"]): {one["metric"]: one for one in some} for some in found}
    gone, one = (by_heads[tuple(effects.names(some))] for some in sets)
    assert 0 < one["loss_at_repeats"]["effect"] < gone["loss_at_repeats"]["effect"]
    for kind in (gone, one):
        assert (kind["loss_at_repeats"]["control"] is None) == (kind["loss_at_repeats"]["note"] is not None)
    assert gone["loss_at_repeats"]["interval"][0] > 1.0
    assert abs(gone["loss_at_fresh"]["effect"]) < 0.1 * gone["loss_at_repeats"]["effect"]
    assert gone["rank_at_repeats"]["effect"] > 10
    assert gone["kl_at_repeats"]["interval"][0] > 0.1
    assert sum(ticks) >= 2
    assert traces(mini) == before


def test_the_previous_token_head_acts_through_the_key(mini, mini_rows, mini_scores, induction, metrics):
    """Ablated, it takes the induction pattern away; so does its path into the key alone, with what the MLPs in between
    make of it, and the other paths do not."""
    ablate, clean = mean_ablation(mini, mini_rows.repeats), Recordings(mini, mini_rows.repeats.tokens)
    receiver = induction[0]
    sender = previous_token_heads(mini_scores, receiver.layer)[0]
    before = metrics.prefix_matching(receiver).mean()

    def lost(intervention) -> float:
        return before - metrics.prefix_matching(receiver, intervention).mean()

    whole = lost(ablate([sender]))
    by_part = {part: lost(path(ablate([sender]), [receiver], part, clean, through_mlps=True)) for part in "qkv"}
    assert whole > 0.5 * before
    assert by_part["k"] > 0.8 * whole
    assert by_part["q"] < 0.1 * whole
    assert by_part["v"] == pytest.approx(0.0, abs=1e-9)


def test_every_earlier_head_into_the_key_singles_out_the_previous_token_head(
    mini, mini_rows, mini_scores, induction, metrics
):
    receiver = induction[0]
    ablate, clean = mean_ablation(mini, mini_rows.repeats), Recordings(mini, mini_rows.repeats.tokens)
    senders = [Head.at(*place) for place in np.ndindex(receiver.layer, mini.n_heads)]
    paths = [path(ablate([sender]), [receiver], "k", clean, through_mlps=True) for sender in senders]
    left = [metrics.prefix_matching(receiver, one).mean() for one in paths]
    assert senders[np.argmin(left)] == previous_token_heads(mini_scores, receiver.layer)[0]


def test_knockout_of_the_induction_cells_changes_what_mini_writes(mini, mini_rows, induction):
    batch = mini_rows.repeats
    row = int(np.argmax(continuing(batch).sum(1)))
    first = int(np.argmax(continuing(batch)[row]))
    start, right = batch.tokens[row, : first + 1], batch.tokens[row, first + 1 : first + 4]
    assert effects.continuation(mini, start, 3).tolist() == right.tolist()
    knocked_out = effects.continuation(
        mini, start, 3, lambda grown: knockout(induction, grown.cells["prefix_matching"])
    )
    assert knocked_out.tolist() != right.tolist()
    others = [Head.at(layer, head) for layer, head in np.ndindex(mini.n_layers, mini.n_heads)]
    others = [head for head in others if head not in induction][: len(induction)]
    control = effects.continuation(mini, start, 3, lambda grown: knockout(others, grown.cells["prefix_matching"]))
    assert control.tolist() == right.tolist()
    assert effects.continuation(mini, start, 3).tolist() == right.tolist()
