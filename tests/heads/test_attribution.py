"""What heads do to the tokens they attend to, against interventions, slow oracles and models built to be known."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from common import UserError
from common.attention.call import Edit
from common.attention.head import Head
from common.heads import attribution
from common.heads.tokens import TokenBatch, battery, continuing
from common.interventions.causal_labels import exact_direct_effect
from common.interventions.runner import Predictions
from common.loading import load
from common.loading.families import plain
from tests import architectures
from tests.handbuilt import COPY, Role

FAMILIES = ("gpt2", "llama", "neox", "gemma2")
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


@pytest.fixture(scope="module")
def of_family(tmp_path_factory, tokenizer):
    """From a family to a random model of it, and its folder."""
    parent = tmp_path_factory.mktemp("attribution")

    @functools.cache
    def loaded(family: str):
        folder = architectures.save(family, parent / family, tokenizer)
        return load(str(folder)), folder

    return loaded


def drawn_for(model) -> TokenBatch:
    return battery(model.ordinary(), model.bos, rows=3, length=30, seed=1).repeats


def centred_logits(logits: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
    """[rows]: the mean over the tokens that continue a repeat of their logit less the mean logit."""
    found = []
    for row, mask in enumerate(continuing(batch)):
        values = [
            logits[row, position - 1, batch.tokens[row, position]] - logits[row, position - 1].mean()
            for position in np.flatnonzero(mask)
        ]
        found.append(torch.stack(values).mean())
    return torch.stack(found)


def gradients_of_patterns(folder, batch: TokenBatch) -> np.ndarray:
    """[rows, layers, heads]: whole patterns of transformers' own eager attention in float64, their gradients, and what
    a pattern loses without the targets: sum of dL/dP times (P - P without)."""
    network = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").double().eval()
    shown = network(torch.from_numpy(batch.tokens), output_attentions=True, use_cache=False)
    for pattern in shown.attentions:
        pattern.retain_grad()
    centred_logits(shown.logits, batch).sum().backward()
    cells = batch.cells["prefix_matching"]
    effects = []
    for pattern in shown.attentions:
        without = pattern.detach().clone()
        without[cells.row, :, cells.query, cells.key] = 0
        without = without / without.sum(-1, keepdim=True)
        effects.append((pattern.grad * (pattern.detach() - without)).sum((2, 3)))
    return torch.stack(effects, 1).numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_total_effect_is_that_of_gradients_of_whole_patterns(of_family, family):
    model, folder = of_family(family)
    rows = drawn_for(model)
    slow = gradients_of_patterns(folder, rows)
    found = attribution.attribute(model, rows, batch_size=2).total
    assert found.shape == slow.shape == (3, 3, 4)
    assert found == pytest.approx(slow, rel=1e-5, abs=1e-5 * np.abs(slow).max())
    assert np.abs(slow).max() > 0.01
    assert np.abs(found - slow[:, :, ::-1]).max() > 0.1 * np.abs(slow).max(), "of the heads that are named"
    assert np.abs(found - slow[::-1]).max() > 0.1 * np.abs(slow).max(), "and rows"


@pytest.mark.parametrize("family", FAMILIES)
def test_total_effect_is_the_slope_of_knocking_the_targets_out(of_family, family):
    """Take a small share of each head's pattern without its target cells, run the whole model, divide by the share."""
    (model, _), share = of_family(family), 0.01
    rows = drawn_for(model)
    measured = attribution.attribute(model, rows, batch_size=2).total
    clean = centred_logits(model.logits(rows.tokens).double(), rows)
    for head in (Head.at(0, 1), Head.at(1, 0), Head.at(2, 3)):
        edited = model.logits(rows.tokens, [knocked_out(head, rows, share)])
        slope = (clean - centred_logits(edited.double(), rows)) / share
        expected = measured[:, head.layer, head.head]
        assert slope.numpy() == pytest.approx(expected, rel=0.05, abs=2e-3 + 0.01 * np.abs(measured).max())


def knocked_out(head: Head, rows: TokenBatch, share: float) -> Edit:
    """A share of the attention to the targets goes to the other keys."""
    cells = rows.cells["prefix_matching"]

    def change(pattern: torch.Tensor, run: slice) -> torch.Tensor:
        without = pattern.clone()
        without[cells.row, cells.query, cells.key] = 0
        without = without / without.sum(-1, keepdim=True)
        return pattern + share * (without - pattern)

    return Edit(head, "pattern", change)


def test_no_effect_is_measured_where_edits_do_not_act(random_gpt2, rows):
    from dataclasses import replace

    deaf = replace(random_gpt2, refused={"edits": "'random-gpt2' does not use what its heads put out"})
    with pytest.raises(UserError, match="does not use.*no verdict can be given"):
        attribution.attribute(deaf, rows, batch_size=2)


def test_heads_that_raise_lower_and_ignore_their_targets(known):
    model, rows = known
    measured = attribution.attribute(model, rows, batch_size=4)
    for effect in ("total", "direct"):
        found = getattr(measured, effect).mean(0)
        assert found[1, 0] > 0.5 and found[1, 1] < -0.5
        assert np.abs(found[[0, 0, 0, 1], [0, 1, 2, 2]]).max() < 0.05, effect


def test_direct_effect_is_what_reaches_the_last_stream_read_at_its_own_scale(random_gpt2, random_gpt2_folder, rows):
    """By hand, query by query: attention due to the targets, values, W_O, the final norm with its scale as it is."""
    found = attribution.attribute(random_gpt2, rows, batch_size=3).direct
    network = AutoModelForCausalLM.from_pretrained(random_gpt2_folder, attn_implementation="eager").double().eval()
    values, last = {}, []
    for layer, block in enumerate(network.transformer.h):
        block.attn.c_attn.register_forward_hook(
            lambda module, args, out, layer=layer: values.update({layer: out[..., 64:]})
        )
    network.transformer.ln_f.register_forward_pre_hook(lambda module, args: last.append(args[0]))
    with torch.no_grad():
        shown = network(torch.from_numpy(rows.tokens), output_attentions=True, use_cache=False)
    norm, unembedding = network.transformer.ln_f, network.lm_head.weight.detach()
    scale = (last[0].var(-1, correction=0) + 1e-5).sqrt()
    cells = rows.cells["prefix_matching"]
    for layer, head in ((0, 1), (2, 3)):
        part = slice(8 * head, 8 * head + 8)
        out = network.transformer.h[layer].attn.c_proj.weight.detach()[part]
        for row in range(len(rows.tokens)):
            effects = []
            for position in np.flatnonzero(continuing(rows)[row]):
                query = position - 1
                attention = shown.attentions[layer][row, head, query]
                rest = attention.clone()
                rest[cells.key[(cells.row == row) & (cells.query == query)]] = 0.0
                written = (attention - rest / rest.sum()) @ values[layer][row, :, part] @ out
                normed = (written - written.mean()) / scale[row, query] * norm.weight.detach()
                token = rows.tokens[row, position]
                effects.append(float(normed @ (unembedding[token] - unembedding.mean(0))))
            assert found[row, layer, head] == pytest.approx(np.mean(effects), rel=1e-3, abs=1e-5)


def test_direct_effect_agrees_in_sign_and_order_with_the_exact_one(known):
    """The exact one recomputes the final norm."""
    model, rows = known
    exact = exact_direct_effect(model, rows, Predictions.of(rows.tokens, continuing(rows))).mean(0)
    found = attribution.attribute(model, rows, batch_size=4).direct.mean(0)
    assert found[1, :3] == pytest.approx(exact[1, :3], rel=0.3, abs=0.02)


def test_the_direct_path_is_there_but_where_a_norm_stands_behind_the_heads(of_family):
    for family in FAMILIES:
        reason = attribution.why_no_direct_path(of_family(family)[0])
        assert (reason is None) == (family != "gemma2"), family
    assert "between its last block and its logits" in reason, "Gemma 2 caps its logits"


def test_what_is_written_behind_a_norm_is_no_direct_path(tokenizer, tmp_path):
    """Gemma 3 caps nothing, and norms what its heads put out."""
    model = load(str(architectures.save("gemma3", tmp_path, tokenizer)))
    assert "changes what layer 0's heads write" in attribution.why_no_direct_path(model)


def test_batch_size_changes_nothing_and_rows_without_repeats_are_undefined(random_gpt2, rows):
    whole, single = (attribution.attribute(random_gpt2, rows, batch_size=size) for size in (4, 1))
    batch = TokenBatch.of([np.array([0, 5, 6, 5, 6]), np.array([0, 5, 6, 7, 8])], pad=0)
    undefined = attribution.attribute(random_gpt2, batch, batch_size=2)
    apart = attribution.attribute(random_gpt2, batch, batch_size=1)
    for effect in ("total", "direct"):
        assert getattr(single, effect) == pytest.approx(getattr(whole, effect), abs=1e-4)
        found = getattr(undefined, effect)
        assert np.isfinite(found[0]).all() and np.isnan(found[1]).all()
        assert np.isnan(getattr(apart, effect)[1]).all()
    modules = random_gpt2.door.network.modules()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def test_no_gradient_is_left_on_the_weights(random_gpt2, rows):
    logits = random_gpt2.logits(rows.tokens)
    attribution.attribute(random_gpt2, rows, batch_size=4)
    assert all(weight.grad is None and not weight.requires_grad for weight in random_gpt2.door.network.parameters())
    assert torch.equal(random_gpt2.logits(rows.tokens), logits)


def test_ov_copying_tells_copying_from_suppressing(known):
    found = attribution.ov_copying(known[0])
    assert found[1, 0] > 0.9 and found[1, 1] < -0.9
    assert found[1, 2] == 0.0


def test_ov_copying_is_about_the_eigenvalues_of_the_whole_circuit(random_gpt2, random_gpt2_folder, monkeypatch):
    """Token by token in full, [tokens, tokens], where the code goes through a matrix of the head's size."""
    monkeypatch.setattr(attribution, "SAMPLE", 50)
    model = random_gpt2
    ordinary = model.ordinary()
    tokens = ordinary[np.unique(np.linspace(0, len(ordinary) - 1, 50).astype(int))]
    found = attribution.ov_copying(model)
    hf = AutoModelForCausalLM.from_pretrained(random_gpt2_folder)  # asked for hidden states it keeps hooks for them
    rows = torch.stack([torch.full((len(tokens),), model.bos), torch.from_numpy(tokens)], 1)
    with torch.no_grad():
        streams = [hidden[:, 1] for hidden in hf(rows, output_hidden_states=True).hidden_states]
        unembedding = hf.lm_head.weight.float()
        out = (unembedding - unembedding.mean(0))[tokens] * hf.transformer.ln_f.weight
        out = out - out.mean(1, keepdim=True)
        for layer, head in ((0, 2), (1, 0), (2, 3)):
            block = hf.transformer.h[layer]
            read = block.ln_1(streams[min(layer, 1)])
            read = read - read.mean(0)
            part = slice(8 * head, 8 * head + 8)
            circuit = read @ block.attn.c_attn.weight[:, 64:][:, part] @ block.attn.c_proj.weight[part] @ out.T
            eigenvalues = np.linalg.eigvals(plain(circuit))
            assert found[layer, head] == pytest.approx(eigenvalues.sum().real / np.abs(eigenvalues).sum(), abs=1e-3)


def test_ov_copying_takes_the_values_that_each_query_head_shares(of_family):
    """In Llama query heads 0 and 1 share one key head, 2 and 3 the other: layer 0, all of it by hand."""
    model, _ = of_family("llama")
    network, tokens = model.door.network, model.ordinary()
    found = attribution.ov_copying(model)
    attention, norm = network.model.layers[0].self_attn, network.model.layers[0].input_layernorm
    with torch.no_grad():
        read = norm(network.model.embed_tokens.weight[tokens])
        read = (read - read.mean(0)).double()
        unembedding = network.lm_head.weight.double()
        out = (unembedding - unembedding.mean(0))[tokens] * network.model.norm.weight.double()
        for head in range(4):
            value = attention.v_proj.weight.double()[8 * (head // 2) : 8 * (head // 2) + 8]
            written = attention.o_proj.weight.double()[:, 8 * head : 8 * head + 8].T
            eigenvalues = np.linalg.eigvals(plain(written @ (out.T @ (read @ value.T))))
            assert found[0, head] == pytest.approx(eigenvalues.sum().real / np.abs(eigenvalues).sum(), abs=1e-3)


def test_copying_score_of_plain_circuits():
    assert attribution.copying_score(np.eye(3)) == 1.0
    assert attribution.copying_score(-np.eye(3)) == -1.0
    assert attribution.copying_score(np.diag([1.0, -1.0])) == 0.0
    assert attribution.copying_score(np.zeros((3, 3))) == 0.0
    turn = np.array([[0.0, -1.0], [1.0, 0.0]])
    assert attribution.copying_score(turn) == pytest.approx(0.0)


# --- the exact effect ---


@pytest.mark.parametrize("family", FAMILIES)
def test_the_exact_effect_is_what_a_run_without_the_cells_loses(of_family, family):
    """A slow oracle: one edit that empties the cells, the whole model run for each head, logits by hand."""
    model, _ = of_family(family)
    batch = drawn_for(model)
    heads = [Head.at(1, 2), Head.at(0, 1), Head.at(2, 0)]
    found = attribution.exact_effect(model, batch, heads, batch_size=2)
    cells = batch.cells["prefix_matching"]

    def logits(head: Head | None) -> np.ndarray:
        def empty(scores, rows):
            for row, query, key in zip(cells.row, cells.query, cells.key, strict=True):
                scores[row, query, key] = -torch.inf
            return scores

        return plain(model.logits(batch.tokens, [Edit(head, "scores", empty)] if head else []))

    clean = logits(None)
    for number, head in enumerate(heads):
        lost = clean - logits(head)
        for row in range(len(batch.tokens)):
            read = np.flatnonzero(continuing(batch)[row])
            expected = [lost[row, at - 1, batch.tokens[row, at]] - lost[row, at - 1].mean() for at in read]
            assert found[row, number] == pytest.approx(np.mean(expected), abs=1e-4), (head, row)


def test_the_exact_effect_of_known_heads(known):
    """Heads of strength 0.6 that write 0.25 of a unit worth 24 nats, 0 and -0.25: 3.6, 0 and -3.6 nats."""
    model, batch = known
    heads = [Head.at(1, 0), Head.at(1, 2), Head.at(1, 1), Head.at(0, 2)]
    found = attribution.exact_effect(model, batch, heads, batch_size=4).mean(0)
    assert found == pytest.approx([3.6, 0.0, -3.6, 0.0], abs=0.1)


def test_no_row_without_a_repeat_has_an_exact_effect(known):
    model, _ = known
    batch = TokenBatch.of([np.array([model.bos, 5, 6, 7])], pad=model.bos)
    assert np.isnan(attribution.exact_effect(model, batch, [Head.at(1, 0)], batch_size=1)).all()
