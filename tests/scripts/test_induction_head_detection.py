"""The script end to end, in process, on small models: files, contract, and one line for what a user gets wrong."""

from __future__ import annotations

import csv
import json
import math
import re
import subprocess
import sys

import pytest

import induction_head_detection as script
from common import UserError
from common.loading import load
from tests.conftest import ROOT
from tests.loading.conftest import cache, put_in_cache  # noqa: F401  (a fixture)
from tests.results import schemas

QUICK = ["--text", "the cat sat the cat sat"]


def run(*arguments: str) -> int:
    return script.main([*arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The default texts on `mini`, pictures and all."""
    out = tmp_path_factory.mktemp("run") / "out"
    assert run("--model", "mini", "--out", str(out)) == 0
    return out


@pytest.fixture(scope="module")
def results(finished):
    return json.loads((finished / "results.json").read_text(encoding="utf-8"))


def test_the_default_run_leaves_pictures_numbers_and_table(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {"results.json", "heads.csv", "mosaic.png", "thresholds.png", "budget.png", "precision_recall.png",
                     "effects.png", "ablation.png", "report.html",
                     *(f"attention_{number:02d}.png" for number in range(1, 5))}  # fmt: skip
    for path in finished.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_mini_has_at_least_two_induction_heads_and_agrees_with_its_labels(results):
    assert len(results["induction_heads"]) >= 2
    assert results["metrics"]["f1"] >= 0.8
    assert results["metrics"]["labels"]


def test_results_follow_the_contract(results):
    for key in ("schema", "argv", "seed", "versions", "model", "device", "wall_seconds"):
        assert key in results
    assert set(results["model"]) == {"name", "source", "fingerprint"}
    head = results["heads"][0]
    for key in ("layer", "head", "prefix_matching", "control", "threshold", "induction", "previous_token",
                "duplicate_token", "first_token", "current_token"):  # fmt: skip
        assert key in head
    detected = {f"{head['layer']}.{head['head']}" for head in results["heads"] if head["induction"]}
    assert detected == set(results["induction_heads"])
    assert [entry["text"] for entry in results["sequences"]] == script.sequences


def test_results_are_what_the_schema_says(results, random_gpt2_folder, tmp_path):
    """With heads and labels, and for a random model with neither, on texts with and without a repeat."""
    schemas.check("induction", results)
    assert results["schema"] == 3 and results["argv"]
    used = dict(results["arguments"])
    assert (
        used.pop("labels") == {"kind": "causal", "source": results["metrics"]["labels"]} and used.pop("batch_size") > 0
    )
    assert used == {"threshold": "dynamic", "ablate": True, "seed": 0}
    common = ["--model", str(random_gpt2_folder), "--out", str(tmp_path), "--no-plots", "--labels", "none"]
    assert run(*common, "--text", "a b c", "--text", "a b c a b c") == 0
    found = json.loads((tmp_path / "results.json").read_text())
    schemas.check("induction", found)
    assert found["induction_heads"] == [] and found["ablation"] is found["metrics"] is None
    assert found["arguments"]["labels"] == "none"
    once, twice = found["sequences"]
    assert [len(set(text["tokens"])) - len(text["tokens"]) for text in (once, twice)] == [0, -2], "b and c come again"
    assert once["queries"] == 0 and {head["prefix_matching"] for head in once["heads"]} == {None}
    assert twice["queries"] == 2 and all(0 < head["prefix_matching"] < 1 for head in twice["heads"])


@pytest.mark.parametrize("broken", ["text", [3], "half"])
def test_an_earlier_result_that_is_not_whole_is_measured_again(results, tmp_path, broken):
    before = results["ablation"]
    ablation = {**before, "effects": before["effects"][:4]} if broken == "half" else {**before, "effects": broken}
    (tmp_path / "results.json").write_text(json.dumps({**results, "ablation": ablation}))
    assert run("--model", "mini", "--no-plots", "--out", str(tmp_path), *QUICK, "--ablate") == 0
    again = json.loads((tmp_path / "results.json").read_text())["ablation"]
    assert again["missing"] == [] and len(again["effects"]) == len(before["effects"])


def test_numbers_are_finite_and_shares_of_attention(results):
    text = json.dumps(results)
    assert "NaN" not in text and "Infinity" not in text
    for head in results["heads"]:
        for score in ("prefix_matching", "control", "previous_token", "first_token", "current_token"):
            assert 0 <= head[score] <= 1 and math.isfinite(head[score])


def test_the_csv_is_the_head_table(finished, results):
    with (finished / "heads.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(results["heads"])
    assert [float(row["prefix_matching"]) for row in rows] == [head["prefix_matching"] for head in results["heads"]]


def test_same_seed_same_numbers_and_batch_size_does_not_matter(random_gpt2_folder, tmp_path):
    tables = []
    for number, size in enumerate(("8", "8", "3")):
        out = tmp_path / str(number)
        assert (
            run("--model", str(random_gpt2_folder), "--out", str(out), "--no-plots", "--batch-size", size, *QUICK) == 0
        )
        tables.append((out / "heads.csv").read_text())
    assert tables[0] == tables[1]
    first, third = (list(csv.DictReader(table.splitlines())) for table in (tables[0], tables[2]))
    for one, other in zip(first, third, strict=True):
        assert one["verdict"] == other["verdict"]
        for column in ("prefix_matching", "control", "threshold", "total_effect", "copying", "budget_bos"):
            assert float(other[column]) == pytest.approx(float(one[column]), abs=1e-4), column


def test_a_random_model_has_no_induction_head(random_gpt2_folder, tmp_path, capsys):
    assert run("--model", str(random_gpt2_folder), "--out", str(tmp_path / "o"), "--no-plots", *QUICK) == 0
    assert json.loads((tmp_path / "o" / "results.json").read_text())["induction_heads"] == []
    assert "No head" in capsys.readouterr().out


def test_gpt2_from_a_hub_cache_runs_offline(cache, random_gpt2_folder, tmp_path, capsys):  # noqa: F811
    put_in_cache(cache, random_gpt2_folder, "gpt2")
    assert run("--model", "gpt2", "--out", str(tmp_path / "o"), "--no-plots", *QUICK) == 0
    model = json.loads((tmp_path / "o" / "results.json").read_text())["model"]
    assert model["name"] == "gpt2" and "cache" in model["source"]
    assert "gpt2" in capsys.readouterr().err


def test_the_real_gpt2_small_has_its_published_heads_in_front(tmp_path):
    try:
        load("gpt2")
    except UserError as error:
        pytest.skip(f"GPT-2 small cannot be loaded here: {error}")
    assert run("--model", "gpt2", "--out", str(tmp_path / "o"), "--no-plots", *QUICK) == 0
    found = json.loads((tmp_path / "o" / "results.json").read_text())["induction_heads"]
    assert set(found[:5]) == {"5.1", "5.5", "6.9", "7.2", "7.10"}


def one_line(capsys) -> str:
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("induction_head_detection:")]
    assert len(errors) == 1
    return errors[0]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--text", ""], "no text to analyse"),
        (["--text", "a"], "no text to analyse"),
        (["--text", "a b " * 2000], "at most 512"),
        (["--sequences-file", "does-not-exist.txt"], "cannot read does-not-exist.txt"),
        (["--model", "no/such/folder", *QUICK], "no/such/folder"),
        (["--labels", "does-not-exist.json", *QUICK], "cannot read labels"),
        (["--labels", "published", *QUICK], "no labels were published for the weights of mini"),
        (["--out", "LICENSE", *QUICK], "cannot write to LICENSE"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line_and_exit_2(arguments, reason, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    defaults = ["--model", "mini", "--no-plots", "--out", str(tmp_path / "o")]
    assert run(*defaults, *arguments) == 2
    assert re.search(re.escape(reason), one_line(capsys))
    assert not (tmp_path / "o" / "results.json").exists()


@pytest.mark.parametrize("arguments", [["--threshold", "high"], ["--threshold", "1.5"], ["--seed", "-1"],
                                       ["--batch-size", "0"], ["--dtype", "int8"], ["--nonsense"]])  # fmt: skip
def test_a_wrong_flag_is_one_line_and_exit_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_empty_list_of_texts_is_said(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(script, "sequences", [])
    assert run("--model", "mini", "--no-plots", "--out", str(tmp_path)) == 2
    assert "no text to analyse" in one_line(capsys)


def test_a_file_that_is_not_utf8_is_said(tmp_path, capsys):
    (tmp_path / "latin.txt").write_bytes("caf\xe9 caf\xe9".encode("latin-1"))
    assert run("--model", "mini", "--sequences-file", str(tmp_path / "latin.txt"), "--out", str(tmp_path / "o")) == 2
    assert "not UTF-8" in one_line(capsys)


def test_a_short_text_is_left_out_and_the_others_go_on(tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("a\n\nthe cat sat the cat sat\n", encoding="utf-8")
    arguments = ["--sequences-file", str(tmp_path / "texts.txt"), "--out", str(tmp_path / "o"), "--no-plots"]
    assert run("--model", "mini", *arguments) == 0
    assert "left out" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "o" / "results.json").read_text())["sequences"]) == 1


def test_a_failed_run_leaves_the_old_files(tmp_path, monkeypatch):
    out = tmp_path / "o"
    assert run("--model", "mini", "--no-plots", "--out", str(out), *QUICK) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fail(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("common.results.induction.score_text", fail)
    assert run("--model", "mini", "--no-plots", "--out", str(out), *QUICK) == 130
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["o"]


def test_a_new_run_leaves_no_picture_of_the_old_one_and_every_other_file(tmp_path):
    common = ["--model", "mini", "--out", str(tmp_path)]
    assert run(*common, *QUICK, "--text", "one two one two") == 0
    assert (tmp_path / "attention_02.png").exists()
    (tmp_path / "notes.txt").write_text("mine")
    assert run(*common, *QUICK, "--no-plots") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "heads.csv", "notes.txt"}


def test_a_fixed_threshold_holds_for_every_head(tmp_path):
    assert run("--model", "mini", "--no-plots", "--threshold", "0.05", "--out", str(tmp_path), *QUICK) == 0
    for head in json.loads((tmp_path / "results.json").read_text())["heads"]:
        assert head["threshold"] == 0.05
        assert head["induction"] == (head["prefix_matching"] >= 0.05)


def test_help_needs_no_heavy_import():
    code = "import sys, induction_head_detection as s\ntry: s.main(['--help'])\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch', 'sklearn', 'matplotlib', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--threshold" in done.stdout


def test_verdict_budget_and_effects_are_in_the_results(results):
    for head in results["heads"]:
        budget = [value for key, value in head.items() if key.startswith("budget_")]
        assert len(budget) == 6 and sum(budget) == pytest.approx(1.0, abs=1e-4)
        assert head["induction"] == (head["verdict"] == "induction")
        assert head["prefix_matching_interval"][0] <= head["prefix_matching"] <= head["prefix_matching_interval"][1]
        assert -1 <= head["copying"] <= 1 and 0 <= head["confidence"] <= 1
        if head["induction"]:
            assert head["total_effect"] > 0 and head["prefix_matching"] >= head["threshold"]


def test_each_text_says_whether_induction_is_at_work_and_on_how_much_it_rests(results):
    for entry in results["sequences"]:
        assert set(entry["induction_at_work"]) <= set(entry["ranked"]) == set(results["induction_heads"])
    twice = results["sequences"][3]
    assert twice["induction_at_work"] and twice["queries"] >= 5
    scores = {f"{head['layer']}.{head['head']}": head["prefix_matching"] for head in twice["heads"]}
    assert [scores[head] for head in twice["ranked"]] == sorted(
        (scores[head] for head in twice["ranked"]), reverse=True
    )
    for head in twice["heads"]:
        assert 0 <= head["control"] <= head["control_highest"] <= 1
        assert "prefix_matching_interval" not in head, "one text is one draw"


def test_what_is_lost_without_the_induction_heads_stands_in_the_results(results):
    ablation = results["ablation"]
    assert ablation["missing"] == [] and ablation["together"] == results["induction_heads"]
    for head in results["heads"]:
        name = f"{head['layer']}.{head['head']}"
        assert (head["ablation_effect"] is not None) == (name in results["induction_heads"])
    of_all = [one for one in ablation["effects"] if one["heads"] == ablation["together"]]
    together = {(one["name"], one["metric"]): one for one in of_all}
    for kind in ("mean", "knockout"):
        rise, fresh = together[kind, "loss_at_repeats"], together[kind, "loss_at_fresh"]
        control = rise["control"]
        assert rise["interval"][0] > 5 * max(map(abs, control["effects"]))
        assert control["draws"] == len(control["effects"]) == 6 and control["exhaustive"], "two of layer 1's other four"
        assert control["lowest"] <= control["median"] <= control["highest"] and control["share_as_large"] == 0
        assert abs(fresh["effect"]) < 0.1 * rise["effect"]
    assert [one["head"] for one in ablation["greedy"]] != []


def test_ablation_can_be_left_out_and_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    from common.interventions import ablation, effects

    common = ["--model", "mini", "--no-plots", "--out", str(tmp_path), *QUICK]
    assert run(*common, "--no-ablate") == 0
    assert json.loads((tmp_path / "results.json").read_text())["ablation"] is None
    monkeypatch.setattr(effects, "UNASKED", 0.0)
    assert run(*common) == 0
    assert "ablation left out" in capsys.readouterr().err
    measured = ablation.effects_with_controls

    def stopped(metrics, kind, sets, *arguments, **options):
        for number, found in enumerate(measured(metrics, kind, sets, *arguments, **options)):
            if number == 1:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(ablation, "effects_with_controls", stopped)
    assert run(*common, "--ablate") == 130
    assert "not measured" in capsys.readouterr().err
    half = json.loads((tmp_path / "results.json").read_text())["ablation"]
    assert half["effects"] and half["missing"]
    asked = []

    def counted(metrics, kind, sets, *arguments, **options):
        asked.append((kind, len(sets)))
        return measured(metrics, kind, sets, *arguments, **options)

    monkeypatch.setattr(ablation, "effects_with_controls", counted)
    assert run(*common, "--ablate") == 0
    whole = json.loads((tmp_path / "results.json").read_text())["ablation"]
    assert whole["missing"] == [] and whole["effects"][: len(half["effects"])] == half["effects"]
    assert asked[0] == ("mean", 2), "one of three sets was done"


def test_labels_of_ones_own_measured_ones_and_none(tmp_path):
    common = ["--model", "mini", "--no-plots", "--no-ablate", *QUICK]
    (tmp_path / "mine.json").write_text('{"source": "a guess", "induction_heads": ["0.0"]}')
    said = {}
    for labels in (str(tmp_path / "mine.json"), "causal", "none"):
        assert run(*common, "--labels", labels, "--out", str(tmp_path / "o")) == 0
        said[labels] = json.loads((tmp_path / "o" / "results.json").read_text())["metrics"]
    assert said["none"] is None
    assert said["causal"]["f1"] >= 0.9 and said["causal"]["labels"].startswith("causal")
    mine = said[str(tmp_path / "mine.json")]
    assert (mine["precision"], mine["recall"], mine["labels"]) == (0.0, 0.0, "a guess")


def test_started_from_another_folder_it_still_finds_mini(tmp_path):
    command = [sys.executable, str(ROOT / "induction_head_detection.py"), "--model", "mini", "--no-plots", *QUICK]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "Heads of mini" in done.stdout
    assert (tmp_path / "outputs" / "mini" / "induction_head_detection" / "results.json").exists()
