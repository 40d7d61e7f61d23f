"""What an architecture calls its parts: on every family the parts found are those that the forward pass uses."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from common import UserError
from common.loading.families import UNCHANGED, Norm, dtype_of, plain, unembedding_weights
from tests import architectures
from tests.loading.test_loader import FAMILIES

POST_NORMS = {"gemma2", "gemma3"}  # they norm what heads and MLP put out before it is added
PARALLEL = {"neox", "phi", "gptj", "cohere", "falcon-rotary"}  # attention and MLP read the same stream
CAPPED = {"gemma2", "cohere"}  # something stands between unembedding and logits
TOKENS = np.stack([np.arange(3, 23), np.arange(60, 40, -1)])
POINTS = ("resid_pre", "resid_post", "q", "k", "v", "z", "projected", "attn_out", "mlp_out")


@pytest.fixture(params=FAMILIES)
def model(request, of_family):
    return of_family(request.param)


def seen_in(model, layer: int, points=POINTS) -> dict[str, torch.Tensor]:
    found = model.record(TOKENS, {(layer, point) for point in points})
    assert found.keys() == {(layer, point) for point in points}
    return {point: value for (_, point), value in found.items()}


def close(one, other, relative: float = 1e-5) -> None:
    """The same up to rounding, and not because both are nothing."""
    one, other = (plain(value) if torch.is_tensor(value) else value for value in (one, other))
    size = np.abs(other).max()
    assert size > 1e-3
    assert one.shape == other.shape
    assert np.abs(one - other).max() <= 10 * relative * size + 1e-6


# --- norms ---


def applied(norm: Norm, x: np.ndarray) -> np.ndarray:
    return norm.linear(x) / norm.scale(x) + norm.offset


def test_norms_are_the_modules_of_every_family(model):
    stream = 3.0 * torch.randn(2, 5, architectures.D_MODEL, generator=torch.Generator().manual_seed(0)) + 1.0
    pairs = [(model.parts.norm, model.parts.final_norm)]
    for layer in model.parts.layers:
        pairs.append((layer.norm, layer.attention_in))
        if layer.norm_behind is not None:
            pairs.append((layer.norm_behind, layer.attention_out))
    assert (len(pairs) == 7) == (model.name in POST_NORMS)
    for norm, module in pairs:
        close(applied(norm, plain(stream)), module(stream))


def test_norms_of_queries_and_keys_are_found_where_there_are_any(model):
    module_names = {"qwen3": ("q_norm", "k_norm"), "gemma3": ("q_norm", "k_norm")}.get(model.name)
    heads = 3.0 * torch.randn(2, 5, architectures.D_HEAD, generator=torch.Generator().manual_seed(1))
    for layer in model.parts.layers:
        found = layer.norms_of_heads()
        if module_names is None:
            assert found == (None, None)
            continue
        for norm, name in zip(found, module_names, strict=True):
            close(applied(norm, plain(heads)), getattr(layer.attention, name)(heads))


def bridged(module: nn.Module, *, offset: bool = False, rms: bool = False, eps: float = 1e-5) -> SimpleNamespace:
    settings = SimpleNamespace(eps=eps)
    return SimpleNamespace(original_component=module, config=settings, uses_weight_offset=offset, uses_rms_norm=rms)


def drawn(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    return module


@pytest.mark.parametrize("kind", ["layer", "layer without bias", "no weight", "rms", "gemma"])
def test_a_norm_is_a_linear_map_once_its_scale_is_given(kind):
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    module, norm = {
        "layer": lambda: (made := drawn(nn.LayerNorm(8, eps=0.3)), Norm.of(bridged(made))),
        "layer without bias": lambda: (made := drawn(nn.LayerNorm(8, bias=False)), Norm.of(bridged(made))),
        "no weight": lambda: (made := nn.LayerNorm(8, elementwise_affine=False), Norm.of(bridged(made))),
        "rms": lambda: (made := drawn(LlamaRMSNorm(8, eps=0.3)), Norm.of(bridged(made, rms=True))),
        "gemma": lambda: (made := drawn(GemmaRMSNorm(8)), Norm.of(bridged(made, rms=True, offset=True))),
    }[kind]()
    x = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(3)) + 2.0
    close(applied(norm, plain(x)), module(x))
    one, two = plain(x)[0], plain(x)[1]
    assert norm.linear(2 * one - 3 * two) == pytest.approx(2 * norm.linear(one) - 3 * norm.linear(two))
    assert norm.scale(one).shape == (4, 1)
    assert norm.centred == ("rms" not in kind and kind != "gemma")
    assert (norm.eps > 0.1) == (kind in ("layer", "rms")), "the module's own epsilon"


def test_a_norm_without_an_epsilon_of_its_own_has_the_configurations():
    class Bare(nn.Module):
        pass

    assert Norm.of(bridged(Bare(), rms=True, eps=0.25)).eps == 0.25


def test_olmos_norm_has_neither_weight_nor_bias(tmp_path, tokenizer):
    import transformers

    from common.loading import load

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.OlmoConfig(vocab_size=len(tokenizer), max_position_embeddings=64, pad_token_id=0, **sizes)
    transformers.OlmoForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = load(str(tmp_path))
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(3)) + 2.0
    close(applied(model.parts.layers[1].norm, plain(x)), model.parts.layers[1].attention_in(x))
    assert model.parts.norm.gain.shape == (1,) == model.parts.norm.offset.shape


def test_the_norm_that_changes_nothing():
    x = np.random.default_rng(0).normal(size=(3, 8))
    assert UNCHANGED.linear(x) == pytest.approx(x) and np.array_equal(UNCHANGED.offset, [0.0])


# --- layers ---


def test_what_a_layer_adds_is_its_attention_and_its_mlp(model):
    for layer in range(model.n_layers):
        seen = seen_in(model, layer)
        close(seen["resid_pre"] + seen["attn_out"] + seen["mlp_out"], seen["resid_post"])
        for left_out in ("attn_out", "mlp_out"):
            without = seen["resid_post"] - seen[left_out]
            assert (without - seen["resid_post"]).abs().max() > 1e-3


def test_the_layers_follow_each_other(model):
    seen = model.record(TOKENS, {(layer, point) for layer in range(3) for point in ("resid_pre", "resid_post")})
    for layer in range(2):
        assert torch.equal(seen[layer, "resid_post"], seen[layer + 1, "resid_pre"])


def test_head_outputs_through_their_weights_are_what_is_projected(model):
    for number, layer in enumerate(model.parts.layers):
        seen = seen_in(model, number)
        by_head = torch.einsum("rphd,hdm->rphm", seen["z"], layer.weights.W_O)
        bias = 0 if layer.weights.b_O is None else layer.weights.b_O
        close(by_head.sum(2) + bias, seen["projected"])
        turned = torch.einsum("rphd,hdm->rpm", seen["z"], layer.weights.W_O.flip(0)) + bias
        assert (turned - seen["projected"]).abs().max() > 1e-2, "each head has its own weights"


def test_only_a_norm_behind_stands_between_projection_and_stream(model):
    for number, layer in enumerate(model.parts.layers):
        seen = seen_in(model, number)
        if model.name in POST_NORMS:
            close(applied(layer.norm_behind, plain(seen["projected"])), seen["attn_out"])
        else:
            assert layer.norm_behind is None
            close(seen["projected"], seen["attn_out"])


def test_values_are_what_attention_reads_through_its_norm_and_weights(model):
    for number, layer in enumerate(model.parts.layers):
        seen = seen_in(model, number)
        read = torch.from_numpy(applied(layer.norm, plain(seen["resid_pre"]))).float()
        made = torch.einsum("rpm,hmd->rphd", read, layer.weights.W_V)
        if layer.weights.b_V is not None:
            made = made + layer.weights.b_V
        close(made.repeat_interleave(model.n_heads // made.shape[2], 2), seen["v"])


@pytest.mark.parametrize("family", ["gpt2", "bloom", "gptneo", "mpt", "opt"])
def test_queries_and_keys_are_made_by_their_weights_where_nothing_is_rotated(of_family, family):
    model = of_family(family)
    layer = model.parts.layers[1]
    seen = seen_in(model, 1)
    read = torch.from_numpy(applied(layer.norm, plain(seen["resid_pre"]))).float()
    of = layer.weights
    for weights, bias, point in ((of.W_Q, of.b_Q, "q"), (of.W_K, of.b_K, "k")):
        made = torch.einsum("rpm,hmd->rphd", read, weights) + (0 if bias is None else bias)
        if family == "opt" and point == "q":
            made = made * architectures.D_HEAD**-0.5  # OPT scales its queries, not its scores
        close(made, seen[point])


def test_whether_the_mlp_reads_the_stream_after_attention(model):
    for number, layer in enumerate(model.parts.layers):
        assert layer.sequential == (model.name not in PARALLEL)
        if not layer.sequential:
            with pytest.raises(UserError, match=f"'{model.name}' has no resid_mid in layer {number}"):
                model.record(TOKENS, {(number, "resid_mid")})
            continue
        seen = seen_in(model, number, (*POINTS, "resid_mid"))
        close(seen["resid_pre"] + seen["attn_out"], seen["resid_mid"])


def test_a_lone_mlp_can_be_run_by_itself(model):
    for number, layer in enumerate(model.parts.layers):
        assert layer.has_lone_mlp == (model.name not in {*PARALLEL, "opt", "bloom", "mpt"})
        if not layer.has_lone_mlp:
            continue
        seen = seen_in(model, number, ("resid_mid", "mlp_out"))
        with torch.no_grad():
            made = layer.mlp_of(seen["resid_mid"])
        if model.name not in POST_NORMS:
            close(made, seen["mlp_out"])
        else:
            assert (made - seen["mlp_out"]).abs().max() > 1e-3


# --- what stands before and behind the layers ---


def test_logits_are_the_unembedding_of_the_normed_last_stream(model):
    weight, bias = unembedding_weights(model.parts)
    stream = seen_in(model, 2, ("resid_post",))["resid_post"]
    normed = torch.from_numpy(applied(model.parts.norm, plain(stream))).float()
    logits = normed @ weight.T + (0 if bias is None else bias)
    if model.name in CAPPED:
        assert (logits - model.logits(TOKENS)).abs().max() > 1e-2
    else:
        close(logits, model.logits(TOKENS))


def test_positions_are_found_where_they_are_added(model):
    learned = {"gpt2", "opt", "gptneo"}
    assert (model.parts.positions is not None) == (model.name in learned) or model.name not in learned
    if model.name in learned:
        added: list[torch.Tensor] = []
        model.record(TOKENS, {(0, "resid_pre")}, taps=[(model.parts.positions, "output", added.append)])
        embedding = model.door.network.get_input_embeddings()(torch.from_numpy(TOKENS))
        close(embedding + added[0], seen_in(model, 0, ("resid_pre",))["resid_pre"])


def test_dtype_is_that_of_the_weights():
    assert dtype_of(nn.Linear(2, 2, dtype=torch.bfloat16)) == torch.bfloat16
    assert plain(torch.ones(2, dtype=torch.bfloat16)).dtype == np.float64
