"""One call of attention against a slow oracle: float64, one cell at a time, every way that scores come about."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from common.attention import call as call_module
from common.attention.call import POINTS, Call, Edit
from common.attention.head import Head

BATCH, HEADS, KEY_HEADS, LENGTH, WIDTH = 2, 4, 2, 11, 6


def numbers(*shape: int, seed: int = 0, size: float = 1.0) -> torch.Tensor:
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def windowed(length: int = LENGTH, window: int = 4) -> torch.Tensor:
    """[1, 1, query, key]: true where a query sees: itself and what stands up to window - 1 before it."""
    far = torch.arange(length)[:, None] - torch.arange(length)
    return ((far >= 0) & (far < window))[None, None]


def in_numbers(seen: torch.Tensor) -> torch.Tensor:
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


def per_head() -> torch.Tensor:
    seen = torch.cat([windowed(window=window) for window in (2, 3, 5, 11)], 1)
    return seen.expand(BATCH, -1, -1, -1)


def padded() -> torch.Tensor:
    """[batch, 1, 1, key]: the second row's first three keys are padding."""
    seen = torch.ones(BATCH, 1, 1, LENGTH, dtype=torch.bool)
    seen[1, ..., :3] = False
    return seen


# What a family may bring: (mask, options). In all of them two query heads share a key head.
KINDS = {
    "causal": (None, {}),
    "all keys": (None, {"causal": False}),
    "scale": (None, {"scale": 1.3}),
    "softcap": (None, {"softcap": 0.7}),
    "bias": (None, {"bias": numbers(1, HEADS, LENGTH, LENGTH, seed=3)}),
    "bias by key": (None, {"bias": numbers(BATCH, HEADS, 1, LENGTH, seed=4)}),
    "sinks": (None, {"sinks": numbers(HEADS, seed=5)}),
    "window": (windowed(), {}),
    "window in numbers": (in_numbers(windowed()), {}),
    "a window per head": (per_head(), {}),
    "padding": (padded(), {"causal": False}),
    "bias and window": (windowed(), {"bias": numbers(1, HEADS, LENGTH, LENGTH, seed=3), "scale": 0.4}),
    "softcap and bias": (None, {"softcap": 0.7, "bias": numbers(1, HEADS, LENGTH, LENGTH, seed=3)}),
    "softcap, window and sinks": (windowed(), {"softcap": 0.9, "sinks": numbers(HEADS, seed=5)}),
}


SAME = {"window", "window in numbers"}


def made(kind: str = "causal", *, size: float = 1.5, edits=()) -> Call:
    mask, options = KINDS[kind]
    q = numbers(BATCH, HEADS, LENGTH, WIDTH, seed=10, size=size)
    k, v = (numbers(BATCH, KEY_HEADS, LENGTH, WIDTH, seed=seed, size=size) for seed in (11, 12))
    call = Call(torch.nn.Identity(), q, k, v, mask, **options)
    if edits:
        call.under(edits, slice(0, BATCH))
    return call


def at(tensor: torch.Tensor, *index: int):
    """A cell of a tensor whose dimensions of size 1 stand for all."""
    return tensor[tuple(min(i, size - 1) for i, size in zip(index, tensor.shape, strict=True))].item()


def no_change(point: str, head: int, row: int, value: np.ndarray) -> np.ndarray:
    return value


def slow_head(kind: str, row: int, head: int, *, change=no_change, size: float = 1.5) -> dict[str, np.ndarray]:
    """scores, pattern and z of one head on one row, with `change(point, head, row, value)` at each point."""
    mask, options = KINDS[kind]
    call = made(kind, size=size)
    shared = head * KEY_HEADS // HEADS
    q = change("q", head, row, call.q[row, head].double().numpy())
    k, v = (change(n, head, row, t[row, shared].double().numpy()) for n, t in (("k", call.k), ("v", call.v)))
    scores = np.full((LENGTH, LENGTH), -np.inf)
    for query in range(LENGTH):
        for key in range(LENGTH):
            score = options.get("scale", WIDTH**-0.5) * float(q[query] @ k[key])
            if "softcap" in options:
                score = options["softcap"] * math.tanh(score / options["softcap"])
            if "bias" in options:
                score += at(options["bias"], row, head, query, key)
            seen = key <= query or not options.get("causal", True)
            if mask is not None:
                allowed = at(mask, row, head, query, key)
                seen = bool(allowed) if mask.dtype == torch.bool else allowed == 0
            if seen:
                scores[query, key] = score
    scores = change("scores", head, row, scores)
    weights = np.exp(scores)
    total = weights.sum(-1, keepdims=True)
    if "sinks" in options:
        total = total + math.exp(options["sinks"][head].item())
    pattern = change("pattern", head, row, np.divide(weights, total, where=total > 0, out=np.zeros_like(weights)))
    return {"q": q, "k": k, "v": v, "scores": scores, "pattern": pattern, "z": change("z", head, row, pattern @ v)}


@pytest.mark.parametrize("block", [1, 300, 1 << 20], ids=["a query", "some queries", "whole"])
@pytest.mark.parametrize("kind", KINDS)
def test_everything_a_call_shows_is_the_slow_oracles(kind, block, monkeypatch):
    monkeypatch.setattr(call_module, "BLOCK", block)
    call = made(kind)
    whole, output = call.pattern(), call.output
    for row in range(BATCH):
        for head in range(HEADS):
            slow = slow_head(kind, row, head)
            assert call.scores_of(head)[row, -1].shape == (LENGTH,)
            assert call.scores_of(head)[row].numpy() == pytest.approx(slow["scores"], abs=1e-5)
            assert call.pattern_of(head)[row].numpy() == pytest.approx(slow["pattern"], abs=1e-6)
            assert whole[row, head].numpy() == pytest.approx(slow["pattern"], abs=1e-6)
            assert output[row, :, head].numpy() == pytest.approx(slow["z"], abs=1e-5)
            for shown, point in ((call.queries(), "q"), (call.keys(), "k"), (call.values(), "v")):
                assert np.array_equal(shown[row, head].double().numpy(), slow[point])


@pytest.mark.parametrize("kind", KINDS)
def test_no_two_kinds_show_the_same(kind):
    """Whatever a kind adds is seen: the oracle of another kind does not fit."""
    others = [slow_head(other, 1, 2)["pattern"] for other in KINDS if other != kind and not {kind, other} <= SAME]
    pattern = made(kind).pattern()[1, 2].numpy()
    assert all(np.abs(pattern - other).max() > 1e-3 for other in others)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_the_pattern_some_queries_at_a_time(kind, monkeypatch):
    monkeypatch.setattr(call_module, "BLOCK", BATCH * HEADS * LENGTH * 3)
    call, seen = made(kind), []
    pattern = call.pattern()
    for start, block in call.blocks():
        stop = start + block.shape[2]
        seen.append((start, stop))
        assert torch.equal(block, pattern[:, :, start:stop, : block.shape[-1]])
        assert not pattern[:, :, start:stop, block.shape[-1] :].any()
    assert seen == [(0, 3), (3, 6), (6, 9), (9, 11)]


# --- edits ---


def change_of(point: str, value: torch.Tensor) -> torch.Tensor:
    """Something that no head does by itself."""
    if point == "scores":
        return torch.where(torch.isinf(value), value, -2.0 * value)
    return value.flip(-1) * 0.5


def slow_change(point: str):
    return lambda of, head, row, value: (
        change_of(point, torch.from_numpy(value)).numpy() if (of, head) == (point, 2) else value
    )


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_changes_what_comes_after_it_in_that_head_alone(kind, point):
    clean = made(kind)
    call = made(kind, edits=[Edit(Head.at(0, 2), point, lambda old, rows: change_of(point, old))])
    for row in range(BATCH):
        slow = slow_head(kind, row, 2, change=slow_change(point))
        assert call.scores_of(2)[row].numpy() == pytest.approx(slow["scores"], abs=2e-5)
        assert call.pattern()[row, 2].numpy() == pytest.approx(slow["pattern"], abs=2e-5)
        assert call.output[row, :, 2].numpy() == pytest.approx(slow["z"], abs=5e-5)
        shown = {"q": call.queries(), "k": call.keys(), "v": call.values()}
        for name, value in shown.items():
            assert value[row, 2].numpy() == pytest.approx(slow[name], abs=1e-6)
    assert (call.output[:, :, 2] - clean.output[:, :, 2]).abs().max() > 1e-2
    others = [0, 1, 3]  # 3 shares its keys and values with 2
    assert torch.equal(call.output[:, :, others], clean.output[:, :, others])
    assert torch.equal(call.pattern()[:, others], clean.pattern()[:, others])
    assert torch.equal(call.keys()[:, others], clean.keys()[:, others])


@pytest.mark.parametrize("block", [1, 1 << 20])
def test_blocks_show_edits_that_come_before_the_pattern(block, monkeypatch):
    monkeypatch.setattr(call_module, "BLOCK", block)
    for point in POINTS:
        call = made(edits=[Edit(Head.at(0, 2), point, lambda old, rows, point=point: change_of(point, old))])
        off = (call.pattern() - made().pattern()).abs()
        assert (off[:, 2].max() > 1e-3) == (point not in ("v", "z"))
        assert not off[:, [0, 1, 3]].any()


def test_edits_are_made_in_their_order_and_each_sees_what_came_before():
    add = Edit(Head.at(0, 1), "z", lambda old, rows: old + 1.0)
    double = Edit(Head.at(0, 1), "z", lambda old, rows: 2.0 * old)
    plain = made().output[:, :, 1]
    assert torch.allclose(made(edits=[add, double]).output[:, :, 1], 2 * (plain + 1))
    assert torch.allclose(made(edits=[double, add]).output[:, :, 1], 2 * plain + 1)
    seen = {}
    zero_q = Edit(Head.at(0, 1), "q", lambda old, rows: torch.zeros_like(old))
    look = Edit(Head.at(0, 1), "pattern", lambda old, rows: seen.setdefault("pattern", old))
    _ = made(edits=[look, zero_q]).output
    assert seen["pattern"][0, 5, :6].numpy() == pytest.approx(np.full(6, 1 / 6))


def test_an_edit_is_told_which_rows_it_is_about():
    told = []
    call = made()
    call.under([Edit(Head.at(0, 0), "v", lambda old, rows: told.append(rows) or old)], slice(4, 6))
    _ = call.output
    assert told == [slice(4, 6)]


def test_a_query_that_may_see_nothing_attends_to_nothing():
    call = made(edits=[Edit(Head.at(0, 1), "scores", lambda old, rows: torch.full_like(old, -torch.inf))])
    assert not call.pattern()[:, 1].any() and not call.output[:, :, 1].any()
    assert call.pattern()[:, 0].sum(-1).numpy() == pytest.approx(np.ones((BATCH, LENGTH)))


def test_the_number_type_of_the_model_stays():
    """An edit may compute in another type; what the projection gets has the model's."""
    call = made(edits=[Edit(Head.at(0, 1), "z", lambda old, rows: old.double() + 1)])
    half = Call(call.module, call.q.bfloat16(), call.k.bfloat16(), call.v.bfloat16(), None)
    half.under([Edit(Head.at(0, 1), "pattern", lambda old, rows: old.double())], slice(0, BATCH))
    assert call.output.dtype == torch.float32 and half.output.dtype == torch.bfloat16
    assert half.pattern().dtype == torch.float32, "patterns are summed in more than 16 bits"
    assert half.output.float().numpy() == pytest.approx(made().output.numpy(), abs=0.1)


# --- what the output owes to some cells ---


def cells_of(pairs: list[tuple[int, int, int]]) -> list[torch.Tensor]:
    return [torch.tensor(index) for index in zip(*pairs, strict=True)]


# Query 0 loses all that it sees where it sees itself alone; queries 4 and 7 lose two cells, query 9 one in one row.
CELLS = [(0, 0, 0), (0, 4, 2), (0, 4, 3), (1, 4, 4), (0, 7, 7), (0, 7, 5), (1, 9, 8)]


def slow_due(kind: str, cells, *, size: float = 1.5) -> np.ndarray:
    """[batch, query, head, d_head], from float64 scores with and without the cells."""
    due = np.zeros((BATCH, LENGTH, HEADS, WIDTH))
    for row in range(BATCH):
        gone = [(query, key) for at_row, query, key in cells if at_row == row]

        def knocked(point, head, at_row, value, gone=gone):
            if point == "scores":
                value = value.copy()
                for query, key in gone:
                    value[query, key] = -np.inf
            return value

        for head in range(HEADS):
            whole, left = (slow_head(kind, row, head, change=c, size=size)["z"] for c in (no_change, knocked))
            due[row, :, head] = whole - left
    return due


@pytest.mark.parametrize("block", [1, 400, 1 << 20])
@pytest.mark.parametrize("kind", KINDS)
def test_due_to_some_cells_is_the_output_less_that_without_them(kind, block, monkeypatch):
    monkeypatch.setattr(call_module, "BLOCK", block)
    due = made(kind).due_to(*cells_of(CELLS)).numpy()
    slow = slow_due(kind, CELLS)
    assert due == pytest.approx(slow, abs=1e-5)
    assert np.abs(slow[0, 4]).max() > 1e-2
    untouched = [(0, 3), (1, 0), (1, 7), (0, 9)]
    assert not any(due[place].any() for place in untouched)


def test_due_to_cells_that_hold_nearly_all_attention():
    """Scores so far apart that queries pay more than 1 - 1e-7 to the cells: renormalising the pattern would be 0/0."""
    size = 8.0
    pattern = made(size=size).pattern()
    best = pattern.argmax(-1)  # [batch, head, query]
    cells = sorted({(row, query, int(best[row, 2, query])) for row in range(BATCH) for query in range(3, LENGTH)})
    paid = np.array([pattern[row, 2, query, key].item() for row, query, key in cells])
    assert (paid >= 1 - 1e-7).sum() >= 3, "or the test is about nothing"
    due = made(size=size).due_to(*cells_of(cells)).numpy()
    slow = slow_due("causal", cells, size=size)
    assert due[:, :, 2] == pytest.approx(slow[:, :, 2], rel=1e-4, abs=1e-3)
    by_pattern = pattern.clone()
    row, query, key = cells_of(cells)
    by_pattern[row, :, query, key] = 0
    by_pattern = by_pattern / by_pattern.sum(-1, keepdim=True)
    naive = ((pattern - by_pattern)[:, 2] @ made(size=size).values()[:, 2]).numpy()
    assert not np.abs(naive - slow[:, :, 2]).max() < 0.1, "the trap is there: a difference, or 0/0"


def test_due_to_disregards_edits():
    edit = Edit(Head.at(0, 2), "q", lambda old, rows: torch.zeros_like(old))
    assert torch.equal(made(edits=[edit]).due_to(*cells_of(CELLS)), made().due_to(*cells_of(CELLS)))


# --- shapes ---


@pytest.mark.parametrize(
    "spoil",
    [
        {"k": numbers(BATCH, KEY_HEADS, LENGTH, WIDTH + 1)},
        {"v": numbers(BATCH + 1, KEY_HEADS, LENGTH, WIDTH)},
        {"q": numbers(HEADS, LENGTH, WIDTH)},
        {"q": numbers(BATCH, HEADS, LENGTH, WIDTH).long()},
        {"mask": windowed(LENGTH + 1)},
        {"bias": numbers(1, HEADS + 1, LENGTH, LENGTH)},
        {"sinks": numbers(HEADS + 1)},
    ],
    ids=lambda spoil: next(iter(spoil)),
)
def test_shapes_that_do_not_fit_are_an_error_in_tests(spoil):
    call = made()
    given = {"q": call.q, "k": call.k, "v": call.v, "mask": None}
    assert Call(call.module, **given).output.shape == (BATCH, LENGTH, HEADS, WIDTH)
    with pytest.raises(TypeCheckError):
        Call(call.module, **(given | spoil))


def test_an_edit_that_returns_another_shape_is_an_error_in_tests():
    call = made(edits=[Edit(Head.at(0, 2), "q", lambda old, rows: old[0])])
    with pytest.raises(TypeCheckError):
        call.query_of(2)
