"""What heads do to the tokens they attend to, against interventions, slow oracles and models built to be known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from common.heads.direct import direct_logit_effect
from common.interventions.bench import Bench, Reads
from common.interventions.interventions import forbid

from common.heads import attribution
from common.heads.tokens import TokenBatch, battery, continuing
from common.interventions.edits import Recordings
from tests.handbuilt import COPY, Role

ROLES = {
    (0, 0): Role("previous-token", slot=0),
    (0, 1): Role("uniform"),
    (0, 2): Role("bos-sink"),
    (1, 0): Role("induction", strength=0.6, slot=0, writing=COPY),
    (1, 1): Role("suppression", strength=0.6, slot=0, writing=-COPY),
    (1, 2): Role("attends-only", strength=0.6, slot=0),
}


@pytest.fixture(scope="module")
def rows(random_gpt2) -> TokenBatch:
    return battery(random_gpt2.ordinary(), random_gpt2.bos, rows=4, length=40, seed=1).repeats


@pytest.fixture(scope="module")
def known(hand_built):
    _, model = hand_built(ROLES)
    return model, battery(model.ordinary(), model.bos, rows=4, length=64, seed=1).repeats


def centred_logit(logits: torch.Tensor, token: np.ndarray) -> np.ndarray:
    right = logits.gather(-1, torch.from_numpy(token)[:, None])[:, 0]
    return (right - logits.mean(-1)).double().numpy()


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox"])
def test_total_effect_is_the_slope_of_forbidding(loaded, name):
    """Forbid a small share of each head's target cells, run the whole model, divide by the share."""
    model, share = loaded[name], 0.01
    rows = battery(model.ordinary(), model.bos, rows=2, length=30, seed=1).repeats
    reads = Reads.of(rows.tokens, continuing(rows))
    bench = Bench(model, rows.tokens, reads)
    metric = {"logit": lambda logits, which: torch.from_numpy(centred_logit(logits, reads.token[which]))}
    clean = bench.measure(None, metric)["logit"]
    measured = attribution.total_effect(model, rows, batch_size=2)
    for layer, head in ((0, 1), (1, 0), (2, 3)):
        part = forbid([(layer, head)], rows.cells["prefix_matching"]).limited(coefficient=share)
        slope = (clean - bench.measure(part, metric)["logit"]) / share
        expected = reads.row_means(slope, 2)
        assert measured[:, layer, head] == pytest.approx(expected, rel=0.05, abs=2e-3)


def test_heads_that_raise_lower_and_ignore_their_targets(known):
    model, rows = known
    for effect in (attribution.total_effect, attribution.direct_effect):
        found = effect(model, rows, batch_size=4).mean(0)
        assert found[1, 0] > 0.5 and found[1, 1] < -0.5
        assert np.abs(found[[0, 0, 0, 1], [0, 1, 2, 2]]).max() < 0.05, effect.__name__


def test_direct_effect_is_what_reaches_the_last_stream_read_at_its_own_scale(random_gpt2, rows):
    """By hand, query by query: attention due to the targets, values, W_O, the final norm with its scale as it is."""
    model = random_gpt2
    found = attribution.direct_effect(model, rows, batch_size=3)
    clean = Recordings(model, rows.tokens)
    norm, unembedding = model.bridge.ln_final, model.bridge.W_U.T.double()
    last = clean.get(2, "resid_post").double()
    scale = (last.var(-1, correction=0) + 1e-5).sqrt()
    for layer, head in ((0, 1), (2, 3)):
        pattern, values = clean.get(layer, "pattern")[:, head].double(), clean.get(layer, "v")[:, :, head].double()
        out = model.bridge.blocks[layer].attn.W_O[head].double()
        for row in range(len(rows.tokens)):
            effects = []
            for position in np.flatnonzero(continuing(rows)[row]):
                query = position - 1
                cells = rows.cells["prefix_matching"]
                keys = cells.key[(cells.row == row) & (cells.query == query)]
                rest = pattern[row, query].clone()
                rest[keys] = 0.0
                written = (pattern[row, query] - rest / rest.sum()) @ values[row] @ out
                normed = (written - written.mean()) / scale[row, query] * norm.weight.double()
                token = rows.tokens[row, position]
                effects.append(float(normed @ (unembedding[token] - unembedding.mean(0))))
            assert found[row, layer, head] == pytest.approx(np.mean(effects), rel=1e-3, abs=1e-5)


def test_direct_effect_agrees_in_sign_and_order_with_the_exact_one(known):
    """The exact one recomputes the final norm."""
    model, rows = known
    heads = [(1, 0), (1, 1), (1, 2)]
    exact = direct_logit_effect(model, rows, Reads.of(rows.tokens, continuing(rows)), heads).mean(0)
    found = attribution.direct_effect(model, rows, batch_size=4).mean(0)[1]
    assert found == pytest.approx(exact, rel=0.3, abs=0.02)


@pytest.mark.parametrize("effect", [attribution.total_effect, attribution.direct_effect])
def test_batch_size_changes_nothing_and_rows_without_repeats_are_undefined(random_gpt2, rows, effect):
    whole, single = (effect(random_gpt2, rows, batch_size=size) for size in (4, 1))
    assert single == pytest.approx(whole, abs=1e-4)
    assert not any(point.fwd_hooks for point in random_gpt2.bridge.hook_dict.values())
    batch = TokenBatch.of([np.array([0, 5, 6, 5, 6]), np.array([0, 5, 6, 7, 8])], pad=0)
    found = effect(random_gpt2, batch, batch_size=2)
    assert np.isfinite(found[0]).all() and np.isnan(found[1]).all()


def test_ov_copying_tells_copying_from_suppressing(known):
    found = attribution.ov_copying(known[0])
    assert found[1, 0] > 0.9 and found[1, 1] < -0.9
    assert found[1, 2] == 0.0


def test_ov_copying_is_about_the_eigenvalues_of_the_whole_circuit(random_gpt2, monkeypatch):
    """Token by token in full, [tokens, tokens], where the code goes through a matrix of the head's size."""
    monkeypatch.setattr(attribution, "SAMPLE", 50)
    model = random_gpt2
    ordinary = model.ordinary()
    tokens = ordinary[np.unique(np.linspace(0, len(ordinary) - 1, 50).astype(int))]
    found = attribution.ov_copying(model)
    hf = model.bridge.original_model
    rows = torch.stack([torch.full((len(tokens),), model.bos), torch.from_numpy(tokens)], 1)
    with torch.no_grad():
        stream = hf(rows, output_hidden_states=True).hidden_states[1][:, 1]
        unembedding = hf.lm_head.weight.float()
        norm = model.bridge.ln_final
        out = (unembedding - unembedding.mean(0))[tokens] * norm.weight
        out = out - out.mean(1, keepdim=True)
        for layer, head in ((1, 0), (2, 3)):
            block = model.bridge.blocks[layer]
            read = block.ln1(stream[None])[0]
            read = read - read.mean(0)
            circuit = (read @ block.attn.W_V[head] @ block.attn.W_O[head] @ out.T).double().numpy()
            eigenvalues = np.linalg.eigvals(circuit)
            assert found[layer, head] == pytest.approx(eigenvalues.sum().real / np.abs(eigenvalues).sum(), abs=1e-3)


def test_copying_score_of_plain_circuits():
    assert attribution.copying_score(np.eye(3)) == 1.0
    assert attribution.copying_score(-np.eye(3)) == -1.0
    assert attribution.copying_score(np.diag([1.0, -1.0])) == 0.0
    assert attribution.copying_score(np.zeros((3, 3))) == 0.0
    turn = np.array([[0.0, -1.0], [1.0, 0.0]])
    assert attribution.copying_score(turn) == pytest.approx(0.0)
