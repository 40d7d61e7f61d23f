"""Maps of queries and keys against the models themselves, on every architecture; sums against their definition."""

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
from common.circuits import qk
from common.heads.tokens import TokenBatch
from common.loading import models
from tests import architectures
from tests.architectures import HEADS, LAYERS, WINDOW


def decompose(model: models.Model, tokens: np.ndarray, met: qk.Interaction, head: int, cells: list) -> qk.Decomposition:
    return qk.decompose(model, tokens, met, [head], cells)[head]


EVERY = sorted(architectures.CONFIGS)
TOKENS = np.array([[0, 5, 9, 700, 41, 5, 9, 700, 33, 41, 1900, 5, 9], [0, 8, 8, 3, 77, 1200, 8, 3, 8, 77, 6, 1200, 2]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """Folder of a random model of each architecture, made when it is first asked for."""
    root, made = tmp_path_factory.mktemp("architectures"), {}

    def folder(name: str):
        if name not in made:
            made[name] = architectures.save(name, root / f"random-{name}", tokenizer)
        return made[name]

    return folder


@pytest.fixture(scope="module")
def model_of(folders):
    loaded = {}

    def model(name: str) -> models.Model:
        if name not in loaded:
            loaded[name] = models.load(str(folders(name)))
        return loaded[name]

    return model


def visible(name: str, layer: int, pos: int) -> np.ndarray:
    """[query, key], from the configurations of the test models: causal, and a window in Gemma's outer layers."""
    distance = np.arange(pos)[:, None] - np.arange(pos)
    windowed = name.startswith("gemma") and layer != 1
    return (distance >= 0) & (distance < WINDOW if windowed else True)


@pytest.mark.parametrize("name", EVERY)
def test_maps_are_those_of_the_unwrapped_model(name, folders, model_of):
    reference = AutoModelForCausalLM.from_pretrained(folders(name), attn_implementation="eager").eval()
    with torch.no_grad():
        theirs = reference(torch.from_numpy(TOKENS), output_attentions=True).attentions
    for layer in range(LAYERS):
        met = qk.interact(model_of(name), TOKENS, layer)
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
        met = qk.interact(model_of(name), TOKENS, layer)
        assert met.q.shape == met.k.shape == (*TOKENS.shape, HEADS, met.q.shape[-1])
        assert met.check.max_abs_error < 1e-5
        assert (met.check.scores is None) == (name == "opt")  # this wrapper shows its pattern in place of its scores
        assert met.pattern[:, :, 6:, 1:].max() > 0.3


def without_hooks(monkeypatch, *ends: str) -> None:
    monkeypatch.setattr(qk, "_HOOKS", tuple(hook for hook in qk._HOOKS if not hook.startswith(ends)))


def with_rules(monkeypatch, **changed) -> None:
    rules = qk._rules
    monkeypatch.setattr(qk, "_rules", lambda *arguments: dataclasses.replace(rules(*arguments), **changed))


FAULTS = {
    "queries and keys exchanged": (EVERY, lambda patch: patch.setattr(
        qk, "dot_products", lambda q, k: np.einsum("bqhd,bkhd->bhkq", q, k))),
    "scale left out": (EVERY, lambda patch: patch.setattr(qk, "_scale", lambda module, d_head: 1.0)),
    "rotation skipped": (["neox", "llama", "gemma3"], lambda patch: (
        without_hooks(patch, "hook_rot"), patch.setattr(qk, "rotate", lambda vectors, cos, sin: vectors))),
    "the whole head rotated": (["neox"], lambda patch: patch.setattr(
        qk, "rotate", lambda vectors, cos, sin, right=qk.rotate: right(
            vectors, np.concatenate([cos, cos], -1), np.concatenate([sin, sin], -1)))),
    "key heads misgrouped": (["llama", "qwen3", "gemma2"], lambda patch: patch.setattr(
        qk, "repeat_keys", lambda k, n_heads: np.tile(k, (1, 1, n_heads // k.shape[2], 1)))),
    "query-key norm skipped": (["qwen3", "gemma3"], lambda patch: without_hooks(patch, "hook_rot")),
    "soft-cap left out": (["gemma2"], lambda patch: with_rules(patch, softcap=None)),
    "ALiBi left out": (["bloom"], lambda patch: patch.setattr(qk, "_position_bias", lambda *arguments: None)),
    "sliding window left out": (["gemma2", "gemma3"], lambda patch: patch.setattr(
        qk, "_visible", lambda mask, batch, pos: np.tril(np.ones((batch, pos, pos), dtype=bool)))),
}  # fmt: skip


@pytest.mark.parametrize(("fault", "name"), [(fault, name) for fault, (names, _) in FAULTS.items() for name in names])
def test_a_map_that_is_wrong_stops_the_run(fault, name, model_of, monkeypatch):
    FAULTS[fault][1](monkeypatch)
    with pytest.raises(UserError, match=r"layer 0 of random-\w+ is not reproduced: head 0\.\d, query \d+, key \d+"):
        qk.interact(model_of(name), TOKENS, 0)


@pytest.mark.parametrize("name", EVERY)
def test_head_by_head_labelled_with_tokens_stops_the_run(name, model_of, monkeypatch):
    """The best-known wrong map: it passes for query × key where a text has as many tokens as the layer has heads."""
    monkeypatch.setattr(qk, "dot_products", lambda q, k: np.einsum("bhqd,bhkd->bhqk", q, k))
    with pytest.raises(UserError, match="is not reproduced"):
        qk.interact(model_of(name), TOKENS[:, :HEADS], 0)


def test_our_own_rotation_is_the_models(model_of, monkeypatch):
    expected = qk.interact(model_of("llama"), TOKENS, 1)
    without_hooks(monkeypatch, "hook_rot")
    assert qk.interact(model_of("llama"), TOKENS, 1).q == pytest.approx(expected.q, abs=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_have_a_tolerance_of_their_own_and_still_show_a_fault(dtype, monkeypatch):
    model = models.load("mini", dtype=dtype)
    met = qk.interact(model, TOKENS, 1)
    assert 1e-4 < met.check.max_abs_error < 0.3 and met.check.pattern < 0.05
    monkeypatch.setattr(qk, "_scale", lambda module, d_head: 1.0)
    with pytest.raises(UserError, match="is not reproduced"):
        qk.interact(model, TOKENS, 1)


def test_large_scores_are_allowed_the_rounding_of_their_own_size():
    q = np.full((1, 2, 1, 4), 1000.0)
    assert qk._allowed(q / 1000, q / 1000, 0.5, torch.float32) == qk.SCORE_ERROR
    assert qk._allowed(q, q, 0.5, torch.float32) == pytest.approx(8 * 2**-23 * 2e6)


def test_the_error_says_by_how_much_and_where(model_of, monkeypatch):
    met = qk.interact(model_of("gpt2"), TOKENS, 1)
    products = qk.dot_products

    def spoiled(q, k):
        right = products(q, k)
        right[1, 2, 9, 4] += 0.01 / met.rules.scale
        return right

    monkeypatch.setattr(qk, "dot_products", spoiled)
    with pytest.raises(UserError, match=r"head 1\.2, query 9, key 4 .* \(off by 0\.00?\d+, allowed 0\.0001\)"):
        qk.interact(model_of("gpt2"), TOKENS, 1)


def test_what_does_not_exist_is_named(model_of):
    with pytest.raises(UserError, match="has no layer 3: its layers are 0 to 2"):
        qk.check_exists(model_of("gpt2"), 3, None)
    with pytest.raises(UserError, match="has no head 4 in a layer: its heads are 0 to 3"):
        qk.check_exists(model_of("gpt2"), None, 4)
    qk.check_exists(model_of("gpt2"), 2, 3)


def test_a_layer_without_attention_is_named(model_of, monkeypatch):
    model = model_of("gpt2")
    blocks = [model.bridge.blocks[0], object(), model.bridge.blocks[2]]
    stand_in = dataclasses.replace(model, bridge=type("Bridge", (), {"blocks": blocks})())
    with pytest.raises(UserError, match=r"layer 1 of random-gpt2 has no attention; those that have: \[0, 2\]"):
        qk.interact(stand_in, TOKENS, 1)


def test_no_hook_is_left_behind(model_of):
    model = model_of("neox")
    qk.interact(model, TOKENS, 1)
    qk.parts(model, TOKENS[0], 2, [1], qk.interact(model, TOKENS[:1], 2).rules)
    assert not any(point.fwd_hooks for point in model.bridge.hook_dict.values())
    assert not model.bridge.blocks[1].attn._forward_pre_hooks


def test_q_and_k_are_written_to_a_file(model_of, tmp_path):
    met = qk.interact(model_of("llama"), TOKENS[:1], 1)
    qk.export(met, TOKENS[0], tmp_path / "qk.safetensors")
    read = load_file(tmp_path / "qk.safetensors")
    scores = np.einsum("qhd,khd->hqk", read["q"], read["k"]) * met.rules.scale
    assert scores == pytest.approx(met.scores[0], abs=1e-4)
    assert read["tokens"].tolist() == TOKENS[0].tolist()


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 5), st.integers(0, 10**6))
def test_rotated_products_depend_on_the_distance_alone(query, key, later, seed):
    q, k = np.random.default_rng(seed).standard_normal((2, 8))
    angle = np.arange(40)[:, None] * np.array([1.0, 0.1, 1.0, 0.1])

    def product(at: int, of: int) -> float:
        turned = (qk.rotate(x[None], np.cos(angle[p : p + 1]), np.sin(angle[p : p + 1])) for x, p in ((q, at), (k, of)))
        return float(np.sum(next(turned) * next(turned)))

    assert product(query + later, key + later) == pytest.approx(product(query, key), abs=1e-9)


# --- decomposition ---


def sources_of(model: models.Model, layer: int) -> dict[str, np.ndarray]:
    return dict(qk.written(model, TOKENS[0], layer))


def shown_by(model: models.Model, *names: str) -> dict[str, np.ndarray]:
    """What hook points show of row 0, in a run of the whole model."""
    seen = {}
    hooks = [(name, lambda value, hook, name=name: seen.__setitem__(name, qk.plain(value[0]))) for name in names]
    with torch.inference_mode(), model.bridge.hooks(fwd_hooks=hooks):
        model.bridge.original_model(torch.from_numpy(TOKENS[:1]))
    return seen


@pytest.mark.parametrize("name", EVERY)
def test_scores_are_the_sum_of_their_parts(name, model_of):
    cells = [(12, 2), (8, 7), (9, 9), (5, 0)]
    for layer in range(LAYERS):
        met = qk.interact(model_of(name), TOKENS[:1], layer)
        for head in range(HEADS):
            found = decompose(model_of(name), TOKENS[0], met, head, cells)
            assert found.error < 1e-5
            expected = np.mean([met.products[0, head, query, key] for query, key in cells])
            assert found.raw.sum() == pytest.approx(expected, abs=1e-5)
            assert found.score == pytest.approx(expected)
            assert found.terms.sum() == pytest.approx(found.lead, abs=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_sources_sum_to_the_residual_stream_and_bear_their_names(name, model_of):
    model = model_of(name)
    found = sources_of(model, 2)
    heads = [f"{layer}.{head}" for layer in range(2) for head in range(HEADS)]
    positions = ["pos_embed"] if name in ("gpt2", "opt") else []
    assert set(found) == {"embed", *positions, *heads, "mlp0", "mlp1", "bias"}
    stream = shown_by(model, "blocks.2.hook_resid_pre", "blocks.1.hook_mlp_out", "blocks.0.hook_resid_pre")
    assert sum(found.values()) == pytest.approx(stream["blocks.2.hook_resid_pre"], abs=1e-4)
    if name != "bloom":  # its MLP adds the residual stream to what it shows
        assert found["mlp1"] == pytest.approx(stream["blocks.1.hook_mlp_out"], abs=1e-4)
    first = sources_of(model, 0)
    assert set(first) == {"embed", *positions, "bias"}
    assert sum(first.values()) == pytest.approx(stream["blocks.0.hook_resid_pre"], abs=1e-5)


def test_a_head_writes_what_its_own_weights_write(folders, model_of):
    """Against the weights in the file: the bridge's view of them may be transposed or regrouped."""
    reference = AutoModelForCausalLM.from_pretrained(folders("llama"), attn_implementation="eager").eval()
    captured = {}
    projection = reference.model.layers[1].self_attn.o_proj
    projection.register_forward_pre_hook(lambda module, inputs: captured.update(z=inputs[0][0].double().numpy()))
    with torch.no_grad():
        reference(torch.from_numpy(TOKENS[:1]))
    weight = projection.weight.detach().double().numpy()
    found = sources_of(model_of("llama"), 2)
    for head in range(HEADS):
        own = slice(head * 8, head * 8 + 8)
        assert found[f"1.{head}"] == pytest.approx(captured["z"][:, own] @ weight[:, own].T, abs=1e-5)


def test_terms_are_what_the_definition_says(folders, model_of):
    """GPT-2 from its state dict, term by term, with the scale of the layer norm frozen."""
    model, layer, head = model_of("gpt2"), 1, 2
    weights = {key: value.double().numpy() for key, value in AutoModelForCausalLM.from_pretrained(
        folders("gpt2")).transformer.h[layer].state_dict().items()}  # fmt: skip
    found = sources_of(model, layer)
    stream = sum(found.values())
    scale = np.sqrt(stream.var(-1, keepdims=True) + 1e-5)
    columns = {"q": slice(head * 8, head * 8 + 8), "k": slice(32 + head * 8, 32 + head * 8 + 8)}
    parts = {side: {} for side in columns}
    for side, own in columns.items():
        matrix, bias = weights["attn.c_attn.weight"][:, own], weights["attn.c_attn.bias"][own]
        for source, wrote in found.items():
            centred = (wrote - wrote.mean(-1, keepdims=True)) / scale
            parts[side][source] = (centred * weights["ln_1.weight"]) @ matrix
        parts[side]["bias"] = parts[side]["bias"] + weights["ln_1.bias"] @ matrix + bias
    cells = [(12, 2), (7, 5), (12, 6)]
    met = qk.interact(model, TOKENS[:1], layer)
    ours = decompose(model, TOKENS[0], met, head, cells)
    for row, by in enumerate(ours.sources):
        for column, of in enumerate(ours.sources):
            raw, lead = [], []
            for query, key in cells:
                others = [place for place in range(1, query + 1) if (query, place) not in cells]
                product = [float(parts["q"][by][query] @ parts["k"][of][place]) / np.sqrt(8) for place in range(13)]
                raw.append(product[key])
                lead.append(product[key] - np.mean([product[place] for place in others]))
            assert ours.raw[row, column] == pytest.approx(np.mean(raw), abs=1e-5)
            assert ours.terms[row, column] == pytest.approx(np.mean(lead), abs=1e-5)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("norms", [(True, True), (True, False), (False, True), (False, False)])
def test_parts_that_a_reader_reads_sum_to_what_it_reads(centred, norms):
    rng = np.random.default_rng(0)
    norm = {d: qk.Norm(rng.standard_normal(d), rng.standard_normal(d), centred, 1e-5) for d in (6, 4)}
    before, after = (norm[d] if there else None for d, there in zip((6, 4), norms, strict=True))
    reader = qk.Reader(before, rng.standard_normal((6, 4)), rng.standard_normal(4), after)
    written = rng.standard_normal((3, 5, 6))
    through = (before or qk.UNCHANGED).linear(written)
    parts = reader.read_parts(written.sum(0), through @ reader.weight)
    assert parts.sum(0) == pytest.approx(reader.read(written.sum(0)))


def test_a_window_bounds_the_keys_a_cell_is_compared_with(model_of):
    met = qk.interact(model_of("gemma2"), TOKENS[:1], 0)
    found = decompose(model_of("gemma2"), TOKENS[0], met, 1, [(12, 10)])
    products = met.products[0, 1, 12]
    assert found.lead == pytest.approx(products[10] - np.mean(products[[8, 9, 11, 12]]))


def test_without_cells_those_with_most_attention_are_taken(model_of):
    met = qk.interact(model_of("gpt2"), TOKENS[:1], 1)
    found = decompose(model_of("gpt2"), TOKENS[0], met, 0, [])
    assert found.kind == "cells with most attention"
    pattern = met.pattern[0, 0]
    best = sorted(((pattern[q, k], q, k) for q in range(2, 13) for k in range(1, q + 1)), reverse=True)[:3]
    assert list(found.cells) == [(q, k) for _, q, k in best]


def test_largest_cells_lie_in_sight_and_off_bos():
    pattern = np.zeros((4, 4))
    pattern[:, 0] = 1.0
    assert qk.largest_cells(pattern, 9) == [(2, 1), (2, 2), (3, 1), (3, 2), (3, 3)]
    pattern[3, 2], pattern[2, 3] = 0.1, 0.9
    assert qk.largest_cells(pattern, 1) == [(3, 2)]


@pytest.mark.parametrize("lost", ["embed", "0.1", "mlp0"])
def test_parts_that_do_not_add_up_are_refused(lost, model_of, monkeypatch):
    met = qk.interact(model_of("llama"), TOKENS[:1], 1)
    written = qk.written
    monkeypatch.setattr(qk, "written", lambda *args: (pair for pair in written(*args) if pair[0] != lost))
    with pytest.raises(UserError, match=r"parts of head 1\.0 of random-llama do not add up"):
        decompose(model_of("llama"), TOKENS[0], met, 0, [(12, 2)])


def test_heads_that_do_not_add_up_are_refused(model_of, monkeypatch):
    plain = qk.plain
    spoiled = model_of("gpt2").bridge.blocks[0].attn.W_O
    monkeypatch.setattr(qk, "plain", lambda value: plain(value) * (2 if value.shape == spoiled.shape else 1))
    with pytest.raises(UserError, match="heads of layer 0 of random-gpt2 do not add up"):
        sources_of(model_of("gpt2"), 1)


def test_mlp0_of_a_token_is_its_mean_over_contexts(model_of):
    """The part of MLP 0 that is the token's: equal at equal tokens, and nearer to what it writes than nothing is."""
    model = model_of("llama")
    token = qk.mean_first_mlp(model, TOKENS[0])
    assert token[1] == pytest.approx(token[5]) and token[1] == pytest.approx(token[11])
    shown = shown_by(model, "blocks.0.hook_mlp_out", "blocks.0.hook_resid_pre")
    wrote = shown["blocks.0.hook_mlp_out"]
    assert np.linalg.norm(wrote - token) < 0.9 * np.linalg.norm(wrote)
    found = sources_of(model, 1)
    assert found["embed"] == pytest.approx(shown["blocks.0.hook_resid_pre"] + token, abs=1e-5)
    made = qk.through_first_mlp(model, TOKENS[0])
    rest = wrote - made.sum(0)
    assert found["embed"] + found["mlp0"] == pytest.approx(shown["blocks.0.hook_resid_pre"] + rest, abs=1e-4)


def test_mlp0_of_a_head_is_what_is_missed_without_it(model_of):
    """Against transformers alone: MLP 0 with and without what one head added to the stream that it reads."""
    model = model_of("gpt2")
    made = qk.through_first_mlp(model, TOKENS[0])
    hf = model.bridge.original_model
    shown = shown_by(model, "blocks.0.attn.hook_z", "blocks.0.hook_resid_mid")
    block = hf.transformer.h[0]
    norm, mlp = (getattr(part, "original_component", part) for part in (block.ln_2, block.mlp))
    with torch.no_grad():
        for head in range(model.n_heads):
            wrote = shown["blocks.0.attn.hook_z"][:, head] @ qk.plain(model.bridge.blocks[0].attn.W_O[head])
            streams = [shown["blocks.0.hook_resid_mid"], shown["blocks.0.hook_resid_mid"] - wrote]
            with_it, without = (qk.plain(mlp(norm(torch.from_numpy(one).float()[None])))[0] for one in streams)
            assert made[head] == pytest.approx(with_it - without, abs=1e-4)
    parallel = qk.through_first_mlp(model_of("neox"), TOKENS[0])
    assert np.abs(parallel).max() < 1e-5, "an MLP beside the heads does not see them"


def test_16_bit_sums_hold_at_their_own_tolerance(mini):
    model = models.load("mini", dtype="bfloat16")
    found = decompose(model, TOKENS[0], qk.interact(model, TOKENS[:1], 1), 0, [(6, 3)])
    assert 1e-6 < found.error < qk.SUM_ERROR_16_BIT
    exact = decompose(mini, TOKENS[0], qk.interact(mini, TOKENS[:1], 1), 0, [(6, 3)])
    assert exact.error < 1e-5


@pytest.mark.parametrize("seed", range(4))
def test_a_hand_set_induction_head_reads_embed_times_previous_token_head(seed, tmp_path, tokenizer):
    sender, receiver = seed % 2, seed // 2
    model = models.load(str(architectures.save_induction(tmp_path / "set", tokenizer, sender, receiver, seed=seed)))
    row = np.concatenate([[model.bos], np.random.default_rng(seed).permutation(np.arange(300, 308))])
    tokens = np.concatenate([row, row[1:]])
    induction = TokenBatch.of([tokens], pad=model.bos).cells["prefix_matching"]
    cells = list(zip(induction.query.tolist(), induction.key.tolist(), strict=True))
    met = qk.interact(model, tokens[None], 1)
    assert np.mean([met.pattern[0, receiver, query, key] for query, key in cells]) > 0.8
    for chosen in (cells, cells[:1], cells[-1:]):
        found = decompose(model, tokens, met, receiver, chosen)
        assert found.top(1)[0][:2] == ("embed", f"0.{sender}")
        assert found.top(1)[0][2] > 0.8 * found.lead
    other = decompose(model, tokens, met, 1 - receiver, cells)
    assert abs(other.top(1)[0][2]) < 0.1 * found.lead


def test_the_induction_heads_of_mini_read_the_previous_token_head(mini):
    """With the heads that its own labels and patterns name, whatever their numbers."""
    from common.heads import labels, scores
    from common.heads.tokens import battery

    drawn = battery(mini.ordinary(), mini.bos, rows=8, length=64, seed=0)
    repeats = scores.score(mini, drawn.repeats, batch_size=8)
    previous = np.unravel_index(int(np.argmax(repeats.mean("previous_token"))), (mini.n_layers, mini.n_heads))
    known = labels.read_labels(mini.labels_file, mini.n_layers, mini.n_heads)
    layer, head = max((head.place for head in known.heads), key=lambda at: repeats.mean("prefix_matching")[at])
    tokens = mini.encode("the quick brown fox jumps the quick brown fox jumps")
    induction = TokenBatch.of([tokens], pad=mini.bos).cells["prefix_matching"]
    cells = list(zip(induction.query.tolist(), induction.key.tolist(), strict=True))
    found = decompose(mini, tokens, qk.interact(mini, tokens[None], layer), head, cells)
    assert found.top(1)[0][:2] == ("embed", f"{previous[0]}.{previous[1]}")
