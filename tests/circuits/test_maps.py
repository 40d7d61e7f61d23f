"""Maps of queries and keys against the models themselves, on every architecture."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from common import UserError
from common.attention.call import Call, Edit
from common.attention.head import Head
from common.circuits import maps
from common.loading import load
from tests import architectures
from tests.architectures import HEADS, LAYERS, WINDOW

EVERY = sorted(architectures.CONFIGS | architectures.FURTHER)
TOKENS = np.array([[0, 5, 9, 700, 41, 5, 9, 700, 33, 41, 1900, 5, 9], [0, 8, 8, 3, 77, 1200, 8, 3, 8, 77, 6, 1200, 2]])


def visible(name: str, layer: int, pos: int) -> np.ndarray:
    """[query, key], from the configurations of the test models: causal, and a window in Gemma's outer layers."""
    distance = np.arange(pos)[:, None] - np.arange(pos)
    windowed = name in ("gemma2", "gemma3") and layer != 1
    return (distance >= 0) & (distance < WINDOW if windowed else True)


@pytest.mark.parametrize("name", EVERY)
def test_maps_are_those_of_the_unwrapped_model(name, folder_of, model_of):
    reference = AutoModelForCausalLM.from_pretrained(folder_of(name), attn_implementation="eager").eval()
    with torch.no_grad():
        theirs = reference(torch.from_numpy(TOKENS), output_attentions=True).attentions
    for layer in range(LAYERS):
        met = maps.interact(model_of(name), TOKENS, layer)
        expected = theirs[layer].double().numpy()
        assert met.pattern == pytest.approx(expected, abs=1e-5)
        seen = visible(name, layer, TOKENS.shape[1])
        assert (met.rules.visible == seen).all()
        ours = met.scores - met.scores[..., :1] if seen[:, 0].all() else met.scores - np.diagonal(
            met.scores, axis1=-2, axis2=-1)[..., None]  # fmt: skip
        logs = np.log(np.where(seen, expected, 1.0))
        logs = logs - logs[..., :1] if seen[:, 0].all() else logs - np.diagonal(logs, axis1=-2, axis2=-1)[..., None]
        assert np.where(seen & (expected > 1e-3), ours - logs, 0.0) == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("name", EVERY)
def test_the_check_is_small_and_attention_is_far_from_uniform(name, model_of):
    for layer in range(LAYERS):
        met = maps.interact(model_of(name), TOKENS, layer)
        assert met.q.shape == met.k.shape == (*TOKENS.shape, HEADS, met.q.shape[-1])
        assert met.check.max_abs_error < 1e-5
        assert met.pattern[:, :, 6:, 1:].max() > 0.3


def with_rules(monkeypatch, **changed) -> None:
    rules = maps._rules
    monkeypatch.setattr(maps, "_rules", lambda *arguments: dataclasses.replace(rules(*arguments), **changed))


FAULTS = {
    "queries and keys exchanged": (EVERY, lambda patch: patch.setattr(
        maps, "dot_products", lambda q, k: np.einsum("bqhd,bkhd->bhkq", q, k))),
    "scale left out": (EVERY, lambda patch: with_rules(patch, scale=1.0)),
    "key heads misgrouped": (["llama", "qwen3", "gemma2"], lambda patch: patch.setattr(
        Call, "keys", lambda call: call.k.repeat(1, call.n_heads // call.k.shape[1], 1, 1))),
    "soft-cap left out": (["gemma2"], lambda patch: with_rules(patch, softcap=None)),
    "ALiBi left out": (["bloom"], lambda patch: with_rules(patch, bias=None)),
    "sliding window left out": (["gemma2", "gemma3"], lambda patch: with_rules(
        patch, visible=np.tril(np.ones((len(TOKENS), TOKENS.shape[1], TOKENS.shape[1]), dtype=bool)))),
}  # fmt: skip


@pytest.mark.parametrize(("fault", "name"), [(fault, name) for fault, (names, _) in FAULTS.items() for name in names])
def test_a_map_that_is_wrong_stops_the_run(fault, name, model_of, monkeypatch):
    FAULTS[fault][1](monkeypatch)
    with pytest.raises(UserError, match=r"layer 0 of random-\w+ is not reproduced: head 0\.\d, query \d+, key \d+"):
        maps.interact(model_of(name), TOKENS, 0)


@pytest.mark.parametrize("name", EVERY)
def test_head_by_head_labelled_with_tokens_stops_the_run(name, model_of, monkeypatch):
    """The best-known wrong map: it passes for query × key where a text has as many tokens as the layer has heads."""
    monkeypatch.setattr(maps, "dot_products", lambda q, k: np.einsum("bhqd,bhkd->bhqk", q, k))
    with pytest.raises(UserError, match="is not reproduced"):
        maps.interact(model_of(name), TOKENS[:, :HEADS], 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_have_a_tolerance_of_their_own_and_still_show_a_fault(dtype, monkeypatch):
    model = load("mini", dtype=dtype)
    met = maps.interact(model, TOKENS, 1)
    assert 0.0 < met.check.max_abs_error < 1e-4  # the door scores in float32, whatever the model computes in
    assert maps._allowed(met.q / 1e3, met.k / 1e3, 1.0, model.dtype) == maps.SCORE_ERRORS[1]
    with_rules(monkeypatch, scale=1.0)
    with pytest.raises(UserError, match="is not reproduced"):
        maps.interact(model, TOKENS, 1)


def test_large_scores_are_allowed_the_rounding_of_their_own_size():
    q = np.full((1, 2, 1, 4), 1000.0)
    assert maps._allowed(q / 1000, q / 1000, 0.5, torch.float32) == maps.SCORE_ERRORS[0]
    assert maps._allowed(q, q, 0.5, torch.float32) == pytest.approx(8 * 2**-23 * 2e6)


def test_the_error_says_by_how_much_and_where(model_of, monkeypatch):
    met = maps.interact(model_of("gpt2"), TOKENS, 1)
    products = maps.dot_products

    def spoiled(q, k):
        right = products(q, k)
        right[1, 2, 9, 4] += 0.01 / met.rules.scale
        return right

    monkeypatch.setattr(maps, "dot_products", spoiled)
    with pytest.raises(UserError, match=r"head 1\.2, query 9, key 4 .* \(off by 0\.00?\d+, allowed 0\.0001\)"):
        maps.interact(model_of("gpt2"), TOKENS, 1)


def test_what_does_not_exist_is_named(model_of):
    with pytest.raises(UserError, match="has no layer 3: its layers are 0 to 2"):
        maps.check_exists(model_of("gpt2"), 3, None)
    with pytest.raises(UserError, match="has no head 4 in a layer: its heads are 0 to 3"):
        maps.check_exists(model_of("gpt2"), None, 4)
    maps.check_exists(model_of("gpt2"), 2, 3)


def test_a_layer_that_does_not_exist_is_not_read(model_of):
    with pytest.raises(UserError, match="has no layer 3"):
        maps.interact(model_of("gpt2"), TOKENS, 3)


def test_no_hook_is_left_behind(model_of, monkeypatch):
    model = model_of("neox")
    maps.interact(model, TOKENS, 1)
    with_rules(monkeypatch, scale=1.0)
    with pytest.raises(UserError):
        maps.interact(model, TOKENS, 1)
    for module in model.door.network.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks


def test_an_edit_of_a_key_moves_the_maps_of_its_head_alone(model_of):
    model = model_of("llama")
    clean = maps.interact(model, TOKENS, 1)
    met = maps.interact(model, TOKENS, 1, [Edit(Head.at(1, 2), "k", lambda old, rows: 2.0 * old)])
    assert met.products[:, 2] == pytest.approx(2.0 * clean.products[:, 2], abs=1e-4)
    others = [head for head in range(HEADS) if head != 2]  # head 3 shares its key
    assert met.products[:, others] == pytest.approx(clean.products[:, others])


def call_of(mask: torch.Tensor | None = None, **given) -> Call:
    q, k, v = torch.randn(3, 2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    return Call(torch.nn.Identity(), q, k, v, mask, **given)


def numbers_mask() -> torch.Tensor:
    """A mask in numbers that holds ALiBi too, as Falcon makes it, [1, head, query, key]."""
    alibi = torch.arange(4).reshape(1, 4, 1, 1) * torch.arange(6) * 0.1
    return torch.where(torch.ones(6, 6).tril().bool(), alibi, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("given", [
    {"sinks": torch.tensor([0.5, -1.0, 3.0, 0.0])}, {"mask": numbers_mask()}, {"softcap": 0.7},
    {"mask": torch.ones(6, 6).tril().triu(-2).bool()[None, None]}, {"bias": numbers_mask().clamp(min=0.0)},
])  # fmt: skip
def test_rules_are_those_of_the_call(given):
    call = call_of(**given)
    rules = maps._rules(call, {})
    q, k = (maps.plain(part.transpose(1, 2)) for part in (call.queries(), call.keys()))
    scores = rules.scores(rules.scale * maps.dot_products(q, k))
    shown = torch.stack([call.scores_of(head) for head in range(4)], 1).double().numpy()
    assert np.where(rules.visible[:, None], scores, -np.inf) == pytest.approx(shown, abs=1e-5)
    assert rules.pattern(scores) == pytest.approx(call.pattern().double().numpy(), abs=1e-6)
    if "sinks" in given:
        without = dataclasses.replace(rules, sinks=None).pattern(scores)
        assert np.abs(without - rules.pattern(scores)).max() > 0.1


def test_q_and_k_are_written_to_a_file(model_of, tmp_path):
    met = maps.interact(model_of("llama"), TOKENS[:1], 1)
    maps.export(met, TOKENS[0], tmp_path / "maps.safetensors")
    read = load_file(tmp_path / "maps.safetensors")
    scores = np.einsum("qhd,khd->hqk", read["q"], read["k"]) * met.rules.scale
    assert scores == pytest.approx(met.scores[0], abs=1e-4)
    assert read["tokens"].tolist() == TOKENS[0].tolist()


@pytest.mark.parametrize("interleaved", [True, False])
@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 5), st.integers(0, 10**6))
def test_rotated_products_depend_on_the_distance_alone(interleaved, query, key, later, seed):
    q, k = np.random.default_rng(seed).standard_normal((2, 8))
    angle = np.arange(40)[:, None] * np.array([1.0, 1.0, 0.1, 0.1] if interleaved else [1.0, 0.1, 1.0, 0.1])
    rotation = maps.Rotation(np.cos(angle), np.sin(angle), interleaved)

    def product(at: int, of: int) -> float:
        turned = (rotation.turn(x[None], slice(place, place + 1)) for x, place in ((q, at), (k, of)))
        return float(np.sum(next(turned) * next(turned)))

    assert product(query + later, key + later) == pytest.approx(product(query, key), abs=1e-9)


def test_how_dimensions_are_paired_is_read_from_the_angles():
    once = np.arange(5)[:, None] * np.array([1.0, 0.1])
    for angles, sin_first, interleaved in (
        (np.tile(once, 2), False, False),
        (np.repeat(once, 2, -1), False, True),
        (once, False, False),
        (once, True, True),
    ):
        given = [np.sin(angles), np.cos(angles)] if sin_first else [np.cos(angles), np.sin(angles)]
        found = maps.Rotation.of(given)
        assert found.interleaved == interleaved
        whole = np.repeat(once, 2, -1) if interleaved else np.tile(once, 2)
        assert found.cos == pytest.approx(np.cos(whole)) and found.sin == pytest.approx(np.sin(whole))
