"""The second script end to end, in process, on small models: files, contract, one line for what a user gets wrong."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import transformers
from safetensors import safe_open

import qk_circuit_analysis as script
from common.circuits import decomposition, maps
from common.interventions import effects, experiments
from common.interventions.experiments import REPLACEMENTS
from common.loading.families import Norm
from tests import architectures
from tests.conftest import ROOT
from tests.results import schemas

QUICK = ["--text", "the cat sat the cat sat", "--no-interventions"]


def run(*arguments: str) -> int:
    return script.main([*arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The default texts on `mini`, pictures and all; interventions asked for, however slow the machine is today."""
    out = tmp_path_factory.mktemp("run") / "out"
    assert run("--model", "mini", "--out", str(out), "--export", "--interventions") == 0
    return out


@pytest.fixture(scope="module")
def results(finished):
    return json.loads((finished / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def strongest(mini):
    """The strongest induction head and the strongest previous-token head of `mini`, read off its scores."""
    from common.heads.survey import survey

    evidence = survey(mini, seed=0, batch_size=8).evidence
    repeats, controls = evidence.repeats, evidence.controls
    ranked = {}
    for kind, of in (("prefix_matching", repeats), ("previous_token", controls)):
        values = of.mean(kind)
        ranked[kind] = tuple(int(place) for place in np.unravel_index(int(values.argmax()), values.shape))
    return ranked


def test_the_default_run_leaves_pictures_numbers_and_table(finished, results):
    at = f"{results['layer']}.{results['decomposition'][0]['head'].split('.')[1]}"
    texts = [f"{number:02d}" for number in range(1, 5)]
    stems = ("scores", "patterns", f"head_{at}", f"decomposition_{at}")
    pictures = {f"{stem}_{text}.png" for stem in stems for text in texts} | {f"circuits_{at}.png", "composition.png"}
    pictures |= {f"parts_{at}.png", f"paths_{at}.png"}
    other = {"results.json", "terms.csv", "report.html", *(f"qk_{text}.safetensors" for text in texts)}
    assert {path.name for path in finished.iterdir()} == pictures | other == set(results["files"])
    for path in finished.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_results_follow_the_contract(results):
    for key in ("schema", "argv", "seed", "versions", "model", "device", "wall_seconds",
                "layer", "heads", "composition", "decomposition", "directions"):  # fmt: skip
        assert key in results
    for effect in results["interventions"]:
        assert set(effect) >= {"name", "heads", "metric", "clean", "effect", "interval", "rows", "control"}
        assert effect["interval"][0] <= effect["effect"] <= effect["interval"][1] and effect["rows"] == 16
    assert results["experiments"]["missing"] == [] and results["experiments"]["refused"] == {}
    assert [entry["text"] for entry in results["sequences"]] == script.sequences
    assert results["check"]["max_abs_error"] == max(entry["check"]["max_abs_error"] for entry in results["sequences"])
    assert 0 < results["check"]["max_abs_error"] <= maps.SCORE_ERRORS[0]
    for entry in results["sequences"]:
        assert len(entry["maps"]) == 4
        assert all(0 < key < query < len(entry["tokens"]) for query, key in entry["cells"])
    text = json.dumps(results)
    assert "NaN" not in text and "Infinity" not in text


def test_results_are_what_the_schema_says(results):
    schemas.check("qk", results)
    assert results["schema"] == 3 and results["arguments"]["layer"] == 1 and results["argv"]


@pytest.mark.parametrize("broken", ["text", [3], "half"])
def test_an_earlier_result_that_is_not_whole_is_measured_again(results, tmp_path, monkeypatch, broken):
    """A result that is whole is taken as it is."""
    before, measured, honest = results["interventions"], [], experiments._done
    monkeypatch.setattr(experiments, "_done", lambda *arguments: measured.append(1) or honest(*arguments))
    monkeypatch.setattr(experiments, "REPLACEMENTS", ("uniform",))
    monkeypatch.setattr(experiments, "PATHS", {})
    earlier = {**results, "interventions": before[:3] if broken == "half" else broken}
    (tmp_path / "results.json").write_text(json.dumps(earlier))
    common = ["--model", "mini", "--no-plots", "--out", str(tmp_path), "--text", "the cat sat the cat sat"]
    assert run(*common, "--interventions") == 0
    assert len(measured) == 2, "one part and one path"
    measured.clear()
    assert run(*common, "--interventions") == 0
    assert measured == []


def test_auto_is_the_layer_of_the_strongest_induction_head(results, strongest):
    layer, head = strongest["prefix_matching"]
    assert results["layer"] == layer
    assert {entry["head"] for entry in results["decomposition"]} == {f"{layer}.{head}"}
    assert "strongest induction head" in results["chosen"]
    assert results["heads"][head]["induction"] is True


def test_on_mini_the_top_term_is_embed_times_the_previous_token_head(results, strongest):
    sender = "{}.{}".format(*strongest["previous_token"])
    repeated = [entry for entry in results["decomposition"] if entry["cells_are"] == "induction cells"]
    assert len(repeated) == 3
    for entry in repeated:
        assert (entry["terms"][0]["query"], entry["terms"][0]["key"]) == ("embed", sender)
        assert entry["terms"][0]["value"] > 0
        assert entry["relative_error"] < decomposition.SUM_ERRORS[0]
    assert results["composition"]["previous_token_to_induction"]["writes"] == sender
    assert results["composition"]["previous_token_to_induction"]["z"] > results["composition"]["z_limit"]


def moved(results, metric):
    """By (name of the intervention, sender or None): the effect on one metric."""
    found = [one for one in results["interventions"] if one["metric"] == metric]
    return {(one["name"], one.get("sender")): one["effect"] for one in found}


def test_on_mini_the_previous_token_head_acts_through_the_key(results, strongest):
    """Ablated, it takes the induction pattern away; so does its path into the key alone, MLPs in between and all."""
    sender = "{}.{}".format(*strongest["previous_token"])
    own = moved(results, "prefix_matching")
    whole = own["whole sender", sender]
    assert whole == min(effect for (name, _), effect in own.items() if name == "whole sender") < -0.5
    assert own["path to key through MLPs", sender] < 0.8 * whole
    for part in ("query", "values"):
        assert abs(own[f"path to {part} through MLPs", sender]) < 0.1 * abs(whole)
    others = [effect for (name, of), effect in own.items() if name == "path to key through MLPs" and of != sender]
    assert max(map(abs, others)) < 0.5 * abs(whole)


def test_on_mini_where_the_induction_head_looks_and_what_it_brings_back_both_matter(results):
    own, repeats, fresh = (moved(results, m) for m in ("prefix_matching", "loss_at_repeats", "loss_at_fresh"))
    clean = next(one["clean"] for one in results["interventions"] if one["metric"] == "prefix_matching")
    for kind in ("uniform", "pattern", "query", "key", "knockout"):
        assert own[kind, None] < -0.8 * clean
    for kind in ("values", "mean"):
        assert own[kind, None] == pytest.approx(0, abs=1e-9)
    for kind in REPLACEMENTS:
        assert repeats[kind, None] > 0.2 and abs(fresh[kind, None]) < 0.1 * repeats[kind, None]
        one = next(e for e in results["interventions"] if (e["name"], e["metric"]) == (kind, "loss_at_repeats"))
        assert abs(one["control"]["effect"]) < 0.2 * one["effect"]


def test_predictions_stand_beside_measurements(results):
    for entry in results["decomposition"]:
        found = entry["removal"]
        assert abs(found["predicted"]) > 1e-3
        assert abs(found["measured"] - found["predicted"]) <= 1e-4 * abs(found["predicted"])


def test_interventions_that_take_long_are_left_out_and_it_is_said(random_gpt2_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(effects, "UNASKED", 0.0)
    common = ["--model", str(random_gpt2_folder), "--out", str(tmp_path), "--no-plots", "--text", "a b c a b c"]
    assert run(*common) == 0
    assert "interventions left out" in capsys.readouterr().err
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["interventions"] == [] and found["experiments"] is None
    assert run(*common, "--layer", "1", "--interventions") == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert {one["name"] for one in found["interventions"]} == {*REPLACEMENTS, *experiments.PATHS, "whole sender"}


def test_an_interruption_keeps_what_is_done_and_says_what_is_missing(random_gpt2_folder, tmp_path, monkeypatch, capsys):
    common = ["--model", str(random_gpt2_folder), "--out", str(tmp_path), "--layer", "1", "--text", "a b c a b c"]
    honest, calls = experiments.ExperimentPlan.measure, []

    def until_the_tenth(self, intervention, head):
        calls.append(intervention)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return honest(self, intervention, head)

    monkeypatch.setattr(experiments.ExperimentPlan, "measure", until_the_tenth)
    assert run(*common, "--interventions") == 130
    assert "stopped; not measured: " in one_line(capsys)
    part = json.loads((tmp_path / "results.json").read_text())
    assert part["interventions"] and part["experiments"]["missing"]
    assert list(tmp_path.glob("parts_*.png")) and not list(tmp_path.glob("paths_*.png"))


def test_the_csv_holds_the_terms(finished, results):
    with (finished / "terms.csv").open() as file:
        rows = list(csv.DictReader(file))
    terms = [term for entry in results["decomposition"] for term in entry["terms"]]
    assert [float(row["value"]) for row in rows] == [term["value"] for term in terms]
    assert set(rows[0]) == {"text", "head", "query", "key", "value"}


def test_exported_q_and_k_make_the_scores_of_the_layer(finished, results, mini):
    with safe_open(finished / "qk_02.safetensors", framework="numpy") as file:
        q, k, tokens = (file.get_tensor(name) for name in ("q", "k", "tokens"))
        assert file.metadata() == {"layer": str(results["layer"])}
    met = maps.interact(mini, tokens[None], results["layer"])
    assert mini.strings(tokens) == results["sequences"][1]["tokens"]
    products = np.einsum("qhd,khd->hqk", q, k) * met.rules.scale
    assert products == pytest.approx(met.products[0], abs=1e-4)


def test_the_table_says_what_was_found(tmp_path, capsys, strongest):
    assert run("--model", "mini", "--no-plots", "--out", str(tmp_path), *QUICK) == 0
    out = capsys.readouterr().out
    sender, receiver = ("{}.{}".format(*strongest[kind]) for kind in ("previous_token", "prefix_matching"))
    assert f"Head {receiver} on 3 induction cells of text 1" in out
    assert re.search(rf" embed +{re.escape(sender)} ", out)
    assert re.search(r"Our scores reproduce the model's: largest error \d\.\de-\d\d", out)
    assert f"K-composition {sender} → " in out
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "terms.csv"}


def test_any_layer_and_head_can_be_asked_for(random_gpt2_folder, tmp_path):
    common = ["--model", str(random_gpt2_folder), "--out", str(tmp_path), "--no-plots", *QUICK]
    assert run(*common, "--layer", "2", "--head", "all") == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert [entry["head"] for entry in found["decomposition"]] == ["2.0", "2.1", "2.2", "2.3"]
    assert run(*common, "--layer", "0", "--head", "3") == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert (found["layer"], found["composition"]) == (0, None)
    assert [entry["head"] for entry in found["decomposition"]] == ["0.3"]


def test_the_layer_in_the_script_counts_and_the_flag_goes_first(random_gpt2_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "layer", 1)
    common = ["--model", str(random_gpt2_folder), "--out", str(tmp_path), "--no-plots", *QUICK]
    for flags, expected in (([], 1), (["--layer", "2"], 2)):
        assert run(*common, *flags) == 0
        assert json.loads((tmp_path / "results.json").read_text())["layer"] == expected


def test_a_model_without_induction_heads_is_analysed_and_it_is_said(random_gpt2_folder, tmp_path, capsys):
    assert run("--model", str(random_gpt2_folder), "--out", str(tmp_path), "--no-plots", *QUICK) == 0
    assert "no induction head; the closest is" in capsys.readouterr().err
    found = json.loads((tmp_path / "results.json").read_text())
    assert not any(head["induction"] for head in found["heads"])


THROUGH = {path for path in experiments.PATHS if path.endswith("through MLPs")}
REFUSED = {  # paths: all, where a norm stands after attention; through MLPs that read more, or beside the heads
    "bloom": THROUGH,
    "gemma2": set(experiments.PATHS),
    "neox": THROUGH,
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_architectures_run_pictures_and_all(name, tmp_path, tokenizer):
    folder = architectures.save(name, tmp_path / f"random-{name}", tokenizer)
    assert run("--model", str(folder), "--out", str(tmp_path / "o"), "--layer", "1", *QUICK, "--interventions") == 0
    found = json.loads((tmp_path / "o" / "results.json").read_text())
    assert found["check"]["max_abs_error"] < 1e-5
    assert found["decomposition"][0]["relative_error"] < 1e-5
    walked = {one["name"] for one in found["interventions"] if "sender" in one}
    refused = {label.split(" of ")[0] for label in found["experiments"]["refused"]}
    assert refused == REFUSED[name] and walked == {*experiments.PATHS, "whole sender"} - refused
    assert {one["name"] for one in found["interventions"]} - walked == set(REPLACEMENTS)
    assert len(list((tmp_path / "o").glob("*.png"))) == 8


def test_a_map_that_is_not_the_models_stops_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(maps.Rules, "scores", lambda self, products: 2 * products)
    assert run("--model", "mini", "--out", str(tmp_path / "o"), *QUICK) == 2
    assert "is not reproduced" in one_line(capsys)
    assert not (tmp_path / "o").exists()


def test_a_decomposition_that_does_not_add_up_is_left_out_and_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Norm, "scale", lambda self, x: np.ones((*x.shape[:-1], 1)))
    assert run("--model", "mini", "--out", str(tmp_path), *QUICK) == 0
    assert "do not add up" in capsys.readouterr().err
    found = json.loads((tmp_path / "results.json").read_text())
    assert "do not add up" in found["decomposition"][0]["refused"] and found["decomposition"][0]["terms"] == []
    assert not list(tmp_path.glob("decomposition_*.png")) and list(tmp_path.glob("scores_*.png"))
    assert not (tmp_path / "terms.csv").exists()


def test_a_head_that_is_no_sum_of_parts_still_has_its_maps(tmp_path, tokenizer, capsys):
    """OLMo 2 norms the queries of all heads at once."""
    config = transformers.Olmo2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    transformers.Olmo2ForCausalLM(config).save_pretrained(tmp_path / "olmo2")
    tokenizer.save_pretrained(tmp_path / "olmo2")
    assert run("--model", str(tmp_path / "olmo2"), "--out", str(tmp_path / "o"), "--layer", "1", *QUICK) == 0
    assert "norms the queries of all heads at once" in capsys.readouterr().err
    found = json.loads((tmp_path / "o" / "results.json").read_text())
    assert found["check"]["max_abs_error"] < 1e-5 and found["composition"] is None
    assert {path.stem.split("_")[0] for path in (tmp_path / "o").glob("*.png")} == {"scores", "patterns", "head"}


def one_line(capsys) -> str:
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("qk_circuit_analysis:")]
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
        (["--out", "LICENSE", *QUICK], "cannot write to LICENSE"),
        (["--layer", "99", *QUICK], "mini has no layer 99: its layers are 0 to "),
        (["--head", "99", *QUICK], "mini has no head 99 in a layer: its heads are 0 to "),
    ],
)
def test_what_a_user_gets_wrong_is_one_line_and_exit_2(arguments, reason, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert run("--model", "mini", "--no-plots", "--out", str(tmp_path / "o"), *arguments) == 2
    assert reason in one_line(capsys)
    assert not (tmp_path / "o" / "results.json").exists()


@pytest.mark.parametrize("arguments", [["--layer", "last"], ["--layer", "-1"], ["--head", "1.5"], ["--head", "most"],
                                       ["--threshold", "2"], ["--nonsense"]])  # fmt: skip
def test_a_wrong_flag_is_one_line_and_exit_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_layer_without_attention_is_said(tmp_path, tokenizer, capsys):
    """A hybrid model: convolutions in layers 0 and 2, attention in layer 1."""
    config = transformers.Lfm2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention", "conv"], bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    transformers.Lfm2ForCausalLM(config).save_pretrained(tmp_path / "hybrid")
    tokenizer.save_pretrained(tmp_path / "hybrid")
    assert run("--model", str(tmp_path / "hybrid"), "--out", str(tmp_path / "o"), "--layer", "0", *QUICK) == 2
    assert "layer 0" in one_line(capsys)


def test_long_texts_run_and_stay_within_a_window(tmp_path):
    text = "the cat sat on the mat and the dog lay by the door " * 20
    assert run("--model", "mini", "--out", str(tmp_path), "--text", text, "--no-interventions") == 0
    for path in tmp_path.glob("*.png"):
        assert path.stat().st_size > 10_000
    assert len(json.loads((tmp_path / "results.json").read_text())["sequences"][0]["tokens"]) > 200


def test_same_seed_same_numbers(random_gpt2_folder, tmp_path):
    read = []
    for number in range(2):
        common = ["--model", str(random_gpt2_folder), "--out", str(tmp_path / str(number)), "--no-plots", *QUICK]
        assert run(*common, "--interventions") == 0
        found = json.loads((tmp_path / str(number) / "results.json").read_text())
        read.append(
            {
                key: found[key]
                for key in ("heads", "check", "decomposition", "composition", "directions", "interventions")
            }
        )
    assert read[0] == read[1]


def test_help_needs_no_heavy_import():
    code = "import sys, qk_circuit_analysis as s\ntry: s.main(['--help'])\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch', 'sklearn', 'matplotlib', 'transformers', 'einops'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for flag in ("--layer", "--head", "--export", "--threshold", "--no-interventions"):
        assert flag in done.stdout


def test_a_new_run_leaves_no_file_of_the_old_one(tmp_path):
    common = ["--model", "mini", "--out", str(tmp_path), "--no-plots", *QUICK]
    assert run(*common, "--text", "one two one two", "--export") == 0
    assert (tmp_path / "qk_02.safetensors").exists()
    assert run(*common) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "terms.csv"}
    shutil.rmtree(tmp_path)
