"""Any model folder: random models of many families through the first script; what cannot be measured says so."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from common.interventions.bench import Bench, Reads
from common.interventions.interventions import check_values, without_cells

import induction_head_detection as script
from common.heads import attribution
from common.heads.tokens import TokenBatch, battery, continuing
from common.interventions.edits import Edit, Intervention, Recordings
from common.loading import models
from tests import architectures
from tests.heads.test_attribution import centred_logit

FAMILIES = [*architectures.CONFIGS, *architectures.FURTHER]
POST_NORMS = {"gemma2", "gemma3"}  # they norm what heads write before it is added


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    return cache(lambda family: architectures.save(family, tmp_path_factory.mktemp("any") / family, tokenizer))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_script_runs_and_leaves_no_wrong_number(folder, family, tmp_path, capfd):
    path = folder(family)
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
    lines = [line for line in said.splitlines() if not line.startswith(("loading", "model:", "warning: no direct"))]
    assert not lines, "noise of other packages"


@pytest.mark.parametrize("family", FAMILIES)
def test_total_effect_is_the_slope_of_taking_the_attention_away(folder, family):
    """A small share of what each head gets from its targets is taken from its output, which works on every family."""
    model, share = models.load(str(folder(family))), 0.01
    rows = battery(model.ordinary(), model.bos, rows=2, length=30, seed=1).repeats
    reads = Reads.of(rows.tokens, continuing(rows))
    bench, clean = Bench(model, rows.tokens, reads), Recordings(model, rows.tokens)
    metric = {"logit": lambda logits, which: torch.from_numpy(centred_logit(logits, reads.token[which]))}
    whole = bench.measure(None, metric)["logit"]
    measured = attribution.total_effect(model, rows, batch_size=2)
    for head in ((0, 1), (1, 0), (2, 3)):
        slope = (whole - bench.measure(taken_away(clean, head, rows, share), metric)["logit"]) / share
        assert measured[:, head[0], head[1]] == pytest.approx(reads.row_means(slope, 2), rel=0.05, abs=2e-3)
    assert np.abs(measured).max() > 0.01


def taken_away(clean: Recordings, head: tuple[int, int], rows: TokenBatch, share: float) -> Intervention:
    pattern, values = check_values(clean, head)
    cells = rows.cells["prefix_matching"]
    row, query, key = (torch.from_numpy(index) for index in (cells.row, cells.query, cells.key))
    due = (pattern - without_cells(pattern, row, query, key)) @ values
    return Intervention("less", (head,), (Edit(head[0], "z", head[1], lambda old, run: old - share * due[run.rows]),))


def test_a_model_without_attention_says_so(tmp_path, tokenizer, capsys):
    import transformers

    folder = tmp_path / "mamba"
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=len(tokenizer))
    transformers.MambaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert script.main(["--model", str(folder), "--no-plots", "--out", str(tmp_path / "o")]) == 2
    assert len([line for line in capsys.readouterr().err.splitlines() if "induction_head_detection:" in line]) == 1


def test_a_pattern_that_is_not_the_one_in_use_is_refused(random_gpt2, monkeypatch):
    """A copy of the pattern is shown in place of the tensor that the layer goes on with."""
    rows = battery(random_gpt2.ordinary(), random_gpt2.bos, rows=2, length=14, seed=1).repeats
    attention = random_gpt2.bridge.blocks[1].attn
    shown = attention.hook_pattern
    monkeypatch.setitem(attention._modules, "hook_pattern", Beside(shown))
    with pytest.raises(models.UserError, match="layer 1 is not the one it uses"):
        attribution.total_effect(random_gpt2, rows, batch_size=2)


class Beside(torch.nn.Module):
    """Shows a hook point a copy and hands on the original."""

    def __init__(self, shown):
        super().__init__()
        self.shown = shown

    def forward(self, pattern):
        self.shown(pattern.clone())
        return pattern


def test_a_folder_named_as_an_old_alias_brings_no_warning(tmp_path, random_gpt2_folder, caplog):
    (tmp_path / "opt").symlink_to(Path(random_gpt2_folder))
    assert models.load(str(tmp_path / "opt")).n_layers == 3
    assert not caplog.records
