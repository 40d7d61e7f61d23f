"""Parts of heads, paths and predictions: on models whose answer is known by construction, then against slow ways."""

from __future__ import annotations

import math
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from common import UserError
from common.circuits import qk
from common.heads.tokens import TokenBatch, battery, continuing
from common.interventions import effects, interventions
from common.interventions import qk_interventions as qki
from common.interventions.edits import Edit, Recordings, ValueEdit
from common.loading import models
from common.results import tables
from common.results.qk import Chosen
from tests import architectures
from tests.handbuilt import COPY, LOGIT, Role
from tests.oracle import assert_no_hooks

SENDER, INDUCTION, DECOY = (0, 0), (1, 0), (1, 1)
ROLES = {
    SENDER: Role("previous-token", slot=0),
    (0, 1): Role("fixed-offset", offset=3),
    (0, 2): Role("duplicate-token"),
    INDUCTION: Role("induction", strength=0.95, slot=0, writing=COPY),
    DECOY: Role("attends-only", strength=0.9, slot=0),  # looks like one, and writes nothing
    (1, 2): Role("bos-sink"),
}


def laboratory(model, *heads, attending=()):
    """For heads of one layer, the first leading."""
    layer = heads[0][0]
    attends = np.zeros((model.n_layers, model.n_heads), dtype=bool)
    for head in attending:
        attends[head] = True
    chosen = Chosen(layer, [head for _, head in heads], heads[0][1], [], [], "")
    return qki.Laboratory(model, chosen, SimpleNamespace(attends=attends), seed=0, batch_size=8)


def by_kind(experiments, metric, head):
    """{name, or (sender, name) of a path: the effect on the metric}."""
    wanted = [one for one in experiments.effects if (one["metric"], one["head"]) == (metric, "{}.{}".format(*head))]
    return {(one["sender"], one["name"]) if "sender" in one else one["name"]: one for one in wanted}


@pytest.fixture(scope="module")
def built(hand_built) -> models.Model:
    return hand_built(ROLES)[1]


@pytest.fixture(scope="module")
def done(built) -> qki.Experiments:
    return qki.experiment(laboratory(built, INDUCTION, DECOY, attending=[INDUCTION, DECOY]))


# --- by construction ---


def test_without_its_pattern_query_key_or_output_the_only_induction_head_leaves_chance(built, done):
    """It then rests on BOS, about which it writes nothing: every logit is 0 and the loss that of guessing."""
    chance = math.log(built.bridge.cfg.d_vocab)
    repeats = by_kind(done, "loss_at_repeats", INDUCTION)
    clean = repeats["mean"]["clean"]
    assert clean < chance - 2
    for kind in ("pattern", "query", "key", "forbid", "mean"):
        assert clean + repeats[kind]["effect"] == pytest.approx(chance, abs=0.1), kind
        assert repeats[kind]["interval"][0] > 2
    assert 0.9 * (chance - clean) < repeats["uniform"]["effect"] <= chance - clean + 0.01  # a little for every token


def test_with_the_values_of_another_row_it_writes_what_does_not_follow(built, done):
    """Worse than guessing: it raises a wrong token by LOGIT x COPY x strength."""
    repeats = by_kind(done, "loss_at_repeats", INDUCTION)["values"]
    vocabulary = built.bridge.cfg.d_vocab
    raised = math.log(vocabulary + math.exp(LOGIT * COPY * 0.95) - 1)
    assert math.log(vocabulary) < repeats["clean"] + repeats["effect"] < raised + 0.5


def test_where_it_looks_changes_with_pattern_query_and_key_alone(done):
    own = by_kind(done, "prefix_matching", INDUCTION)
    clean = own["mean"]["clean"]
    assert clean == pytest.approx(0.95, abs=0.02)
    for kind in ("pattern", "query", "key", "forbid"):
        assert clean + own[kind]["effect"] == pytest.approx(0, abs=0.01), kind
    for kind in ("values", "mean"):
        assert own[kind]["effect"] == 0.0


def test_a_decoy_looks_the_same_and_does_nothing(done):
    own, repeats = (by_kind(done, metric, DECOY) for metric in ("prefix_matching", "loss_at_repeats"))
    for kind in ("pattern", "query", "key", "forbid"):
        assert own[kind]["effect"] < -0.8
    for kind in qki.KINDS:
        assert repeats[kind]["effect"] == pytest.approx(0, abs=1e-4)


def test_fresh_tokens_and_the_only_other_head_do_not_care(done):
    """The control is the sink, the one head of the layer that attends to no targets."""
    repeats, fresh = (by_kind(done, f"loss_at_{where}", INDUCTION) for where in ("repeats", "fresh"))
    for kind in qki.KINDS:
        assert repeats[kind]["control"]["heads"] == ["1.2"]
        assert repeats[kind]["control"]["effect"] == pytest.approx(0, abs=1e-3)
        assert abs(fresh[kind]["effect"]) < 0.1 * repeats[kind]["effect"]


def test_the_path_into_the_key_carries_all_that_the_previous_token_head_does(done):
    """Through LayerNorm's scale, which an emptied slot changes by a hundredth, it touches query and values too."""
    for metric in qki.PATH_METRICS:
        found = by_kind(done, metric, INDUCTION)
        whole = found["0.0", "whole sender"]["effect"]
        assert abs(whole) > 0.9
        for way in ("", qki.THROUGH):  # the MLPs are zero: both ways are one
            assert found["0.0", f"path to key{way}"]["effect"] == pytest.approx(whole, rel=0.02)
            for part in ("query", "values"):
                assert found["0.0", f"path to {part}{way}"]["effect"] == pytest.approx(0, abs=0.03 * abs(whole))
        for sender in ("0.1", "0.2"):
            for which in (qki.WHOLE, *qki.PATHS):
                assert found[sender, which]["effect"] == pytest.approx(0, abs=0.01)
        assert found["0.0", "path to key"]["control"]["heads"] == ["0.1", "0.2"]
        assert found["0.0", "path to key"]["control"]["effect"] == pytest.approx(0, abs=0.01)


def test_paths_of_one_layer_below_none_are_not_walked(built):
    lab = laboratory(built, SENDER)
    assert lab.units == [(kind, SENDER) for kind in qki.KINDS]


# --- against slow ways ---


def test_each_kind_replaces_what_it_is_named_for(random_gpt2):
    """On the induction head query and key break the same thing: here they are told apart."""
    lab = laboratory(random_gpt2, (1, 2))
    points = {kind: {(edit.point, type(edit)) for edit in lab.kinds[kind]([(1, 2)]).edits} for kind in qki.KINDS}
    assert points == {
        "uniform": {("pattern", Edit)}, "pattern": {("pattern", Edit)}, "forbid": {("pattern", Edit)},
        "query": {("q", Edit)}, "key": {("k", Edit)}, "values": {("z", ValueEdit)}, "mean": {("z", Edit)},
    }  # fmt: skip


def test_effects_are_those_of_the_losses_and_the_pattern(random_gpt2):
    """Key of another row, head 1.2, written out: rows drawn again, losses of whole runs."""
    lab = laboratory(random_gpt2, (1, 2))
    drawn = battery(
        random_gpt2.ordinary(), random_gpt2.bos, rows=qki.ROWS, length=random_gpt2.context, seed=0, first=qki.FIRST_ROW
    )
    batch = drawn.repeats
    others = Recordings(random_gpt2, drawn.controls.tokens[interventions.donor_rows(qki.ROWS, 0)])
    key = interventions.input_from([(1, 2)], "k", Recordings(random_gpt2, batch.tokens), others)
    before, after = (effects.losses(random_gpt2, batch, one) for one in (None, key))
    found = {one["metric"]: one for one in qki._part_effects(lab, "key", (1, 2), lambda count: None)}
    for metric, mask in (("loss_at_repeats", continuing(batch)), ("loss_at_fresh", effects.fresh(batch))):
        expected = effects.row_means(after - before, mask).mean()
        assert abs(expected) > 1e-4
        assert found[metric]["effect"] == pytest.approx(expected, abs=2e-5)
    own = [effects.prefix_matching(random_gpt2, batch, (1, 2), one).mean() for one in (key, None)]
    assert found["prefix_matching"]["effect"] == pytest.approx(own[0] - own[1], abs=1e-6)


def test_controls_are_measured_by_their_own_prefix_matching(random_gpt2):
    lab = laboratory(random_gpt2, (1, 2), attending=[(1, 0), (1, 1)])
    found = {one["metric"]: one for one in qki._part_effects(lab, "uniform", (1, 2), lambda count: None)}
    uniform = interventions.uniform([(1, 3)])
    own = [effects.prefix_matching(random_gpt2, lab.batch, (1, 3), one).mean() for one in (uniform, None)]
    assert found["prefix_matching"]["control"] | {"interval": None} == {
        "effect": pytest.approx(own[0] - own[1], abs=1e-9), "interval": None, "heads": ["1.3"],
    }  # fmt: skip


def test_an_interruption_keeps_whole_units_and_the_next_run_goes_on(random_gpt2, monkeypatch):
    whole = qki.experiment(laboratory(random_gpt2, (1, 2)))
    assert whole.missing == [] and whole.refused == {}
    honest, calls = qki.Laboratory.measure, []

    def stopped(self, intervention, head):
        calls.append(head)
        if len(calls) == 14:
            raise KeyboardInterrupt
        return honest(self, intervention, head)

    monkeypatch.setattr(qki.Laboratory, "measure", stopped)
    part = qki.experiment(laboratory(random_gpt2, (1, 2)))
    assert_no_hooks(random_gpt2)
    assert part.effects == whole.effects[: len(part.effects)] != []
    assert part.missing[0] == "query of 1.2" and part.missing[-1] == "path to values through MLPs of 1.2"
    earlier = {"interventions": part.effects, "experiments": part.about()}
    monkeypatch.setattr(qki.Laboratory, "measure", honest)
    monkeypatch.setattr(qki, "_part_effects", lambda lab, kind, *_: again.append(kind) or [])
    again: list[str] = []
    resumed = qki.experiment(laboratory(random_gpt2, (1, 2)), earlier)
    assert again == ["query", "key", "values", "forbid", "mean"]  # neither what was finished, nor less
    assert resumed.effects[: len(part.effects)] == part.effects
    again.clear()
    qki.experiment(laboratory(random_gpt2, (1, 2), attending=[(1, 1)]), earlier)
    assert again == list(qki.KINDS)  # other settings, other controls


def test_the_bar_is_told_of_every_run_and_as_many_are_promised_at_least(random_gpt2):
    told: list[int] = []
    promised: list[int] = []

    @contextmanager
    def progress(what, total):
        promised.append(total)
        yield told.append

    lab = laboratory(random_gpt2, (1, 2))
    qki.experiment(lab, None, progress)
    assert promised == [lab.runs] == [sum(told)] == [7 * (1 + qki.CONTROLS) + 4 * 7]


# --- predict, intervene, compare ---


def compared(model, layer, tokens, cells):
    met = qk.interact(model, tokens[None], layer)
    split = qk.decompose(model, tokens, met, list(range(model.n_heads)), cells)
    return split, qki.removals(model, tokens, met, split)


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox", "opt", "bloom"])
def test_what_a_decomposition_predicts_is_what_is_measured(name, tmp_path, tokenizer):
    """On the Llama two query heads share a key; it and NeoX rotate it."""
    model = models.load(str(architectures.save(name, tmp_path / name, tokenizer)))
    hooks = [len(point.fwd_hooks) for point in model.bridge.hook_dict.values()]  # some architectures keep their own
    tokens = np.concatenate([[model.bos], np.tile(np.arange(300, 309), 2)])
    split, found = compared(model, 2, tokens, [(11, 3), (15, 7)])
    for head, one in found.items():
        column = split[head].sources.index(one["source"])
        assert one["predicted"] == pytest.approx(-split[head].terms[:, column].sum())
        assert one["score_predicted"] == pytest.approx(-split[head].raw[:, column].sum())
        assert abs(one["predicted"]) > 1e-2
        assert one["relative_error"] < 1e-4
        assert one["measured"] == pytest.approx(one["predicted"], rel=1e-4)
        assert one["score_measured"] == pytest.approx(one["score_predicted"], abs=1e-4 * abs(one["predicted"]))
    assert [len(point.fwd_hooks) for point in model.bridge.hook_dict.values()] == hooks


def test_on_mini_too(mini):
    tokens = mini.encode("the quick brown fox jumps the quick brown fox jumps")
    cells = TokenBatch.of([tokens], pad=mini.bos).cells["prefix_matching"]
    _, found = compared(mini, 1, tokens, sorted(zip(cells.query.tolist(), cells.key.tolist(), strict=True)))
    for one in found.values():
        assert abs(one["predicted"]) > 1e-3 and one["relative_error"] < 1e-4


def test_the_strongest_source_is_a_head_and_layer_0_has_none(random_gpt2):
    tokens = np.array([random_gpt2.bos, 5, 6, 7, 5, 6])
    split, found = compared(random_gpt2, 2, tokens, [(4, 2)])
    for head, one in found.items():
        by_source = dict(zip(split[head].sources, np.abs(split[head].terms.sum(0)), strict=True))
        heads = {source: size for source, size in by_source.items() if source[0].isdigit()}
        assert one["source"] == max(heads, key=heads.get)
    assert set(compared(random_gpt2, 0, tokens, [(4, 2)])[1].values()) == {None}


def test_keys_that_are_normed_once_more_are_refused_and_it_is_said(tmp_path, tokenizer):
    model = models.load(str(architectures.save("qwen3", tmp_path / "qwen3", tokenizer)))
    tokens = np.array([model.bos, 5, 6, 7, 5, 6])
    met = qk.interact(model, tokens[None], 1)
    split = qk.decompose(model, tokens, met, [0], [(4, 2)])
    with pytest.raises(UserError, match="norms the keys of each head once more"):
        qki.removal(model, tokens, met, 0, split[0])
    assert "norms the keys" in qki.removals(model, tokens, met, split)[0]["refused"]


def test_a_head_without_a_decomposition_has_no_prediction(random_gpt2):
    assert qki.removals(random_gpt2, np.array([0, 5, 6]), None, {1: "not a sum"}) == {1: None}


# --- at the terminal ---


def test_lines_and_sentences_say_what_was_measured(done):
    lines = tables.part_lines(done.effects, "1.0")
    assert [line[0] for line in lines] == list(tables.PARTS_REPLACED.values())
    query = by_kind(done, "prefix_matching", INDUCTION)["query"]
    low, high = query["interval"]
    assert lines[2][1] == f"{query['effect']:+.2f} [{low:+.2f}, {high:+.2f}]"
    assert "prefix matching 0.95" in tables.part_sentence(done.effects, "1.0")
    said = tables.path_sentence(done.effects)
    assert said.startswith("Without 0.0 the prefix matching of 1.0 changes by -0.9")
    assert "its path into the key carries 100 % of that (100 % where the MLPs in between stay as they are)" in said
    assert tables.path_sentence([one for one in done.effects if "sender" not in one]) is None
    assert tables.part_lines([], "1.0") == []
