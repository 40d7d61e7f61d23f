"""Scores from patterns in blocks against whole patterns of transformers' own, and memory: the fast way is the same."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, MistralConfig, Qwen3Config

from common import cli
from common.attention import call as call_module
from common.attention.door import Door
from common.heads import scores
from common.heads.tokens import Cells, TokenBatch
from common.loading import Model, load
from common.results import analysis
from tests import architectures
from tests.conftest import ROOT

ARCHITECTURES = ("gpt2", "llama", "neox")
KINDS = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}


def saved(config, tokenizer, folder):
    """A random model of the configuration, and transformers' own of the same weights, with eager attention."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load(str(folder)), eager(folder)


def eager(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=dtype).eval()


def whole_patterns(network, tokens: np.ndarray) -> list[np.ndarray]:
    """By layer, [rows, head, query, key]."""
    with torch.no_grad():
        shown = network(torch.from_numpy(tokens), output_attentions=True, use_cache=False).attentions
    return [pattern.double().numpy() for pattern in shown]


@pytest.fixture(scope="module")
def networks(folders):
    return {name: eager(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def batch(random_gpt2) -> TokenBatch:
    """Rows of unequal length with several copies of some tokens, as long as the models' context."""
    rng = np.random.default_rng(0)
    rows = [rng.choice(np.arange(5, 25), size=size) for size in (63, 40, 9)]
    return TokenBatch.of([np.concatenate([[random_gpt2.bos], row]) for row in rows], pad=random_gpt2.bos)


def slow_sums(network, batch: TokenBatch, cells: Cells) -> np.ndarray:
    """Sums per row, [rows, layers, heads]: whole patterns, and a loop over queries and cells."""
    patterns = whole_patterns(network, batch.tokens)
    sums = np.zeros((len(batch.tokens), len(patterns), patterns[0].shape[1]))
    for row, query, key in zip(cells.row.tolist(), cells.query.tolist(), cells.key.tolist(), strict=True):
        sums[row] += np.stack([pattern[row, :, query, key] for pattern in patterns])
    return sums


def assert_same_scores(model: Model, network, batch: TokenBatch, tolerance: float = 1e-6) -> None:
    measured = scores.score(model, batch, batch_size=2)
    for kind, cells in batch.cells.items():
        sums = slow_sums(network, batch, cells)
        count = np.maximum(measured.sums[kind].counts[:, None, None], 1)
        assert measured.sums[kind].sums / count == pytest.approx(sums / count, abs=tolerance), kind


@pytest.mark.parametrize("block", [1, 64 * 12 * 5, 1 << 20], ids=["a query", "some queries", "many queries"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sums_are_those_of_whole_patterns(loaded, networks, batch, name, block, monkeypatch):
    monkeypatch.setattr(call_module, "BLOCK", block)
    assert_same_scores(loaded[name], networks[name], batch)


@pytest.mark.parametrize("block", [1, 64 * 12 * 5], ids=["a query", "some queries"])
def test_scores_of_another_model_are_others(loaded, networks, batch, block, monkeypatch):
    monkeypatch.setattr(call_module, "BLOCK", block)
    with pytest.raises(AssertionError):
        assert_same_scores(loaded["gpt2"], networks["llama"], batch, tolerance=1e-2)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_blocks_together_are_the_pattern(loaded, networks, batch, name, monkeypatch):
    seen = {}
    whole = whole_patterns(networks[name], batch.tokens)
    monkeypatch.setattr(call_module, "BLOCK", 64 * 12 * 10)

    def keep(layer, call):
        for start, block in call.blocks():
            seen[layer, start] = block

    loaded[name].read(batch.tokens, keep)
    assert sorted({start for _, start in seen}) == list(range(0, 64, 10))
    assert {layer for layer, _ in seen} == {0, 1, 2}
    for (layer, start), block in seen.items():
        _, _, queries, keys = block.shape
        assert keys == start + queries
        assert block.numpy() == pytest.approx(whole[layer][:, :, start : start + queries, :keys], abs=1e-5)


def test_neither_the_bridge_nor_the_unembedding_runs(random_gpt2, batch):
    bridged = set(random_gpt2.bridge.original_model.modules()) - set(random_gpt2.door.network.modules())
    ran = []

    def watched(module, args):
        large = isinstance(module, torch.nn.Linear) and module.out_features > 1000
        if module in bridged or large:
            ran.append(module)

    watch = torch.nn.modules.module.register_module_forward_pre_hook(watched)
    try:
        scores.score(random_gpt2, batch, batch_size=2)
        assert not ran
        random_gpt2.logits(batch.tokens)
        assert ran
    finally:
        watch.remove()


@pytest.mark.parametrize("queries", [5, 24])
def test_a_sliding_window_hides_what_lies_before_it(tokenizer, tmp_path, monkeypatch, batch, queries):
    config = MistralConfig(
        vocab_size=len(tokenizer), num_key_value_heads=2, intermediate_size=48, sliding_window=6,
        initializer_range=0.3, max_position_embeddings=64, **KINDS,
    )  # fmt: skip
    model, network = saved(config, tokenizer, tmp_path)
    monkeypatch.setattr(call_module, "BLOCK", queries * 4 * 64)
    assert_same_scores(model, network, batch)
    whole = scores.patterns(model, np.arange(5, 29), [(1, 0)])[0]
    assert whole[20, :15].max() == 0 < whole[20, 15]


def test_norms_of_queries_and_keys_are_in_the_pattern(tokenizer, tmp_path, batch):
    config = Qwen3Config(
        vocab_size=len(tokenizer), num_key_value_heads=2, head_dim=16, intermediate_size=48,
        initializer_range=0.3, max_position_embeddings=64, **KINDS,
    )  # fmt: skip
    assert_same_scores(*saved(config, tokenizer, tmp_path), batch)


@pytest.mark.parametrize("family", ["gemma2", "mpt", "gptneo"])
def test_a_soft_cap_a_bias_and_local_layers_are_in_the_scores(tokenizer, tmp_path, batch, family):
    folder = architectures.save(family, tmp_path, tokenizer)
    assert_same_scores(load(str(folder)), eager(folder), batch, tolerance=1e-5)


def test_attention_inside_a_module_of_its_own_is_scored_as_any_other(tokenizer, tmp_path, batch):
    """Bloom adds to its scores by distance (ALiBi), in code of its own."""
    config = BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    assert_same_scores(*saved(config, tokenizer, tmp_path), batch)


def test_scores_in_bfloat16_are_near_those_in_float32(random_gpt2, random_gpt2_folder, batch):
    half = load(str(random_gpt2_folder), dtype="bfloat16")
    fast, exact = (scores.score(model, batch, batch_size=2).mean("prefix_matching") for model in (half, random_gpt2))
    sums = slow_sums(eager(random_gpt2_folder, torch.bfloat16), batch, batch.cells["prefix_matching"])
    slow = sums.sum(0) / len(batch.cells["prefix_matching"].queries()[0])
    assert 1e-6 < abs(fast - exact).max() < 0.01
    assert abs(slow - exact).max() < 0.01


def test_scores_survive_running_out_of_memory(random_gpt2, batch, monkeypatch, caplog):
    whole = scores.score(random_gpt2, batch, batch_size=1)
    run = Door.run

    def greedy(self, inputs, **options):
        if len(inputs["input_ids"]) > 1:
            raise torch.OutOfMemoryError
        return run(self, inputs, **options)

    monkeypatch.setattr(Door, "run", greedy)
    halved = scores.score(random_gpt2, batch, batch_size=3)
    assert "going on with 1" in caplog.text
    for kind in batch.cells:
        assert halved.sums[kind].sums == pytest.approx(whole.sums[kind].sums, abs=1e-12)


# --- rows at once ---


def test_auto_is_filled_in_for_the_longest_rows_and_a_number_stays(random_gpt2):
    parser = cli.shared_parser("")
    for arguments, length, rows in (([], 3, 16), ([], 1000, 2), (["--batch-size", "3"], 3, 3)):
        args = parser.parse_args(arguments)
        encoded = [("text", np.zeros(length, dtype=np.int64))]
        assert analysis.rows_at_once(random_gpt2, encoded, args.batch_size) == rows


# --- memory ---

LONG_ROW = """
import json, sys, torch, numpy as np
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from benchmarks.scoring import peak, reset_peak
from common.attention import call
from common.heads import scores
from common.heads.tokens import TokenBatch
from common.loading import load
from common.loading.find import MINI

torch.set_num_threads(1)

def small_llama(layers):
    tokenizer = AutoTokenizer.from_pretrained(MINI)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=2, intermediate_size=32, max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.bos_token_id,
    )
    folder = f"{sys.argv[1]}/{layers}"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load(folder)

def extra(model, length):
    ids = np.random.default_rng(0).choice(model.ordinary(), size=length - 1, replace=True)
    batch = TokenBatch.of([np.concatenate([[model.bos], ids])], pad=0)
    reset_peak("cpu")
    before = peak("cpu")
    found = scores.score(model, batch, batch_size=1).mean("prefix_matching")
    return (peak("cpu") - before) / 2**20, found

shallow, deep = small_llama(2), small_llama(8)
extra(shallow, 256)
in_blocks, fast = extra(shallow, 4096)
deeper, _ = extra(deep, 4096)
call.BLOCK = 1 << 40  # one block of all queries: whole patterns
whole, slow = extra(shallow, 4096)
differ = float(abs(fast - slow).max())
json.dump({"in_blocks": in_blocks, "deeper": deeper, "whole": whole, "differ": differ}, sys.stdout)
"""


def test_a_row_of_4096_tokens_fits_where_whole_patterns_need_eight_times_as_much(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LONG_ROW, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    mebibytes = json.loads(done.stdout)
    assert mebibytes["differ"] < 1e-5
    assert mebibytes["whole"] > 8 * mebibytes["in_blocks"]
    assert mebibytes["deeper"] < mebibytes["in_blocks"] + 16  # four times the layers; one kept pattern would be 512
