"""Parts of heads, paths and predictions: on models whose answer is known by construction, then against slow ways."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from common import UserError
from common.attention.head import Head
from common.circuits.decomposition import decompose
from common.circuits.maps import interact
from common.heads.tokens import TokenBatch, battery, continuing
from common.interventions import effects, experiments
from common.interventions.edits import Recordings, donor_rows, input_from, uniform, zero
from common.interventions.experiments import (
    PATH_METRICS,
    PATHS,
    REPLACEMENTS,
    THROUGH,
    WHOLE,
    ExperimentPlan,
    removal,
    removals,
    run_experiments,
)
from common.interventions.paths import path
from common.loading import Model, load
from tests import architectures
from tests.handbuilt import COPY, LOGIT, Role
from tests.oracle import traces

SENDER, INDUCTION, DECOY = Head.at(0, 0), Head.at(1, 0), Head.at(1, 1)
ROLES = {
    (0, 0): Role("previous-token", slot=0),
    (0, 1): Role("fixed-offset", offset=3),
    (0, 2): Role("duplicate-token"),
    (1, 0): Role("induction", strength=0.95, slot=0, writing=COPY),
    (1, 1): Role("attends-only", strength=0.9, slot=0),  # looks like one, and writes nothing
    (1, 2): Role("bos-sink"),
}
BY_PART = ("uniform", "pattern", "query", "key", "values", "knockout", "mean")  # what is promised to users


def plan_of(model, *heads, attending=(), seed=0) -> ExperimentPlan:
    """For heads of one layer, the first of which receives the paths."""
    attends = np.zeros((model.n_layers, model.n_heads), dtype=bool)
    for head in attending:
        attends[head.place] = True
    return ExperimentPlan(model, heads, heads[0], SimpleNamespace(attends=attends), seed=seed, batch_size=8)


def by_kind(done, metric, head):
    """{name, or (sender, name) of a path: the effect on the metric}."""
    wanted = [one for one in done.effects if (one["metric"], one["heads"]) == (metric, [str(head)])]
    return {(one["sender"], one["name"]) if "sender" in one else one["name"]: one for one in wanted}


@pytest.fixture(scope="module")
def built(hand_built) -> Model:
    return hand_built(ROLES)[1]


@pytest.fixture(scope="module")
def done(built) -> experiments.Experiments:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, "EXPERIMENT_ROWS", 8)  # by construction the heads do the same in every row
        return run_experiments(plan_of(built, INDUCTION, DECOY, attending=[INDUCTION, DECOY]))


@pytest.fixture
def few_rows(monkeypatch):
    monkeypatch.setattr(experiments, "EXPERIMENT_ROWS", 4)


# --- by construction ---


def test_without_its_pattern_query_key_or_output_the_only_induction_head_leaves_chance(built, done):
    """It then rests on BOS, about which it writes nothing: every logit is 0 and the loss that of guessing."""
    chance = math.log(built.d_vocab)
    repeats = by_kind(done, "loss_at_repeats", INDUCTION)
    clean = repeats["mean"]["clean"]
    assert clean < chance - 2
    for kind in ("pattern", "query", "key", "knockout", "mean"):
        assert clean + repeats[kind]["effect"] == pytest.approx(chance, abs=0.1), kind
        assert repeats[kind]["interval"][0] > 2
    assert 0.9 * (chance - clean) < repeats["uniform"]["effect"] <= chance - clean + 0.01  # a little for every token


def test_with_the_values_of_another_row_it_writes_what_does_not_follow(built, done):
    """Worse than guessing: it raises a wrong token by LOGIT x COPY x strength."""
    repeats = by_kind(done, "loss_at_repeats", INDUCTION)["values"]
    raised = math.log(built.d_vocab + math.exp(LOGIT * COPY * 0.95) - 1)
    assert math.log(built.d_vocab) < repeats["clean"] + repeats["effect"] < raised + 0.5


def test_where_it_looks_changes_with_pattern_query_and_key_alone(done):
    own = by_kind(done, "prefix_matching", INDUCTION)
    clean = own["mean"]["clean"]
    assert clean == pytest.approx(0.95, abs=0.02)
    for kind in ("pattern", "query", "key", "knockout"):
        assert clean + own[kind]["effect"] == pytest.approx(0, abs=0.01), kind
    for kind in ("values", "mean"):
        assert own[kind]["effect"] == 0.0


def test_a_decoy_looks_the_same_and_does_nothing(done):
    own, repeats = (by_kind(done, metric, DECOY) for metric in ("prefix_matching", "loss_at_repeats"))
    for kind in ("pattern", "query", "key", "knockout"):
        assert own[kind]["effect"] < -0.8
    for kind in BY_PART:
        assert repeats[kind]["effect"] == pytest.approx(0, abs=1e-4)


def test_fresh_tokens_and_the_only_other_head_do_not_care(done):
    """The control is the sink, the one head of the layer that attends to no targets."""
    repeats, fresh = (by_kind(done, f"loss_at_{where}", INDUCTION) for where in ("repeats", "fresh"))
    for kind in BY_PART:
        assert repeats[kind]["control"]["heads"] == [["1.2"]]
        assert repeats[kind]["control"]["effect"] == pytest.approx(0, abs=1e-3)
        assert abs(fresh[kind]["effect"]) < 0.1 * repeats[kind]["effect"]


def test_the_path_into_the_key_carries_all_that_the_previous_token_head_does(done):
    """Through LayerNorm's scale, which an emptied slot changes by a hundredth, it touches query and values too."""
    for metric in PATH_METRICS:
        found = by_kind(done, metric, INDUCTION)
        whole = found["0.0", "whole sender"]["effect"]
        assert abs(whole) > 0.9
        for way in ("", THROUGH):  # the MLPs are zero: both ways are one
            assert found["0.0", f"path to key{way}"]["effect"] == pytest.approx(whole, rel=0.02)
            for part in ("query", "values"):
                assert found["0.0", f"path to {part}{way}"]["effect"] == pytest.approx(0, abs=0.03 * abs(whole))
        for sender in ("0.1", "0.2"):
            for which in (WHOLE, *PATHS):
                assert found[sender, which]["effect"] == pytest.approx(0, abs=0.01)
        assert found["0.0", "path to key"]["control"]["heads"] == [["0.1"], ["0.2"]]
        assert found["0.0", "path to key"]["control"]["effect"] == pytest.approx(0, abs=0.01)


def test_what_is_done_has_the_names_that_users_know(done):
    assert REPLACEMENTS == BY_PART
    assert {one["name"] for one in done.effects if "sender" not in one} == set(BY_PART)
    ways = [f"path to {part}{way}" for way in ("", " through MLPs") for part in ("query", "key", "values")]
    assert list(PATHS) == ways
    assert {one["name"] for one in done.effects if "sender" in one} == {"whole sender", *ways}
    assert {one["sender"] for one in done.effects if "sender" in one} == {"0.0", "0.1", "0.2"}
    assert all(one["heads"] in (["1.0"], ["1.1"]) for one in done.effects)
    assert (done.missing, done.refused) == ([], {})
    assert json.loads(json.dumps(done.about())).keys() == {"settings", "refused", "missing"}


def test_paths_of_one_layer_below_none_are_not_walked(built, few_rows):
    plan = plan_of(built, SENDER)
    assert plan.senders == []
    assert plan.units == [(kind, SENDER) for kind in BY_PART]


# --- against slow ways ---


def test_each_kind_replaces_what_it_is_named_for(random_gpt2, few_rows):
    """On the induction head query and key break the same thing: here they are told apart."""
    head, plan = Head.at(1, 2), plan_of(random_gpt2, Head.at(1, 2))
    made = {kind: plan.replacements[kind]([head]).edits for kind in BY_PART}
    assert {kind: [(edit.head, edit.point) for edit in edits] for kind, edits in made.items()} == {
        "uniform": [(head, "pattern")], "pattern": [(head, "pattern")], "knockout": [(head, "scores")],
        "query": [(head, "q")], "key": [(head, "k")], "values": [(head, "v")], "mean": [(head, "z")],
    }  # fmt: skip


def masked_mean(values, mask) -> float:
    return float(np.mean([row[places].mean() for row, places in zip(values, mask, strict=True)]))


@pytest.mark.parametrize("kind", ["query", "key", "values"])
def test_effects_are_those_of_the_losses_and_the_pattern(random_gpt2, few_rows, kind):
    """One input of head 1.2 of another row's control, written out: rows drawn again, losses of whole runs."""
    head, plan = Head.at(1, 2), plan_of(random_gpt2, Head.at(1, 2))
    drawn = battery(
        random_gpt2.ordinary(), random_gpt2.bos, rows=4, length=random_gpt2.context, seed=0,
        first=3_000_000,
    )  # fmt: skip
    batch = drawn.repeats
    others = Recordings(random_gpt2, drawn.controls.tokens[donor_rows(4, 0)])
    replaced = input_from([head], kind[0], others)
    before, after = (effects.losses(random_gpt2, batch, one) for one in (None, replaced))
    found = {one["metric"]: one for one in experiments._replacement_effects(plan, kind, head, lambda count: None)}
    for metric, mask in (("loss_at_repeats", continuing(batch)), ("loss_at_fresh", effects.fresh(batch))):
        expected = masked_mean(after - before, mask)
        assert abs(expected) > 1e-4
        assert found[metric]["effect"] == pytest.approx(expected, abs=2e-5)
        assert found[metric]["clean"] == pytest.approx(masked_mean(before, mask), abs=2e-5)
    metrics = effects.RowMetrics(random_gpt2, batch)
    own = [metrics.prefix_matching(head, one).mean() for one in (replaced, None)]
    assert found["prefix_matching"]["effect"] == pytest.approx(own[0] - own[1], abs=1e-6)


def test_controls_are_measured_by_their_own_prefix_matching(random_gpt2, few_rows):
    head, other = Head.at(1, 2), Head.at(1, 3)
    plan = plan_of(random_gpt2, head, attending=[Head.at(1, 0), Head.at(1, 1)])
    found = {one["metric"]: one for one in experiments._replacement_effects(plan, "uniform", head, lambda count: None)}
    metrics = effects.RowMetrics(random_gpt2, plan.drawn.repeats)
    own = [metrics.prefix_matching(other, one).mean() for one in (uniform([other]), None)]
    control = found["prefix_matching"]["control"]
    assert control["effect"] == pytest.approx(own[0] - own[1], abs=1e-9)
    assert control["heads"] == [["1.3"]]


@pytest.mark.parametrize("which", [WHOLE, "path to key", "path to values through MLPs"])
def test_path_effects_are_those_of_each_sender(random_gpt2, few_rows, which):
    """Each beside the other heads of the sender's layer, and of that layer alone."""
    receiver = Head.at(2, 1)
    plan = plan_of(random_gpt2, receiver)
    senders = [f"{layer}.{head}" for layer in range(2) for head in range(4)]
    found = experiments._path_effects(plan, which, lambda count: None)
    assert [(one["sender"], one["metric"]) for one in found] == [
        (sender, metric) for sender in senders for metric in ("prefix_matching", "loss_at_repeats")
    ]
    metrics = effects.RowMetrics(random_gpt2, plan.drawn.repeats)

    def measured(intervention) -> dict[str, float]:
        loss = metrics.losses(intervention)["loss_at_repeats"].mean()
        return {"prefix_matching": metrics.prefix_matching(receiver, intervention).mean(), "loss_at_repeats": loss}

    clean, moved = measured(None), {}
    for sender in map(Head.parse, senders):
        intervention = plan.replacements["mean"]([sender])
        if which != WHOLE:
            part, through = ("k", False) if which == "path to key" else ("v", True)
            intervention = path(intervention, [receiver], part, plan.clean, through_mlps=through)
        moved[str(sender)] = measured(intervention)
    for one in found:
        sender, metric = one["sender"], one["metric"]
        assert one["effect"] == pytest.approx(moved[sender][metric] - clean[metric], abs=1e-6)
        assert (one["name"], one["heads"]) == (which, ["2.1"])
        others = [other for other in senders if other[0] == sender[0] and other != sender]
        rest = np.mean([moved[other][metric] for other in others])
        assert one["control"]["effect"] == pytest.approx(rest - clean[metric], abs=1e-6)
        assert one["control"]["heads"] == [[other] for other in others]


# --- what is refused, and interruptions ---


def test_what_an_architecture_does_not_allow_is_refused_and_the_rest_done(loaded, few_rows):
    """Gemma 2 norms what its heads write: no path leaves them as they are. Its parts can be replaced."""
    result = run_experiments(plan_of(loaded["gemma2"], Head.at(1, 2)))
    assert set(result.refused) == {f"{which} of 1.2" for which in PATHS}
    assert all("before it is added" in why for why in result.refused.values())
    assert {one["name"] for one in result.effects} == {*BY_PART, WHOLE}
    assert result.missing == []
    beside = run_experiments(plan_of(loaded["neox"], Head.at(1, 2)))
    assert set(beside.refused) == {f"{which} of 1.2" for which in PATHS if which.endswith(THROUGH)}
    assert {one["name"] for one in beside.effects} == {*BY_PART, WHOLE, *list(PATHS)[:3]}


def test_an_interruption_keeps_whole_units_and_the_next_run_goes_on(random_gpt2, few_rows, monkeypatch):
    head, before = Head.at(1, 2), traces(random_gpt2)
    whole = run_experiments(plan_of(random_gpt2, head))
    assert whole.missing == [] and whole.refused == {}
    honest, calls = ExperimentPlan.measure, []

    def stopped(self, intervention, head):
        calls.append(head)
        if len(calls) == 14:
            raise KeyboardInterrupt
        return honest(self, intervention, head)

    monkeypatch.setattr(ExperimentPlan, "measure", stopped)
    part = run_experiments(plan_of(random_gpt2, head))
    assert traces(random_gpt2) == before
    assert part.effects == whole.effects[: len(part.effects)] != []
    assert part.missing[0] == "query of 1.2" and part.missing[-1] == "path to values through MLPs of 1.2"
    monkeypatch.setattr(ExperimentPlan, "measure", honest)
    again: list[str] = []
    monkeypatch.setattr(experiments, "_replacement_effects", lambda plan, kind, *_: again.append(kind) or [])
    plan = plan_of(random_gpt2, head)
    plan.known = json.loads(json.dumps(part.effects))
    assert plan.runs == 5 * 4 + 4 + 4 * 7  # five replacements of four heads, these clean, and all paths
    resumed = run_experiments(plan)
    assert again == ["query", "key", "values", "knockout", "mean"]  # neither what was finished, nor less
    assert [one["effect"] for one in resumed.effects[: len(part.effects)]] == [one["effect"] for one in part.effects]
    again.clear()
    other = plan_of(random_gpt2, Head.at(1, 1))
    other.known = part.effects
    run_experiments(other)
    assert again == list(BY_PART)  # the effects of another head


def test_what_is_known_is_not_measured_again(random_gpt2, few_rows, monkeypatch):
    whole, plan = run_experiments(plan_of(random_gpt2, Head.at(1, 2))), plan_of(random_gpt2, Head.at(1, 2))
    plan.known = json.loads(json.dumps(whole.effects))
    monkeypatch.setattr(ExperimentPlan, "measure", None)
    assert (plan.runs, plan.seconds()) == (0, 0.0)
    assert run_experiments(plan).effects == json.loads(json.dumps(whole.effects))


def test_the_bar_is_told_of_every_run_and_as_many_are_promised(random_gpt2, few_rows):
    told: list[int] = []
    promised: list[int] = []

    @contextmanager
    def progress(what, total):
        promised.append(total)
        yield told.append

    plan = plan_of(random_gpt2, Head.at(1, 2))
    run_experiments(plan, progress)
    # Head 1.2 and the three others of its layer by seven replacements and clean; four senders by six paths, and whole.
    assert promised == [plan.runs] == [sum(told)] == [4 * (7 + 1) + 4 * 7]
    assert plan.seconds() > 0


# --- predict, intervene, compare ---


def compared(model, layer, tokens, cells):
    met = interact(model, tokens[None], layer)
    split = decompose(model, tokens, met, list(range(model.n_heads)), cells)
    return split, removals(model, tokens, met, split)


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox", "opt", "bloom"])
def test_what_a_decomposition_predicts_is_what_is_measured(name, tmp_path, tokenizer):
    """On the Llama two query heads share a key; it and NeoX rotate it."""
    model = load(str(architectures.save(name, tmp_path / name, tokenizer)))
    before = traces(model)
    tokens = np.concatenate([[model.bos], np.tile(np.arange(300, 309), 2)])
    split, found = compared(model, 2, tokens, [(11, 3), (15, 7)])
    for head, one in found.items():
        column = split[head].sources.index(one["source"])
        assert one["predicted"] == pytest.approx(-split[head].terms[:, column].sum())
        assert one["score_predicted"] == pytest.approx(-split[head].raw[:, column].sum())
        assert abs(one["predicted"]) > 1e-2
        assert one["relative_error"] < 1e-4
        assert one["measured"] == pytest.approx(one["predicted"], rel=1e-4)
        assert one["score_measured"] == pytest.approx(one["score_predicted"], abs=1e-4 * abs(one["predicted"]))
    assert traces(model) == before


def test_on_mini_too(mini):
    tokens = mini.encode("the quick brown fox jumps the quick brown fox jumps")
    cells = TokenBatch.of([tokens], pad=mini.bos).cells["prefix_matching"]
    _, found = compared(mini, 1, tokens, sorted(zip(cells.query.tolist(), cells.key.tolist(), strict=True)))
    for one in found.values():
        assert abs(one["predicted"]) > 1e-3 and one["relative_error"] < 1e-4


def test_a_prediction_that_does_not_hold_shows_in_the_error(random_gpt2):
    """The same cells and sources with terms half as large: what is measured is no longer what is predicted."""
    tokens = np.concatenate([[random_gpt2.bos], np.tile(np.arange(300, 309), 2)])
    met = interact(random_gpt2, tokens[None], 2)
    split = decompose(random_gpt2, tokens, met, [1], [(11, 3), (15, 7)])[1]
    halved = SimpleNamespace(sources=split.sources, terms=split.terms / 2, raw=split.raw, cells=split.cells)
    right, wrong = (removal(random_gpt2, tokens, met, Head.at(2, 1), one) for one in (split, halved))
    assert right["relative_error"] < 1e-4
    assert wrong["relative_error"] == pytest.approx(1.0, abs=1e-3)
    assert wrong["measured"] == pytest.approx(right["measured"])


def test_the_strongest_source_is_a_head_and_layer_0_has_none(random_gpt2):
    tokens = np.array([random_gpt2.bos, 5, 6, 7, 5, 6])
    split, found = compared(random_gpt2, 2, tokens, [(4, 2)])
    for head, one in found.items():
        by_source = dict(zip(split[head].sources, np.abs(split[head].terms.sum(0)), strict=True))
        heads = {source: size for source, size in by_source.items() if source[0].isdigit()}
        assert one["source"] == max(heads, key=heads.get)
    assert set(compared(random_gpt2, 0, tokens, [(4, 2)])[1].values()) == {None}


def test_keys_that_are_normed_once_more_are_refused_and_it_is_said(tmp_path, tokenizer):
    model = load(str(architectures.save("qwen3", tmp_path / "qwen3", tokenizer)))
    tokens = np.array([model.bos, 5, 6, 7, 5, 6])
    met = interact(model, tokens[None], 1)
    split = decompose(model, tokens, met, [0], [(4, 2)])
    with pytest.raises(UserError, match="norms the keys of each head once more"):
        removal(model, tokens, met, Head.at(1, 0), split[0])
    assert "norms the keys" in removals(model, tokens, met, split)[0]["refused"]
    assert np.isfinite(model.logits(tokens[None], zero([Head.at(1, 0)]).edits).numpy()).all()


def test_a_head_without_a_decomposition_has_no_prediction(random_gpt2):
    assert removals(random_gpt2, np.array([0, 5, 6]), None, {1: "not a sum"}) == {1: None}
