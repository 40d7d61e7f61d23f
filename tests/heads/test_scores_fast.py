"""The trunk behind fused attention against the bridge's whole patterns, and memory: that the fast way is the same."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from common import UserError, cli
from common.attention import batching, trunk
from common.heads import scores
from common.heads.tokens import Cells, TokenBatch
from common.loading import models
from common.results import analysis
from tests.conftest import ROOT

ARCHITECTURES = ("gpt2", "llama", "neox")
KINDS = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}


def saved(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return models.load(str(tmp_path))


@pytest.fixture(scope="module")
def batch(random_gpt2) -> TokenBatch:
    """Rows of unequal length with several copies of some tokens, as long as the models' context."""
    rng = np.random.default_rng(0)
    rows = [rng.choice(np.arange(5, 25), size=size) for size in (63, 40, 9)]
    return TokenBatch.of([np.concatenate([[random_gpt2.bos], row]) for row in rows], pad=random_gpt2.bos)


def slow_sums(model: models.Model, batch: TokenBatch, cells: Cells) -> tuple[np.ndarray, np.ndarray]:
    """Sums and squares per row, [rows, layers, heads]: whole patterns of the bridge, a loop over queries and cells."""
    patterns = {}
    models.read_patterns(model, batch.tokens, lambda layer, pattern: patterns.update({layer: pattern.double().numpy()}))
    paid = {}
    for row, query, key in zip(cells.row.tolist(), cells.query.tolist(), cells.key.tolist(), strict=True):
        seen = np.stack([patterns[layer][row, :, query, key] for layer in range(model.n_layers)])
        paid[row, query] = paid.get((row, query), 0) + seen
    shape = (len(batch.tokens), model.n_layers, model.n_heads)
    sums, squares = np.zeros(shape), np.zeros(shape)
    for (row, _), value in paid.items():
        sums[row] += value
        squares[row] += value**2
    return sums, squares


@pytest.mark.parametrize("block", [1, 64 * 12 * 5, 1 << 20], ids=["a query", "some queries", "many queries"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sums_and_squares_are_those_of_the_bridges_patterns(loaded, batch, name, block, monkeypatch):
    monkeypatch.setattr(trunk, "BLOCK", block)
    model = loaded[name]
    assert model.trunk
    measured = scores.score(model, batch, batch_size=2)
    for kind, cells in batch.cells.items():
        sums, squares = slow_sums(model, batch, cells)
        count = np.maximum(measured.sums[kind].counts[:, None, None], 1)
        assert measured.sums[kind].sums / count == pytest.approx(sums / count, abs=1e-6), kind
        assert measured.sums[kind].squares / count == pytest.approx(squares / count, abs=1e-6), kind


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_each_query_pays_is_the_same_either_way(loaded, batch, name):
    fast = scores.per_query(loaded[name], batch, batch_size=2)
    slow = scores.per_query(replace(loaded[name], trunk=None), batch, batch_size=3)
    assert fast.shape == slow.shape
    assert fast == pytest.approx(slow, abs=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_blocks_together_are_the_pattern(loaded, batch, name, monkeypatch):
    model, seen, whole = loaded[name], {}, {}
    monkeypatch.setattr(trunk, "BLOCK", 64 * 12 * 10)
    model.trunk.read(torch.from_numpy(batch.tokens), lambda *block: seen.setdefault(block[:2], block[2]))
    models.read_patterns(model, batch.tokens, lambda layer, pattern: whole.update({layer: pattern}))
    assert sorted({start for _, start in seen}) == list(range(0, 64, 10))
    for (layer, start), block in seen.items():
        _, _, queries, keys = block.shape
        assert keys == start + queries
        assert block.numpy() == pytest.approx(whole[layer][:, :, start : start + queries, :keys].numpy(), abs=1e-5)


def test_neither_the_bridge_nor_the_unembedding_runs(random_gpt2, batch, monkeypatch):
    def refuse(*args):
        raise AssertionError("ran")

    monkeypatch.setattr(scores, "read_patterns", refuse)
    watch = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: refuse() if isinstance(module, torch.nn.Linear) and module.out_features > 1000 else None
    )
    try:
        scores.score(random_gpt2, batch, batch_size=2)
    finally:
        watch.remove()


def test_the_weights_are_those_of_the_bridge(random_gpt2):
    ours = {tensor.data_ptr() for tensor in random_gpt2.trunk.model.parameters()}
    theirs = {tensor.data_ptr() for tensor in random_gpt2.bridge.original_model.parameters()}
    assert ours <= theirs


@pytest.mark.parametrize("queries", [5, 24])
def test_a_sliding_window_hides_what_lies_before_it(tokenizer, tmp_path, monkeypatch, queries):
    config = MistralConfig(
        vocab_size=len(tokenizer), num_key_value_heads=2, intermediate_size=48, sliding_window=6,
        initializer_range=0.3, max_position_embeddings=64, **KINDS,
    )  # fmt: skip
    torch.manual_seed(0)
    model = saved(MistralForCausalLM(config), tokenizer, tmp_path)
    assert model.trunk
    tokens = torch.arange(5, 29)[None]
    monkeypatch.setattr(trunk, "BLOCK", queries * 4 * 24)
    whole = {}
    models.read_patterns(model, tokens.numpy(), lambda layer, pattern: whole.update({layer: pattern[0].numpy()}))
    assert trunk.disagreement(model.trunk, tokens, {layer: torch.tensor(whole[layer])[None] for layer in whole}) < 1e-5
    assert whole[1][0, 20, :15].max() == 0 < whole[1][0, 20, 15]


def test_norms_of_queries_and_keys_are_in_the_pattern(tokenizer, tmp_path):
    config = Qwen3Config(
        vocab_size=len(tokenizer), num_key_value_heads=2, head_dim=16, intermediate_size=48,
        initializer_range=0.3, **KINDS,
    )  # fmt: skip
    torch.manual_seed(0)
    assert saved(Qwen3ForCausalLM(config), tokenizer, tmp_path).trunk


def test_a_soft_cap_on_scores_is_left_to_the_bridge(gemma, batch):
    assert gemma.trunk is None
    assert np.isfinite(scores.score(gemma, batch, batch_size=2).mean("prefix_matching")).all()


def test_attention_that_cannot_be_exchanged_is_left_to_the_bridge(tokenizer, tmp_path, batch):
    """Bloom adds to its scores by distance (ALiBi), in code of its own."""
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    model = saved(BloomForCausalLM(config), tokenizer, tmp_path)
    assert model.trunk is None
    assert np.isfinite(scores.score(model, batch, batch_size=2).mean("prefix_matching")).all()


def test_a_trunk_that_shows_other_patterns_is_not_used(random_gpt2_folder, monkeypatch):
    exact = trunk.blocks

    def slightly_wrong(query, key, mask, scale):
        return exact(query, key, mask, scale * 1.001)

    monkeypatch.setattr(trunk, "blocks", slightly_wrong)
    assert models.load(str(random_gpt2_folder)).trunk is None


def test_scores_in_bfloat16_are_near_those_in_float32(random_gpt2, random_gpt2_folder, batch):
    half = models.load(str(random_gpt2_folder), dtype="bfloat16")
    assert half.trunk
    fast, slow, exact = (
        scores.score(model, batch, batch_size=2).mean("prefix_matching")
        for model in (half, replace(half, trunk=None), random_gpt2)
    )
    assert 1e-6 < abs(fast - exact).max() < 0.01
    assert abs(slow - exact).max() < 0.01


# --- rows at once ---


def failing_above(most: int, error: Exception):
    """Work that runs out of memory with more than `most` rows, and notes what it did."""
    done = []

    def work(rows):
        if rows[1] - rows[0] > most:
            raise error
        done.append(rows)
        return rows

    return work, done


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("no"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_halves_the_rows_and_says_so(error, caplog):
    work, done = failing_above(2, error)
    ticks = []
    assert batching.in_batches(work, 11, 8, ticks.append) == done
    assert done == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10), (10, 11)]
    assert sum(ticks) == 11
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory with 8 rows at once: going on with 4",
        "out of memory with 4 rows at once: going on with 2",
    ]


def test_the_rows_that_are_halved_are_those_that_were_tried(caplog):
    work, done = failing_above(1, MemoryError())
    batching.in_batches(work, 3, 8)
    assert done == [(0, 1), (1, 2), (2, 3)]
    assert caplog.messages == ["out of memory with 3 rows at once: going on with 1"]


def test_one_row_that_does_not_fit_is_said(caplog):
    with pytest.raises(UserError, match="a single row does not fit"):
        batching.in_batches(failing_above(0, MemoryError())[0], 3, 2)


def test_other_errors_are_no_lack_of_memory():
    with pytest.raises(RuntimeError, match="shapes"):
        batching.in_batches(failing_above(0, RuntimeError("shapes do not match"))[0], 3, 2)


def test_scores_survive_running_out_of_memory(random_gpt2, batch, monkeypatch, caplog):
    whole = scores.score(random_gpt2, batch, batch_size=1)
    read = trunk.Trunk.read

    def greedy(self, tokens, read_block):
        if len(tokens) > 1:
            raise torch.OutOfMemoryError
        read(self, tokens, read_block)

    monkeypatch.setattr(trunk.Trunk, "read", greedy)
    halved = scores.score(random_gpt2, batch, batch_size=3)
    assert "going on with 1" in caplog.text
    for kind in batch.cells:
        assert halved.sums[kind].sums == pytest.approx(whole.sums[kind].sums, abs=1e-12)


def test_rows_at_once_follow_the_free_memory(random_gpt2, monkeypatch):
    need = batching.bytes_per_row(random_gpt2, 64)
    for free, rows in ((0, 1), (2 * need, 1), (10 * need, 5), (10**15, batching.ENOUGH // 64)):
        monkeypatch.setattr(batching, "free_memory", lambda device, free=free: free)
        assert batching.batch_size(random_gpt2, 64) == rows
    monkeypatch.undo()
    assert batching.free_memory(torch.device("cpu")) > 1 << 20


def test_a_longer_row_needs_more_than_in_proportion(random_gpt2):
    """Its backward pass keeps patterns, which grow with the square of the length."""
    short, long = (batching.bytes_per_row(random_gpt2, length) for length in (64, 640))
    assert long > 12 * short


def test_auto_is_filled_in_for_the_longest_rows_and_a_number_stays(random_gpt2):
    parser = cli.shared_parser("")
    for arguments, length, rows in (([], 3, 16), ([], 1000, 2), (["--batch-size", "3"], 3, 3)):
        args = parser.parse_args(arguments)
        encoded = [("text", np.zeros(length, dtype=np.int64))]
        assert analysis.rows_at_once(random_gpt2, encoded, args.batch_size) == rows


# --- memory ---

LONG_ROW = """
import json, sys, torch, numpy as np
from dataclasses import replace
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from benchmarks.scoring import peak, reset_peak
from common.loading import models
from common.heads import scores
from common.heads.tokens import TokenBatch

def small_llama(layers):
    tokenizer = AutoTokenizer.from_pretrained(models.MINI)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=2, intermediate_size=32, max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.bos_token_id,
    )
    folder = f"{sys.argv[1]}/{layers}"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return models.load(folder)

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
whole, slow = extra(replace(shallow, trunk=None), 4096)
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
