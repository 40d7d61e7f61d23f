"""The judge by attention knockout: its effects against a slow oracle, its labels against known heads."""

from __future__ import annotations

import ast
import json

import numpy as np
import pytest
import torch

from benchmarks import knockout_reference as judge
from tests import handbuilt
from tests.conftest import ROOT
from tests.handbuilt import COPY, Role
from tests.oracle import Changes, of

ROLES = {
    (0, 0): Role("previous-token", slot=0),
    (0, 1): Role("fixed-offset", offset=3, writing=0.08),
    (0, 2): Role("duplicate-token", writing=0.08),
    (1, 0): Role("induction", strength=0.9, slot=0, writing=COPY),
    (1, 1): Role("attends-only", strength=0.9, slot=0),
    (1, 2): Role("induction", strength=0.6, slot=0, writing=COPY / 2),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    model = handbuilt.assemble(ROLES, vocabulary=65, seed=3)
    return handbuilt.save(model, tmp_path_factory.mktemp("built"), handbuilt.word_tokenizer(64))


def cells_by_hand(tokens: np.ndarray) -> list[tuple[int, int, int]]:
    """Every (row, query, key) where the key follows an earlier copy of the query's token."""
    return [
        (row, query, earlier + 1)
        for row, line in enumerate(tokens)
        for query in range(len(line))
        for earlier in range(1, query)
        if line[earlier] == line[query] and earlier + 1 < query
    ]


def slow_losses(oracle, tokens, sizes, out):
    """The loss at repeats of each row, of whole runs in float64, without the target cells of the heads `out`."""
    cells = cells_by_hand(tokens)

    def knocked(layer, head, row, pattern):
        pattern = pattern.clone()
        for at, query, key in cells:
            if at == row:
                pattern[query, key] = 0.0
        return pattern / pattern.sum(-1, keepdim=True)

    log_probs = oracle.logits(tokens, Changes(pattern=of(out, knocked))).log_softmax(-1)
    last = tokens.shape[1] - 1
    losses = []
    for row, size in enumerate(sizes):
        queries = range(last + 1 - size, last)
        losses.append(-np.mean([log_probs[row, query, tokens[row, query + 1]].item() for query in queries]))
    return np.array(losses)


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox"])
def test_effects_are_those_of_whole_runs_with_the_cells_taken_away(folders, oracles, family):
    network, ordinary, bos, _ = judge.read(folders[family])
    tokens, sizes = judge.draw_rows(ordinary, bos, rows=3, length=20)
    reference = judge.Reference(network, tokens, sizes)
    clean = slow_losses(oracles[family], tokens, sizes, [])
    out = frozenset({(0, 1), (1, 3)})
    without = slow_losses(oracles[family], tokens, sizes, out)
    heads = [(0, 0), (0, 1), (1, 2), (2, 3)]
    alone = dict(reference.effects(heads, frozenset()))
    others_out = dict(reference.effects(heads, out))
    assert reference.clean == pytest.approx(clean, abs=2e-5)
    assert reference.effect_of(out) == pytest.approx(without - clean, abs=2e-5)
    for head in heads:
        expected = slow_losses(oracles[family], tokens, sizes, [head]) - clean
        assert alone[head] == pytest.approx(expected, abs=2e-5)
        assert np.abs(expected).max() > 2e-4, "an effect of nothing would prove nothing"
        changed = slow_losses(oracles[family], tokens, sizes, out ^ {head})
        assert others_out[head] == pytest.approx(without - changed if head in out else changed - without, abs=2e-5)


def test_an_induction_head_is_needed_and_a_decoy_is_not(built, tmp_path):
    file, heard = tmp_path / "reference.json", []
    found = judge.measure_into(file, built, rows=8, say=heard.append)
    assert judge.needed_heads(found["alone"]) == {(1, 0), (1, 2)}
    for head in ("0.1", "0.2", "1.1"):  # it looks a fixed distance back, at the copy itself, or writes nothing
        assert abs(np.mean(found["alone"][head])) < 0.02
    assert np.mean(found["joint"]) > np.mean(found["alone"]["1.0"])
    assert len(heard) == 2 * len(ROLES)
    assert judge.measure_into(file, built, rows=8, say=heard.append) == json.loads(file.read_text())
    assert len(heard) == 2 * len(ROLES), "what is known is not measured again"
    judge.measure_into(file, built, rows=4, others=2, say=heard.append)
    assert len(heard) == 3 * len(ROLES) + 2, "other rows are"


def test_a_model_that_would_not_run_as_it_runs_by_itself_is_refused(built):
    network, ordinary, bos, _ = judge.read(built)
    tokens, sizes = judge.draw_rows(ordinary, bos, rows=2, length=30)
    network.transformer.drop = torch.nn.Identity()  # as it is; then a second norm that our way would not know of
    network.transformer.ln_f.register_forward_hook(lambda module, args, out: out * 2 if args[0].shape[1] == 30 else out)
    with pytest.raises(ValueError, match="does not run here as it runs by itself"):
        judge.Reference(network, tokens, sizes)


@pytest.mark.parametrize(("words", "expected"), [(500, 64), (40, 41), (7, 8)])
def test_a_row_repeats_its_segment_at_the_end_and_nothing_else(words, expected):
    tokens, sizes = judge.draw_rows(np.arange(1, words + 1), 0, rows=20, length=64)
    assert tokens.shape == (20, expected)
    assert len(set(sizes.tolist())) > 1 or words == 7
    for row, size in zip(tokens.tolist(), sizes.tolist(), strict=True):
        assert row[0] == 0 and size >= 2
        before, segment = row[:-size], row[-size:]
        assert len(set(before)) == len(before) and len(set(segment)) == size
        start = before.index(segment[0])
        assert before[start : start + size] == segment
    mask = judge.target_cells(tokens)
    assert sorted(zip(*np.nonzero(mask), strict=True)) == sorted(cells_by_hand(tokens))


def test_the_interval_is_students_t_over_rows():
    mean, low, high = judge.with_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert (low, high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))  # t of 2 degrees, 97.5 %
    effects = {"0.0": [0.06, 0.07, 0.05], "0.1": [0.3, -0.1, 0.0], "1.0": [0.04, 0.041, 0.042]}
    assert judge.needed_heads(effects) == {(0, 0)}, "large enough and surely above 0"


def test_the_judge_imports_nothing_of_the_detector():
    tree = ast.parse((ROOT / "benchmarks" / "knockout_reference.py").read_text(encoding="utf-8"))
    named = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    named |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in named} <= {
        "__future__", "argparse", "collections", "functools", "itertools", "json", "numpy", "pathlib", "scipy", "sys",
        "time", "torch", "transformers", "typing",
    }  # fmt: skip
