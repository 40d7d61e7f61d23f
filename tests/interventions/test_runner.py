"""The short way gives what the whole model gives, runs less, and keeps what is done when it is stopped."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common import UserError
from common.attention.head import Head
from common.heads.tokens import TokenBatch, continuing
from common.interventions import edits
from common.interventions.edits import Recordings, input_from, knockout, mean, pattern_from, uniform, zero
from common.interventions.paths import path, without_source
from common.interventions.runner import Predictions, Runner, greedy, sweep
from tests.oracle import ARCHITECTURES, traces

FAMILIES = (*ARCHITECTURES, "gemma2")


def predictions_of(batch) -> Predictions:
    return Predictions.of(batch.tokens, continuing(batch))


def runner_of(model, drawn, batch_size: int = 2) -> Runner:
    return Runner(model, drawn.repeats.tokens, predictions_of(drawn.repeats), batch_size=batch_size)


def log_probs(logits: torch.Tensor, predictions: Predictions) -> np.ndarray:
    """By hand, prediction by prediction, from whole logits."""
    normed = logits.double().log_softmax(-1)
    places = zip(predictions.row, predictions.position, predictions.token, strict=True)
    return np.array([normed[row, position, token].item() for row, position, token in places])


def every_kind(model, drawn, paths: bool = True):
    """One intervention of each kind on a head of layer 1."""
    clean, control = (Recordings(model, batch.tokens, batch_size=2) for batch in (drawn.repeats, drawn.controls))
    classes = edits.position_classes(drawn.repeats)
    head, below = [Head.at(1, 2)], Head.at(0, 0)
    yield zero(head)
    yield mean(head, control, classes)
    yield uniform(head)
    yield pattern_from(head, control)
    yield knockout(head, drawn.repeats.cells["prefix_matching"])
    for part in "qkv":
        yield input_from(head, part, control)
        if paths:
            yield path(zero([below]), head, part, clean)
            yield without_source([below], head, part, clean)


def test_predictions_are_one_before_the_token_they_predict():
    found = Predictions.of(np.array([[9, 5, 6], [9, 7, 8]]), np.array([[True, False, True], [False, True, False]]))
    assert (found.row.tolist(), found.position.tolist(), found.token.tolist()) == ([0, 1], [1, 0], [6, 7])


@pytest.mark.parametrize("name", FAMILIES)
def test_it_reads_what_transformers_reads(loaded, oracles, drawn, name):
    runner = runner_of(loaded[name], drawn)
    expected = log_probs(oracles[name].logits(drawn.repeats.tokens), runner.predictions)
    assert runner.measure(None, {"clean": runner.log_prob})["clean"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sweep_gives_what_whole_runs_give(loaded, drawn, name):
    model, tokens = loaded[name], drawn.repeats.tokens
    runner, before = runner_of(model, drawn), traces(model)
    clean = model.logits(tokens)
    asked = list(every_kind(model, drawn, paths=name != "gemma2"))
    asked += [zero([Head.at(layer, 1)]) for layer in reversed(range(model.n_layers))]
    asked.append(zero([Head.at(0, 1), Head.at(1, 2)]))
    layers, names = [], []
    for intervention, found in sweep(runner, asked):
        whole = log_probs(model.logits(tokens, intervention.edits), runner.predictions)
        assert found == pytest.approx(whole, abs=1e-4), intervention.name
        assert np.abs(whole - log_probs(clean, runner.predictions)).max() > 1e-4, intervention.name
        layers.append(intervention.first_layer)
        names.append(intervention.name)
    assert layers == sorted(layers)
    assert sorted(names) == sorted(one.name for one in asked)
    assert traces(model) == before
    assert torch.equal(model.logits(tokens), clean)


def test_in_16_bits_every_kind_does_what_it_does_in_32(loaded, drawn):
    """As far as 16 bits can tell, and the model is the same afterwards to the bit."""
    half, tokens, before = loaded["16 bits"], drawn.repeats.tokens, traces(loaded["16 bits"])
    clean, runner = half.logits(tokens), runner_of(half, drawn)
    pairs = zip(every_kind(half, drawn), every_kind(loaded["gpt2"], drawn), strict=True)
    for coarse, fine in pairs:
        assert coarse.name == fine.name
        expected = loaded["gpt2"].logits(tokens, fine.edits)
        changed = half.logits(tokens, coarse.edits)
        assert changed.dtype == torch.bfloat16
        assert (changed.float() - expected).abs().max() < 0.02 * expected.abs().max(), coarse.name
        whole = log_probs(changed, runner.predictions)
        assert runner.measure(coarse, {"x": runner.log_prob})["x"] == pytest.approx(whole, abs=1e-2)
    assert traces(half) == before
    assert torch.equal(half.logits(tokens), clean)


@pytest.mark.parametrize("name", [*FAMILIES, "16 bits"])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_run_from_a_layer_on_has_the_whole_runs_bits(loaded, drawn, name, batch_size):
    """Layer after layer, in the order of a sweep; what the whole model gives for the same rows at once."""
    model, tokens = loaded[name], drawn.repeats.tokens
    runner = runner_of(model, drawn, batch_size)
    predictions = runner.predictions
    kept: dict[int, torch.Tensor] = {}

    def keep(logits, which):
        kept[int(predictions.row[which[0]]) // batch_size * batch_size] = logits.clone()
        return logits[:, 0]

    for layer in (None, 0, 1, 2):
        intervention = None if layer is None else zero([Head.at(layer, 1)]) + uniform([Head.at(2, 3)])
        kept.clear()
        runner.measure(intervention, {"kept": keep})
        assert sorted(kept) == list(range(0, 3, batch_size))
        for start, logits in kept.items():
            rows = slice(start, min(start + batch_size, 3))
            inside = (predictions.row >= rows.start) & (predictions.row < rows.stop)
            at = predictions.row[inside] - start, predictions.position[inside]
            changes = intervention.edits if intervention else ()
            assert torch.equal(logits, model.logits(tokens[rows], changes, rows=rows, at=at))
            if layer is not None:
                assert not torch.equal(logits, model.logits(tokens[rows], rows=rows, at=at))


def test_interventions_may_come_in_any_order(random_gpt2, drawn):
    """A sweep goes up; down, or up and down, the clean stream is made again and nothing else comes out."""
    runner = runner_of(random_gpt2, drawn)
    asked = {layer: zero([Head.at(layer, 2)]) for layer in range(3)}
    upwards = {
        layer: runner_of(random_gpt2, drawn).measure(one, {"x": runner.log_prob}) for layer, one in asked.items()
    }
    for layer in (2, 0, 1, 2, 1, 0):
        assert np.array_equal(runner.measure(asked[layer], {"x": runner.log_prob})["x"], upwards[layer]["x"])


def test_of_the_clean_stream_one_layer_is_kept(random_gpt2, drawn):
    """Rows by positions by width are many numbers: those of layers that a sweep has left behind go."""
    runner = runner_of(random_gpt2, drawn)
    for intervention, _ in sweep(runner, [zero([Head.at(layer, 2)]) for layer in range(3)]):
        layers = [layer for layer in [intervention.first_layer] if layer > 0]
        assert [list(chunk.streams) for chunk in runner._chunks] == [layers] * 2


def test_rows_without_a_prediction_are_passed_over_and_none_at_all_is_said(random_gpt2, drawn):
    plain = np.concatenate([[random_gpt2.bos], np.arange(20, 33)])
    tokens = np.stack([plain, plain + 20, *drawn.repeats.tokens])
    batch = TokenBatch.of(list(tokens), pad=0)
    found = Runner(random_gpt2, tokens, predictions_of(batch), batch_size=2)
    alone = runner_of(random_gpt2, drawn)
    ablation = zero([Head.at(0, 0)])
    each = [runner.measure(ablation, {"log_prob": runner.log_prob})["log_prob"] for runner in (found, alone)]
    assert each[0] == pytest.approx(each[1], abs=1e-5)
    with pytest.raises(UserError, match="continues an earlier copy"):
        Runner(random_gpt2, tokens[:2], Predictions.of(tokens[:2], np.zeros((2, 14), dtype=bool)))


def test_rank_and_kl_by_hand(random_gpt2, oracles, drawn):
    runner = runner_of(random_gpt2, drawn)
    tokens, predictions = drawn.repeats.tokens, runner.predictions
    metrics = {"rank": runner.rank, "kl": runner.kl}
    ablation = zero([Head.at(0, 1), Head.at(2, 2)])
    found = runner.measure(ablation, metrics)
    clean = oracles["gpt2"].logits(tokens)
    changed = random_gpt2.logits(tokens, ablation.edits).double()
    for place, (row, position, token) in enumerate(
        zip(predictions.row, predictions.position, predictions.token, strict=True)
    ):
        logits = changed[row, position]
        assert found["rank"][place] == torch.argsort(logits, descending=True).tolist().index(token) + 1
        before, after = clean[row, position].softmax(-1), logits.softmax(-1)
        assert found["kl"][place] == pytest.approx((before * (before / after).log()).sum().item(), abs=1e-4)
    assert found["kl"].max() > 1e-3
    unchanged = runner.measure(None, metrics)
    assert unchanged["kl"] == pytest.approx(np.zeros(len(predictions.row)), abs=1e-6)
    assert (unchanged["rank"] != found["rank"]).any()


def test_of_equal_logits_the_rank_is_the_best_place(random_gpt2, drawn):
    runner = runner_of(random_gpt2, drawn)
    token = runner.predictions.token[0]
    logits = torch.zeros(1, random_gpt2.d_vocab)
    logits[0, [token, 3]] = 1.0
    logits[0, 4] = 2.0
    assert runner.rank(logits, np.array([0])).tolist() == [2]


def test_layers_below_are_not_run_again_and_predictions_alone_are_unembedded(random_gpt2, drawn):
    runner = runner_of(random_gpt2, drawn, batch_size=3)
    seen = []
    network = random_gpt2.door.network
    handles = [
        network.transformer.h[layer].attn.register_forward_pre_hook(lambda *_, layer=layer: seen.append(layer))
        for layer in range(3)
    ]
    handles.append(network.lm_head.register_forward_hook(lambda *call: seen.append(tuple(call[2].shape[:-1]))))
    try:
        list(sweep(runner, [zero([Head.at(1, 0)]), uniform([Head.at(2, 0)]), zero([Head.at(1, 1)])]))
    finally:
        for handle in handles:
            handle.remove()
    # Layer 0 to reach layer 1; 1 in two runs, to reach it, and to reach layer 2; 2 in three runs, and to reach it. To
    # reach a layer is to enter its attention, where the run is left.
    assert [seen.count(layer) for layer in range(3)] == [1, 4, 4]
    assert [shape for shape in seen if isinstance(shape, tuple)] == [(1, len(runner.predictions.row))] * 3


@pytest.mark.parametrize("place", [(0, 1), (2, 3)])
@pytest.mark.parametrize("edited", [None, 0, 2])
def test_what_is_watched_is_the_attention_of_the_whole_run(random_gpt2, drawn, place, edited):
    """Of a layer above the edit, of its own, and below, where the edit does nothing."""
    head, tokens, runner = Head.at(*place), drawn.repeats.tokens, runner_of(random_gpt2, drawn)
    intervention = None if edited is None else uniform([Head.at(edited, 1), Head.at(edited, 3)])
    seen = {}
    for _ in range(2):  # the second time from a stream that is kept
        runner.watch(head.layer, intervention, lambda call, rows: seen.update({rows.start: call.pattern_of(head.head)}))
        whole = Recordings(random_gpt2, tokens, under=intervention).get(head.layer, "pattern")[:, head.head]
        torch.testing.assert_close(torch.cat([seen[0], seen[2]]), whole, atol=1e-5, rtol=1e-4)
    clean = Recordings(random_gpt2, tokens).get(head.layer, "pattern")[:, head.head]
    assert ((whole - clean).abs().max() > 1e-3) == (edited is not None and edited <= head.layer)


# --- sweeps ---


def test_a_sweep_that_is_stopped_keeps_what_is_done_and_leaves_nothing_behind(random_gpt2, drawn):
    tokens, before = drawn.repeats.tokens, traces(random_gpt2)
    clean = random_gpt2.logits(tokens)
    done = []

    def stop_at_the_third(count: int) -> None:
        if len(done) == 3:
            raise KeyboardInterrupt

    def collect(found) -> None:
        for one in found:
            done.append(one)

    asked = [zero([Head.at(layer, head)]) for head in range(4) for layer in range(3)]
    with pytest.raises(KeyboardInterrupt):
        collect(sweep(runner_of(random_gpt2, drawn), asked, advance=stop_at_the_third))
    assert [intervention.heads for intervention, _ in done] == [(Head.at(0, head),) for head in range(3)]
    assert all(np.isfinite(found).all() for _, found in done)
    assert traces(random_gpt2) == before
    assert torch.equal(random_gpt2.logits(tokens), clean)


def test_a_run_that_is_stopped_inside_leaves_nothing_behind_and_the_next_is_right(random_gpt2, drawn):
    """Ctrl-C within a forward pass that passes by the layers below."""
    runner, before = runner_of(random_gpt2, drawn), traces(random_gpt2)
    clean = random_gpt2.logits(drawn.repeats.tokens)

    def stop(old, rows):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(
            sweep(runner, [zero([Head.at(1, 0)]), edits.each_head("stopped", [Head.at(2, 1)], "z", lambda head: stop)])
        )
    assert traces(random_gpt2) == before
    assert torch.equal(random_gpt2.logits(drawn.repeats.tokens), clean)
    ablation, other = zero([Head.at(2, 0)]), runner_of(random_gpt2, drawn)
    each = [some.measure(ablation, {"x": some.log_prob})["x"] for some in (runner, other)]
    assert np.array_equal(*each)


def test_the_bar_is_told_of_each_intervention(random_gpt2, drawn):
    told: list[int] = []
    asked = [zero([Head.at(layer, 0)]) for layer in range(3)]
    runner = runner_of(random_gpt2, drawn)
    assert len(list(sweep(runner, asked, advance=told.append))) == 3
    assert told == [1, 1, 1]


def test_greedy_takes_the_head_that_costs_most_each_time(random_gpt2, drawn):
    runner = runner_of(random_gpt2, drawn)
    candidates = [Head.at(2, 3), Head.at(0, 0), Head.at(0, 1), Head.at(1, 1)]

    def loss(heads) -> float:
        return -log_probs(random_gpt2.logits(drawn.repeats.tokens, zero(heads).edits), runner.predictions).mean()

    chosen, ticks = [], []
    for head, losses in greedy(runner, candidates, zero, most=3, advance=ticks.append):
        rest = [other for other in candidates if other not in chosen]
        assert head == max(rest, key=lambda other: loss([*chosen, other]))
        chosen.append(head)
        assert losses.mean() == pytest.approx(loss(chosen), abs=1e-4)
    assert len(chosen) == 3
    assert sum(ticks) == 4 + 3 + 2
    assert len(list(greedy(runner, candidates[:2], zero, most=5))) == 2


def test_of_heads_that_cost_the_same_greedy_takes_the_lowest(random_gpt2, drawn):
    """Edits that change nothing cost nothing, whichever head they are made on."""
    runner = runner_of(random_gpt2, drawn)

    def nothing(heads):
        return edits.each_head("nothing", [Head.at(2, 0)], "z", lambda head: lambda old, rows: old)

    candidates = [Head.at(2, 1), Head.at(1, 3), Head.at(1, 2)]
    assert [head for head, _ in greedy(runner, candidates, nothing, most=2)] == [Head.at(1, 2), Head.at(1, 3)]
