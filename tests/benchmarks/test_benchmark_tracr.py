"""Models that Tracr compiled: converted they do what Tracr's do, and the verdicts are judged by Tracr's own labels."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.tracr import __main__ as benchmark
from benchmarks.tracr import convert
from common.heads.scores import patterns
from tests.conftest import ROOT

DOCUMENT = convert.read_programs()
ENTRIES = {entry["name"]: entry for entry in DOCUMENT["programs"]}


def compiled(name: str) -> convert.Compiled:
    return convert.read_compiled(ENTRIES[name])


def by_hand(given: convert.Compiled, row: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Tracr's transformer in NumPy, one head after the other: every pattern, and what is put out."""
    token, place, *layers = given.matrices
    stream, shown = token[row] + place[: len(row)], []
    for number in range(given.entry["layers"]):
        query, key, value, out, inwards, outwards = layers[6 * number : 6 * number + 6]
        size, before = given.entry["key_size"], stream
        for head in range(given.entry["heads_per_layer"]):
            its = slice(head * size, (head + 1) * size)
            scores = (before @ query[:, its]) @ (before @ key[:, its]).T / math.sqrt(size)
            powers = np.tril(np.exp(scores))
            shown.append(powers / powers.sum(1, keepdims=True))
            stream = stream + shown[-1] @ (before @ value[:, its]) @ out[its]
        stream = stream + np.maximum(stream @ inwards, 0) @ outwards
    return shown, stream[:, given.output_directions]


@pytest.mark.parametrize("name", ["twice", "histogram", "flag-after"])
def test_a_converted_model_computes_what_tracr_computes(name):
    """On Tracr's own rows, and on rows that nobody ran there; tokens, counts, and true or false are put out."""
    given = compiled(name)
    model = benchmark.loaded(given)
    errors = benchmark.conversion_errors(given, model)
    assert errors["pattern"] < 1e-5 and errors["output"] < 1e-4 and errors["another"] == 0
    wanted = [(layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]
    rng = np.random.default_rng(5)
    for length in (3, model.context):
        row = np.concatenate([[model.bos], rng.choice(model.ordinary(), length - 1)])
        shown, output = by_hand(given, row)
        assert np.abs(np.array(patterns(model, row, wanted)) - shown).max() < 1e-5
        logits = model.logits(row[None])[0].numpy()
        assert logits[1:, given.output_ids] / convert.LOGIT == pytest.approx(output[1:], abs=1e-4)
        others = np.setdiff1d(np.arange(model.d_vocab), given.output_ids)
        assert not others.size or np.abs(logits[:, others]).max() < 1e-4


def test_only_tokens_of_the_program_are_ordinary():
    """BOS, padding and the values that are no tokens are never drawn."""
    model = benchmark.loaded(compiled("histogram"))
    assert len(model.ordinary()) == 8 and model.d_vocab == 10 + 17  # counts from 0 to 16
    assert model.bos == ENTRIES["histogram"]["token_values"].index(convert.BOS)


@pytest.mark.parametrize("which", [3, 5, 8, 9])
def test_a_model_converted_wrongly_is_noticed(which):
    """Keys, out and in of a head, an MLP: any matrix that is off shows on Tracr's rows."""
    given = compiled("twice")
    matrices = list(given.matrices)
    assert matrices[which].any()
    matrices[which] = 0.9 * matrices[which]
    errors = benchmark.conversion_errors(given, benchmark.loaded(replace(given, matrices=matrices)))
    assert max(errors["pattern"], errors["output"]) > 10 * benchmark.TOLERANCE


@pytest.mark.parametrize(
    ("name", "attends", "induction"),
    [("twice", {(1, 0), (2, 0)}, {(1, 0), (2, 0)}), ("shifted-on", {(1, 0)}, set()), ("before-place", set(), set())],
)
def test_verdicts_on_foreign_models(name, attends, induction):
    """Induction in two formulations; attention alone, another token put out; the token before a copy."""
    reached = benchmark.outcome(ENTRIES[name], convert.COMPILED)
    assert reached["reached"] == "judged"
    for truth, heads in (("attends", attends), ("induction", induction)):
        assert {(head["layer"], head["head"]) for head in reached["heads"] if head[truth]} == heads
        assert {(head["layer"], head["head"]) for head in reached["heads"] if head["said"][truth]} == heads


def test_a_head_that_no_gradient_shows_is_found():
    """The steps of an MLP hide a head from effects of first order: it attends, all depends on it, and none is seen."""
    (head,) = (
        head for head in benchmark.outcome(ENTRIES["through-number"], convert.COMPILED)["heads"] if head["attends"]
    )
    assert head["induction"] and head["knockout"] > 1
    assert head["said"]["attends"] and head["said"]["induction"]


def test_what_does_not_get_all_the_way_says_how_far():
    refused = benchmark.outcome(ENTRIES["selectors-joined"], convert.COMPILED)
    assert refused["reached"] == "not compiled" and "composite Selectors" in refused["why"]
    stopped = benchmark.outcome(ENTRIES["sorted-exactly"], convert.COMPILED)
    assert stopped["reached"] != "judged" and stopped["why"]


def test_what_does_not_do_what_tracr_did_is_not_judged(tmp_path):
    with np.load(convert.COMPILED / "previous.npz") as stored:
        np.savez(tmp_path / "previous.npz", **{**stored, "values": 0.9 * stored["values"]})
    off = benchmark.outcome(ENTRIES["previous"], tmp_path)
    assert off["reached"] == "loaded" and "heads" not in off and off["errors"]["pattern"] > benchmark.TOLERANCE


def head_of(truth: bool, said: bool, score: float, effect: float) -> dict:
    return {"induction": truth, "said": {"induction": said}, "score": score, "effect": effect}


def test_agreement_of_a_case_worked_out_by_hand():
    heads = [head_of(True, True, 0.3, 1.0), head_of(True, False, 0.5, 0.0), head_of(False, True, 0.05, 1.0)]
    counted = benchmark.counts(heads, "induction")
    assert counted == {"heads": 3, "right": 1, "wrong": 1, "missed": 1, "precision": 0.5, "recall": 0.5}
    assert [benchmark.says(head, "induction", "fixed 0.4") for head in heads] == [False, True, False]
    assert [benchmark.says(head, "induction", "fixed 0.1 with effect") for head in heads] == [True, False, False]
    nothing = benchmark.counts([head_of(False, False, 0, 0)], "induction")
    assert nothing["precision"] == nothing["recall"] == 1
    only_wrong = benchmark.counts([head_of(False, True, 0, 0)], "induction")
    assert only_wrong["precision"] == only_wrong["recall"] == 0


def test_the_committed_result_is_of_the_committed_programs():
    """The same programs, the same truth, and totals that follow from its heads."""
    result = json.loads((ROOT / "benchmarks/results/tracr.json").read_text(encoding="utf-8"))
    assert [each["name"] for each in result["programs"]] == list(ENTRIES) and len(ENTRIES) >= 10
    assert result["versions"] == DOCUMENT["versions"]
    for each in result["programs"]:
        for head, known in zip(each.get("heads", ()), ENTRIES[each["name"]].get("heads", ()), strict=False):
            assert known.items() <= head.items()
    for truth in benchmark.TRUTHS:
        counted = benchmark.totals_of(result["programs"], truth)
        assert result["totals"][truth].keys() == counted.keys()
        for method, count in counted.items():
            assert result["totals"][truth][method] == pytest.approx(count, abs=1e-4), method  # rounded when written


def test_an_unknown_program_is_refused(tmp_path, capsys):
    assert benchmark.main(["--only", "no-such-program", "--out", str(tmp_path / "out")]) == 2
    assert "no-such-program" in capsys.readouterr().err
