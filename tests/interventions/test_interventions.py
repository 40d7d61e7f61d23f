"""Every intervention against a slow reference on three architectures, and the model as it was afterwards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPTJConfig, GPTJForCausalLM

from common import UserError
from common.heads.tokens import Cells, TokenBatch
from common.interventions import interventions
from common.interventions.edits import POINTS, Recordings, applied
from common.loading import models
from tests.oracle import ARCHITECTURES, Edits, assert_no_hooks, bridge_logits, every_kind, recorded

HEADS = [(0, 1), (1, 2), (1, 3)]


def of(heads, change):
    """`change(layer, head, row, value)` for the `heads` alone."""
    return lambda layer, head, row, value: change(layer, head, row, value) if (layer, head) in heads else value


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_reference_and_the_bridge_agree_without_an_intervention(loaded, oracles, drawn, name):
    tokens = drawn.repeats.tokens
    torch.testing.assert_close(bridge_logits(loaded[name], tokens), oracles[name].logits(tokens), atol=2e-5, rtol=1e-4)


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


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_zero_ablation(loaded, oracles, drawn, name):
    edits = Edits(z=of(HEADS, lambda layer, head, row, z: torch.zeros_like(z)))
    check(loaded[name], oracles[name], drawn, interventions.zero(HEADS), edits)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_mean_ablation_is_by_class_of_position(loaded, oracles, drawn, name):
    reference = oracles[name].record(drawn.controls.tokens)
    classes = interventions.position_classes(drawn.repeats)

    def mean(layer, head, row, z):
        def at(kind):
            places = [(r, p) for r, p in np.argwhere(classes == kind)]
            return sum(reference["z", layer, head, r][p] for r, p in places) / len(places)

        return torch.stack([at(kind) for kind in classes[row]])

    intervention = interventions.mean(HEADS, recorded(loaded[name], drawn.controls), classes, classes)
    check(loaded[name], oracles[name], drawn, intervention, Edits(z=of(HEADS, mean)))


def test_position_classes_tell_bos_targets_and_padding_apart():
    batch = TokenBatch.of([np.array([9, 5, 6, 5, 6]), np.array([9, 1])], pad=5)
    assert interventions.position_classes(batch).tolist() == [[0, 1, 1, 2, 2], [0, 1, -1, -1, -1]]


def test_a_class_without_a_reference_is_refused(random_gpt2, drawn):
    classes = interventions.position_classes(drawn.repeats)
    with pytest.raises(UserError, match="class 2"):
        interventions.mean(HEADS, recorded(random_gpt2, drawn.controls), np.minimum(classes, 1), classes)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_resampling_takes_another_control_row(loaded, oracles, drawn, name):
    reference = oracles[name].record(drawn.controls.tokens)
    donors = interventions.donor_rows(3, seed=5)
    edits = Edits(z=of(HEADS, lambda layer, head, row, z: reference["z", layer, head, donors[row]]))
    intervention = interventions.resample(HEADS, recorded(loaded[name], drawn.controls), seed=5)
    check(loaded[name], oracles[name], drawn, intervention, edits)


@given(rows=st.integers(2, 40), seed=st.integers(0, 2**32))
def test_no_row_is_its_own_donor_and_every_row_gives_once(rows, seed):
    donors = interventions.donor_rows(rows, seed)
    assert (donors != np.arange(rows)).all()
    assert sorted(donors) == list(range(rows))


def test_one_row_cannot_be_resampled():
    with pytest.raises(UserError, match="two rows"):
        interventions.donor_rows(1, seed=0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_uniform_pattern(loaded, oracles, drawn, name):
    def uniform(layer, head, row, pattern):
        seen = torch.ones_like(pattern).tril()
        return seen / seen.sum(-1, keepdim=True)

    check(loaded[name], oracles[name], drawn, interventions.uniform(HEADS), Edits(pattern=of(HEADS, uniform)))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_control_rows_pattern(loaded, oracles, drawn, name):
    reference = oracles[name].record(drawn.controls.tokens)
    edits = Edits(pattern=of(HEADS, lambda layer, head, row, pattern: reference["pattern", layer, head, row]))
    intervention = interventions.pattern_from(HEADS, recorded(loaded[name], drawn.controls))
    check(loaded[name], oracles[name], drawn, intervention, edits)


def test_a_frozen_pattern_undoes_what_an_earlier_head_does_to_it(random_gpt2, drawn):
    """Ablating a head of layer 0 moves the patterns of layer 1; frozen from the clean run they stay."""
    tokens, later = drawn.repeats.tokens, [(1, head) for head in range(4)]
    clean = recorded(random_gpt2, drawn.repeats)
    ablated = interventions.zero([(0, 1)])
    frozen = ablated + interventions.pattern_from(later, clean)
    moved = Recordings(random_gpt2, tokens, under=ablated).get(1, "pattern")
    held = Recordings(random_gpt2, tokens, under=frozen).get(1, "pattern")
    assert (moved - clean.get(1, "pattern")).abs().max() > 1e-3
    assert torch.equal(held, clean.get(1, "pattern"))


@pytest.mark.parametrize("part", ["q", "k", "v"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_input_alone_from_the_control_row(loaded, oracles, drawn, name, part):
    """Heads of one layer; on the Llama two heads share a key and a value, and only one of them is edited."""
    heads = [(1, 2)] if name == "llama" else [(1, 0), (1, 2)]
    reference = oracles[name].record(drawn.controls.tokens)
    edits = Edits(**{part: of(heads, lambda layer, head, row, value: reference[part, layer, head, row])})
    clean, control = recorded(loaded[name], drawn.repeats), recorded(loaded[name], drawn.controls)
    check(loaded[name], oracles[name], drawn, interventions.input_from(heads, part, clean, control), edits)


@pytest.mark.parametrize("part", ["q", "k", "v"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_path_from_an_earlier_head_into_one_input(loaded, oracles, drawn, name, part):
    sender, receiver, oracle, tokens = (0, 1), (1, 3), oracles[name], drawn.repeats.tokens
    seen = oracle.record(tokens)
    output = torch.stack([seen["z", sender[0], sender[1], row] for row in range(len(tokens))])
    shifted = oracle.record_shifted(tokens, 1, -output @ oracle.output_weights(*sender, output.shape[-1]))
    edits = Edits(**{part: of([receiver], lambda layer, head, row, value: shifted[part, layer, head, row])})
    clean = recorded(loaded[name], drawn.repeats)
    intervention = interventions.path(interventions.zero([sender]), [receiver], part, clean)
    check(loaded[name], oracle, drawn, intervention, edits)


@pytest.mark.parametrize("part", ["q", "k", "v"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_path_through_mlps_freezes_every_head_but_the_sender(loaded, oracles, drawn, name, part):
    """By brute force: all layers run again with every head held to its clean output and the sender silenced; two MLPs
    stand between sender and receiver."""
    sender, receiver, oracle, tokens = (0, 1), (2, 3), oracles[name], drawn.repeats.tokens
    seen = oracle.record(tokens)
    frozen = Edits(z=lambda layer, head, row, z: seen["z", layer, head, row] * ((layer, head) != sender))
    oracle.logits(tokens, frozen)
    edits = Edits(**{part: of([receiver], lambda layer, head, row, value: frozen.seen[part, layer, head, row])})
    clean = recorded(loaded[name], drawn.repeats)
    through = interventions.path(interventions.zero([sender]), [receiver], part, clean, through_mlps=True)
    check(loaded[name], oracle, drawn, through, edits)
    direct = interventions.path(interventions.zero([sender]), [receiver], part, clean)
    tokens = drawn.repeats.tokens
    apart = (logits_under(loaded[name], through, tokens) - logits_under(loaded[name], direct, tokens)).abs().max()
    assert apart > 1e-3


def test_senders_of_several_layers_pass_the_mlps_above_them(random_gpt2, oracles, drawn):
    senders, receiver, oracle, tokens = [(0, 2), (1, 0)], (2, 1), oracles["gpt2"], drawn.repeats.tokens
    seen = oracle.record(tokens)
    frozen = Edits(z=lambda layer, head, row, z: seen["z", layer, head, row] * ((layer, head) not in senders))
    oracle.logits(tokens, frozen)
    edits = Edits(k=of([receiver], lambda layer, head, row, value: frozen.seen["k", layer, head, row]))
    clean = recorded(random_gpt2, drawn.repeats)
    intervention = interventions.path(interventions.zero(senders), [receiver], "k", clean, through_mlps=True)
    check(random_gpt2, oracle, drawn, intervention, edits)


def test_a_path_through_mlps_of_the_next_layer_alone_passes_the_senders_mlp(random_gpt2, drawn):
    """Sender and receiver in neighbouring layers still have the sender's own MLP between them."""
    clean = recorded(random_gpt2, drawn.repeats)
    ways = [
        interventions.path(interventions.zero([(0, 1)]), [(1, 3)], "k", clean, through_mlps=through)
        for through in (False, True)
    ]
    direct, through = (logits_under(random_gpt2, way, drawn.repeats.tokens) for way in ways)
    assert (direct - through).abs().max() > 1e-3


def test_where_mlps_stand_beside_the_heads_no_path_runs_through_them(loaded, drawn):
    with pytest.raises(UserError, match="paths through MLPs cannot be made"):
        interventions.path(
            interventions.zero([(0, 1)]), [(1, 3)], "k", recorded(loaded["neox"], drawn.repeats), through_mlps=True
        )


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_paths_agree_with_transformer_lens(random_gpt2, drawn, part):
    """TransformerLens puts a clean output into a run on other tokens; one row, read as its last logit of token 7."""
    from transformer_lens.patching import get_act_patch_direct_path

    repeat, control = (torch.from_numpy(batch.tokens[:1]) for batch in (drawn.repeats, drawn.controls))
    bridge = random_gpt2.bridge
    caches = [bridge.run_with_cache(tokens)[1] for tokens in (control, repeat)]
    with torch.no_grad():
        theirs = get_act_patch_direct_path(
            bridge, repeat, *caches, lambda logits: logits[0, -1, 7], 0, 2, component=part, verbose=False
        )
    source = Recordings(random_gpt2, drawn.controls.tokens[:1])
    sender = interventions.output_from([(0, 2)], source)
    for head in range(4):
        ours = interventions.path(sender, [(2, head)], part, Recordings(random_gpt2, drawn.repeats.tokens[:1]))
        with applied(random_gpt2, ours):
            assert bridge_logits(random_gpt2, drawn.repeats.tokens[:1])[0, -1, 7].item() == pytest.approx(
                theirs[2, head].item(), abs=2e-5
            )


def test_several_senders_add_up_in_the_residual_stream(random_gpt2, oracles, drawn):
    senders, receiver, oracle, tokens = [(0, 0), (0, 3)], (1, 1), oracles["gpt2"], drawn.repeats.tokens
    seen = oracle.record(tokens)
    change = 0
    for sender in senders:
        output = torch.stack([seen["z", sender[0], sender[1], row] for row in range(len(tokens))])
        change = change - output @ oracle.output_weights(*sender, output.shape[-1])
    shifted = oracle.record_shifted(tokens, 1, change)
    edits = Edits(k=of([receiver], lambda layer, head, row, value: shifted["k", layer, head, row]))
    clean = recorded(random_gpt2, drawn.repeats)
    check(random_gpt2, oracle, drawn, interventions.path(interventions.zero(senders), [receiver], "k", clean), edits)


def test_a_path_needs_a_later_receiver(random_gpt2, drawn):
    with pytest.raises(UserError, match=r"head 1\.0 reads nothing of head 1\.2"):
        interventions.path(interventions.zero([(1, 2)]), [(1, 0)], "k", recorded(random_gpt2, drawn.repeats))


@pytest.mark.parametrize("part", ["q", "k"])
def test_a_source_is_removed_with_the_layernorm_frozen(random_gpt2, oracles, drawn, part):
    """By hand, from GPT-2's weights: what the source wrote, centred, over the clean standard deviation, through W."""
    source, receiver, oracle, tokens = (0, 2), (2, 1), oracles["gpt2"], drawn.repeats.tokens
    seen = oracle.record(tokens)
    block = oracle.layers[receiver[0]]
    with torch.no_grad():
        streams = oracle.model(torch.from_numpy(tokens), output_hidden_states=True, use_cache=False).hidden_states
        first = {"q": 0, "k": 32}[part] + 8 * receiver[1]
        weights = block.attn.c_attn.weight[:, first : first + 8]

    def without(layer, head, row, value):
        wrote = seen["z", source[0], source[1], row] @ oracle.output_weights(*source, 8)
        stream = streams[receiver[0]][row]
        deviation = (stream.var(-1, unbiased=False, keepdim=True) + block.ln_1.eps).sqrt()
        return value - (wrote - wrote.mean(-1, keepdim=True)) / deviation * block.ln_1.weight.detach() @ weights

    edits = Edits(**{part: of([receiver], without)})
    intervention = interventions.without_source([source], [receiver], part, recorded(random_gpt2, drawn.repeats))
    check(random_gpt2, oracle, drawn, intervention, edits)


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_with_an_rms_norm_the_whole_stream_projects_to_the_whole_input(loaded, drawn, part):
    """The Llama has no biases, so the linear term of all of the residual stream is all there is."""
    clean = recorded(loaded["llama"], drawn.repeats)
    whole = clean.get(1, part)
    for column in range(whole.shape[2]):
        term = interventions.project_frozen(clean, 1, part, column, clean.get(1, "resid_pre"))
        torch.testing.assert_close(term, whole[:, :, column], atol=1e-5, rtol=1e-4)


def test_a_sender_may_be_changed_anywhere(random_gpt2, oracles, drawn):
    """A sender whose pattern is made uniform: its output is what that pattern brings."""
    sender, receiver, oracle, tokens = (0, 1), (1, 3), oracles["gpt2"], drawn.repeats.tokens
    seen, changed = (
        oracle.record(tokens),
        Edits(pattern=of([sender], lambda layer, head, row, p: p.tril().sign() / (torch.arange(len(p))[:, None] + 1))),
    )
    oracle.logits(tokens, changed)
    move = torch.stack([changed.seen["z", 0, 1, row] - seen["z", 0, 1, row] for row in range(len(tokens))])
    shifted = oracle.record_shifted(tokens, 1, move @ oracle.output_weights(0, 1, 8))
    edits = Edits(k=of([receiver], lambda layer, head, row, value: shifted["k", layer, head, row]))
    clean = recorded(random_gpt2, drawn.repeats)
    check(
        random_gpt2, oracle, drawn, interventions.path(interventions.uniform([sender]), [receiver], "k", clean), edits
    )


# --- in part ---


def logits_under(model, intervention, tokens):
    with applied(model, intervention):
        return bridge_logits(model, tokens)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_coefficient_of_0_is_clean_and_of_1_is_whole(loaded, drawn, name):
    model, tokens = loaded[name], drawn.repeats.tokens
    clean = bridge_logits(model, tokens)
    for intervention in every_kind(model, drawn):
        none, half, whole = (
            logits_under(model, intervention.limited(coefficient=amount), tokens) for amount in (0.0, 0.5, 1.0)
        )
        torch.testing.assert_close(none, clean, atol=2e-6, rtol=1e-5)
        assert torch.equal(whole, logits_under(model, intervention, tokens)), intervention.name
        assert (half - clean).abs().max() > 1e-4 and (half - whole).abs().max() > 1e-4, intervention.name


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_limit_to_rows_or_positions_touches_nothing_else(loaded, drawn, name):
    """Row 1 alone; or positions from 9 on, which leaves what is read before them."""
    model, tokens = loaded[name], drawn.repeats.tokens
    clean = bridge_logits(model, tokens)
    rows, positions = np.arange(3) == 1, np.arange(tokens.shape[1]) >= 9
    for intervention in every_kind(model, drawn):
        changed = (logits_under(model, intervention.limited(rows=rows), tokens) - clean).abs().amax((1, 2))
        assert changed[[0, 2]].max() < 2e-6 < 1e-4 < changed[1], intervention.name
        changed = (logits_under(model, intervention.limited(positions=positions), tokens) - clean).abs().amax((0, 2))
        assert changed[:9].max() < 2e-6 < 1e-4 < changed[9:].max(), intervention.name


@pytest.mark.parametrize("rows", [None, np.arange(3) > 0])
def test_limits_hold_when_part_of_the_rows_runs(random_gpt2, drawn, rows):
    tokens = drawn.repeats.tokens
    limited = interventions.zero(HEADS).limited(positions=np.arange(tokens.shape[1]) >= 5, rows=rows)
    whole = logits_under(random_gpt2, limited, tokens)
    with applied(random_gpt2, limited, slice(2, 3)):
        torch.testing.assert_close(bridge_logits(random_gpt2, tokens[2:]), whole[2:], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("part", ["q", "k"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_subspace_of_a_query_or_key_alone(loaded, oracles, drawn, name, part):
    """Along one direction; rotation turns the direction with the position, so the Llama is compared in whole space."""
    model, oracle, head = loaded[name], oracles[name], (1, 2)
    clean, control = recorded(model, drawn.repeats), recorded(model, drawn.controls)
    intervention = interventions.input_from([head], part, clean, control)
    direction = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0][:, :1]
    reference = oracle.record(drawn.controls.tokens)
    if name == "gpt2":
        projector = direction @ direction.T
        limited = intervention.limited(subspace=direction)
        edit = of([head], lambda layer, at, row, old: old + (reference[part, layer, at, row] - old) @ projector)
    else:
        limited = intervention.limited(subspace=torch.eye(8))
        edit = of([head], lambda layer, at, row, old: reference[part, layer, at, row])
    check(model, oracle, drawn, limited, Edits(**{part: edit}), least=1e-4)


def test_a_pattern_has_no_subspace_and_a_coefficient_ends_at_1():
    with pytest.raises(UserError, match="pattern"):
        interventions.uniform(HEADS).limited(subspace=torch.eye(8))
    with pytest.raises(UserError, match=r"1\.5"):
        interventions.zero(HEADS).limited(coefficient=1.5)


# --- what a model cannot do ---


@pytest.fixture(scope="module")
def gptj(tmp_path_factory, tokenizer) -> models.Model:
    """TransformerLens shows a GPT-J's pattern only after the layer has used it."""
    torch.manual_seed(0)
    config = GPTJConfig(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4)
    folder = tmp_path_factory.mktemp("models") / "random-gptj"
    GPTJForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return models.load(str(folder))


def test_an_intervention_that_would_do_nothing_is_refused(gptj, drawn):
    tokens = drawn.repeats.tokens
    with pytest.raises(UserError, match="ignores the intervention 'uniform pattern'"):
        logits_under(gptj, interventions.uniform(HEADS), tokens)
    clean, control = recorded(gptj, drawn.repeats), recorded(gptj, drawn.controls)
    with pytest.raises(UserError, match="values cannot be edited alone"):
        logits_under(gptj, interventions.input_from(HEADS, "v", clean, control), tokens)
    assert_no_hooks(gptj)
    changed = logits_under(gptj, interventions.zero(HEADS), tokens)
    assert (changed - bridge_logits(gptj, tokens)).abs().max() > 1e-3


def test_a_path_through_a_norm_after_attention_is_refused(gemma, drawn):
    with pytest.raises(UserError, match="before it is added"):
        interventions.path(interventions.zero([(0, 1)]), [(1, 0)], "k", recorded(gemma, drawn.repeats))


def test_an_activation_that_is_not_shown_is_said(random_gpt2, drawn, monkeypatch):
    monkeypatch.setitem(POINTS, "scale", "ln1.hook_nowhere")
    with pytest.raises(UserError, match=r"no blocks\.1\.ln1\.hook_nowhere"):
        recorded(random_gpt2, drawn.repeats).get(1, "scale")


def test_a_query_left_without_attention_stays_empty(random_gpt2):
    """Forbidding all a query may see gives zeros, not NaN."""
    everything = Cells(np.zeros(2, int), np.ones(2, int), np.arange(2))
    with applied(random_gpt2, interventions.forbid([(0, 0)], everything)):
        assert torch.isfinite(bridge_logits(random_gpt2, np.array([[0, 5, 6]]))).all()


def test_the_hooks_go_even_when_the_block_fails(random_gpt2, drawn):
    with (
        pytest.raises(ZeroDivisionError),
        applied(random_gpt2, interventions.forbid(HEADS, drawn.repeats.cells["prefix_matching"])),
    ):
        raise ZeroDivisionError
    assert_no_hooks(random_gpt2)
