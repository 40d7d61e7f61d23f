"""Every intervention against a slow reference on five families, and the model as it was afterwards."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common import UserError
from common.attention.door import Door
from common.attention.head import Head
from common.heads.tokens import Cells, TokenBatch
from common.interventions import edits
from common.interventions.edits import Recordings, input_from, knockout, mean, pattern_from, uniform, zero
from tests.oracle import ARCHITECTURES, Changes, assert_near, check, of, traces

FAMILIES = (*ARCHITECTURES, "gemma2")
HEADS = [Head.at(0, 1), Head.at(1, 2), Head.at(1, 3)]


def recorded(model, batch: TokenBatch) -> Recordings:
    return Recordings(model, batch.tokens, batch_size=2)


def without(cells: Cells):
    """The reference's knockout: scores of -inf, cell by cell."""

    def change(layer, head, row, scores):
        scores = scores.clone()
        for at, query, key in zip(cells.row, cells.query, cells.key, strict=True):
            if at == row:
                scores[query, key] = -math.inf
        return scores

    return change


def flat(layer, head, row, pattern):
    seen = torch.ones_like(pattern).tril()
    return seen / seen.sum(-1, keepdim=True)


def taken_from(seen, part):
    return lambda layer, head, row, value: seen[part, layer, head, row]


def silent(layer, head, row, z):
    return torch.zeros_like(z)


# --- one at a time ---


@pytest.mark.parametrize("name", FAMILIES)
def test_the_reference_and_the_model_agree_without_an_intervention(loaded, oracles, drawn, name):
    tokens = drawn.repeats.tokens
    assert_near(loaded[name].logits(tokens), oracles[name].logits(tokens))
    with torch.no_grad():
        bridged = loaded[name].bridge.original_model(torch.from_numpy(tokens), use_cache=False).logits
    assert_near(bridged, oracles[name].logits(tokens))


@pytest.mark.parametrize("name", FAMILIES)
def test_cells_that_are_knocked_out_lose_their_attention_and_the_rest_is_renormalised(loaded, oracles, drawn, name):
    cells = drawn.repeats.cells["prefix_matching"]
    intervention = knockout(HEADS, cells)
    check(loaded[name], oracles[name], drawn.repeats.tokens, intervention, Changes(scores=of(HEADS, without(cells))))
    pattern = Recordings(loaded[name], drawn.repeats.tokens, under=intervention).get(1, "pattern")
    clean = recorded(loaded[name], drawn.repeats).get(1, "pattern")
    assert (pattern[cells.row, 2:, cells.query, cells.key] == 0).all()
    assert pattern.sum(-1) == pytest.approx(1, abs=1e-5)
    if name != "gemma2":  # whose window is shorter than some of the way back
        assert (clean[cells.row, 2:, cells.query, cells.key] > 0).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_zero_ablation(loaded, oracles, drawn, name):
    check(loaded[name], oracles[name], drawn.repeats.tokens, zero(HEADS), Changes(z=of(HEADS, silent)))


@pytest.mark.parametrize("name", FAMILIES)
def test_mean_ablation_is_by_class_of_position(loaded, oracles, drawn, name):
    reference = oracles[name].record(drawn.controls.tokens)
    classes = edits.position_classes(drawn.repeats)

    def average(layer, head, row, z):
        def at(kind):
            places = np.argwhere(classes == kind)
            return sum(reference["z", layer, head, r][p] for r, p in places) / len(places)

        return torch.stack([at(kind) for kind in classes[row]])

    intervention = mean(HEADS, recorded(loaded[name], drawn.controls), classes)
    check(loaded[name], oracles[name], drawn.repeats.tokens, intervention, Changes(z=of(HEADS, average)))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_uniform_pattern(loaded, oracles, drawn, name):
    check(loaded[name], oracles[name], drawn.repeats.tokens, uniform(HEADS), Changes(pattern=of(HEADS, flat)))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_control_rows_pattern(loaded, oracles, drawn, name):
    reference = oracles[name].record(drawn.controls.tokens)
    changes = Changes(pattern=of(HEADS, taken_from(reference, "pattern")))
    intervention = pattern_from(HEADS, recorded(loaded[name], drawn.controls))
    check(loaded[name], oracles[name], drawn.repeats.tokens, intervention, changes)


@pytest.mark.parametrize("part", ["q", "k", "v"])
@pytest.mark.parametrize("name", FAMILIES)
def test_one_input_alone_from_the_control_row(loaded, oracles, drawn, name, part):
    """On the Llama and Gemma 2 two heads share a key and values, and only one of them is edited."""
    heads = [Head.at(1, 2)] if name in ("llama", "gemma2") else [Head.at(1, 0), Head.at(1, 2)]
    reference = oracles[name].record(drawn.controls.tokens)
    changes = Changes(**{part: of(heads, taken_from(reference, part))})
    intervention = input_from(heads, part, recorded(loaded[name], drawn.controls))
    check(loaded[name], oracles[name], drawn.repeats.tokens, intervention, changes)


@pytest.mark.parametrize("name", FAMILIES)
def test_new_values_leave_the_pattern_and_a_new_query_or_key_does_not(loaded, drawn, name):
    head, control = Head.at(1, 2), recorded(loaded[name], drawn.controls)
    clean = Recordings(loaded[name], drawn.repeats.tokens).get(1, "pattern")
    for part in "qkv":
        under = Recordings(loaded[name], drawn.repeats.tokens, under=input_from([head], part, control))
        moved = (under.get(1, "pattern") - clean).abs().amax((0, 2, 3))
        assert (moved[[0, 1, 3]] == 0).all(), "of the heads that share its key, the named one alone"
        assert moved[2] == 0 if part == "v" else moved[2] > 1e-3


# --- the same, where float32 is short of digits ---


@pytest.mark.parametrize("louder", [1, 40], ids=["rest below 1e-7", "rest below what float32 can hold"])
def test_where_nearly_all_attention_is_knocked_out_the_rest_is_the_softmax_of_the_other_scores(
    saturated, drawn, louder
):
    """Against float64, and beside it what the float32 pattern, divided by what is left of 1, would have given."""
    model, oracle, tokens = saturated.model, saturated.oracle, drawn.repeats.tokens
    heads = [Head.at(1, head) for head in range(4)]
    inputs = {"q": of(heads, lambda layer, head, row, query: louder * query)}
    loud = edits.each_head("louder", heads, "q", lambda head: lambda old, rows: louder * old)
    unchanged = Changes(**inputs)
    oracle.logits(tokens, unchanged)
    cells = {head: nearly_all(unchanged.seen, head) for head in range(4)}
    assert sum(len(some.query) for some in cells.values()) > 15
    both, changes = loud, Changes(**inputs, scores=of(heads, lambda *place: without(cells[place[1]])(*place)))
    for head in heads:
        both += knockout([head], cells[head.head])
    check(model, oracle, tokens, both, changes, close=1e-5 if louder == 1 else 1e-4)
    found, clean = (Recordings(model, tokens, under=some).get(1, "pattern") for some in (both, loud))
    off = []
    for head, some in cells.items():
        expected = torch.stack([changes.seen["pattern", 1, head, row] for row in range(3)])
        assert (found[:, head] - expected).abs().max() < 1e-4 * louder  # scores are that many times as large
        left = clean[:, head].clone()
        left[some.row, some.query, some.key] = 0
        rest = left.sum(-1, keepdim=True) if louder > 1 else 1 - clean[:, head].gather(-1, largest(clean[:, head]))
        off.append(((left / rest).double() - expected)[some.row, some.query])
    assert torch.cat(off).isnan().any() or torch.cat(off).abs().max() > 0.1


def nearly_all(seen, head: int) -> Cells:
    """The cells of a head of layer 1 that have all but 1e-7 of their query's attention."""
    patterns = torch.stack([seen["pattern", 1, head, row] for row in range(3)]).numpy()
    row, query, key = np.nonzero(patterns >= 1 - 1e-7)
    later = query > 0  # the first query has a single key
    return Cells(row[later], query[later], key[later])


def largest(pattern: torch.Tensor) -> torch.Tensor:
    return pattern.argmax(-1, keepdim=True)


def test_a_query_left_without_attention_has_an_output_of_0(random_gpt2, oracles):
    """Knocking out all that a query may see gives zeros there, not NaN, and nothing but that query is touched."""
    tokens, head = np.array([[0, 5, 6, 7]] * 3), Head.at(0, 0)
    everything = Cells(np.ones(3, int), np.full(3, 2), np.arange(3))
    intervention = knockout([head], everything)
    check(random_gpt2, oracles["gpt2"], tokens, intervention, Changes(scores=of([head], without(everything))), least=0)
    under, clean = Recordings(random_gpt2, tokens, under=intervention), Recordings(random_gpt2, tokens)
    for point, axis in (("z", 2), ("pattern", 1)):
        new, old = (some.get(0, point).select(axis, 0) for some in (under, clean))
        assert (new[1, 2] == 0).all() and (old[1, 2] != 0).any()
        new[1, 2] = old[1, 2]
        torch.testing.assert_close(new, old, atol=1e-6, rtol=1e-5)
    assert torch.isfinite(random_gpt2.logits(tokens, intervention.edits)).all()


# --- several at once ---


@pytest.mark.parametrize("part", ["q", "k", "v"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("pair", [(2, 3), (0, 2)], ids=["one key head", "two key heads"])
def test_two_edits_of_one_layer_both_act(loaded, oracles, drawn, name, part, pair):
    """On the Llama and Gemma 2, heads 2 and 3 share a key: the second edit must not undo the first."""
    model, oracle, tokens = loaded[name], oracles[name], drawn.repeats.tokens
    one, other = (Head.at(1, head) for head in pair)
    sources = [recorded(model, drawn.controls), Recordings(model, drawn.controls.tokens[[1, 2, 0]])]
    references = [oracle.record(drawn.controls.tokens), oracle.record(drawn.controls.tokens[[1, 2, 0]])]

    def both(layer, head, row, value):
        return references[head == other.head][part, layer, head, row]

    intervention = input_from([one], part, sources[0]) + input_from([other], part, sources[1])
    changes = Changes(**{part: of([one, other], both)})
    check(model, oracle, tokens, intervention, changes)
    both_act = model.logits(tokens, intervention.edits)
    for single in (one, other):
        assert (both_act - model.logits(tokens, intervention.of(single).edits)).abs().max() > 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_key_pattern_and_output_of_three_heads_of_one_layer(loaded, oracles, drawn, name):
    """And the knockout of a fourth, in whichever order they are given."""
    model, oracle, tokens = loaded[name], oracles[name], drawn.repeats.tokens
    reference, cells = oracle.record(drawn.controls.tokens), drawn.repeats.cells["prefix_matching"]
    key, pattern, output, knocked = (Head.at(1, head) for head in (2, 3, 0, 1))
    parts = [
        input_from([key], "k", recorded(model, drawn.controls)), uniform([pattern]), zero([output]),
        knockout([knocked], cells),
    ]  # fmt: skip
    changes = Changes(
        k=of([key], taken_from(reference, "k")), pattern=of([pattern], flat), z=of([output], silent),
        scores=of([knocked], without(cells)),
    )  # fmt: skip
    forwards, backwards = parts[0] + parts[1] + parts[2] + parts[3], parts[3] + parts[2] + parts[1] + parts[0]
    check(model, oracle, tokens, forwards, changes)
    assert torch.equal(model.logits(tokens, forwards.edits), model.logits(tokens, backwards.edits))
    whole = model.logits(tokens, forwards.edits)
    for head in forwards.heads:  # each of them acts
        rest = [edit for edit in forwards.edits if edit.head != head]
        assert (whole - model.logits(tokens, rest)).abs().max() > 1e-4, head


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_edits_of_one_head_come_one_after_the_other(loaded, oracles, drawn, name):
    """Query, key, scores, values and output of one head: each is made of what the edits before it left."""
    model, oracle, tokens, head = loaded[name], oracles[name], drawn.repeats.tokens, Head.at(1, 3)
    reference, cells = oracle.record(drawn.controls.tokens), drawn.repeats.cells["prefix_matching"]
    control = recorded(model, drawn.controls)
    halved = edits.each_head("halved", [head], "z", lambda head: lambda old, rows: old / 2)
    every = halved + knockout([head], cells)
    for part in "vkq":  # given from last to first
        every += input_from([head], part, control)
    inputs = {part: of([head], taken_from(reference, part)) for part in "qkv"}
    outputs = of([head], lambda layer, number, row, z: z / 2)
    check(model, oracle, tokens, every, Changes(**inputs, scores=of([head], without(cells)), z=outputs))


def test_at_one_point_the_second_sees_what_the_first_has_changed(random_gpt2, oracles, drawn):
    head = Head.at(1, 1)
    doubled = edits.each_head("doubled", [head], "z", lambda head: lambda old, rows: 2 * old)
    raised = edits.each_head("raised", [head], "z", lambda head: lambda old, rows: old + 1)
    tokens = drawn.repeats.tokens
    for both, expected in ((doubled + raised, lambda z: 2 * z + 1), (raised + doubled, lambda z: 2 * (z + 1))):
        changes = Changes(z=of([head], lambda layer, number, row, z, made=expected: made(z)))
        check(random_gpt2, oracles["gpt2"], tokens, both, changes)


def test_an_intervention_knows_its_name_its_heads_and_its_lowest_layer(drawn):
    first, second = knockout(HEADS[1:], drawn.repeats.cells["prefix_matching"]), uniform(HEADS[:2])
    both = first + second
    assert (first.name, second.name, both.name) == ("knockout", "uniform pattern", "knockout + uniform pattern")
    assert (first.first_layer, second.first_layer, both.first_layer) == (1, 0, 0)
    assert both.heads == (Head.at(1, 2), Head.at(1, 3), Head.at(0, 1))
    assert repr(both) == "Intervention(knockout + uniform pattern on 1.2, 1.3, 0.1)"
    assert [edit.point for edit in both.of(Head.at(1, 2)).edits] == ["scores", "pattern"]
    assert {edit.head for edit in both.of(Head.at(1, 2)).edits} == {Head.at(1, 2)}


# --- where an edit stands, and what is recorded ---


@pytest.mark.parametrize("name", FAMILIES)
def test_an_edit_below_changes_what_is_recorded_in_its_own_layer_what_follows_it_and_above_nothing(loaded, drawn, name):
    model, tokens = loaded[name], drawn.repeats.tokens
    clean = Recordings(model, tokens, batch_size=2)
    points = ("resid_pre", "q", "k", "v", "pattern", "z", "resid_post")

    def moved(layer: int, make) -> list[bool]:
        under = Recordings(model, tokens, batch_size=2, under=make([Head.at(layer, 1)]))
        return [not torch.equal(under.get(1, point), clean.get(1, point)) for point in points]

    assert moved(0, zero) == [True] * 7
    assert moved(1, zero) == [False, False, False, False, False, True, True]
    assert moved(1, uniform) == [False, False, False, False, True, True, True]
    assert moved(2, zero) == [False] * 7


def test_what_is_recorded_under_an_edit_is_what_the_edit_leaves(loaded, oracles, drawn):
    """Key and output of one head in turn, on the Llama, whose heads 2 and 3 share a key."""
    model, oracle, tokens, head = loaded["llama"], oracles["llama"], drawn.repeats.tokens, Head.at(1, 2)
    for intervention, point in ((input_from([head], "k", recorded(model, drawn.controls)), "k"), (zero([head]), "z")):
        found = Recordings(model, tokens, under=intervention).get(1, point)
        clean, control = (oracle.record(batch.tokens) for batch in (drawn.repeats, drawn.controls))
        for row, number in np.ndindex(3, 4):
            expected = clean[point, 1, number, row]
            if number == 2:
                expected = control["k", 1, 2, row] if point == "k" else torch.zeros_like(expected)
            torch.testing.assert_close(found[row, :, number].double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("point", ["v", "z"])
def test_a_reader_may_look_twice(loaded, drawn, point):
    """One head at a time, all together, and once more: an edit is made once, whatever was looked at before."""
    model, tokens, head = loaded["llama"], drawn.repeats.tokens, Head.at(1, 2)
    raised = edits.each_head("raised", [head], point, lambda head: lambda old, rows: old + 1)
    alone = Recordings(model, tokens, under=raised).get(1, "z")

    def look(layer, call):
        for _ in range(2):
            assert torch.equal(call.output_of(2), alone[:, :, 2])
            assert torch.equal(call.output, alone)

    clean = model.logits(tokens)
    model.read(tokens, look, [1], raised.edits)
    assert torch.equal(model.logits(tokens), clean)


def test_an_edit_that_the_run_does_not_reach(random_gpt2, drawn):
    """A run that is left below it has nothing to change; a run to the end that never comes by says so."""
    tokens = drawn.repeats.tokens
    above = zero([Head.at(2, 0)]).edits
    clean = random_gpt2.record(tokens, {(1, "z")})[1, "z"]
    assert torch.equal(random_gpt2.record(tokens, {(1, "z")}, above)[1, "z"], clean)
    seen = []
    random_gpt2.read(tokens, lambda layer, call: seen.append((layer, call.output)), [1], above)
    assert [layer for layer, _ in seen] == [1]
    assert torch.equal(seen[0][1], clean)
    with pytest.raises(UserError, match=r"edit of 7\.0 was not made"):
        random_gpt2.logits(tokens, zero([Head.at(7, 0)]).edits)
    stream = random_gpt2.record(tokens, {(2, "resid_pre")})[2, "resid_pre"]
    with pytest.raises(UserError, match=r"edit of 1\.0 changes nothing"):
        random_gpt2.logits(tokens, zero([Head.at(1, 0)]).edits, start=(2, stream))


def test_a_frozen_pattern_undoes_what_an_earlier_head_does_to_it(random_gpt2, drawn):
    """Ablating a head of layer 0 moves the patterns of layer 1; frozen from the clean run they stay."""
    tokens, later = drawn.repeats.tokens, [Head.at(1, head) for head in range(4)]
    clean = recorded(random_gpt2, drawn.repeats)
    ablated = zero([Head.at(0, 1)])
    frozen = ablated + pattern_from(later, clean)
    moved = Recordings(random_gpt2, tokens, under=ablated).get(1, "pattern")
    held = Recordings(random_gpt2, tokens, under=frozen).get(1, "pattern")
    assert (moved - clean.get(1, "pattern")).abs().max() > 1e-3
    assert torch.equal(held, clean.get(1, "pattern"))


def test_recordings_run_once_for_all_that_is_asked_and_no_point_twice(random_gpt2, drawn, monkeypatch):
    runs, run = [], Door.run
    monkeypatch.setattr(Door, "run", lambda self, inputs, **how: runs.append(inputs) or run(self, inputs, **how))
    found = Recordings(random_gpt2, drawn.repeats.tokens, batch_size=2)
    found.fetch({(0, "z"), (1, "q"), (1, "resid_pre")})
    assert [len(inputs["input_ids"]) for inputs in runs] == [2, 1]
    found.get(1, "q"), found.fetch({(0, "z"), (1, "resid_pre")})
    assert len(runs) == 2
    whole = Recordings(random_gpt2, drawn.repeats.tokens)
    for layer, point in ((0, "z"), (1, "q"), (1, "resid_pre")):
        torch.testing.assert_close(found.get(layer, point), whole.get(layer, point), atol=1e-5, rtol=1e-4)


def test_a_point_that_the_architecture_has_not_is_said(loaded, drawn):
    with pytest.raises(UserError, match="no resid_mid in layer 1"):
        recorded(loaded["neox"], drawn.repeats).get(1, "resid_mid")
    assert recorded(loaded["gpt2"], drawn.repeats).get(1, "resid_mid").shape == (3, 14, 32)


# --- what goes wrong ---


def test_an_edit_that_fails_leaves_nothing_behind(random_gpt2, drawn):
    tokens, before = drawn.repeats.tokens, traces(random_gpt2)
    clean = random_gpt2.logits(tokens)

    def fails(old, rows):
        raise ZeroDivisionError

    stream = random_gpt2.record(tokens, {(1, "resid_pre")})[1, "resid_pre"]
    broken = edits.each_head("broken", [Head.at(2, 1)], "z", lambda head: fails)
    for start in (None, (1, stream)):
        with pytest.raises(ZeroDivisionError):
            random_gpt2.logits(tokens, (zero(HEADS[1:]) + broken).edits, start=start)
        assert traces(random_gpt2) == before
        assert torch.equal(random_gpt2.logits(tokens), clean)


def test_a_model_that_does_not_use_its_head_outputs_takes_no_intervention(random_gpt2, drawn):
    useless = replace(random_gpt2, refused={"edits": "no intervention acts on it"})
    for run in (useless.logits, lambda tokens, edits: useless.record(tokens, {(1, "z")}, edits)):
        with pytest.raises(UserError, match="no intervention acts on it"):
            run(drawn.repeats.tokens, zero(HEADS).edits)
        run(drawn.repeats.tokens, ())


# --- classes and donors ---


def test_position_classes_tell_bos_targets_and_padding_apart():
    batch = TokenBatch.of([np.array([9, 5, 6, 5, 6]), np.array([9, 1])], pad=5)
    assert edits.position_classes(batch).tolist() == [[0, 1, 1, 2, 2], [0, 1, -1, -1, -1]]


def test_padding_takes_no_part_in_the_means_and_needs_none(random_gpt2, drawn):
    """Two rows, the second half padding: the class means are those of what is no padding."""
    rows = [drawn.repeats.tokens[0], drawn.repeats.tokens[1][:7]]
    batch = TokenBatch.of(rows, pad=random_gpt2.bos)
    classes = edits.position_classes(batch)
    source = Recordings(random_gpt2, batch.tokens)
    under = Recordings(random_gpt2, batch.tokens, under=mean([Head.at(1, 2)], source, classes))
    found, clean = (some.get(1, "z")[:, :, 2] for some in (under, source))
    for row, position in np.argwhere(classes >= 0):
        alike = clean[torch.from_numpy(classes == classes[row, position])]
        torch.testing.assert_close(found[row, position], alike.mean(0), atol=1e-6, rtol=1e-5)
    assert torch.isfinite(random_gpt2.logits(batch.tokens, mean(HEADS, source, classes).edits)).all()


@given(rows=st.integers(2, 40), seed=st.integers(0, 2**32))
def test_no_row_is_its_own_donor_and_every_row_gives_once(rows, seed):
    donors = edits.donor_rows(rows, seed)
    assert (donors != np.arange(rows)).all()
    assert sorted(donors) == list(range(rows))


def test_one_row_has_no_donor():
    with pytest.raises(UserError, match="two rows"):
        edits.donor_rows(1, seed=0)
