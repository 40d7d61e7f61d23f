"""The direct effect against transformers alone, and against models in which nothing stands between head and logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from common.interventions.bench import Reads

from common import UserError
from common.heads import direct
from common.heads.tokens import TokenBatch, continuing
from common.interventions import effects, interventions
from tests.oracle import ARCHITECTURES, assert_no_hooks, bridge_logits

HEADS = [(0, 1), (1, 2), (2, 0), (2, 3)]


def by_hand(oracle, batch, reads, head) -> np.ndarray:
    """[2, reads]: log-probability and centred logit lost, one read at a time."""
    seen, stream = oracle.record(batch.tokens), oracle.final_stream(batch.tokens)
    cells = batch.cells["prefix_matching"]
    lost = []
    for row, position, token in zip(reads.row, reads.position, reads.token, strict=True):
        attention = seen["pattern", head[0], head[1], row][position]
        kept = attention.clone()
        kept[cells.key[(cells.row == row) & (cells.query == position)]] = 0
        move = (kept / kept.sum() - attention) @ seen["v", head[0], head[1], row]
        write = move @ oracle.output_weights(*head, len(move))
        before, after = (oracle.read_out(final) for final in (stream[row, position], stream[row, position] + write))
        log_prob = before.log_softmax(-1)[token] - after.log_softmax(-1)[token]
        lost.append((log_prob.item(), (before[token] - before.mean() - after[token] + after.mean()).item()))
    return np.array(lost).T


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_direct_effect_by_hand(loaded, oracles, drawn, name):
    batch, model = drawn.repeats, loaded[name]
    reads = Reads.of(batch.tokens, continuing(batch))
    clean = bridge_logits(model, batch.tokens)
    ticks = []
    found = direct.direct_effect(model, batch, reads, HEADS, batch_size=2, advance=ticks.append)
    logits = direct.direct_logit_effect(model, batch, reads, HEADS, batch_size=2)
    for column, head in enumerate(HEADS):
        log_prob, logit = by_hand(oracles[name], batch, reads, head)
        assert np.abs(log_prob).max() > 1e-3
        assert found.log_prob[:, column] == pytest.approx(reads.row_means(log_prob, 3), abs=2e-5)
        assert found.logit[:, column] == pytest.approx(reads.row_means(logit, 3), abs=2e-5)
    assert logits == pytest.approx(found.logit, abs=2e-5)
    assert sum(ticks) == 3
    assert_no_hooks(model)
    assert torch.equal(bridge_logits(model, batch.tokens), clean)


def test_rows_without_a_repeat_have_no_direct_effect(random_gpt2, drawn):
    plain = np.concatenate([[random_gpt2.bos], np.arange(20, 33)])
    batch = TokenBatch.of([plain, drawn.repeats.tokens[0]], pad=0)
    reads = Reads.of(batch.tokens, continuing(batch))
    found = direct.direct_effect(random_gpt2, batch, reads, [(0, 1)], batch_size=1).log_prob
    alone = direct.direct_effect(
        random_gpt2, drawn.repeats, Reads.of(drawn.repeats.tokens, continuing(drawn.repeats)), [(0, 1)]
    )
    assert np.isnan(found[0, 0])
    assert found[1, 0] == pytest.approx(alone.log_prob[0, 0], abs=1e-6)


def test_in_the_last_layer_without_an_mlp_direct_is_all_there_is(random_gpt2, drawn):
    """With the last MLP silent, forbidding the cells of a last-layer head in the whole model is its direct effect."""
    block = random_gpt2.bridge.original_model.transformer.h[2]
    silent = block.mlp.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    try:
        batch, head = drawn.repeats, (2, 1)
        reads = Reads.of(batch.tokens, continuing(batch))
        found = direct.direct_effect(random_gpt2, batch, reads, [head])
        forbidden = interventions.forbid([head], batch.cells["prefix_matching"])
        change = effects.losses(random_gpt2, batch, forbidden) - effects.losses(random_gpt2, batch)
        whole = effects.row_means(change, continuing(batch))
    finally:
        silent.remove()
    assert np.abs(whole).max() > 1e-3
    assert found.log_prob[:, 0] == pytest.approx(whole, abs=1e-5)


def test_what_cannot_be_read_directly_is_refused(gemma, drawn):
    batch = drawn.repeats
    with pytest.raises(UserError, match="between its last block and its logits"):
        direct.direct_effect(gemma, batch, Reads.of(batch.tokens, continuing(batch)), [(0, 0)])
