"""Any model folder: random models of many families through the first script; what cannot be measured says so."""

from __future__ import annotations

import json

import numpy as np
import pytest

import induction_head_detection as script
from common.attention.head import Head
from common.heads import attribution
from common.heads.tokens import battery
from tests import architectures
from tests.heads.test_attribution import centred_logits, knocked_out
from tests.loading.test_loader import FAMILIES

THROUGH_THE_SCRIPT = [*architectures.CONFIGS, *architectures.FURTHER]
POST_NORMS = {"gemma2", "gemma3"}  # they norm what heads write before it is added


@pytest.mark.parametrize("family", THROUGH_THE_SCRIPT)
def test_the_script_runs_and_leaves_no_wrong_number(family_folder, family, tmp_path, capfd):
    path = family_folder(family)
    capfd.readouterr()
    arguments = ["--model", str(path), "--no-plots", "--out", str(tmp_path / "o"), "--batch-size", "32"]
    assert script.main([*arguments, "--text", "the cat sat the cat sat"]) == 0
    results = json.loads((tmp_path / "o" / "results.json").read_text(encoding="utf-8"))
    assert len(results["heads"]) == architectures.LAYERS * architectures.HEADS
    said = capfd.readouterr().err
    assert bool(results["no_direct_path"]) == (family in POST_NORMS) == ("no direct effect" in said)
    for head in results["heads"]:
        assert np.isfinite(head["total_effect"]) and 0 <= head["prefix_matching"] <= 1
        for measure in ("direct_effect", "copying"):
            assert (head[measure] is None) == (family in POST_NORMS)
    ours = ("loading", "model:", "warning: no direct", "warning: no fused")
    lines = [line for line in said.splitlines() if not line.startswith(ours)]
    assert not lines, "noise of other packages"


@pytest.mark.parametrize("family", FAMILIES)
def test_total_effect_is_the_slope_of_taking_the_attention_away(of_family, family):
    """A small share of what each head pays to its targets goes to its other keys, which works on every family."""
    model, share = of_family(family), 0.01
    size = getattr(model.door.network.config, "logit_scale", None) or 1.0  # Cohere multiplies its logits by 1/16
    rows = battery(model.ordinary(), model.bos, rows=2, length=30, seed=1).repeats
    clean = centred_logits(model.logits(rows.tokens).double(), rows)
    measured = attribution.attribute(model, rows, batch_size=2).total
    for head in (Head.at(0, 1), Head.at(1, 0), Head.at(2, 3)):
        edited = model.logits(rows.tokens, [knocked_out(head, rows, share)])
        slope = (clean - centred_logits(edited.double(), rows)) / share
        expected = measured[:, head.layer, head.head]
        assert slope.numpy() == pytest.approx(expected, rel=0.05, abs=2e-3 * size + 0.01 * np.abs(measured).max())
    assert np.abs(measured).max() > 0.01 * size


def test_a_model_without_attention_says_so(tmp_path, tokenizer, capsys):
    import transformers

    folder = tmp_path / "mamba"
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=len(tokenizer))
    transformers.MambaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert script.main(["--model", str(folder), "--no-plots", "--out", str(tmp_path / "o")]) == 2
    assert len([line for line in capsys.readouterr().err.splitlines() if "induction_head_detection:" in line]) == 1
