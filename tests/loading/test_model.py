"""A loaded model: texts to ids and back, and its runs: what they show, where they begin and end, what they refuse."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from common import UserError
from common.attention.call import Edit
from common.attention.head import Head
from common.loading.model import visible

TOKENS = np.array([[0, 5, 6, 7, 5, 6], [0, 9, 8, 7, 9, 8]])
STREAM = ("resid_pre", "resid_post", "projected", "attn_out", "mlp_out")
HALVE = Edit(Head.at(1, 2), "pattern", lambda old, rows: old / 2)


# --- texts ---


def test_special_tokens_are_not_ordinary_and_stay_text_in_a_text(random_gpt2):
    assert random_gpt2.bos not in random_gpt2.ordinary()
    assert random_gpt2.bos not in random_gpt2.encode("<|endoftext|>")[1:]
    assert len(random_gpt2.ordinary()) == len(random_gpt2.tokenizer) - 1


def test_any_text_encodes_and_comes_back(mini):
    for text in ("the cat sat", "é😀שלום", "a\x00b\t\n", "$x_1$ \\frac"):
        assert mini.encode(text)[0] == mini.bos
        assert mini.tokenizer.decode(mini.encode(text)[1:]) == text


def test_an_empty_text_is_bos_alone(mini):
    assert mini.encode("").tolist() == [mini.bos]


def test_a_text_that_is_no_unicode_is_refused_in_one_line(mini):
    with pytest.raises(UserError, match="not UTF-8") as error:
        mini.encode("caf\udce9")
    assert str(error.value).isprintable()


def test_white_space_is_made_visible():
    assert visible(" a\n\t\x00") == "·a⏎→\\x00"


def test_tokens_are_shown_as_a_reader_should_see_them(mini):
    tokens = mini.encode("a cat\n")
    shown = mini.strings(tokens)
    assert shown[0] == "BOS" and "".join(shown[1:]) == "a·cat⏎"


def test_a_model_is_shown_in_one_line(mini):
    assert repr(mini).startswith("Model(mini: ") and len(repr(mini)) < 160 and "\n" not in repr(mini)


# --- runs ---


@pytest.fixture(params=["gpt2", "llama", "neox"])
def model(request, loaded):
    return loaded[request.param]


@pytest.fixture
def reference(model, folders):
    """transformers alone, with its eager attention."""
    name = model.source.rpartition("-")[2]
    network = AutoModelForCausalLM.from_pretrained(folders[name], attn_implementation="eager").eval()
    with torch.no_grad():
        return network(torch.from_numpy(TOKENS), output_attentions=True, output_hidden_states=True)


def test_logits_streams_and_patterns_are_those_of_transformers(model, reference):
    assert model.logits(TOKENS).numpy() == pytest.approx(reference.logits.numpy(), abs=1e-4)
    points = {(layer, point) for layer in range(3) for point in ("resid_pre", "pattern", "scores")}
    seen = model.record(TOKENS, points)
    for layer in range(3):
        assert seen[layer, "resid_pre"].numpy() == pytest.approx(reference.hidden_states[layer].numpy(), abs=5e-5)
        pattern = reference.attentions[layer].numpy()
        assert seen[layer, "pattern"].numpy() == pytest.approx(pattern, abs=1e-5)
        assert seen[layer, "scores"].softmax(-1).numpy() == pytest.approx(pattern, abs=1e-5)


def test_what_is_recorded_has_the_shapes_that_are_named(model):
    vectors = {(1, point): (2, 6, 4, 8) for point in "qkvz"}
    maps = {(1, point): (2, 4, 6, 6) for point in ("pattern", "scores")}
    streams = {(1, point): (2, 6, 32) for point in STREAM}
    seen = model.record(TOKENS, {*vectors, *maps, *streams})
    assert {point: tuple(value.shape) for point, value in seen.items()} == vectors | maps | streams


def test_a_head_output_is_its_pattern_on_its_values(model):
    seen = model.record(TOKENS, {(1, point) for point in ("pattern", "v", "z")})
    made = torch.einsum("rhqk,rkhd->rqhd", seen[1, "pattern"], seen[1, "v"])
    assert seen[1, "z"].numpy() == pytest.approx(made.numpy(), abs=1e-5)


def test_what_is_recorded_under_an_edit_is_what_the_edited_run_has(model):
    points = {(1, "pattern"), (1, "z"), (2, "resid_pre")}
    clean, edited = (model.record(TOKENS, points, edits) for edits in ((), [HALVE]))
    assert edited[1, "pattern"][:, 2].numpy() == pytest.approx(clean[1, "pattern"][:, 2].numpy() / 2, abs=1e-6)
    assert torch.equal(edited[1, "pattern"][:, [0, 1, 3]], clean[1, "pattern"][:, [0, 1, 3]])
    assert edited[1, "z"][:, :, 2].numpy() == pytest.approx(clean[1, "z"][:, :, 2].numpy() / 2, abs=1e-5)
    assert not torch.equal(edited[2, "resid_pre"], clean[2, "resid_pre"])


@pytest.mark.parametrize("point", ["resid_pre", "z", "projected", "mlp_out", "resid_post"])
def test_a_recording_is_left_once_all_was_seen(model, point):
    """What is recorded is the same whether or not the run goes on; nothing behind it runs."""
    ran: list[int] = []
    projections = [layer.projection for layer in model.parts.layers]
    after = [(module, "output", lambda value, at=at: ran.append(at)) for at, module in enumerate(projections)]
    alone = model.record(TOKENS, {(1, point)}, taps=after)[1, point]
    assert 2 not in ran and (1 in ran) == (point not in ("resid_pre", "z"))
    with_more = model.record(TOKENS, {(1, point), (2, "resid_post")})
    assert torch.equal(alone, with_more[1, point])


def test_patterns_come_layer_by_layer_and_no_further_than_asked(model):
    seen: list[tuple[int, tuple[int, ...]]] = []
    model.read(TOKENS, lambda layer, call: seen.append((layer, tuple(call.pattern().shape))))
    assert seen == [(layer, (2, 4, 6, 6)) for layer in range(3)]
    seen.clear()
    model.read(TOKENS, lambda layer, call: seen.append((layer, ())), [1, 0])
    assert seen == [(0, ()), (1, ())]
    hooks = [(module._forward_hooks, module._forward_pre_hooks) for module in model.door.network.modules()]
    assert not any(before or after for before, after in hooks)


def test_no_logit_is_computed_to_read_attention(model):
    def refuse(*args):
        raise AssertionError("the unembedding ran")

    watch = model.parts.unembedding.register_forward_pre_hook(refuse)
    try:
        model.read(TOKENS, lambda layer, call: call.pattern())
        with pytest.raises(AssertionError, match="the unembedding ran"):
            model.logits(TOKENS)
    finally:
        watch.remove()


def test_an_edit_above_what_is_read_is_no_matter_one_below_is(model):
    shown: dict[str, torch.Tensor] = {}
    late, early = (Edit(Head.at(layer, 0), "z", lambda old, rows: old + 1) for layer in (2, 0))
    for name, edits in (("clean", ()), ("late", [late]), ("early", [early])):
        model.read(TOKENS, lambda layer, call, name=name: shown.setdefault(name, call.pattern()), [1], edits)
    assert torch.equal(shown["late"], shown["clean"]) and not torch.equal(shown["early"], shown["clean"])


def test_runs_from_a_layer_on_are_the_same_bits(model):
    stream = model.record(TOKENS, {(1, "resid_pre")})[1, "resid_pre"]
    edit = Edit(Head.at(2, 1), "z", lambda old, rows: torch.zeros_like(old))
    for edits in ((), [edit]):
        assert torch.equal(model.logits(TOKENS, edits, start=(1, stream)), model.logits(TOKENS, edits))
        whole, late = (model.record(TOKENS, {(2, "z")}, edits, start=start) for start in (None, (1, stream)))
        assert torch.equal(whole[2, "z"], late[2, "z"])
        patterns: list[torch.Tensor] = []
        for start in (None, (1, stream)):
            show = partial(lambda patterns, layer, call: patterns.append(call.pattern()), patterns)
            model.read(TOKENS, show, [2], edits, start=start)
        assert torch.equal(*patterns)
    assert not torch.equal(model.logits(TOKENS, start=(1, stream.flip(0))), model.logits(TOKENS))


def test_logits_at_some_places_are_those_of_all_places(model):
    at = np.array([0, 1, 1]), np.array([2, 5, 0])
    whole = model.logits(TOKENS, [HALVE])
    assert model.logits(TOKENS, [HALVE], at=at).numpy() == pytest.approx(whole[at].numpy(), abs=1e-5)
    assert not torch.allclose(model.logits(TOKENS, at=at), whole[at], atol=1e-4)


def test_an_edit_is_told_which_rows_are_run(model):
    told: list[slice] = []
    edit = Edit(Head.at(1, 0), "z", lambda old, rows: told.append(rows) or old)
    model.logits(TOKENS, [edit], rows=slice(4, 6))
    model.read(TOKENS, lambda layer, call: call.output, [1], [edit], rows=slice(6, 8))
    model.record(TOKENS, {(1, "z")}, [edit], rows=slice(8, 10))
    assert told == [slice(4, 6), slice(6, 8), slice(8, 10)]


def test_runs_keep_no_graph(model):
    assert not model.logits(TOKENS).requires_grad
    assert not model.record(TOKENS, {(1, "resid_post")})[1, "resid_post"].requires_grad


def test_a_layer_that_does_not_exist_is_an_error_of_one_line(model):
    with pytest.raises(UserError, match=r"9\.0 was not made"):
        model.logits(TOKENS, [Edit(Head.at(9, 0), "z", lambda old, rows: old)])
    assert torch.equal(model.logits(TOKENS), model.logits(TOKENS))


def test_a_point_that_a_parallel_layer_has_not_is_refused_by_name(loaded):
    with pytest.raises(UserError, match="has no resid_mid in layer 1"):
        loaded["neox"].record(TOKENS, {(1, "resid_mid")})
    seen = loaded["gpt2"].record(TOKENS, {(1, "resid_mid"), (1, "resid_pre"), (1, "attn_out")})
    made = seen[1, "resid_pre"] + seen[1, "attn_out"]
    assert seen[1, "resid_mid"].numpy() == pytest.approx(made.numpy(), abs=1e-5)
