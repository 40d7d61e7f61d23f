"""The short way gives what the whole model gives, runs less, and keeps what is done when it is stopped."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from common.interventions.bench import Bench, Reads, greedy, logit_difference, sweep

from benchmarks import interventions as benchmark
from common import UserError
from common.heads.tokens import TokenBatch, continuing
from common.interventions import interventions
from common.interventions.edits import applied
from tests.oracle import ARCHITECTURES, assert_no_hooks, bridge_logits, every_kind


def reads_of(batch) -> Reads:
    return Reads.of(batch.tokens, continuing(batch))


def bench_of(model, drawn) -> Bench:
    return Bench(model, drawn.repeats.tokens, reads_of(drawn.repeats), batch_size=2)


def log_probs(logits: torch.Tensor, reads: Reads) -> np.ndarray:
    """By hand, read by read."""
    normed = logits.double().log_softmax(-1)
    places = zip(reads.row, reads.position, reads.token, strict=True)
    return np.array([normed[row, position, token].item() for row, position, token in places])


def test_reads_are_one_before_the_token_they_predict():
    reads = Reads.of(np.array([[9, 5, 6], [9, 7, 8]]), np.array([[True, False, True], [False, True, False]]))
    assert (reads.row.tolist(), reads.position.tolist(), reads.token.tolist()) == ([0, 1], [1, 0], [6, 7])
    assert reads.row_means(np.array([2.0, 4.0]), 3) == pytest.approx([2.0, 4.0, np.nan], nan_ok=True)


@pytest.mark.parametrize(("name", "way"), [("gpt2", "halves"), ("llama", "halves"), ("neox", "blocks")])
def test_each_architecture_goes_its_way_and_reads_what_transformers_reads(loaded, oracles, drawn, name, way):
    bench = bench_of(loaded[name], drawn)
    assert bench.way == way
    expected = log_probs(oracles[name].logits(drawn.repeats.tokens), bench.reads)
    assert bench.measure(None, {"clean": bench.log_prob})["clean"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", [*ARCHITECTURES, "gemma"])
def test_a_sweep_gives_what_whole_runs_give(loaded, gemma, drawn, name):
    model = gemma if name == "gemma" else loaded[name]
    bench = bench_of(model, drawn)
    assert (bench.way == "whole") == (name == "gemma")
    asked = list(every_kind(model, drawn, paths=name != "gemma"))
    asked += [interventions.zero([(layer, 1)]) for layer in range(model.n_layers)]
    asked.append(interventions.zero([(0, 1), (1, 2)]))
    layers, names = [], []
    for intervention, found in sweep(bench, asked):
        with applied(model, intervention):
            whole = bridge_logits(model, drawn.repeats.tokens)
        assert found["log_prob"] == pytest.approx(log_probs(whole, bench.reads), abs=1e-4), intervention.name
        layers.append(intervention.first_layer)
        names.append(intervention.name)
    assert layers == sorted(layers)
    assert sorted(names) == sorted(one.name for one in asked)
    assert_no_hooks(model)


def test_rows_without_a_read_are_passed_over_and_no_read_at_all_is_said(random_gpt2, drawn):
    plain = np.concatenate([[random_gpt2.bos], np.arange(20, 33)])
    tokens = np.stack([plain, plain + 20, *drawn.repeats.tokens])
    batch = TokenBatch.of(list(tokens), pad=0)
    found = Bench(random_gpt2, tokens, reads_of(batch), batch_size=2)
    alone = bench_of(random_gpt2, drawn)
    ablation = interventions.zero([(0, 0)])
    per_read = [bench.measure(ablation, {"log_prob": bench.log_prob})["log_prob"] for bench in (found, alone)]
    assert per_read[0] == pytest.approx(per_read[1], abs=1e-5)
    with pytest.raises(UserError, match="continues an earlier copy"):
        Bench(random_gpt2, tokens[:2], Reads.of(tokens[:2], np.zeros((2, 14), dtype=bool)))


def test_on_gpt2_the_short_way_repeats_the_same_operations(random_gpt2, drawn):
    """To within float32 rounding of the last product, whose size differs."""
    bench = bench_of(random_gpt2, drawn)
    for intervention, found in sweep(bench, [interventions.zero([(layer, 0)]) for layer in range(3)]):
        with applied(random_gpt2, intervention):
            whole = bridge_logits(random_gpt2, drawn.repeats.tokens)
        assert np.abs(found["log_prob"] - log_probs(whole, bench.reads)).max() < 1e-5


def test_rank_kl_and_logit_difference_by_hand(random_gpt2, drawn):
    bench = bench_of(random_gpt2, drawn)
    tokens, reads = drawn.repeats.tokens, bench.reads
    wrong = (reads.token + 1) % 100
    metrics = {"rank": bench.rank, "kl": bench.kl, "difference": logit_difference(reads.token, wrong)}
    ablation = interventions.zero([(0, 1), (2, 2)])
    found = bench.measure(ablation, metrics)
    clean = bridge_logits(random_gpt2, tokens).double()
    with applied(random_gpt2, ablation):
        changed = bridge_logits(random_gpt2, tokens).double()
    for place, (row, position, token) in enumerate(zip(reads.row, reads.position, reads.token, strict=True)):
        logits = changed[row, position]
        order = torch.argsort(logits, descending=True).tolist()
        assert found["rank"][place] == order.index(token) + 1
        assert found["difference"][place] == pytest.approx((logits[token] - logits[wrong[place]]).item(), abs=1e-4)
        before, after = clean[row, position].softmax(-1), logits.softmax(-1)
        assert found["kl"][place] == pytest.approx((before * (before / after).log()).sum().item(), abs=1e-4)
    unchanged = bench.measure(None, metrics)
    assert unchanged["kl"] == pytest.approx(np.zeros(len(reads.row)), abs=1e-6)


def test_layers_below_are_not_run_again_and_only_reads_are_unembedded(random_gpt2, drawn):
    bench = Bench(random_gpt2, drawn.repeats.tokens, reads_of(drawn.repeats), batch_size=3)
    seen = []
    watched = {f"block {layer}": random_gpt2.bridge.blocks[layer].attn for layer in range(3)}
    watched["unembed"] = random_gpt2.bridge.unembed
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, name=name: seen.append((name, tuple(args[0].shape[:-1]) if args else ()))
        )
        for name, module in watched.items()
    ]
    try:
        list(
            sweep(bench, [interventions.zero([(1, 0)]), interventions.zero([(1, 1)]), interventions.uniform([(2, 0)])])
        )
    finally:
        for handle in handles:
            handle.remove()
    names = [name for name, _ in seen]
    # Block 0 to reach layer 1; 1 for its heads' clean outputs and to reach 2; 2 after each ablation in 1, and at last.
    assert (names.count("block 0"), names.count("block 1"), names.count("block 2")) == (1, 2, 3)
    assert [shape for name, shape in seen if name == "unembed"] == [(len(bench.reads.row),)] * 3


def collect(found, into: list) -> None:
    for one in found:
        into.append(one)


def test_a_sweep_that_is_stopped_keeps_what_is_done_and_leaves_no_hook(random_gpt2, drawn):
    done = []

    def stop_at_the_third(count: int) -> None:
        if len(done) == 3:
            raise KeyboardInterrupt

    asked = [interventions.zero([(layer, head)]) for layer in range(3) for head in range(4)]
    with pytest.raises(KeyboardInterrupt):
        collect(sweep(bench_of(random_gpt2, drawn), asked, advance=stop_at_the_third), done)
    assert [intervention.heads for intervention, _ in done] == [((0, 0),), ((0, 1),), ((0, 2),)]
    assert all(np.isfinite(found["log_prob"]).all() for _, found in done)
    assert_no_hooks(random_gpt2)


def test_greedy_takes_the_head_that_costs_most_each_time(random_gpt2, drawn):
    bench = bench_of(random_gpt2, drawn)
    candidates = [(0, 0), (0, 1), (1, 1), (2, 3)]

    def loss(heads) -> float:
        with applied(random_gpt2, interventions.zero(heads)):
            return -log_probs(bridge_logits(random_gpt2, drawn.repeats.tokens), bench.reads).mean()

    chosen, ticks = [], []
    for head, losses in greedy(bench, candidates, interventions.zero, most=3, advance=ticks.append):
        rest = [other for other in candidates if other not in chosen]
        assert head == max(rest, key=lambda other: loss([*chosen, other]))
        chosen.append(head)
        assert losses.mean() == pytest.approx(loss(chosen), abs=1e-4)
    assert len(chosen) == 3
    assert sum(ticks) == 4 + 3 + 2


def test_the_benchmark_runs_and_both_ways_agree(capsys):
    assert benchmark.main(["--quick", "--rows", "2", "--length", "24"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["times_as_fast"] > 0
    assert result["largest_difference"] < 1e-4
