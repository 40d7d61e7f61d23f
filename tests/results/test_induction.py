"""find_induction_heads from Python: the result as table, figure, page, files and repr."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from common import UserError
from common.attention.batches import silent
from common.attention.head import Head
from common.heads import scores
from common.interventions import ablation, effects
from common.results import InductionHeads, files, find_induction_heads, induction
from common.results.analysis import Note, Notes, go_on_from, ignore
from common.results.tables import HeadRow
from tests.results import schemas
from tests.results.schemas import fits_a_screen

TEXTS = ["the cat sat the cat sat", "one two three"]


@pytest.fixture(scope="module")
def heard() -> list[Note]:
    return []


@pytest.fixture(scope="module")
def found(mini, heard) -> InductionHeads:
    return find_induction_heads(mini, [*TEXTS, "a"], batch_size=8, ablate=False, hear=heard.append)


def test_the_heads_of_mini_are_found_and_named(found):
    assert found.induction_heads == (Head.at(1, 0), Head.at(1, 1))
    assert [head.name for head in found.heads if head.induction] == ["1.0", "1.1"]
    assert len(found.heads) == found.survey.found.score.size
    assert [text.text for text in found.texts] == TEXTS
    assert set(found.texts[0].induction_at_work) <= set(found.induction_heads) and found.texts[1].queries == 0
    assert found.metrics.f1 >= 0.8 and found.ablation is None and found.missing == ()


def test_notes_are_told_at_once_and_kept(found, heard):
    assert list(found.notes) == heard == [Note("text 3 ('a') has 1 tokens, at least 2 are needed: left out", True)]


def test_the_arguments_are_those_that_were_used(found, mini):
    asked = found.as_json()["arguments"]
    assert asked.pop("labels") == {"kind": "causal", "source": found.labels.source}
    assert asked == {"threshold": "dynamic", "ablate": False, "seed": 0, "batch_size": 8}
    assert found.as_json()["metrics"]["kind"] == "causal" and "causal labels" in repr(found)


def test_rows_at_once_are_recorded_where_nobody_chose_them_and_so_is_the_seed(random_gpt2):
    used = find_induction_heads(random_gpt2, seed=3, threshold=0.4, labels="none").as_json()["arguments"]
    size = used.pop("batch_size")
    assert isinstance(size, int) and size >= 1
    assert used == {"threshold": 0.4, "labels": "none", "ablate": False, "seed": 3}


def test_fewer_rows_at_once_are_noted_once(random_gpt2, monkeypatch):
    whole, failed = scores._score_at_once, []

    def short_of_memory(model, batch):
        if len(batch.tokens) > 4:
            failed.append(len(batch.tokens))
            raise MemoryError
        return whole(model, batch)

    monkeypatch.setattr(scores, "_score_at_once", short_of_memory)
    heard: list[Note] = []
    found = find_induction_heads(random_gpt2, batch_size=8, labels="none", hear=heard.append)
    said = Note("out of memory with 8 rows at once: going on with 4", True)
    assert len(failed) > 1 and list(found.notes) == heard == [said]
    assert {"text": said.text, "warning": True} in found.as_json()["notes"] and said.text in repr(found)
    assert not logging.getLogger("common.attention.batches").handlers


def test_the_table_has_a_row_per_head_with_its_name(found):
    table = found.table()
    assert table.loc["1.0", "verdict"] == "induction"
    assert list(table.index[table["induction"]]) == ["1.0", "1.1"]
    assert table["prefix_matching"].to_numpy().reshape(found.survey.found.score.shape) == pytest.approx(
        found.survey.found.score
    )
    assert (table["total_effect_low"] <= table["total_effect_high"]).all()


def test_rows_are_the_arrays_of_the_survey_head_by_head(found):
    """A slow oracle: every number of every row looked up where it was measured."""
    detected, evidence = found.survey.found, found.survey.evidence
    for head in found.heads:
        at = head.layer, head.head
        assert head.prefix_matching == detected.score[at] and head.threshold == detected.threshold[at]
        assert head.verdict == detected.verdict[at] and head.induction == detected.induction[at]
        assert head.total_effect == pytest.approx(evidence.effect.mean(0)[at])
        assert head.first_token == evidence.repeats.mean("first_token")[at]
        assert head.budget_bos == evidence.repeats.budget()["bos"][at]
    shuffled = np.roll(detected.score, 1)
    assert any(head.prefix_matching != shuffled[head.layer, head.head] for head in found.heads)


def test_figures_are_listed_drawn_by_name_and_refused_by_name(found):
    assert found.figures == ["mosaic", "thresholds", "budget", "precision_recall", "attention_01", "attention_02",
                             "effects"]  # fmt: skip
    assert "mini" in found.figure("mosaic").axes[0].get_title()
    assert "1.0" in found.figure("attention_01").axes[0].get_title()
    with pytest.raises(UserError, match=r"no figure 'heatmap': there are mosaic, .*effects"):
        found.figure("heatmap")


def test_the_page_is_one_string_of_html(found):
    page = found.page()
    assert page.lstrip().lower().startswith("<!doctype html>") and "Induction heads of mini" in page


def test_saving_writes_the_files_that_results_json_lists(found, tmp_path):
    names = found.save(tmp_path / "o", pictures=False)
    assert names == ["heads.csv", "results.json"] == sorted(path.name for path in (tmp_path / "o").iterdir())
    held = json.loads((tmp_path / "o" / "results.json").read_text())
    assert held == json.loads(json.dumps(found.as_json(names))) and held["files"] == names


def test_as_json_follows_the_schema_and_has_no_argv_without_a_script(found):
    content = json.loads(json.dumps(found.as_json()))
    schemas.check("induction", content)
    assert "argv" not in content and content["arguments"]["ablate"] is False and content["dtype"] == "float32"
    with pytest.raises(AssertionError):
        schemas.check("induction", {**content, "schema": 1})
    with pytest.raises(AssertionError):
        schemas.check("induction", {**content, "heads": [{**content["heads"][0], "verdict": "sure"}]})


def test_every_repr_fits_a_screen_and_says_what_was_found(found):
    for one in (found, found.heads[6], found.texts[0], found.texts[0].heads[6], found.provenance):
        fits_a_screen(one)
    assert "2 induction heads: 1.0" in repr(found) and "induction is at work" in repr(found.texts[0])
    assert "head 1.0: induction" in repr(found.heads[6])


def test_a_text_whose_controls_leave_no_room_decides_nothing(found):
    """An induction head that scores 0.995 in a control text cannot be told to be at work, and the sentence says so."""
    text = found.texts[0]
    attention = text.scores.attention
    place = text.ranked[0].place
    limit = attention.threshold.copy()
    limit[place] = 1.005
    full = replace(text, scores=replace(text.scores, attention=replace(attention, threshold=limit)))
    assert f"not decided for {text.ranked[0]}, as they look there in a control text too" in full.sentence()
    assert "not decided" not in text.sentence()


def test_a_repr_of_much_is_cut():
    class Much(HeadRow):
        def summary(self):
            yield from ("word " * 100 for _ in range(100))

    fits_a_screen(Much(0, 0, *[0.0] * 23))
    assert repr(Much(0, 0, *[0.0] * 23)).endswith("…")


def test_without_texts_the_heads_alone(random_gpt2):
    found = find_induction_heads(random_gpt2, batch_size=8, labels="none")
    assert found.texts == () and found.induction_heads == () and found.metrics is None
    assert "No head of this model" in repr(found)
    schemas.check("induction", json.loads(json.dumps(found.as_json())))


def test_a_hand_built_model_without_one_and_without_a_repeat_follow_the_schema(hand_built):
    built, model = hand_built(1)
    found = find_induction_heads(model, "a b c", batch_size=8)
    schemas.check("induction", json.loads(json.dumps(found.as_json())))
    assert {head.place for head in found.induction_heads} == set(built.heads("induction"))
    assert found.texts[0].queries == 0 and "no token comes again" in found.texts[0].sentence()


@pytest.mark.parametrize(("options", "reason"), [
    ({"sequences": ["a"]}, "no text to analyse"),
    ({"sequences": ["a b " * 2000]}, "reads at most"),
    ({"labels": "does-not-exist.json"}, "cannot read labels"),
])  # fmt: skip
def test_what_cannot_be_analysed_is_a_user_error(mini, options, reason):
    with pytest.raises(UserError, match=reason):
        find_induction_heads(mini, **options)


def effect(**changes):
    control = effects.beside(2.0, [(["0.1"], 0.5)], exhaustive=True)
    return {"name": "mean", "heads": ["1.0"], "metric": "loss", "clean": 1.0, "effect": 2.0, "interval": [1.0, 3.0],
            "rows": 16, "control": control, "note": None, **changes}  # fmt: skip


PLAN = SimpleNamespace(settings={"fingerprint": "a", "dtype": "float32", "versions": {"torch": "2.13.0"}, "code": "b"})


def earlier(effects, part="ablation", **settings):
    """What a file holds of a run with the settings of `PLAN`, but for some."""
    about = {"settings": {**PLAN.settings, **settings}, "missing": []}
    if part == "experiments":
        return {"experiments": {**about, "refused": {}}, "interventions": [{**one, "head": "1.0"} for one in effects]}
    return {"ablation": {**about, "together": ["1.0"], "clean": {}, "effects": effects, "greedy": [], "impossible": {}}}


def used_again(content, part="ablation", metrics=((False, 1),)):
    """Which effects of an earlier results.json are used again, and what is said."""
    notes = Notes(ignore)
    found = go_on_from(json.loads(json.dumps(content)), part, PLAN, dict(metrics), notes)
    return (found and found["effects"]), [tuple(note) for note in notes]


def test_an_earlier_result_is_used_again_where_everything_is_the_same():
    whole = [effect(), effect(heads=["1.1"], control=None, note="none left")]
    taken = "effects taken from the earlier run, which had the same settings"
    assert used_again(earlier(whole)) == (whole, [(f"ablation: 2 {taken}", False)])
    path = [effect(), effect(sender="0.1"), effect(sender="0.1", metric="b")]
    found, said = used_again(earlier(path, "experiments"), "experiments", {False: 1, True: 2}.items())
    assert found == [{**one, "head": "1.0"} for one in path] and said == [(f"experiments: 3 {taken}", False)]
    unknown = effect(effect=None, interval=[None, None], heads=["2.0"])
    found, _ = used_again(earlier([effect(), unknown]))
    assert found == [effect()], "null was NaN, and is measured anew"


def test_an_intervention_is_used_again_with_all_of_its_metrics_or_not_at_all():
    half = [effect(), effect(metric="b", effect=None, interval=[None, None])]
    assert used_again(earlier(half), metrics=[(False, 2)]) == ([], [])
    found, ((said, warning),) = used_again(earlier([effect(), effect()]), metrics=[(False, 2)])
    assert found is None and warning and "an effect stands there twice" in said


@pytest.mark.parametrize("part", ["ablation", "experiments"])
@pytest.mark.parametrize(("changed", "value"), [
    ("fingerprint", "c"), ("dtype", "bfloat16"), ("versions", {"torch": "2.12.0"}), ("code", "d"), ("more", 1),
])  # fmt: skip
def test_what_could_change_a_number_is_measured_anew_and_it_is_said_in_one_line(part, changed, value):
    found, said = used_again(earlier([effect()], part, **{changed: value}), part)
    assert (found, said) == (None, [(f"the earlier run had another {changed}: {part} measured anew", False)])


@pytest.mark.parametrize("nothing", [None, {}, {"ablation": None}, {"heads": [3]}])
def test_where_nothing_was_measured_nothing_is_said(nothing):
    assert used_again(nothing) == (None, [])


WRONG = [{"heads": 3}, {"heads": "1.0"}, {"heads": [["1.2"]]}, {"name": {}}, {"metric": []}, {"effect": "2"},
         {"interval": [1.0]}, {"interval": None}, {"interval": ["low", "high"]}, {"control": {}}, {"control": 3},
         {"control": {"effect": 0.5, "interval": [0, 1], "heads": [["1.0"]]}}, {"note": 3}, {"rows": 1.5},
         {"more": 1}, {"sender": ["0.1"]}]  # fmt: skip


@pytest.mark.parametrize(
    "content",
    [
        *(earlier([effect(**change)]) for change in WRONG), earlier([effect(), effect(metric="b"), effect(metric="c")]),
        earlier([{}]), earlier([3]), earlier([[effect()]]), earlier("text"), earlier(None), earlier({}),
        earlier([{key: value for key, value in effect().items() if key != "effect"}]),
        "text", 3, [], [effect()], {"ablation": 3}, {"ablation": []}, {"ablation": {"effects": []}},
        {"ablation": {"settings": PLAN.settings}}, {"ablation": {"settings": PLAN.settings, "effects": [effect()]}},
    ],
)  # fmt: skip
def test_a_malformed_earlier_result_is_ignored_with_a_warning(content):
    found, ((said, warning),) = used_again(content)
    assert found is None and warning and said.startswith("the earlier results.json is malformed")


def test_a_run_reuses_all_or_nothing(random_gpt2, monkeypatch):
    """The same everything: no run of an ablation. Another dtype in the file: every one anew, with the same effects."""
    asked: list[object] = []
    monkeypatch.setattr(ablation, "ABLATION_ROWS", 4)
    found = np.zeros((random_gpt2.n_layers, random_gpt2.n_heads), dtype=bool)
    found[1, 2] = True
    detected = SimpleNamespace(attends=found, induction=found, ranked=lambda: [Head.at(1, 2)])
    measured = SimpleNamespace(found=detected)
    options = {"seed": 0, "batch_size": 8}

    def ablated(before):
        notes = Notes(ignore)
        return induction._ablate(random_gpt2, measured, True, options, before, silent, notes), list(notes)

    first, _ = ablated(None)
    content = json.loads(json.dumps(files.jsonable({"ablation": first.as_json()})))
    honest = effects.effect
    monkeypatch.setattr(effects, "effect", lambda *rest, **more: asked.append(rest) or honest(*rest, **more))
    again, notes = ablated(content)
    assert asked == [] and again.effects == content["ablation"]["effects"]
    assert [note.text[:29] for note in notes] == ["ablation: 12 effects taken fr"]
    content["ablation"]["settings"]["dtype"] = "torch.bfloat16"
    anew, notes = ablated(content)
    assert len(asked) == len(anew.effects) == len(first.effects) and anew.effects == first.effects
    assert [note.text for note in notes] == ["the earlier run had another dtype: ablation measured anew"]


def test_texts_that_are_left_out_keep_the_others_numbers(random_gpt2):
    few, more = "a b c d e a b c d e", "a b c d e f a b c d e f"
    found = find_induction_heads(random_gpt2, ["", "the", "the cat sat the cat sat", few, more], ablate=False)
    assert [text.number for text in found.texts] == [3, 4, 5]
    assert "4 queries with a target, which is few" in found.texts[1].sentence()
    assert "5 queries with a target" in found.texts[2].sentence() and "few" not in found.texts[2].sentence()
    assert "attention_03" in found.figures and found.texts[0].sentence().startswith("Text 3: ")
    assert "text 3: the cat" in found.figure("attention_03").get_suptitle()
    assert "<h3>Text 3</h3>" in found.page()
    assert [note.text[:6] for note in found.notes if note.warning] == ["text 1", "text 2"]


@pytest.mark.parametrize(("model", "texts", "said"), [("mini", ["a b"], "load it first"), (None, [1], "is a string")])
def test_what_is_no_model_or_no_text_is_said(random_gpt2, model, texts, said):
    with pytest.raises(UserError, match=said):
        find_induction_heads(model or random_gpt2, texts)


@pytest.mark.parametrize(("seconds", "made"), [(60.0, True), (60.1, False)])
def test_an_ablation_of_up_to_a_minute_is_made_unasked(random_gpt2, monkeypatch, seconds, made):
    monkeypatch.setattr(ablation, "AblationPlan", lambda *_, **__: SimpleNamespace(seconds=lambda: seconds))
    monkeypatch.setattr(ablation, "ablate", lambda *_: SimpleNamespace(impossible={}))
    said: list[str] = []
    notes = SimpleNamespace(say=said.append, warn=said.append)
    measured = SimpleNamespace(found=SimpleNamespace(induction=np.array([True])))
    found = induction._ablate(random_gpt2, measured, None, {}, {}, silent, notes)
    assert (found is not None, said == []) == (made, made), said
