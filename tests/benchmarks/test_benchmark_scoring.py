"""The benchmark of scoring: every way does its work on the same tokens, and what is measured is what happens."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch

import benchmarks.scoring as benchmark
from benchmarks.scoring import Point
from common.heads import scores
from common.heads.tokens import HEAD_TYPES, battery


@pytest.fixture(scope="module")
def tokens(random_gpt2) -> np.ndarray:
    return benchmark.drawn_tokens(random_gpt2.bridge.cfg.d_vocab, random_gpt2.bos, rows=4, length=24)


def test_our_scores_are_those_of_the_tokens_that_all_ways_are_given(random_gpt2, random_gpt2_folder, tokens):
    drawn = battery(benchmark.every_id(random_gpt2), random_gpt2.bos, rows=2, length=24, seed=benchmark.SEED)
    assert tokens.tolist() == [*drawn.repeats.tokens.tolist(), *drawn.controls.tokens.tolist()]
    expected = scores.score(random_gpt2, drawn.repeats, batch_size=2)
    found = benchmark.ours(random_gpt2_folder, "cpu")(tokens)
    assert found == pytest.approx(np.stack([expected.mean(kind) for kind in HEAD_TYPES]), abs=1e-6)


def passes(path, way: str, tokens: np.ndarray) -> list[tuple[str, tuple[int, ...]]]:
    """The embeddings and unembeddings of a way's runs, by the ids' or the logits' shape."""
    run, seen = benchmark.WAYS[way](path, "cpu"), []

    def note(module, args, output):
        if type(module) is torch.nn.Embedding and module.num_embeddings > 1000:
            seen.append(("rows", tuple(args[0].shape)))
        if type(module) is torch.nn.Linear and module.out_features > 1000:
            seen.append(("logits", tuple(output.shape)))

    watch = torch.nn.modules.module.register_module_forward_hook(note)
    try:
        with torch.inference_mode():
            run(tokens)
    finally:
        watch.remove()
    return seen


@pytest.mark.parametrize(
    ("way", "rows", "logits"),
    [
        ("base model", [(4, 24)], False),
        ("forward", [(4, 24)], True),
        ("ours", [(2, 24), (2, 24)], False),
        ("ours, bfloat16", [(2, 24), (2, 24)], False),
        ("run_with_cache", [(4, 24)], True),
        ("diagonals", [(4, 24)], True),
        ("detect_head", [(1, 24)] * 12, True),
    ],
)
def test_each_way_runs_the_rows_and_only_ours_and_the_base_model_go_without_logits(
    random_gpt2_folder, tokens, way, rows, logits
):
    seen = passes(random_gpt2_folder, way, tokens)
    assert [shape for what, shape in seen if what == "rows"] == rows
    assert any(what == "logits" for what, _ in seen) == logits


def test_time_and_peak_are_those_of_the_run():
    def work(tokens):
        time.sleep(0.2)
        torch.ones(64 << 20).sum()  # 256 MiB

    wall, cpu, at_peak, found = benchmark.timed_run(work, np.zeros((1, 1)), "cpu")
    _, _, at_rest, _ = benchmark.timed_run(lambda tokens: None, np.zeros((1, 1)), "cpu")
    assert wall >= 0.2 and wall >= cpu, "it slept, which takes time and no CPU"
    assert at_peak - at_rest > 200 * benchmark.MEBIBYTE
    assert found is None


class FakeWay:
    """A process that notes what it was asked for, takes `seconds` per row and more each time."""

    def __init__(self, name, log, seconds):
        self.name, self.log, self.seconds, self.asked = name, log, seconds, None

    def send(self, asked):
        self.asked = asked
        self.log.append((self.name, asked))

    def recv(self):
        times = sum(entry == (self.name, self.asked) for entry in self.log)
        return times * self.seconds * self.asked[0], 1.0, 1000 * times, None


def test_ways_take_turns_and_the_median_counts():
    log = []
    ways = {"base model": FakeWay("base model", log, 1.0), "forward": FakeWay("forward", log, 2.0)}
    found = benchmark.timed(ways, "some", "cpu", [(1, 64), (32, 64)], repeats=3)
    assert log == [("base model", (1, 64)), ("forward", (1, 64)), ("base model", (32, 64))] * 3
    assert {(point.way, point.rows): (point.seconds, point.peak) for point in found} == {
        ("base model", 1): (2.0, 1000),
        ("forward", 1): (4.0, 1000),
        ("base model", 32): (64.0, 1000),
    }


def test_targets_of_a_case_worked_out_by_hand():
    def point(way, rows, seconds, peak):
        return Point("GPT-2 small size", "cpu", way, rows, 257, [seconds], [seconds], peak)

    measured = [
        point("base model", 8, 2.0, 100),
        point("forward", 8, 4.0, 200),
        point("ours", 8, 2.1, 150),
        point("ours", 32, 16.8, 150),
        point("detect_head", 8, 10.0, 300),
    ]
    found = benchmark.targets(measured)
    assert [entry["value"] for entry in found] == pytest.approx([1.05, 0.525, 10 / 2.1, 0.75, 2.0, 1.0])
    assert [entry["met"] for entry in found] == [True, True, False, True, False, True]
    assert benchmark.targets([Point("mini", "cpu", "ours", 8, 257, [1.0], [1.0], 1)]) == []


def test_the_benchmark_runs_from_end_to_end(tmp_path, capsys, monkeypatch):
    few = {way: benchmark.WAYS[way] for way in ("base model", "ours", "ours, bfloat16")}
    monkeypatch.setattr(benchmark, "WAYS", few)
    out = tmp_path / "out"
    assert benchmark.main(["--quick", "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    assert {(point["way"], point["rows"]) for point in results["points"]} == {
        (way, rows) for way in few for rows in (2, 8)
    }
    assert all(point["seconds"] > 0 and point["peak"] > 0 for point in results["points"])
    assert 0 < results["bfloat16"]["mini on cpu"]["largest"] < 0.05
    assert (out / "scoring.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "mini: 8 rows of 64 tokens" in shown and "…" not in shown


def test_a_way_that_fails_is_said_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "WAYS", {"no such way": None})
    assert benchmark.main(["--quick", "--out", str(tmp_path / "out")]) == 2
    assert "failed in its process" in capsys.readouterr().err
