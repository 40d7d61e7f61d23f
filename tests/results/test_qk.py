"""analyse_qk from Python: the result as table, figure, page, files and repr; no script, no folder, no print."""

from __future__ import annotations

import json

import numpy as np
import pytest

from common import UserError
from common.circuits import maps
from common.interventions import experiments
from common.results import QKAnalysis, analyse_qk
from common.results import qk as results_qk
from common.results.qk import choose
from tests.results import schemas
from tests.results.schemas import fits_a_screen

TEXTS = ["the cat sat the cat sat", "one two three"]


@pytest.fixture(scope="module")
def found(mini) -> QKAnalysis:
    return analyse_qk(mini, TEXTS, batch_size=8, interventions=False)


def test_layer_and_head_are_those_of_the_strongest_induction_head(found):
    assert (found.chosen.layer, found.leading) == (1, "1.0")
    assert "strongest induction head is 1.0" in found.chosen.reason and found.notes[0].text.startswith("layer 1: ")
    assert [head.head for head in found.heads if head.induction] == [0, 1]
    assert found.experiments is None and found.effects == [] and found.missing == ()


def test_the_arguments_are_those_that_were_used(found):
    assert found.as_json()["arguments"] == {
        "layer": 1, "head": 0, "threshold": "dynamic", "interventions": False, "seed": 0, "batch_size": 8,
    }  # fmt: skip
    assert found.as_json()["notes"][0]["text"].startswith("layer 1: ")


def test_the_table_has_a_row_per_head_of_the_layer(found):
    table = found.table()
    assert list(table.index) == [f"1.{head}" for head in range(6)]
    assert table["prefix_matching"].to_numpy() == pytest.approx(found.found.score[1])


def test_the_interaction_of_a_text_is_kept_or_made_again(found, mini, monkeypatch):
    text = found.texts[0]
    again = maps.interact(mini, text.ids[None], 1)
    assert found.interaction(text) is text.kept and np.array_equal(text.kept.scores, again.scores)
    monkeypatch.setattr(results_qk, "KEPT", 0)
    bare = analyse_qk(mini, TEXTS[0], batch_size=8, interventions=False)
    assert bare.texts[0].kept is None and np.array_equal(bare.interaction(bare.texts[0]).scores, again.scores)


def test_figures_are_listed_drawn_by_name_and_refused_by_name(found):
    assert found.figures == ["scores_01", "patterns_01", "head_1.0_01", "decomposition_1.0_01", "scores_02",
                             "patterns_02", "head_1.0_02", "decomposition_1.0_02", "circuits_1.0",
                             "composition"]  # fmt: skip
    for name in ("decomposition_1.0_02", "composition"):
        assert found.figure(name).axes
    with pytest.raises(UserError, match="no figure 'mosaic': there are scores_01"):
        found.figure("mosaic")


def test_page_and_files_are_made_without_a_script(found, tmp_path):
    assert "Layer 1 of mini" in found.page()
    names = found.save(tmp_path / "o", pictures=False, export=True)
    assert names == ["qk_01.safetensors", "qk_02.safetensors", "results.json", "terms.csv"]
    assert names == sorted(path.name for path in (tmp_path / "o").iterdir())
    held = json.loads((tmp_path / "o" / "results.json").read_text())
    assert held == json.loads(json.dumps(found.as_json(names))) and "argv" not in held
    schemas.check("qk", held)


def test_every_repr_fits_a_screen_and_says_what_was_found(found):
    for one in (found, found.texts[0], found.provenance, found.heads[0], found.chosen):
        fits_a_screen(one)
    assert "layer 1: the strongest induction head is 1.0" in repr(found) and "embed × 0.0" in repr(found)


def test_a_random_model_and_a_hand_built_one_follow_the_schema(random_gpt2, hand_built):
    for model, options in ((random_gpt2, {"layer": 0, "head": "all"}), (hand_built(1)[1], {})):
        analysed = analyse_qk(model, ["a b c", "a b c a b c"], **options, batch_size=8, interventions=False)
        schemas.check("qk", json.loads(json.dumps(analysed.as_json())))
        fits_a_screen(analysed)
    without = analyse_qk(random_gpt2, [], layer=1, batch_size=8, interventions=False)
    schemas.check("qk", json.loads(json.dumps(without.as_json())))


def test_an_interrupted_analysis_names_what_is_missing_and_goes_on(random_gpt2, monkeypatch):
    options = {"layer": 1, "batch_size": 8, "interventions": True}
    honest, calls = experiments.ExperimentPlan.measure, []

    def until_the_tenth(self, intervention, head):
        calls.append(intervention)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return honest(self, intervention, head)

    with monkeypatch.context() as patched:
        patched.setattr(experiments.ExperimentPlan, "measure", until_the_tenth)
        half = analyse_qk(random_gpt2, "a b c a b c", **options)
    assert half.missing and half.effects
    whole = analyse_qk(random_gpt2, "a b c a b c", **options, earlier=json.loads(json.dumps(half.as_json())))
    assert whole.missing == () and len(whole.effects) > len(half.effects)
    content = json.loads(json.dumps(whole.as_json()))
    schemas.check("qk", content)
    assert all(one["heads"] == [one["head"]] for one in content["interventions"])
    fits_a_screen(whole)


def test_where_a_layer_has_no_induction_head_the_closest_is_chosen(found):
    detected = found.found
    chosen = choose(detected, 0, "auto")
    assert chosen.leading == int(detected.score[0].argmax()) and chosen.induction == []
    assert "no induction head; the closest is" in chosen.reason
    assert choose(detected, "auto", 3).reason.startswith("--head 3; ") and choose(detected, 1, "all").heads[-1] == 5
    assert choose(detected, 1, "auto", drawn=2).grid == [0, 1]


@pytest.mark.parametrize(("options", "reason"), [
    ({"layer": 99}, "has no layer 99"), ({"head": 99}, "has no head 99"), ({"sequences": ["a"]}, "no text to analyse"),
])  # fmt: skip
def test_what_cannot_be_analysed_is_a_user_error(mini, options, reason):
    with pytest.raises(UserError, match=reason):
        analyse_qk(mini, **{"sequences": TEXTS, **options})
