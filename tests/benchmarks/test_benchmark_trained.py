"""The benchmark that sets the detector against attention knockout: its arithmetic, and one run."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import knockout_reference, trained
from common.attention.head import Head
from common.heads.survey import survey
from common.loading import load
from tests import handbuilt
from tests.conftest import ROOT
from tests.handbuilt import COPY, Role


def verdicts(**changed) -> trained.Verdicts:
    """Two layers of two heads; head 1.1 has the largest effect, and 1.0 one that the detector missed."""
    alone = np.array([[[0.0, 0.001], [0.3, 0.9]]]) + np.array([-0.0004, 0.0, 0.0004, 0.0])[:, None, None]
    detected = np.array([[False, False], [False, True]])
    parts = {
        "name": "model", "facts": {}, "detected": detected, "resampled": np.tile(detected, (trained.RESAMPLES, 1, 1)),
        "score": np.array([[0.01, 0.02], [0.2, 0.8]]), "control": np.zeros((2, 2)), "threshold": np.full((2, 2), 0.3),
        "effect": np.array([[0.0, 0.1], [0.04, 2.0]]), "attends": detected, "verdict": np.full((2, 2), "none"),
        "alone": alone, "others_out": np.full_like(alone, np.nan), "joint": [1.0, 1.2, 1.1, 1.3],
    }  # fmt: skip
    return trained.Verdicts(**(parts | changed))


def test_labels_and_agreement_follow_the_rule():
    each = verdicts()
    assert each.needed().tolist() == [[False, False], [True, True]]
    assert each.needed(0.5).tolist() == [[False, False], [False, True]]
    assert trained.counts(each.detected, each.needed()).tolist() == [1, 0, 1]
    found = trained.summary([each])
    assert found["macro"]["precision"] == [1.0, 1.0, 1.0]
    assert found["macro"]["recall"] == [0.5, 0.5, 0.5]
    assert found["macro"]["f1"][0] == pytest.approx(2 / 3, abs=1e-4)
    assert found["f1_by_cut"]["0.5"] == 1.0
    assert found["fixed"]["0.1"] == 1.0
    assert found["fixed_with_effect_rule"]["0.1"] == pytest.approx(2 / 3, abs=1e-4)


def test_an_effect_that_may_be_nothing_is_no_label_and_takes_no_part_in_the_rank():
    alone = verdicts().alone.copy()
    alone[:, 0, 0] = [3.0, -2.0, 3.0, -2.0]
    noisy = verdicts(alone=alone)
    assert not noisy.needed()[0, 0], "its mean is large, its interval holds 0"
    assert noisy.real().tolist() == [[False, True], [True, True]]
    assert noisy.needed_again[:, 0, 0].mean() < 0.5 and noisy.needed_again[:, 1].all()


def test_rank_agreement_is_spearmans_over_the_chosen_heads():
    signal, effect = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[0.1, 0.2], [0.4, 0.3]])
    every = np.ones((2, 2), dtype=bool)
    assert trained.rank(signal, effect, every) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert trained.rank(signal, -effect, every) == pytest.approx(-0.8)
    assert trained.rank(signal, effect, np.array([[True, True], [False, False]])) is None
    alike = np.array([[1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 3.0, 4.0]] * 2)  # even and odd rows swap two heads of four
    found = trained.ranks(signal.ravel(), signal.ravel(), alike, np.ones(4, dtype=bool))
    assert (found["ceiling"], found["heads"]) == (pytest.approx(0.8), 4)


def test_nothing_to_find_counts_false_positives_alone():
    quiet = verdicts(alone=np.zeros((4, 2, 2)))
    found = trained.summary([quiet])
    assert found == {"false_positives": {"model": 1}, "decisions_on_negatives": 4}
    assert trained.shares(trained.counts(np.zeros((2, 2), bool), quiet.needed())).tolist() == [1.0, 1.0, 1.0]


def test_a_run_on_a_hand_built_model_finds_both_sides_of_one_mind(tmp_path, monkeypatch, capsys):
    roles = {
        (0, 0): Role("previous-token", slot=0),
        (0, 1): Role("fixed-offset", offset=3, writing=0.08),
        (1, 0): Role("induction", strength=0.9, slot=0, writing=COPY),
        (1, 1): Role("attends-only", strength=0.9, slot=0),
    }
    built = handbuilt.assemble(roles, vocabulary=65, seed=3)
    folder = handbuilt.save(built, tmp_path / "built", handbuilt.word_tokenizer(64))
    monkeypatch.setattr(trained, "REFERENCES", tmp_path / "references")
    out = tmp_path / "results.json"
    assert trained.main([str(folder), "--rows", "6", "--out", str(out)]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    (model,) = result["models"]
    assert model["needed"] == model["detected"] == ["1.0"]
    assert model["by_head"]["1.0"]["knockout"][1] > 0.05 > abs(model["by_head"]["1.1"]["knockout"][0])
    assert result["summary"]["macro"]["f1"][0] == 1.0
    assert str(tmp_path) not in out.read_text(encoding="utf-8"), "no path of this machine in what is committed"
    assert "1.00" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["gpt2-0", "llama-0", "neox-0"])
def test_detector_and_judge_agree_on_the_trained_models_kept_here(name, tmp_path):
    folder = ROOT / "models" / "judges" / name
    committed = json.loads(trained.RESULTS.read_text(encoding="utf-8"))
    (told,) = [each for each in committed["models"] if each["model"] == name]
    assert told["formed"] and 0 < len(told["needed"]) < told["layers"] * told["heads"]
    again = knockout_reference.measure_into(tmp_path / "reference.json", folder, rows=8, others=0)
    assert sorted(map(knockout_reference.name_of, knockout_reference.needed_heads(again["alone"]))) == told["needed"]
    model = load(str(folder))
    detected = survey(model, seed=1, batch_size=8).found.induction
    assert [str(Head.at(*place)) for place in np.argwhere(detected)] == told["needed"]
