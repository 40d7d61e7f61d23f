"""The one door on small random models of every family: what is read is the model's own attention, what is edited acts
and is undone, and nothing is left behind."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from common import UserError
from common.attention import call as call_module
from common.attention import door as door_module
from common.attention.call import POINTS, Call, Edit
from common.attention.door import Door
from common.attention.head import ONLY_STACK, Head, Place
from tests import architectures

VOCABULARY = 200
CAUSAL = list(architectures.CAUSAL)
STACKED = [*architectures.ENCODER_DECODER, "qwen-vl"]  # families of more than one stack
FAMILIES = [*CAUSAL, *STACKED]
NUMBERS = torch.Generator().manual_seed(7)


@dataclass
class Case:
    """A door, what its network is run on, and what transformers' own eager attention gives: logits, and of each place
    the patterns of its calls, in order."""

    door: Door
    inputs: dict[str, torch.Tensor]
    logits: torch.Tensor
    patterns: dict[Place, list[torch.Tensor]]
    network: Any

    @functools.cached_property
    def clean(self) -> Seen:
        return seen_in(self)

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of a causal model."""
        lists = (module for module in self.door.network.modules() if isinstance(module, nn.ModuleList))
        return list(next(blocks for blocks in lists if len(blocks) == architectures.LAYERS))

    def run(self, **options: Any) -> torch.Tensor:
        with torch.no_grad():
            return self.door.run(self.inputs, **options)


@dataclass
class Seen:
    """One run: its logits and, call by call, the place and what the door shows there."""

    logits: torch.Tensor | None = None
    calls: list[tuple[Place, torch.Tensor, torch.Tensor]] = field(default_factory=list)  # place, pattern, output


def seen_in(case: Case, **options: Any) -> Seen:
    seen = Seen()
    readers = {
        place: lambda call, place=place: seen.calls.append((place, call.pattern(), call.output))
        for place in case.patterns
    }
    seen.logits = case.run(readers=readers, **options)
    return seen


@functools.cache
def case_of(family: str) -> Case:
    if family == "qwen-vl":
        return vision_case()
    if family in architectures.ENCODER_DECODER:
        return encoder_decoder_case(family)
    network = architectures.build(family, VOCABULARY)
    inputs = {"input_ids": torch.randint(1, VOCABULARY, (2, 20), generator=NUMBERS)}
    with torch.no_grad():
        own = network(**inputs, output_attentions=True, use_cache=False)
    patterns = {Place(ONLY_STACK, layer): [shown] for layer, shown in enumerate(own.attentions)}
    return Case(Door(network), inputs, own.logits, patterns, network)


def encoder_decoder_case(family: str) -> Case:
    network = architectures.build_encoder_decoder(family, VOCABULARY)
    ids = {"input_ids": 13, "decoder_input_ids": 9}
    inputs = {name: torch.randint(1, VOCABULARY, (2, size), generator=NUMBERS) for name, size in ids.items()}
    with torch.no_grad():
        own = network(**inputs, output_attentions=True, use_cache=False)
    shown = {"encoder": own.encoder_attentions, "decoder": own.decoder_attentions, "cross": own.cross_attentions}
    patterns = {Place(stack, layer): [one] for stack, of in shown.items() for layer, one in enumerate(of)}
    return Case(Door(network), inputs, own.logits, patterns, network)


def vision_case() -> Case:
    """Vision attention shows no pattern, so its own eager function is watched; a layer calls it for each window."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling

    network = architectures.build_qwen_vl(VOCABULARY)
    image, grid = [architectures.IMAGE_TOKEN] * 16, torch.tensor([architectures.IMAGE_GRID])
    ids = torch.tensor([[0, 10, 7, *image, 8, 11, 12, 10, 11, 12]])
    pixels = torch.randn(64, 3 * 2 * architectures.PATCH**2, generator=NUMBERS)
    inputs = {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid}
    inputs["mm_token_type_ids"] = (ids == architectures.IMAGE_TOKEN).long()
    layers = {block.attn: layer for layer, block in enumerate(network.model.visual.blocks)}
    eager, patterns = modeling.eager_attention_forward, {}

    def watched(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output, pattern = eager(module, *args, **kwargs)
        place = Place("vision", layers[module]) if module in layers else Place(ONLY_STACK, module.layer_idx)
        patterns.setdefault(place, []).append(pattern)
        return output, pattern

    modeling.eager_attention_forward = watched
    try:
        with torch.no_grad():
            own = network(**inputs, output_attentions=True, use_cache=False)
    finally:
        modeling.eager_attention_forward = eager
    assert torch.equal(own.attentions[1], patterns[Place(ONLY_STACK, 1)][0])
    return Case(Door(network), inputs, own.logits, patterns, network)


@pytest.fixture(params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    return case_of(request.param)


@pytest.fixture(params=CAUSAL)
def causal(request: pytest.FixtureRequest) -> Case:
    return case_of(request.param)


def stacks(case: Case) -> set[str]:
    return {place.stack for place in case.patterns}


def blank(point: str) -> Callable[[torch.Tensor, slice], torch.Tensor]:
    """All zero; scores stay -inf where a query may not see."""
    if point == "scores":
        return lambda old, rows: torch.where(torch.isinf(old), old, torch.zeros_like(old))
    return lambda old, rows: torch.zeros_like(old)


# --- reading ---


def test_the_pattern_read_is_the_models_own(case):
    found: dict[Place, list[torch.Tensor]] = {}
    for place, pattern, _ in case.clean.calls:
        found.setdefault(place, []).append(pattern)
    assert found.keys() == case.patterns.keys()
    for place, own in case.patterns.items():
        assert len(found[place]) == len(own)
        for one, other in zip(found[place], own, strict=True):
            assert (one - other).abs().max() < 1e-5, place
    assert case.clean.logits.numpy() == pytest.approx(case.logits.numpy(), abs=2e-5 * float(case.logits.abs().max()))


def test_every_layers_pattern_is_another(case):
    """Or the comparison above would not see two layers, or two heads, that are exchanged."""
    full = [own[0] for own in case.patterns.values() if own[0].shape == case.patterns[max(case.patterns)][0].shape]
    for one, pattern in enumerate(full):
        for other in full[:one]:
            assert (pattern - other).abs().max() > 1e-3
        assert all((pattern[:, 0] - pattern[:, head]).abs().max() > 1e-3 for head in range(1, architectures.HEADS))


def test_windows_hide_what_lies_before_them():
    """The families with a window have it in the patterns that are compared: rows are longer than windows."""
    for family in ("gemma2", "gemma3", "gptneo", "gpt-oss"):
        seen = [int((own[0] > 0).sum(-1).max()) for own in case_of(family).patterns.values()]
        assert architectures.WINDOW in seen and max(seen) > architectures.WINDOW, family


def test_falcon_with_alibi_is_as_transformers_fused_attention_has_it():
    """Its eager attention adds the bias twice, once in the mask and once beside it, and gives other logits."""
    network = architectures.build("falcon-alibi", VOCABULARY)
    door, ids = Door(network), {"input_ids": torch.arange(1, 21)[None]}
    with torch.no_grad():
        eager = network(**ids, use_cache=False).logits
        network.set_attn_implementation("sdpa")
        network.config._attn_implementation = "sdpa"
        fused = network(**ids, use_cache=False).logits
        found = door.run(ids)
        edits = [Edit(Head.at(layer, head), "scores", lambda old, rows: old) for layer in range(3) for head in range(4)]
        by_steps = door.run(ids, edits=edits)
    assert found.numpy() == pytest.approx(fused.numpy(), abs=1e-4)
    assert by_steps.numpy() == pytest.approx(fused.numpy(), abs=1e-4)
    assert (found - eager).abs().max() > 1e-2


def test_reading_changes_no_logit(case):
    assert torch.equal(case.run(), case.clean.logits)


def test_the_pattern_in_blocks_is_the_whole(case, monkeypatch):
    whole = {}
    for place, pattern, _ in case.clean.calls:
        whole.setdefault(place, []).append(pattern)

    def compare(place: Place, call: Call) -> None:
        expected, covered = whole[place].pop(0), 0
        for start, block in call.blocks():
            assert start == covered
            covered += block.shape[2]
            part = expected[:, :, start:covered]
            assert block.numpy() == pytest.approx(part[..., : block.shape[-1]].numpy(), abs=1e-6)
            assert not part[..., block.shape[-1] :].any()
        assert covered == expected.shape[2]
        counts.append(covered)

    counts: list[int] = []
    monkeypatch.setattr(call_module, "BLOCK", 2 * architectures.HEADS * 20 * 3)
    case.run(readers={place: functools.partial(compare, place) for place in case.patterns})
    assert len(counts) == len(case.clean.calls)


def test_due_to_is_the_change_of_the_models_own_pattern(causal):
    """In float64: the model's own pattern without some cells, the rest blown up to what the row had left to give."""
    cells = [torch.tensor(index) for index in ([0, 0, 0, 1], [9, 9, 12, 19], [8, 7, 12, 17])]
    for place, own in causal.patterns.items():
        shown = {}
        causal.run(readers={place: lambda call, shown=shown: shown.update(v=call.values(), due=call.due_to(*cells))})
        pattern = own[0].double()
        kept = pattern.clone()
        kept[cells[0], :, cells[1], cells[2]] = 0
        left = 1 - (pattern - kept).sum(-1, keepdim=True)
        slow = (pattern - torch.where(left > 1e-6, kept / left, 0)) @ shown["v"].double()
        sure = (left > 1e-3).expand_as(slow).numpy()  # the oracle, which renormalises the pattern, is coarse elsewhere
        due = shown["due"].transpose(1, 2).double().numpy()
        assert np.abs(slow.numpy()).max() > 1e-3
        assert due[sure] == pytest.approx(slow.numpy()[sure], rel=1e-3, abs=1e-3 * float(shown["v"].abs().max()))


# --- editing ---


@pytest.mark.parametrize("point", POINTS)
def test_an_edit_acts_on_its_head_alone_and_is_undone_bit_for_bit(case, point):
    for stack in stacks(case):
        head = Head(stack, 1, 2)
        edited = seen_in(case, edits=[Edit(head, point, blank(point))])
        clean = case.clean
        assert (edited.logits - clean.logits).abs().max() > 1e-4, (stack, point)
        places = [place for place, _, _ in clean.calls]
        first = places.index(head.attention)
        others = [number for number in range(architectures.HEADS) if number != head.head]
        for number, (place, pattern, output) in enumerate(edited.calls):
            _, own_pattern, own_output = clean.calls[number]
            if number < first:
                assert torch.equal(pattern, own_pattern) and torch.equal(output, own_output), place
            elif place == head.attention:
                assert torch.equal(pattern[:, others], own_pattern[:, others])
                assert torch.equal(output[:, :, others], own_output[:, :, others])
                assert not torch.equal(output[:, :, head.head], own_output[:, :, head.head])
        assert torch.equal(case.run(), clean.logits), "taken back"


def test_an_edit_that_changes_nothing_changes_no_more_than_rounding(case):
    """The way of an edited head, step by step, gives what the fused kernel gives."""
    for stack in stacks(case):
        same = [Edit(Head(stack, 1, head), "scores", lambda old, rows: old) for head in range(architectures.HEADS)]
        edited = seen_in(case, edits=same)
        for (place, _, output), (_, _, own) in zip(edited.calls, case.clean.calls, strict=True):
            size = float(own.abs().max())
            assert output.numpy() == pytest.approx(own.numpy(), abs=2e-5 * size + 1e-6), place


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom", "falcon-rotary", "mpt", "t5"])
def test_zeroing_every_head_leaves_what_the_projection_adds_without_them(family):
    """Where all heads of a layer put out nothing, the projection reads zeros."""
    case, read = case_of(family), []
    stack = max(stacks(case))
    place = Place(stack, 1)
    module = next(m for m in case.door._names if is_attention(m) and case.door.place_of(m) == place)
    projection = list(linear_of(module))[-1]
    edits = [Edit(Head(*place, head), "z", blank("z")) for head in range(architectures.HEADS)]
    for run in ((), edits):
        case.run(edits=run, taps=[(projection, "input", lambda value: read.append(value))])
    assert read[0].abs().max() > 1e-3 and not read[1].any()


def is_attention(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Attention") and bool(list(linear_of(module)))


def linear_of(module: nn.Module) -> list[nn.Module]:
    """Projections in the order in which they are made; the output's is the last in these families."""
    from transformers.pytorch_utils import Conv1D

    return [child for child in module.children() if isinstance(child, nn.Linear | Conv1D)]


def test_an_edit_of_a_layer_that_does_not_exist_is_an_error(case):
    for stack in stacks(case):
        with pytest.raises(UserError, match=r"7\.0 was not made") as error:
            case.run(edits=[Edit(Head(stack, 7, 2), "z", blank("z"))])
        assert len(str(error.value).splitlines()) == 1
    with pytest.raises(UserError, match=r"nowhere 0\.0 was not made"):
        case.run(edits=[Edit(Head("nowhere", 0, 0), "z", blank("z"))])
    assert torch.equal(case.run(), case.clean.logits)


# --- running ---


def test_predictions_are_slices_of_the_logits(causal):
    row, position = torch.tensor([1, 0, 1]), torch.tensor([5, 19, 7])
    found = causal.run(predictions=(row, position))
    assert found.shape == (3, VOCABULARY)
    assert found.numpy() == pytest.approx(causal.clean.logits[row, position].numpy(), abs=1e-4)
    assert not torch.allclose(found, causal.clean.logits[row, position - 1], atol=1e-2)


def test_a_run_from_a_layer_on_gives_the_same_bits(causal):
    streams: dict[int, torch.Tensor] = {}
    blocks = causal.blocks
    taps = [(block, "input", functools.partial(streams.__setitem__, layer)) for layer, block in enumerate(blocks)]
    edits = [Edit(Head.at(2, 1), "pattern", blank("pattern"))]
    at = (torch.tensor([0, 1]), torch.tensor([5, 19]))
    assert torch.equal(causal.run(taps=taps), causal.clean.logits)
    for options in ({}, {"edits": edits}, {"predictions": at}):
        whole = causal.run(**options)
        for layer in range(architectures.LAYERS):
            begin = (blocks[: layer + 1], streams[layer])
            assert torch.equal(causal.run(start=begin, **options), whole), layer
    other = causal.run(start=(blocks[:2], streams[1] + 1.0 * torch.randn(streams[1].shape, generator=NUMBERS)))
    assert not torch.allclose(other, causal.clean.logits, atol=1e-3), "the stream given is the one used"
    assert torch.equal(causal.run(), causal.clean.logits)


def test_the_layers_below_the_start_are_not_run(causal):
    streams: list[torch.Tensor] = []
    causal.run(taps=[(causal.blocks[2], "input", streams.append)])
    reached: list[Place] = []
    readers = {place: lambda call, place=place: reached.append(place) for place in causal.patterns}
    causal.run(readers=readers, start=(causal.blocks, streams[0]))
    assert reached == [Place(ONLY_STACK, 2)]


def test_a_run_is_left_after_the_layer_or_before_the_module_that_is_named(causal):
    unembedding = causal.door.network.get_output_embeddings()

    def refuse(value: torch.Tensor) -> None:
        raise AssertionError("the unembedding ran")

    watch = [(unembedding, "input", refuse)]
    for last, expected in ((Place(ONLY_STACK, 1), 2), (causal.blocks[2], 2), (Place(ONLY_STACK, 0), 1)):
        reached: list[Place] = []
        readers = {place: lambda call, place=place, to=reached: to.append(place) for place in causal.patterns}
        assert causal.run(readers=readers, last=last, taps=watch) is None
        assert reached == [Place(ONLY_STACK, layer) for layer in range(expected)]
    with pytest.raises(AssertionError, match="the unembedding ran"):
        causal.run(taps=watch)
    assert torch.equal(causal.run(), causal.clean.logits)


def test_a_tap_that_returns_something_takes_the_values_place(causal):
    block = causal.blocks[1]
    shift = torch.randn(architectures.D_MODEL, generator=NUMBERS)
    for side in ("input", "output"):
        moved = causal.run(taps=[(block, side, lambda stream: stream + shift)])
        assert (moved - causal.clean.logits).abs().max() > 1e-3, side
        assert torch.equal(causal.run(taps=[(block, side, lambda stream: None)]), causal.clean.logits)


# --- nothing is left behind ---


def left_behind(door: Door) -> dict[str, object]:
    """Hooks and replaced methods of every module, and the run under way."""
    found: dict[str, object] = {"visit": door_module._VISIT.get()}
    for name, module in door.network.named_modules():
        own = (id(module.__dict__.get("forward")), len(module._forward_hooks), len(module._forward_pre_hooks))
        found[name] = own
    return found


class _Stopped(Exception):
    pass


def test_no_run_leaves_anything_behind(causal):
    def stop(*values: object) -> None:
        raise _Stopped

    before = left_behind(causal.door)
    streams: list[torch.Tensor] = []
    taps = [(causal.blocks[1], "input", streams.append)]
    edits = [Edit(Head.at(1, 2), "q", blank("q"))]
    causal.run(taps=taps, edits=edits, predictions=(torch.tensor([0]), torch.tensor([3])))
    causal.run(taps=taps, last=causal.blocks[2])
    causal.run(start=(causal.blocks[:2], streams[0]), last=Place(ONLY_STACK, 1))
    stops = [
        {"readers": {Place(ONLY_STACK, 1): stop}},
        {"taps": [(causal.blocks[1], "output", stop)]},
        {"edits": [Edit(Head.at(1, 2), "z", stop)]},
        {"readers": {Place(ONLY_STACK, 2): stop}, "start": (causal.blocks[:2], streams[0])},
    ]
    for options in stops:
        with pytest.raises(_Stopped):
            causal.run(**options)
    assert left_behind(causal.door) == before
    assert torch.equal(causal.run(), causal.clean.logits)


def test_a_run_within_a_run_disturbs_neither(case):
    edits = [Edit(Head(max(stacks(case)), 1, 2), "pattern", blank("pattern"))]
    alone = case.run(edits=edits)
    inner: list[torch.Tensor] = []
    place = Place(max(stacks(case)), 0)
    before = left_behind(case.door)

    def run_again(call: Call) -> None:
        if not inner:  # vision layers attend several times
            inner.append(case.run(edits=edits))
            with pytest.raises(UserError, match="was not made"):
                case.run(edits=[Edit(Head("", 9, 0), "z", blank("z"))])

    outer = case.run(readers={place: run_again})
    assert torch.equal(inner[0], alone) and torch.equal(outer, case.clean.logits)
    assert not torch.equal(inner[0], outer)
    assert left_behind(case.door) == before


def test_outside_of_a_run_the_network_is_the_model(causal):
    with torch.no_grad():
        assert torch.equal(causal.door.network(**causal.inputs, use_cache=False).logits, causal.clean.logits)


def test_the_model_that_was_given_keeps_its_own_attention(causal):
    with torch.no_grad():
        again = causal.network(**causal.inputs, output_attentions=True, use_cache=False)
    assert torch.equal(again.logits, causal.logits)
    assert torch.equal(again.attentions[1], causal.patterns[Place(ONLY_STACK, 1)][0])


def test_the_weights_are_shared_and_not_copied(case):
    ours = {tensor.data_ptr() for tensor in case.door.network.parameters()}
    assert ours == {tensor.data_ptr() for tensor in case.network.parameters()}


# --- gradients ---


def test_gradients_reach_the_outputs_of_all_heads(causal):
    """And they are the slopes of the logits: those of a small edit of a head's output."""
    for parameter in causal.door.network.parameters():
        parameter.requires_grad_(False)
    outputs: dict[int, torch.Tensor] = {}

    def keep(layer: int, call: Call) -> None:
        call.output.retain_grad()
        outputs[layer] = call.output

    readers = {place: functools.partial(keep, place.layer) for place in causal.patterns}
    begin = (causal.blocks[0], "input", lambda stream: stream.detach().requires_grad_())
    at = torch.tensor([0, 1]), torch.tensor([18, 17])
    with torch.enable_grad():
        logits = causal.door.run(causal.inputs, readers=readers, taps=[begin], predictions=at)
        (logits[0, 3] - logits[1, 4]).backward()
    for layer, output in outputs.items():
        per_head = output.grad.abs().amax((0, 1, 3))
        assert torch.isfinite(output.grad).all() and (per_head > 0).all(), layer
    step = 1e-2 * torch.randn(8, generator=NUMBERS)
    moved = []
    for sign in (1, -1):
        edit = Edit(Head.at(1, 2), "z", lambda old, rows, sign=sign: old + sign * step[: old.shape[-1]])
        logits = causal.run(edits=[edit], predictions=at)
        moved.append(float(logits[0, 3] - logits[1, 4]))
    slope = float((outputs[1].grad[:, :, 2] * step).sum())
    assert (moved[0] - moved[1]) / 2 == pytest.approx(slope, rel=0.05, abs=2e-4)


# --- what is refused ---


@pytest.mark.parametrize(
    "config",
    [
        transformers.XLNetConfig(d_model=32, n_layer=2, n_head=4, vocab_size=50, d_inner=32),
        transformers.RwkvConfig(hidden_size=32, num_hidden_layers=2, vocab_size=50),
    ],
    ids=lambda config: config.model_type,
)
def test_a_family_whose_attention_cannot_be_exchanged_is_refused_by_name(config):
    """transformers itself only logs a warning and goes on with the model's own attention."""
    network = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match=type(network).__name__) as error:
        Door(network)
    assert "cannot be read or edited" in str(error.value) and len(str(error.value).splitlines()) == 1


def test_a_network_that_is_no_transformers_model_is_refused_by_name():
    with pytest.raises(UserError, match="Linear"):
        Door(nn.Linear(2, 2))


def test_training_mode_is_refused():
    network = architectures.build("gpt2", VOCABULARY)
    network.config.attn_pdrop = 0.1
    for block in network.transformer.h:
        block.attn.attn_dropout.p = 0.1
    door = Door(network)
    ids = {"input_ids": torch.tensor([[1, 2, 3]])}
    door.run(ids)
    door.network.train()
    with pytest.raises(UserError, match="training mode"):
        door.run(ids)


def test_opening_a_door_says_nothing(caplog, capfd):
    with caplog.at_level(logging.WARNING):
        Door(architectures.build("bloom", VOCABULARY))
        Door(architectures.build("gpt2", VOCABULARY))
    assert not caplog.records and not capfd.readouterr().err


def test_an_early_run_may_leave_below_an_edit():
    case = case_of("gpt2")
    reached: list[int] = []
    edit = Edit(Head.at(2, 0), "z", blank("z"))
    options = {"readers": {Place(ONLY_STACK, 0): lambda call: reached.append(0)}, "last": Place(ONLY_STACK, 0)}
    assert case.run(edits=[edit], **options) is None
    assert reached == [0]


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("transformer.h.3.attn", ("", 3)),
        ("model.layers.11.self_attn", ("", 11)),
        ("model.language_model.layers.2.self_attn", ("", 2)),
        ("model.visual.blocks.5.attn", ("vision", 5)),
        ("model.vision_tower.encoder.layers.1.self_attn", ("vision", 1)),
        ("encoder.block.0.layer.0.SelfAttention", ("encoder", 0)),
        ("decoder.block.3.layer.0.SelfAttention", ("decoder", 3)),
        ("decoder.block.3.layer.1.EncDecAttention", ("cross", 3)),
        ("model.encoder.layers.1.self_attn", ("encoder", 1)),
        ("model.decoder.layers.1.self_attn", ("decoder", 1)),
        ("model.decoder.layers.1.encoder_attn", ("cross", 1)),
        ("transformer.h.2.crossattention", ("cross", 2)),
    ],
)
def test_a_place_is_read_off_the_modules_name(name, place):
    assert door_module._place(name) == Place(*place)


def test_opts_one_stack_has_no_name():
    """Its blocks lie in a module called decoder, with no encoder beside it."""
    assert {place.stack for place, _, _ in case_of("opt").clean.calls} == {ONLY_STACK}
    assert len(case_of("opt").clean.calls) == architectures.LAYERS


def test_edits_reach_all_calls_of_a_vision_layer():
    """Its windows are attended to one by one: 4 calls, one place."""
    case = case_of("qwen-vl")
    calls = [place for place, _, _ in case.clean.calls]
    assert calls.count(Place("vision", 0)) == 4 and calls.count(Place("vision", 1)) == 1
    edited = seen_in(case, edits=[Edit(Head("vision", 0, 2), "z", blank("z"))])
    outputs = [output for place, _, output in edited.calls if place == Place("vision", 0)]
    assert len(outputs) == 4 and not any(output[:, :, 2].any() for output in outputs)


def test_an_edit_of_a_head_that_does_not_exist_is_said(random_gpt2):
    edit = Edit(Head.at(1, 4), "z", lambda old, rows: old)
    with pytest.raises(UserError, match="no head 1.4: the heads of its layer are 0 to 3"):
        random_gpt2.logits(np.array([[0, 1, 2]]), [edit])


def test_an_edit_at_a_point_that_does_not_exist_is_said(random_gpt2):
    edit = Edit(Head.at(1, 0), "values", lambda old, rows: old)
    with pytest.raises(UserError, match="no point 'values' in a head: an edit is made at q, k, scores"):
        random_gpt2.logits(np.array([[0, 1, 2]]), [edit])
