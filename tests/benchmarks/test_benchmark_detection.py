"""The benchmark runs, feeds every method the right rows, and counts right and wrong as the metrics do."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformer_lens.head_detector import detect_head

from benchmarks import detection as benchmark
from benchmarks.detection import Agreement, Said, Subject
from common.attention.head import Head
from common.heads import metrics, scores
from common.heads.labels import Labels
from common.loading import load
from tests import handbuilt


@pytest.fixture(scope="module")
def paper_case(tmp_path_factory, tokenizer):
    built = handbuilt.paper_case(vocabulary=len(tokenizer))
    return load(str(handbuilt.save(built, tmp_path_factory.mktemp("paper-case"), tokenizer)))


@pytest.mark.parametrize("seed", range(20))
def test_agreement_is_that_of_the_metrics(seed):
    rng = np.random.default_rng(seed)
    said, truth = rng.random((2, 3, 4)) < rng.choice([0.0, 0.3, 0.7], size=(2, 1, 1))
    heads = frozenset(benchmark.heads_of(truth))
    counted = Agreement.of(said, heads)
    expected = metrics.evaluate(said, said.astype(float), said[None], Labels(heads, "random"))
    assert (counted.precision, counted.recall, counted.f1) == pytest.approx(
        (expected.precision, expected.recall, expected.f1)
    )


def test_library_scores_are_sums_over_the_pattern(paper_case):
    """By hand from the patterns: attention on the targets over all attention, or over all that is not on BOS."""
    plain, without_bos = benchmark.library_scores(paper_case, length=32, seed=1)
    expected = np.zeros((2, 2, 3))
    rows = benchmark.said_twice(paper_case, length=32, seed=1)
    for row in rows:
        assert len(row) == 31 and row[0] == paper_case.bos and (row[1:16] == row[16:]).all()
        for layer, head in np.ndindex(2, 3):
            pattern = scores.patterns(paper_case, row, [(layer, head)])[0]
            on_targets = sum(pattern[query, query - 14] for query in range(16, 31))
            expected[:, layer, head] += on_targets / pattern.sum(), on_targets / pattern[:, 1:].sum()
    assert plain == pytest.approx(expected[0] / len(rows), abs=1e-4)
    assert without_bos == pytest.approx(expected[1] / len(rows), abs=1e-4)


def test_detect_head_says_the_same_of_the_model_itself(paper_case):
    """Nothing is lost by handing it ids and patterns in place of text and a full cache."""
    text = "the cat sat on the mat and the cat sat on the mat"
    row = paper_case.encode(text)
    given = benchmark.GivenTokens(paper_case.bridge)
    by_ids = detect_head(given, row, "induction_head", cache=given.cache(row))
    assert torch.equal(paper_case.bridge.to_tokens(text)[0], torch.from_numpy(row))
    assert by_ids.tolist() == detect_head(paper_case.bridge, text, "induction_head").tolist()


def said(group: str, truth: list[int], heads: list[int], length: int = 32, strength: float = 0.9) -> Said:
    array = np.zeros((1, 4), dtype=bool)
    array[0, heads] = True
    true = frozenset(Head.at(0, head) for head in truth)
    roles = {Head.at(0, head): handbuilt.Role("induction", strength) for head in truth}
    return Said("fixed 0.1", True, Subject("some", group, 24, true, true, roles), length, array)


def test_summary_of_a_case_worked_out_by_hand():
    """Two hand-built models: one of two found (P 1, R 1/2, F1 2/3), one found and one false (P 1/2, R 1, F1 2/3)."""
    entry = benchmark.summary(
        [
            said("hand-built", [0, 1], [0], length=32, strength=0.04),
            said("hand-built", [0], [0, 3], length=64),
            said("mini", [2], [2]),
            said("decoys", [], [1]),
            said("decoys", [], []),
            said("random", [], []),
            said("forming", [1], [3]),
        ]
    )
    assert (entry["method"], entry["effect_rule"]) == ("fixed 0.1", True)
    assert (entry["precision"], entry["recall"]) == pytest.approx((0.75, 0.75))
    assert entry["f1"] == pytest.approx(2 / 3)
    assert entry["f1_by_length"] == pytest.approx({32: 2 / 3, 64: 2 / 3})
    assert entry["f1_by_vocabulary"] == pytest.approx({24: 2 / 3})
    assert entry["recall_by_strength"] == {0.05: 0.5, 1.0: 1.0}
    assert entry["f1_pooled"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert entry["f1_mini"] == 1
    assert entry["false_per_1000"] == {"decoys": 125, "random": 0, "before": 0}
    assert entry["decisions"] == {"decoys": 8, "random": 4, "before": 0}


def test_mistakes_are_named_with_what_the_head_is():
    assert benchmark.mistakes(said("hand-built", [0, 1], [0, 3], strength=0.04)) == [
        {"model": "some", "words": 24, "length": 32, "false": ["0.3"], "missed": ["0.1 induction 0.04"]}
    ]
    assert benchmark.mistakes(said("hand-built", [2], [2])) == []


def test_the_benchmark_runs_from_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "FORMING", ("step-0300",))
    out = tmp_path / "out" / "results.json"
    few = ["--models", "2", "--decoys", "2", "--random", "1", "--lengths", "24", "48"]
    assert benchmark.main([*few, "--out", str(out)]) == 0
    results = json.loads(out.read_text())
    summary = {(entry["method"], entry["effect_rule"]): entry for entry in results["summary"]}
    assert len(summary) == 2 * (1 + 3 * len(benchmark.THRESHOLDS))
    ours = summary["dynamic", True]
    assert ours["f1"] == ours["f1_mini"] == 1
    assert ours["false_per_1000"] == {"decoys": 0, "random": 0, "before": 0}
    assert results["wrong"] == []
    assert summary["fixed 0.7", True]["recall"] < summary["fixed 0.01", True]["recall"] == 1
    assert summary["fixed 0.01", True]["false_per_1000"]["decoys"] > 100, "decoys copy what they look at"
    assert summary["fixed 0.01", True]["precision"] > summary["fixed 0.01", False]["precision"]
    shown = capsys.readouterr()
    assert "detect_head 0.4" in shown.out and "…" not in shown.out
    assert "1/8 hand-built 1000000" in shown.err


@pytest.mark.parametrize("length", ["7", "300"])
def test_a_row_length_that_no_model_takes_is_refused_in_one_line(length, tmp_path, capsys):
    assert benchmark.main(["--lengths", length, "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        f"benchmark_detection: --lengths {length}: hand-built models need rows of 8 to 299\n"
    )
