"""Scores as sums over sources: against the models themselves, and against the definition."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from common import UserError
from common.circuits import decomposition, maps
from common.circuits.maps import Interaction, interact
from common.heads.tokens import TokenBatch
from common.loading import Model, load
from common.loading.families import UNCHANGED, Norm, plain
from tests import architectures
from tests.architectures import HEADS, LAYERS

EVERY = sorted(architectures.CONFIGS | architectures.FURTHER)
TOKENS = np.array([[0, 5, 9, 700, 41, 5, 9, 700, 33, 41, 1900, 5, 9], [0, 8, 8, 3, 77, 1200, 8, 3, 8, 77, 6, 1200, 2]])


def decompose(model: Model, tokens: np.ndarray, met: Interaction, head: int, cells: list):
    return decomposition.decompose(model, tokens, met, [head], cells)[head]


def sources_of(model: Model, layer: int) -> dict[str, np.ndarray]:
    return dict(decomposition.written(model, TOKENS[0], layer))


def shown_by(model: Model, *names: str) -> dict[str, np.ndarray]:
    """What hook points show of row 0, in a run of the whole model."""
    seen = {}
    hooks = [(name, lambda value, hook, name=name: seen.__setitem__(name, plain(value[0]))) for name in names]
    with torch.inference_mode(), model.bridge.hooks(fwd_hooks=hooks):
        model.bridge.original_model(torch.from_numpy(TOKENS[:1]))
    return seen


@pytest.mark.parametrize("name", EVERY)
def test_scores_are_the_sum_of_their_parts(name, model_of):
    cells = [(12, 2), (8, 7), (9, 9), (5, 0)]
    for layer in range(LAYERS):
        met = interact(model_of(name), TOKENS[:1], layer)
        for head in range(HEADS):
            found = decompose(model_of(name), TOKENS[0], met, head, cells)
            assert found.error < 1e-5
            expected = np.mean([met.products[0, head, query, key] for query, key in cells])
            assert found.raw.sum() == pytest.approx(expected, abs=1e-5)
            assert found.score == pytest.approx(expected)
            assert found.terms.sum() == pytest.approx(found.score_advantage, abs=1e-5)


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


def test_a_head_writes_what_its_own_weights_write(folder_of, model_of):
    """Against the weights in the file: the bridge's view of them may be transposed or regrouped."""
    reference = AutoModelForCausalLM.from_pretrained(folder_of("llama"), attn_implementation="eager").eval()
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


def test_terms_are_what_the_definition_says(folder_of, model_of):
    """GPT-2 from its state dict, term by term, with the scale of the layer norm frozen."""
    model, layer, head = model_of("gpt2"), 1, 2
    weights = {key: value.double().numpy() for key, value in AutoModelForCausalLM.from_pretrained(
        folder_of("gpt2")).transformer.h[layer].state_dict().items()}  # fmt: skip
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
    met = interact(model, TOKENS[:1], layer)
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
def test_parts_that_a_side_reads_sum_to_what_it_reads(centred, norms):
    rng = np.random.default_rng(0)
    norm = {d: Norm(rng.standard_normal(d), rng.standard_normal(d), centred, 1e-5) for d in (6, 4)}
    before, after = (norm[d] if there else UNCHANGED for d, there in zip((6, 4), norms, strict=True))
    side = decomposition.Side(before, rng.standard_normal((6, 4)), rng.standard_normal(4), after)
    written = rng.standard_normal((3, 5, 6))
    through = before.linear(written)
    parts = side.read_parts(written.sum(0), through @ side.weight)
    assert parts.sum(0) == pytest.approx(side.read(written.sum(0)))


def test_a_window_bounds_the_keys_a_cell_is_compared_with(model_of):
    met = interact(model_of("gemma2"), TOKENS[:1], 0)
    found = decompose(model_of("gemma2"), TOKENS[0], met, 1, [(12, 10)])
    products = met.products[0, 1, 12]
    assert found.score_advantage == pytest.approx(products[10] - np.mean(products[[8, 9, 11, 12]]))


def test_without_cells_those_with_most_attention_are_taken(model_of):
    met = interact(model_of("gpt2"), TOKENS[:1], 1)
    found = decompose(model_of("gpt2"), TOKENS[0], met, 0, [])
    assert found.kind == "cells with most attention"
    pattern = met.pattern[0, 0]
    best = sorted((max((pattern[q, k], q, k) for k in range(1, q + 1)) for q in range(2, 13)), reverse=True)[:3]
    assert list(found.cells) == [(q, k) for _, q, k in best]


def test_a_score_advantage_by_hand_leaves_bos_out_and_a_lonely_cell_has_none():
    products = np.array([[5.0, 0, 0, 0], [5.0, 1.0, 0, 0], [5.0, 2.0, 4.0, 0], [7.0, 3.0, 1.0, 2.0]])
    visible = np.tri(4, dtype=bool)
    query, key = np.array([3, 3, 2, 1]), np.array([1, 2, 2, 1])
    # query 3 has two cells, which leave each other out; query 1 sees BOS and itself alone
    expected = [3 - 2, 1 - 2, 4 - 2, np.nan]
    assert decomposition.score_advantages(products, visible, query, key) == pytest.approx(expected, nan_ok=True)


def test_a_cell_alone_is_counted_and_left_out_of_the_mean(model_of):
    model = model_of("gpt2")
    met = interact(model, TOKENS[:1], 1)
    both, one = (decompose(model, TOKENS[0], met, 2, cells) for cells in ([(12, 2), (1, 1)], [(12, 2)]))
    assert (both.alone, one.alone) == (1, 0) and both.score_advantage == pytest.approx(one.score_advantage)
    assert both.terms == pytest.approx(one.terms) and both.error < 1e-5 and both.score != one.score
    products = met.products[0, 2]
    assert one.over_bos == pytest.approx(products[12, 2] - products[12, 0])
    assert both.over_bos == pytest.approx(np.mean([products[12, 2] - products[12, 0], products[1, 1] - products[1, 0]]))
    assert "BOS left out (over BOS:" in one.advantage() and "1 cell has no other token in sight" in both.advantage()
    assert both.record(3)["cells_without_advantage"] == 1 and "alone" not in one.advantage()
    with pytest.raises(UserError, match="no score advantage of head 1.2"):
        decompose(model, TOKENS[0], met, 2, [(1, 1)])


def test_a_window_that_hides_bos_gives_no_advantage_over_it(model_of):
    met = interact(model_of("gemma2"), TOKENS[:1], 0)
    found = decompose(model_of("gemma2"), TOKENS[0], met, 1, [(12, 10)])
    assert found.over_bos is None and "BOS is out of sight" in found.advantage()


def test_cells_of_a_text_without_induction_are_called_so(model_of):
    met = interact(model_of("gpt2"), TOKENS[:1], 1)
    titles = [decompose(model_of("gpt2"), TOKENS[0], met, 0, cells).title("1.0") for cells in ([], [(12, 2)])]
    assert "no induction cell here: cells with most attention" in titles[0] and "no induction" not in titles[1]


def test_largest_cells_lie_in_sight_and_off_bos():
    pattern = np.zeros((4, 4))
    pattern[:, 0] = 1.0
    assert decomposition.largest_cells(pattern, 9) == [(2, 1), (3, 1)]
    pattern[3, 2], pattern[2, 3] = 0.1, 0.9
    assert decomposition.largest_cells(pattern, 1) == [(3, 2)]


@pytest.mark.parametrize("lost", ["embed", "0.1", "mlp0"])
def test_parts_that_do_not_add_up_are_refused(lost, model_of, monkeypatch):
    met = interact(model_of("llama"), TOKENS[:1], 1)
    written = decomposition.written
    monkeypatch.setattr(decomposition, "written", lambda *args: (pair for pair in written(*args) if pair[0] != lost))
    with pytest.raises(UserError, match=r"parts of head 1\.0 of random-llama do not add up"):
        decompose(model_of("llama"), TOKENS[0], met, 0, [(12, 2)])


def test_heads_that_do_not_add_up_are_refused(model_of, monkeypatch):
    real = decomposition.plain
    spoiled = model_of("gpt2").bridge.blocks[0].attn.W_O
    monkeypatch.setattr(decomposition, "plain", lambda value: real(value) * (2 if value.shape == spoiled.shape else 1))
    with pytest.raises(UserError, match="heads of layer 0 of random-gpt2 do not add up"):
        sources_of(model_of("gpt2"), 1)


def test_mlp0_of_a_token_is_its_mean_over_contexts(model_of):
    """The part of MLP 0 that is the token's: equal at equal tokens, and nearer to what it writes than nothing is."""
    model = model_of("llama")
    token = decomposition.mean_first_mlp(model, TOKENS[0])
    assert token[1] == pytest.approx(token[5]) and token[1] == pytest.approx(token[11])
    shown = shown_by(model, "blocks.0.hook_mlp_out", "blocks.0.hook_resid_pre")
    wrote = shown["blocks.0.hook_mlp_out"]
    assert np.linalg.norm(wrote - token) < 0.9 * np.linalg.norm(wrote)
    found = sources_of(model, 1)
    assert found["embed"] == pytest.approx(shown["blocks.0.hook_resid_pre"] + token, abs=1e-5)
    made = decomposition.through_first_mlp(model, TOKENS[0])
    rest = wrote - made.sum(0)
    assert found["embed"] + found["mlp0"] == pytest.approx(shown["blocks.0.hook_resid_pre"] + rest, abs=1e-4)


def test_mlp0_of_a_head_is_what_is_missed_without_it(model_of):
    """Against transformers alone: MLP 0 with and without what one head added to the stream that it reads."""
    model = model_of("gpt2")
    made = decomposition.through_first_mlp(model, TOKENS[0])
    hf = model.bridge.original_model
    shown = shown_by(model, "blocks.0.attn.hook_z", "blocks.0.hook_resid_mid")
    block = hf.transformer.h[0]
    norm, mlp = (getattr(part, "original_component", part) for part in (block.ln_2, block.mlp))
    with torch.no_grad():
        for head in range(model.n_heads):
            wrote = shown["blocks.0.attn.hook_z"][:, head] @ plain(model.bridge.blocks[0].attn.W_O[head])
            streams = [shown["blocks.0.hook_resid_mid"], shown["blocks.0.hook_resid_mid"] - wrote]
            with_it, without = (plain(mlp(norm(torch.from_numpy(one).float()[None])))[0] for one in streams)
            assert made[head] == pytest.approx(with_it - without, abs=1e-4)
    parallel = decomposition.through_first_mlp(model_of("neox"), TOKENS[0])
    assert np.abs(parallel).max() < 1e-5, "an MLP beside the heads does not see them"


def test_16_bit_sums_hold_at_their_own_tolerance(mini):
    model = load("mini", dtype="bfloat16")
    found = decompose(model, TOKENS[0], interact(model, TOKENS[:1], 1), 0, [(6, 3)])
    assert 1e-6 < found.error < decomposition.SUM_ERRORS[1]
    exact = decompose(mini, TOKENS[0], interact(mini, TOKENS[:1], 1), 0, [(6, 3)])
    assert exact.error < 1e-5


@pytest.mark.parametrize("seed", range(4))
def test_a_hand_set_induction_head_reads_embed_times_previous_token_head(seed, tmp_path, tokenizer):
    sender, receiver = seed % 2, seed // 2
    model = load(str(architectures.save_induction(tmp_path / "set", tokenizer, sender, receiver, seed=seed)))
    row = np.concatenate([[model.bos], np.random.default_rng(seed).permutation(np.arange(300, 308))])
    tokens = np.concatenate([row, row[1:]])
    induction = TokenBatch.of([tokens], pad=model.bos).cells["prefix_matching"]
    cells = list(zip(induction.query.tolist(), induction.key.tolist(), strict=True))
    met = interact(model, tokens[None], 1)
    assert np.mean([met.pattern[0, receiver, query, key] for query, key in cells]) > 0.8
    for chosen in (cells, cells[:1], cells[-1:]):
        found = decompose(model, tokens, met, receiver, chosen)
        assert found.top(1)[0][:2] == ("embed", f"0.{sender}")
        assert found.top(1)[0][2] > 0.8 * found.score_advantage
    other = decompose(model, tokens, met, 1 - receiver, cells)
    assert abs(other.top(1)[0][2]) < 0.1 * found.score_advantage


def test_the_induction_heads_of_mini_read_the_previous_token_head(mini):
    """With the heads that its own labels and patterns name, whatever their numbers."""
    from common.heads import labels
    from common.heads.tokens import battery

    rows = battery(mini.ordinary(), mini.bos, rows=8, length=64, seed=0).repeats
    patterns = np.stack([interact(mini, rows.tokens, layer).pattern for layer in range(mini.n_layers)])

    def mean(cells) -> np.ndarray:
        return patterns[:, cells.row, :, cells.query, cells.key].mean(0)

    previous = np.unravel_index(int(np.argmax(mean(rows.cells["previous_token"]))), (mini.n_layers, mini.n_heads))
    known = labels.read_labels(mini.labels_file, mini.n_layers, mini.n_heads)
    matching = mean(rows.cells["prefix_matching"])
    layer, head = max((head.place for head in known.heads), key=lambda at: matching[at])
    tokens = mini.encode("the quick brown fox jumps the quick brown fox jumps")
    induction = TokenBatch.of([tokens], pad=mini.bos).cells["prefix_matching"]
    cells = list(zip(induction.query.tolist(), induction.key.tolist(), strict=True))
    found = decompose(mini, tokens, interact(mini, tokens[None], layer), head, cells)
    assert found.top(1)[0][:2] == ("embed", f"{previous[0]}.{previous[1]}")


def faulty_rotation(rotation, fault: str):
    if fault == "rotation skipped":
        return None
    if fault == "the whole head rotated":
        return dataclasses.replace(rotation, cos=np.tile(rotation.cos, 2), sin=np.tile(rotation.sin, 2))
    return dataclasses.replace(rotation, interleaved=not rotation.interleaved)


@pytest.mark.parametrize(("fault", "name"), [
    *(("rotation skipped", name) for name in ("neox", "llama", "gemma3", "phi", "gptj")),
    *(("other dimensions paired", name) for name in ("neox", "llama", "gptj")),
    ("the whole head rotated", "neox"),
])  # fmt: skip
def test_a_wrong_rotation_is_refused(fault, name, model_of):
    met = interact(model_of(name), TOKENS[:1], 1)
    rules = dataclasses.replace(met.rules, rotation=faulty_rotation(met.rules.rotation, fault))
    with pytest.raises(UserError, match=rf"parts of head 1\.1 of random-{name} do not add up"):
        decompose(model_of(name), TOKENS[0], dataclasses.replace(met, rules=rules), 1, [(12, 2)])


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_a_query_key_norm_left_out_is_refused(name, model_of, monkeypatch):
    sides_of = decomposition.sides_of
    monkeypatch.setattr(
        decomposition, "sides_of",
        lambda *given: tuple(dataclasses.replace(side, after=UNCHANGED) for side in sides_of(*given)),
    )  # fmt: skip
    with pytest.raises(UserError, match=rf"parts of head 1\.1 of random-{name} do not add up"):
        decompose(model_of(name), TOKENS[0], interact(model_of(name), TOKENS[:1], 1), 1, [(12, 2)])


def test_the_scale_that_opt_puts_into_its_queries_is_not_forgotten(model_of, monkeypatch):
    monkeypatch.setattr(maps, "_within", lambda call: 1.0)
    met = interact(model_of("opt"), TOKENS[:1], 1)
    with pytest.raises(UserError, match=r"parts of head 1\.1 of random-opt do not add up"):
        decompose(model_of("opt"), TOKENS[0], met, 1, [(12, 2)])


def test_no_hook_is_left_behind(model_of):
    model = model_of("neox")
    decomposition.split_heads(model, TOKENS[0], 2, [1], interact(model, TOKENS[:1], 2).rules)
    for module in model.door.network.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks


def test_the_repr_fits_a_screen(model_of):
    met = interact(model_of("gpt2"), TOKENS[:1], 1)
    assert len(repr(met)) < 120 and "layer=1" in repr(met)
    assert len(repr(decompose(model_of("gpt2"), TOKENS[0], met, 0, [(12, 2)]))) < 240
