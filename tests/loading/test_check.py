"""The self-check: a door that forgets something is not believed, nor one whose edits do not act or stay."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from common import UserError
from common.attention.call import Call, Edit
from common.attention.head import Head
from common.heads.attribution import attribute
from common.heads.tokens import battery
from common.loading import check, load
from common.results.analysis import Provenance
from tests import architectures
from tests.loading.test_loader import FAMILIES, refusal

LONG_WINDOW = 12


def save_with_window(kind: str, folder, tokenizer):
    """A random model whose window of 12 tokens its configuration names in its own way; the context is 64."""
    shared = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0}
    sizes = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.3, **shared,
    }  # fmt: skip
    types = {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
    config = {
        "mistral": lambda: transformers.MistralConfig(sliding_window=LONG_WINDOW, **sizes),
        "gemma3": lambda: transformers.Gemma3TextConfig(sliding_window=LONG_WINDOW, **types, **sizes),
        "gptneo": lambda: transformers.GPTNeoConfig(
            hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
            window_size=LONG_WINDOW, max_position_embeddings=64, initializer_range=0.3, **shared,
        ),
    }[kind]()  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def forgetting(monkeypatch, forget) -> None:
    """Every call of attention from now on is made as `forget(call)` leaves it."""
    made = Call.__init__

    def spoiled(self, *args, **kwargs):
        made(self, *args, **kwargs)
        forget(self)

    monkeypatch.setattr(Call, "__init__", spoiled)


def forget_window(call: Call) -> None:
    call.mask, call.causal = None, True


@pytest.mark.parametrize("kind", ["mistral", "gemma3", "gptneo"])
def test_a_forgotten_window_of_12_tokens_fails_the_self_check(kind, tmp_path, tokenizer, monkeypatch):
    folder = save_with_window(kind, tmp_path, tokenizer)
    assert load(str(folder)).n_layers == 2, "nothing is forgotten: nothing is said"
    forgetting(monkeypatch, forget_window)
    assert "differ by" in refusal(folder)


def test_on_a_row_as_short_as_the_window_it_would_not_have_been_seen(tmp_path, tokenizer, monkeypatch):
    """The length of the row is what finds it."""
    folder = save_with_window("mistral", tmp_path, tokenizer)
    row = check._row
    monkeypatch.setattr(check, "_row", lambda model: row(model)[:, :LONG_WINDOW])
    forgetting(monkeypatch, forget_window)
    assert load(str(folder)).n_layers == 2


def unrotated(call: Call) -> None:
    """Llama's queries as they were before their rotation; keys stay rotated."""
    angle = torch.arange(call.q.shape[2])[:, None] * 1e4 ** (-torch.arange(0, 8, 2) / 8)
    cos, sin = (torch.cat([part, part], -1) for part in (angle.cos(), angle.sin()))
    one, two = call.q.chunk(2, -1)
    call.q = call.q * cos - torch.cat([-two, one], -1) * sin


def put(**values):
    """Give a call other values."""

    def forget(call: Call) -> None:
        for name, value in values.items():
            assert getattr(call, name) is not None, "there is something to forget"
            setattr(call, name, value)

    return forget


def of_another_key(call: Call) -> None:
    call.k = call.k.flip(1)


FORGOTTEN = {
    "scale, of gemma2": ("gemma2", put(scale=architectures.D_HEAD**-0.5)),
    "scale, of gptneo": ("gptneo", put(scale=architectures.D_HEAD**-0.5)),
    "softcap, of gemma2": ("gemma2", put(softcap=None)),
    "window, of gemma3": ("gemma3", forget_window),
    "window, of gptneo": ("gptneo", forget_window),
    "ALiBi, of bloom": ("bloom", put(bias=None)),
    "ALiBi, of mpt": ("mpt", put(bias=None)),
    "rotation, of llama": ("llama", unrotated),
    "which key a query head has, of llama": ("llama", of_another_key),
}


@pytest.mark.parametrize("what", FORGOTTEN)
def test_what_a_door_forgets_fails_the_self_check(what, of_family, monkeypatch):
    family, forget = FORGOTTEN[what]
    model = of_family(family)
    assert check.checked(model).refused == {}
    forgetting(monkeypatch, forget)
    with pytest.raises(UserError, match=rf"'{family}' fails the self-check in layer \d.*TransformerLens.*differ by"):
        check.checked(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_to_what_comes_later_and_a_wrong_scale_fail_on_every_family(family, of_family, monkeypatch):
    model = of_family(family)
    forgetting(monkeypatch, lambda call: setattr(call, "scale", 1.01 * call.scale))
    with pytest.raises(UserError, match="fails the self-check in layer 0"):
        check.checked(model)


# --- the witness ---


def shown_otherwise(model, layer: int, change):
    """TransformerLens shows of one layer what `change` makes of its pattern; returns what takes that back."""
    point = model.bridge.blocks[layer].attn.hook_pattern
    return point.register_forward_hook(lambda module, args, pattern: change(pattern), prepend=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda pattern: pattern.flip(1), "layer 1.*differ by"),
        (lambda pattern: 0.999 * pattern + 0.001 * pattern.roll(1, 1), "layer 1.*differ by"),
        (lambda pattern: torch.full_like(pattern, 1 / pattern.shape[-1]), "layer 1.*future"),
        (lambda pattern: 0.9 * pattern, "layer 1.*do not sum to 1"),
        (lambda pattern: pattern * torch.nan, "layer 1.*NaN"),
        (lambda pattern: pattern + 0.0, None),
    ],
    ids=["other heads", "a little of other heads", "uniform", "less", "NaN", "the same"],
)
def test_a_witness_that_shows_something_else_is_believed_no_more_than_the_door(random_gpt2, change, said):
    handle = shown_otherwise(random_gpt2, 1, change)
    try:
        if said is None:
            assert check.checked(random_gpt2).refused == {}
        else:
            with pytest.raises(UserError, match=said):
                check.checked(random_gpt2)
    finally:
        handle.remove()


def test_a_layer_of_which_the_witness_shows_nothing_is_said(random_gpt2, monkeypatch):
    shown = check._bridge_patterns

    def without_one(model, tokens):
        return {layer: pattern for layer, pattern in shown(model, tokens).items() if layer != 2}

    monkeypatch.setattr(check, "_bridge_patterns", without_one)
    with pytest.raises(UserError, match="shows no attention pattern in layer 2"):
        check.checked(random_gpt2)


def test_layers_without_a_fused_kernel_are_said(gemma, random_gpt2):
    said = "no fused attention in 2 of 2 layers, which run block by block: each caps its scores"
    assert gemma.notes == (said,) and gemma.unfused_layers == 2
    assert random_gpt2.notes == () and random_gpt2.unfused_layers == 0
    assert Provenance.of(gemma, 0, 0.0, {}).fused_attention is False
    assert Provenance.of(random_gpt2, 0, 0.0, {}).fused_attention is True


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda pattern: pattern.fill_(0.25), "future"),
        (lambda pattern: pattern.mul_(0.9), "sum to 1"),
        (lambda pattern: pattern.fill_(torch.nan), "NaN"),
    ],
)
def test_the_self_check_names_what_is_wrong_with_a_pattern(spoil, reason):
    causal = torch.softmax(torch.full((4, 4), -torch.inf).triu(1), dim=-1)[None, None]
    assert check._complaint(causal.clone()) is None
    assert reason in check._complaint(spoil(causal.clone()))


def test_attention_to_the_very_next_token_is_to_the_future():
    causal = torch.full((1, 1, 4, 4), 0.25).tril()
    causal = causal / causal.sum(-1, keepdim=True)
    assert check._complaint(causal) is None
    causal[0, 0, 1] = torch.tensor([0.5, 0.4, 0.1, 0.0])
    assert "future" in check._complaint(causal)


def test_sixteen_bits_are_allowed_what_they_cost_and_no_more(random_gpt2_folder, monkeypatch):
    half = load(str(random_gpt2_folder), dtype="bfloat16")
    assert half.refused == {}
    forgetting(monkeypatch, put(scale=1.0))
    with pytest.raises(UserError, match="differ by"):
        check.checked(half)


# --- edits ---


def refused(model) -> str:
    """Why edits are refused; and they are, while what is only read still works."""
    found = check.checked(model)
    assert found.refused.keys() == {"edits"} and model.name in found.refused["edits"]
    tokens = battery(found.ordinary(), found.bos, rows=2, length=14, seed=0).repeats
    edit = [Edit(Head.at(1, 1), "z", lambda old, rows: old)]
    for use in (
        lambda: found.logits(tokens.tokens, edit),
        lambda: found.read(tokens.tokens, lambda layer, call: None, edits=edit),
        lambda: found.record(tokens.tokens, {(1, "z")}, edit),
        lambda: attribute(found, tokens, batch_size=2),
    ):
        with pytest.raises(UserError, match="intervention") as error:
            use()
        assert model.name in str(error.value)
    assert torch.isfinite(found.logits(tokens.tokens)).all()
    return found.refused["edits"]


def test_edits_that_do_not_act_are_refused_by_name(copied, monkeypatch):
    model = load(str(copied))
    assert check.checked(model).refused == {}
    monkeypatch.setattr(Call, "output", property(lambda call: call._fused))
    assert "does not use what its heads put out in layer 0" in refused(model)


def test_edits_that_do_not_act_in_one_layer_alone_are_found_too(copied, monkeypatch):
    model = load(str(copied))
    under = Call.under
    last = model.parts.layers[2].attention
    monkeypatch.setattr(
        Call, "under", lambda call, edits, rows: under(call, () if call.module is last else edits, rows)
    )
    assert "in layer 2" in refused(model)


def test_edits_that_are_not_undone_are_refused_by_name(copied, monkeypatch):
    """An edit that leaves its mark on a weight."""
    model = load(str(copied))
    under = Call.under

    def marking(call: Call, edits, rows) -> None:
        under(call, edits, rows)
        with torch.no_grad():
            next(call.module.parameters()).add_(1e-3)

    monkeypatch.setattr(Call, "under", marking)
    found = check._refused(model, check._row(model))
    assert "other logits after an edit was taken back" in found["edits"]
    monkeypatch.undo()
    assert check._refused(model, check._row(model)) == {}


def test_a_model_whose_edits_are_refused_says_so_wherever_they_are_asked_for(random_gpt2):
    model = dataclasses.replace(random_gpt2, refused={"edits": "'random-gpt2' does not: no intervention acts"})
    with pytest.raises(UserError, match="no intervention acts"):
        model.logits(np.array([[0, 5]]), [Edit(Head.at(0, 0), "z", lambda old, rows: old)])
    assert model.logits(np.array([[0, 5]])).shape[:2] == (1, 2)


# --- the checked row ---


class Configuration(SimpleNamespace):
    def to_dict(self):
        return vars(self)


def row_length(model, monkeypatch, context: int = 64, **named) -> int:
    """How long the checked row is where the configuration names these, and the context is so long."""
    config = Configuration(**named)
    network = SimpleNamespace(config=config)
    fake = SimpleNamespace(
        door=SimpleNamespace(network=network), context=context, n_heads=model.n_heads, ordinary=model.ordinary,
        bos=model.bos, name="fake",
    )  # fmt: skip
    row = check._row(fake)
    assert row[0, 0] == model.bos and set(row[0, 1:]) <= set(model.ordinary())
    return row.shape[1]


@pytest.mark.parametrize(
    ("named", "beyond"),
    [
        ({}, 0),
        ({"sliding_window": 500}, 500),
        ({"window_size": 300, "sliding_window": 200}, 300),
        ({"attention_chunk_size": 700}, 700),
        ({"local_attention": 600}, 600),
        ({"block_size": 400}, 400),
        ({"text_config": Configuration(sliding_window=500)}, 500),
        ({"text_config": Configuration(inner=Configuration(sliding_window=450))}, 450),
    ],
    ids=str,
)
def test_the_checked_row_is_longer_than_every_window_that_is_named(random_gpt2, monkeypatch, named, beyond):
    length = row_length(random_gpt2, monkeypatch, context=2000, **named)
    assert length > beyond and length >= check.LEAST_CHECKED
    assert length <= max(check.LEAST_CHECKED, beyond + 50), "no longer than is needed"


@pytest.mark.parametrize(
    "named",
    [{"sliding_window": None}, {"sliding_window": 4096}, {"use_sliding_window": True}, {"hidden_size": 900}],
    ids=str,
)
def test_what_is_no_window_within_the_context_makes_no_row_longer(random_gpt2, monkeypatch, named):
    assert row_length(random_gpt2, monkeypatch, context=2000, **named) == check.LEAST_CHECKED


def test_the_row_is_no_longer_than_context_and_memory_allow(random_gpt2, monkeypatch):
    assert row_length(random_gpt2, monkeypatch, context=16) == 16
    assert row_length(random_gpt2, monkeypatch, context=2000, sliding_window=1996) == 2000
    monkeypatch.setattr(check, "MOST_CELLS", 4 * 100**2)
    assert row_length(random_gpt2, monkeypatch, context=2000, sliding_window=500) == 100


def test_the_row_of_a_real_window_goes_beyond_it(of_family, tmp_path, tokenizer):
    model = load(str(save_with_window("mistral", tmp_path, tokenizer)))
    assert check._row(model).shape[1] > LONG_WINDOW
    assert [value for _, _, value in check._periods(model.door.network.config)] == [LONG_WINDOW]


@pytest.mark.parametrize("forgets", [False, True])
def test_a_window_of_thousands_is_checked_on_a_short_row(tmp_path, tokenizer, monkeypatch, forgets):
    """A row of 4,104 tokens would take minutes on a real model; the window is made short in both for the check."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.MistralConfig(
        vocab_size=len(tokenizer), num_key_value_heads=2, initializer_range=0.5, sliding_window=4096, **shape
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    lengths = []
    monkeypatch.setattr(check, "_compare", lambda model, tokens, own, then=check._compare: (
        lengths.append(tokens.shape[1]), then(model, tokens, own)))  # fmt: skip
    if forgets:
        own = Call.__init__
        monkeypatch.setattr(Call, "__init__", lambda self, module, q, k, v, mask, **given: own(
            self, module, q, k, v, None, **{**given, "causal": True}))  # fmt: skip
        with pytest.raises(UserError, match="fails the self-check"):
            load(str(tmp_path))
    else:
        model = load(str(tmp_path))
        assert model.door.network.config.sliding_window == model.bridge.original_model.config.sliding_window == 4096
    assert check.SHORT < lengths[0] < 100


def test_a_vocabulary_of_special_tokens_alone_is_said(random_gpt2, monkeypatch):
    monkeypatch.setattr(type(random_gpt2), "ordinary", lambda model: np.array([], dtype=np.int64))
    with pytest.raises(UserError, match="special tokens alone"):
        check.checked(random_gpt2)
