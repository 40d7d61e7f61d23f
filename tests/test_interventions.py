"""Every intervention against a slow reference on three architectures, and the model as it was afterwards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from common import interventions, models
from common.edits import applied
from common.sequences import Battery, Cells, battery
from tests.oracle import Edits, Oracle, bridge_logits

HEADS = [(0, 1), (1, 2), (1, 3)]
ARCHITECTURES = ("gpt2", "llama", "neox")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer, random_gpt2_folder):
    """Random models of 4 heads: GPT-2, a Llama with 2 key heads, a GPT-NeoX with parallel blocks."""
    shared = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.3,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.bos_token_id,
    }  # fmt: skip
    torch.manual_seed(0)
    built = {
        "llama": LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **shared)),
        "neox": GPTNeoXForCausalLM(GPTNeoXConfig(**shared)),
    }
    found = {"gpt2": random_gpt2_folder}
    for name, model in built.items():
        found[name] = tmp_path_factory.mktemp("models") / f"random-{name}"
        model.save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found


@pytest.fixture(scope="module")
def loaded(folders):
    return {name: models.load(str(folder)) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def oracles(folders):
    return {name: Oracle(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def drawn(random_gpt2) -> Battery:
    return battery(random_gpt2.ordinary(), random_gpt2.bos, rows=3, length=14, seed=1)


def of(heads, change):
    """`change(layer, head, row, value)` for the `heads` alone."""
    return lambda layer, head, row, value: change(layer, head, row, value) if (layer, head) in heads else value


def assert_no_hooks(model) -> None:
    assert not any(point.fwd_hooks for point in model.bridge.hook_dict.values())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_reference_and_the_bridge_agree_without_an_intervention(loaded, oracles, drawn, name):
    tokens = drawn.repeats.tokens
    torch.testing.assert_close(bridge_logits(loaded[name], tokens), oracles[name].logits(tokens), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_forbidden_cells_lose_their_attention_and_the_rest_is_renormalised(loaded, oracles, drawn, name):
    cells = drawn.repeats.cells["prefix_matching"]

    def without(layer, head, row, pattern):
        pattern = pattern.clone()
        for at, query, key in zip(cells.row, cells.query, cells.key, strict=True):
            if at == row:
                pattern[query, key] = 0
        return pattern / pattern.sum(-1, keepdim=True)

    check(loaded[name], oracles[name], drawn, interventions.forbid(HEADS, cells), Edits(pattern=of(HEADS, without)))


def check(model, oracle, drawn, intervention, edits, least=1e-3) -> None:
    """The intervention gives the reference's logits, changes something, works row by row, and leaves nothing behind."""
    tokens = drawn.repeats.tokens
    clean = bridge_logits(model, tokens)
    with applied(model, intervention):
        changed = bridge_logits(model, tokens)
    torch.testing.assert_close(changed, oracle.logits(tokens, edits), atol=2e-5, rtol=1e-4)
    assert (changed - clean).abs().max() > least
    with applied(model, intervention, slice(1, 3)):
        part = bridge_logits(model, tokens[1:3])
    torch.testing.assert_close(part, changed[1:3], atol=2e-5, rtol=1e-4)
    assert_no_hooks(model)
    assert torch.equal(bridge_logits(model, tokens), clean)


def test_a_query_left_without_attention_stays_empty(random_gpt2):
    """Forbidding all a query may see gives zeros, not NaN."""
    everything = Cells.of(np.zeros(2, int), np.ones(2, int), np.arange(2))
    with applied(random_gpt2, interventions.forbid([(0, 0)], everything)):
        assert torch.isfinite(bridge_logits(random_gpt2, np.array([[0, 5, 6]]))).all()


def test_the_hooks_go_even_when_the_block_fails(random_gpt2, drawn):
    with (
        pytest.raises(ZeroDivisionError),
        applied(random_gpt2, interventions.forbid(HEADS, drawn.repeats.cells["prefix_matching"])),
    ):
        raise ZeroDivisionError
    assert_no_hooks(random_gpt2)
