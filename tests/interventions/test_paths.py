"""Paths between heads against a slow reference, against brute force, and against TransformerLens."""

from __future__ import annotations

import pytest
import torch

from common import UserError
from common.attention.head import Head
from common.interventions.edits import Intervention, Recordings, each_head, uniform, zero
from common.interventions.paths import path, without_source
from common.loading import load
from tests import architectures
from tests.oracle import ARCHITECTURES, Changes, check, of, traces


def clean_of(model, drawn) -> Recordings:
    return Recordings(model, drawn.repeats.tokens, batch_size=2)


def taken_from(seen, part):
    return lambda layer, head, row, value: seen[part, layer, head, row]


# --- direct ---


@pytest.mark.parametrize("part", ["q", "k", "v"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_path_from_an_earlier_head_into_one_input(loaded, oracles, drawn, name, part):
    sender, receiver, oracle, tokens = Head.at(0, 1), Head.at(1, 3), oracles[name], drawn.repeats.tokens
    shifted = oracle.record_shifted(tokens, 1, -oracle.written(tokens, sender))
    changes = Changes(**{part: of([receiver], taken_from(shifted, part))})
    intervention = path(zero([sender]), [receiver], part, clean_of(loaded[name], drawn))
    assert [(edit.head, edit.point) for edit in intervention.edits] == [(receiver, part)]
    check(loaded[name], oracle, tokens, intervention, changes)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_path_over_a_layer_keeps_the_heads_and_mlps_in_between(loaded, oracles, drawn, name):
    """From layer 0 into layer 2: what layer 1 adds to the stream is what it adds in the clean run."""
    sender, receiver, oracle, tokens = Head.at(0, 2), Head.at(2, 0), oracles[name], drawn.repeats.tokens
    shifted = oracle.record_shifted(tokens, 2, -oracle.written(tokens, sender))
    changes = Changes(k=of([receiver], taken_from(shifted, "k")))
    check(loaded[name], oracle, tokens, path(zero([sender]), [receiver], "k", clean_of(loaded[name], drawn)), changes)
    through = Changes(z=of([sender], lambda layer, head, row, z: torch.zeros_like(z)))
    oracle.logits(tokens, through)
    apart = [(through.seen["k", 2, 0, row] - shifted["k", 2, 0, row]).abs().max() for row in range(3)]
    assert max(apart) > 1e-3, "with what layer 1 makes of it, the key would be another"


def test_several_senders_add_up_in_the_residual_stream(random_gpt2, oracles, drawn):
    """Two of one layer and one of the next, into two receivers of different layers."""
    senders, oracle, tokens = [Head.at(0, 0), Head.at(0, 3)], oracles["gpt2"], drawn.repeats.tokens
    receivers = [Head.at(1, 1), Head.at(2, 2)]
    change = sum(-oracle.written(tokens, sender) for sender in senders)
    shifted = {layer: oracle.record_shifted(tokens, layer, change) for layer in (1, 2)}
    changes = Changes(k=of(receivers, lambda layer, head, row, value: shifted[layer]["k", layer, head, row]))
    # In the run, the edit of layer 1 moves the stream that layer 2 reads; the path adds the sender's part to what is
    # there, so the second receiver's key is compared where the first is not touched.
    for receiver in receivers:
        alone = Changes(k=of([receiver], changes.k))
        check(random_gpt2, oracle, tokens, path(zero(senders), [receiver], "k", clean_of(random_gpt2, drawn)), alone)
    late = [Head.at(0, 0), Head.at(1, 3)]
    both = oracle.record_shifted(tokens, 2, sum(-oracle.written(tokens, sender) for sender in late))
    alone = Changes(k=of(receivers[1:], taken_from(both, "k")))
    check(random_gpt2, oracle, tokens, path(zero(late), receivers[1:], "k", clean_of(random_gpt2, drawn)), alone)


def test_a_path_is_added_to_what_other_edits_left(random_gpt2, oracles, drawn):
    """A head of layer 0 is silenced for all, and the path of another into a key comes on top of it."""
    sender, receiver, oracle, tokens = Head.at(0, 1), Head.at(1, 3), oracles["gpt2"], drawn.repeats.tokens
    clean, shifted = oracle.record(tokens), oracle.record_shifted(tokens, 1, -oracle.written(tokens, sender))
    gone = Head.at(0, 2)
    changes = Changes(
        z=of([gone], lambda layer, head, row, z: torch.zeros_like(z)),
        k=of([receiver], lambda layer, head, row, key: key + shifted["k", 1, 3, row] - clean["k", 1, 3, row]),
    )
    both = zero([gone]) + path(zero([sender]), [receiver], "k", clean_of(random_gpt2, drawn))
    check(random_gpt2, oracle, tokens, both, changes)


def test_a_sender_may_be_changed_anywhere(random_gpt2, oracles, drawn):
    """A sender whose pattern is made uniform: its output is what that pattern brings."""
    sender, receiver, oracle, tokens = Head.at(0, 1), Head.at(1, 3), oracles["gpt2"], drawn.repeats.tokens
    changed = Changes(
        pattern=of([sender], lambda layer, head, row, p: p.tril().sign() / (torch.arange(len(p))[:, None] + 1))
    )
    seen = oracle.record(tokens)
    oracle.logits(tokens, changed)
    move = torch.stack([changed.seen["z", 0, 1, row] - seen["z", 0, 1, row] for row in range(len(tokens))])
    shifted = oracle.record_shifted(tokens, 1, move @ oracle.output_weights(0, 1, 8))
    changes = Changes(k=of([receiver], taken_from(shifted, "k")))
    check(random_gpt2, oracle, tokens, path(uniform([sender]), [receiver], "k", clean_of(random_gpt2, drawn)), changes)


def output_from(head: Head, source: Recordings) -> Intervention:
    output = source.get(head.layer, "z")[:, :, head.head]
    return each_head("output", [head], "z", lambda head: lambda old, rows: output[rows])


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
    sender = output_from(Head.at(0, 2), Recordings(random_gpt2, drawn.controls.tokens[:1]))
    tokens = drawn.repeats.tokens[:1]
    clean = random_gpt2.logits(tokens)[0, -1, 7].item()
    for head in range(4):
        ours = path(sender, [Head.at(2, head)], part, Recordings(random_gpt2, tokens))
        found = random_gpt2.logits(tokens, ours.edits)[0, -1, 7].item()
        assert found == pytest.approx(theirs[2, head].item(), abs=2e-5)
        assert abs(found - clean) > 1e-4


# --- through MLPs ---


@pytest.mark.parametrize("part", ["q", "k", "v"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_path_through_mlps_freezes_every_head_but_the_sender(loaded, oracles, drawn, name, part):
    """By brute force: all layers run again with every head held to its clean output and the sender silenced; two MLPs
    stand between sender and receiver."""
    sender, receiver, oracle, tokens = Head.at(0, 1), Head.at(2, 3), oracles[name], drawn.repeats.tokens
    model, clean = loaded[name], clean_of(loaded[name], drawn)
    changes = Changes(**{part: of([receiver], taken_from(frozen_but(oracle, tokens, [sender]), part))})
    through = path(zero([sender]), [receiver], part, clean, through_mlps=True)
    check(model, oracle, tokens, through, changes)
    direct = path(zero([sender]), [receiver], part, clean)
    word = {"q": "query", "k": "key", "v": "values"}[part]
    assert [one.name for one in (direct, through)] == [f"zero 0.1 → {word}", f"zero 0.1 → {word} through MLPs"]
    assert (model.logits(tokens, through.edits) - model.logits(tokens, direct.edits)).abs().max() > 1e-3


def frozen_but(oracle, tokens, senders):
    """What every head has where all but the silenced senders keep their clean output, and MLPs are as they then are."""
    seen, places = oracle.record(tokens), {head.place for head in senders}
    frozen = Changes(z=lambda layer, head, row, z: seen["z", layer, head, row] * ((layer, head) not in places))
    oracle.logits(tokens, frozen)
    return frozen.seen


def test_senders_of_several_layers_pass_the_mlps_above_them(random_gpt2, oracles, drawn):
    senders, receiver, oracle = [Head.at(0, 2), Head.at(1, 0)], Head.at(2, 1), oracles["gpt2"]
    tokens = drawn.repeats.tokens
    changes = Changes(k=of([receiver], taken_from(frozen_but(oracle, tokens, senders), "k")))
    intervention = path(zero(senders), [receiver], "k", clean_of(random_gpt2, drawn), through_mlps=True)
    check(random_gpt2, oracle, tokens, intervention, changes)


def test_a_path_through_mlps_into_the_next_layer_passes_the_senders_own_mlp(random_gpt2, oracles, drawn):
    sender, receiver, oracle, tokens = Head.at(0, 1), Head.at(1, 3), oracles["gpt2"], drawn.repeats.tokens
    changes = Changes(k=of([receiver], taken_from(frozen_but(oracle, tokens, [sender]), "k")))
    through = path(zero([sender]), [receiver], "k", clean_of(random_gpt2, drawn), through_mlps=True)
    check(random_gpt2, oracle, tokens, through, changes)
    direct = path(zero([sender]), [receiver], "k", clean_of(random_gpt2, drawn))
    assert (random_gpt2.logits(tokens, direct.edits) - random_gpt2.logits(tokens, through.edits)).abs().max() > 1e-3


# --- a source taken out, the norm frozen ---


@pytest.mark.parametrize("part", ["q", "k", "v"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_source_is_removed_with_the_norm_frozen(loaded, oracles, drawn, name, part):
    """By hand: the layer reads the norm's own output, less what two sources wrote over the norm's clean divisor. The
    other heads of the receiver's layer keep what they have."""
    sources, receiver = [Head.at(0, 2), Head.at(1, 0)], Head.at(2, 1)
    oracle, tokens = oracles[name], drawn.repeats.tokens
    wrote = sum(oracle.written(tokens, source) for source in sources)
    seen = recorded_less(oracle, tokens, 2, wrote)
    changes = Changes(**{part: of([receiver], taken_from(seen, part))})
    intervention = without_source(sources, [receiver], part, clean_of(loaded[name], drawn))
    check(loaded[name], oracle, tokens, intervention, changes)
    # The norm recomputed, as a path has it, is something else.
    whole = path(zero(sources), [receiver], part, clean_of(loaded[name], drawn))
    apart = loaded[name].logits(tokens, intervention.edits) - loaded[name].logits(tokens, whole.edits)
    assert apart.abs().max() > 1e-4


def norm_of(block):
    return next(getattr(block, at) for at in ("ln_1", "input_layernorm", "self_attn_layer_norm") if hasattr(block, at))


def recorded_less(oracle, tokens, layer, wrote):
    """As `Oracle.record`, with the frozen norm's share of `wrote` taken off what the norm of `layer` puts out."""
    norm = norm_of(oracle.layers[layer])
    centred = isinstance(norm, torch.nn.LayerNorm)
    eps = norm.eps if centred else norm.variance_epsilon

    def less(module, args, output):
        stream, lost = args[0], wrote
        if centred:
            stream, lost = (x - x.mean(-1, keepdim=True) for x in (stream, lost))
        return output - lost / (stream.pow(2).mean(-1, keepdim=True) + eps).sqrt() * norm.weight

    handle = norm.register_forward_hook(less)
    try:
        return oracle.record(tokens)
    finally:
        handle.remove()


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_a_source_of_layer_0_may_count_with_what_its_mlp_makes_of_it(loaded, oracles, drawn, name):
    source, receiver, oracle, tokens = Head.at(0, 2), Head.at(2, 1), oracles[name], drawn.repeats.tokens
    streams = []
    for changes in (Changes(), Changes(z=of([source], lambda layer, head, row, z: torch.zeros_like(z)))):
        handle = oracle.layers[0].register_forward_hook(
            lambda module, args, output: streams.append(output[0] if isinstance(output, tuple) else output)
        )
        oracle.logits(tokens, changes)
        handle.remove()
    seen = recorded_less(oracle, tokens, 2, streams[0] - streams[1])
    clean = clean_of(loaded[name], drawn)
    intervention = without_source([source], [receiver], "k", clean, through_first_mlp=True)
    check(loaded[name], oracle, tokens, intervention, Changes(k=of([receiver], taken_from(seen, "k"))))
    direct = without_source([source], [receiver], "k", clean)
    apart = loaded[name].logits(tokens, intervention.edits) - loaded[name].logits(tokens, direct.edits)
    assert apart.abs().max() > 1e-4
    # a head of a later layer has no MLP 0 behind it
    late = [without_source([Head.at(1, 0)], [receiver], "k", clean, through_first_mlp=yes) for yes in (True, False)]
    assert torch.equal(*(loaded[name].logits(tokens, one.edits) for one in late))


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_with_an_rms_norm_all_that_was_written_is_all_there_is(loaded, drawn, part):
    """The Llama has no biases. The query, key and values of layer 1 less every source's linear term are those of what
    no head wrote: the terms of all heads add up to the term of their sum."""
    clean, receiver = clean_of(loaded["llama"], drawn), Head.at(1, 2)
    sources = [Head.at(0, head) for head in range(4)]

    def lost(some) -> torch.Tensor:
        under = Recordings(loaded["llama"], drawn.repeats.tokens, under=without_source(some, [receiver], part, clean))
        return clean.get(1, part)[:, :, 2] - under.get(1, part)[:, :, 2]

    each = [lost([source]) for source in sources]
    torch.testing.assert_close(sum(each), lost(sources), atol=1e-5, rtol=1e-4)
    assert min(one.abs().max() for one in each) > 1e-2


# --- what is refused ---


def test_a_path_needs_a_later_receiver(random_gpt2, drawn):
    clean = clean_of(random_gpt2, drawn)
    for sender in (Head.at(1, 2), Head.at(2, 2)):
        with pytest.raises(UserError, match=rf"head 1\.0 reads nothing of head {sender}"):
            path(zero([sender]), [Head.at(1, 0)], "k", clean)
        with pytest.raises(UserError, match="reads nothing of head"):
            without_source([sender], [Head.at(1, 0)], "k", clean)


@pytest.mark.parametrize("name", ["neox", "opt", "bloom"])
def test_without_an_mlp_that_reads_the_stream_after_attention_no_path_runs_through_them(
    loaded, tmp_path, tokenizer, drawn, name
):
    """NeoX has it beside the heads, OPT has none that is a module, Bloom's is given the stream too and adds to it by
    itself. A direct path there is in all of them."""
    model = loaded.get(name) or load(str(architectures.save(name, tmp_path / name, tokenizer)))
    clean, tokens = clean_of(model, drawn), drawn.repeats.tokens
    before, left = model.logits(tokens), traces(model)
    with pytest.raises(UserError, match="paths through MLPs cannot be made"):
        path(zero([Head.at(0, 1)]), [Head.at(1, 3)], "k", clean, through_mlps=True)
    direct = path(zero([Head.at(0, 1)]), [Head.at(1, 3)], "k", clean)
    assert (model.logits(tokens, direct.edits) - before).abs().max() > 1e-3
    assert traces(model) == left
    assert torch.equal(model.logits(tokens), before)


def test_a_path_through_a_norm_after_attention_is_refused(loaded, drawn):
    clean = clean_of(loaded["gemma2"], drawn)
    sender, receivers = Head.at(0, 1), [Head.at(1, 0)]
    for make in (
        lambda: path(zero([sender]), receivers, "k", clean),
        lambda: without_source([sender], receivers, "k", clean),
        lambda: without_source([sender], receivers, "k", clean, through_first_mlp=True),
    ):
        with pytest.raises(UserError, match="before it is added"):
            make()
    assert torch.isfinite(loaded["gemma2"].logits(drawn.repeats.tokens, zero([Head.at(0, 1)]).edits)).all()
