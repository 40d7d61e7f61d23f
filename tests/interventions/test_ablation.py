"""What is taken away and what that costs: effects against whole runs, what a file may hold, and interruptions."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from common.attention.head import Head
from common.heads.tokens import battery, continuing
from common.interventions import ablation, effects
from common.interventions.ablation import AblationPlan, ablate
from common.interventions.edits import Recordings, knockout, mean, position_classes
from tests.oracle import traces

FOUND = [Head.at(2, 1), Head.at(1, 2)]  # strongest first


def plan_of(model, heads=FOUND, seed=0) -> AblationPlan:
    attends = np.zeros((model.n_layers, model.n_heads), dtype=bool)
    for head in heads:
        attends[head.place] = True
    return AblationPlan(model, SimpleNamespace(attends=attends, ranked=lambda: list(heads)), seed=seed, batch_size=8)


@pytest.fixture(scope="module", autouse=True)
def few_rows():
    """Sixteen rows show no more here than four."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation, "ABLATION_ROWS", 4)
        yield


@pytest.fixture(scope="module")
def done(random_gpt2, few_rows) -> ablation.Ablation:
    return ablate(plan_of(random_gpt2))


def test_heads_are_taken_one_by_one_and_together_by_both_ways(done):
    sets = [["2.1"], ["1.2"], ["2.1", "1.2"]]
    made = {(one["name"], tuple(one["heads"])) for one in done.effects}
    assert made == {(name, tuple(heads)) for name in ("mean", "knockout") for heads in sets}
    assert done.together == ["2.1", "1.2"]
    assert (done.missing, done.impossible) == ([], {})
    measured = [one["metric"] for one in done.effects if (one["name"], one["heads"]) == ("mean", ["2.1"])]
    assert sorted(measured) == sorted(done.clean)
    assert done.of(["1.2"], "knockout", "loss_at_repeats")["heads"] == ["1.2"]
    assert done.of(["1.2"], "forbid", "loss_at_repeats") is None
    assert done.of("1.2", "knockout", "loss_at_repeats") is None
    assert json.loads(json.dumps(done.as_json()))["effects"][0]["name"] == "mean"


@pytest.fixture(scope="module")
def rows(random_gpt2, few_rows):
    """What the plan draws, drawn here again."""
    return battery(random_gpt2.ordinary(), random_gpt2.bos, rows=4, length=random_gpt2.context, seed=0, first=2_000_000)


@pytest.mark.parametrize("heads", [FOUND[:1], FOUND], ids=["one", "together"])
def test_effects_are_those_of_whole_runs(random_gpt2, done, rows, heads):
    batch, classes = rows.repeats, position_classes(rows.repeats)
    made = {
        "mean": mean(heads, Recordings(random_gpt2, rows.controls.tokens), classes),
        "knockout": knockout(heads, batch.cells["prefix_matching"]),
    }
    before = effects.losses(random_gpt2, batch)
    for name, intervention in made.items():
        rise = effects.losses(random_gpt2, batch, intervention) - before
        per_row = [row[mask].mean() for row, mask in zip(rise, continuing(batch), strict=True)]
        found = done.of(effects.names(heads), name, "loss_at_repeats")
        assert found["effect"] == pytest.approx(np.mean(per_row), abs=1e-4)
        assert abs(found["effect"]) > 1e-4
        for control in found["control"]["heads"]:
            assert sorted(Head.parse(head).layer for head in control) == sorted(head.layer for head in heads)
            assert not set(control) & {"2.1", "1.2"}
    repeats = continuing(batch)
    assert done.clean["loss_at_repeats"] == pytest.approx(
        np.mean([row[mask].mean() for row, mask in zip(before, repeats, strict=True)]), abs=1e-4
    )


def test_the_greedy_order_costs_most_at_each_step(random_gpt2, done, rows):
    batch = rows.repeats

    def loss(heads) -> float:
        intervention = knockout(heads, batch.cells["prefix_matching"])
        return effects.losses(random_gpt2, batch, intervention)[continuing(batch)].mean()

    first = max(FOUND, key=lambda head: loss([head]))
    rest = next(head for head in FOUND if head != first)
    assert [step["head"] for step in done.greedy] == [str(first), str(rest)]
    assert [step["loss_at_repeats"] for step in done.greedy] == pytest.approx([loss([first]), loss(FOUND)], abs=1e-4)


@pytest.mark.parametrize("heads", [[], FOUND[:1]])
def test_none_and_one_have_no_set_of_all(random_gpt2, heads):
    plan = plan_of(random_gpt2, heads)
    assert plan.sets == [(head,) for head in heads]
    result = ablate(plan)
    assert result.together == effects.names(heads)
    assert {tuple(one["heads"]) for one in result.effects} == {(str(head),) for head in heads}
    assert len(result.greedy) == len(heads)
    assert result.missing == []


def test_many_heads_are_taken_together_and_the_strongest_alone(random_gpt2, monkeypatch):
    monkeypatch.setattr(ablation, "MOST_SINGLE", 2)
    heads = [Head.at(2, 1), Head.at(0, 3), Head.at(1, 1)]
    plan = plan_of(random_gpt2, heads)
    assert plan.singles == heads[:2]
    assert plan.sets == [(heads[0],), (heads[1],), tuple(heads)]
    assert plan.settings["heads"] == ["2.1", "0.3", "1.1"]
    assert plan.seconds() > 0


def test_the_bar_is_told_of_every_run_and_of_no_more_than_were_promised(random_gpt2):
    told, promised = [], []

    @contextmanager
    def progress(what, total):
        promised.append(total)
        yield told.append

    plan = plan_of(random_gpt2)
    ablate(plan, progress)
    # Per way: three sets; for 2.1 the three others of its layer, for 1.2 likewise, for both all 3 x 3 pairs of them.
    # Greedy tries two heads and then the one that is left.
    assert sum(told) == 2 * (3 + 3 + 3 + 9) + 2 + 1
    assert promised == [plan.runs] == [sum(told)]


# --- interruption, and going on ---


def stopping_after(count: int):
    """A progress that is interrupted once `count` runs are done."""

    @contextmanager
    def progress(what, total):
        told = []

        def advance(one: int) -> None:
            told.append(one)
            if len(told) == count:
                raise KeyboardInterrupt

        yield advance

    return progress


def test_an_interruption_keeps_whole_sets_and_says_what_is_missing(random_gpt2, done):
    before = traces(random_gpt2)
    part = ablate(plan_of(random_gpt2), stopping_after(6))  # one set with its controls, and part of the next
    assert {(one["name"], *one["heads"]) for one in part.effects} == {("mean", "1.2")}, "the lowest layer comes first"
    assert part.effects == [one for one in done.effects if (one["name"], one["heads"]) == ("mean", ["1.2"])]
    assert part.missing == [
        "mean 2.1", "mean 2.1 1.2", "knockout 2.1", "knockout 1.2", "knockout 2.1 1.2", "the greedy order",
    ]  # fmt: skip
    assert part.greedy == []
    assert traces(random_gpt2) == before


def test_another_run_goes_on_where_one_was_interrupted(random_gpt2, done, monkeypatch):
    part = json.loads(json.dumps(ablate(plan_of(random_gpt2), stopping_after(6)).as_json()))
    asked, honest = [], effects.effects_with_controls

    def watched(metrics, name, sets, *rest, **options):
        asked.append((name, list(sets)))
        return honest(metrics, name, sets, *rest, **options)

    monkeypatch.setattr(ablation, "effects_with_controls", watched)
    plan = plan_of(random_gpt2)
    plan.go_on(part)
    assert plan.runs == (1 + 3 + 1 + 9) + (3 + 3 + 3 + 9) + 3
    resumed = ablate(plan)
    assert asked == [("mean", [(FOUND[0],), tuple(FOUND)]), ("knockout", [(FOUND[0],), (FOUND[1],), tuple(FOUND)])]
    assert resumed.missing == []
    by_unit = {(one["name"], *one["heads"], one["metric"]): one["effect"] for one in resumed.effects}
    assert by_unit == {(one["name"], *one["heads"], one["metric"]): one["effect"] for one in done.effects}


def test_what_is_known_is_not_measured_again(random_gpt2, done, monkeypatch):
    plan = plan_of(random_gpt2)
    plan.go_on(json.loads(json.dumps(done.as_json())))
    monkeypatch.setattr(effects.RowMetrics, "losses", None)
    assert (plan.runs, plan.seconds()) == (0, 0.0)
    ran: list[object] = []
    monkeypatch.setattr(ablation, "greedy", ran.append)
    resumed = ablate(plan)
    assert ran == [] and resumed.as_json() == json.loads(json.dumps(done.as_json()))


# --- what cannot be done ---


def test_what_a_model_does_not_allow_is_said_and_not_missing(random_gpt2):
    useless = replace(random_gpt2, refused={"edits": "no intervention acts on it"})
    result = ablate(plan_of(useless))
    assert result.impossible == {"mean": "no intervention acts on it", "knockout": "no intervention acts on it"}
    assert (result.effects, result.greedy, result.missing) == ([], [], [])
    assert result.clean["loss_at_repeats"] > 0
