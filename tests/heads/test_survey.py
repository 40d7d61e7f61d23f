"""Verdicts on models whose heads are known by construction, and the guard that turns each decoy away."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from common.heads import attribution, scores
from common.heads.detection import detect
from common.heads.statistics import RowSums
from common.heads.survey import Survey, for_effects, gather_evidence, survey
from common.heads.tokens import Battery, TokenBatch, battery
from tests.handbuilt import COPY, ON_TARGETS, Role

SAME_VERDICT = (*ON_TARGETS, "previous-token", "duplicate-token", "bos-sink", "uniform", "before-duplicate")


@pytest.mark.parametrize(
    ("seed", "length"), [*((seed, length) for seed in range(3) for length in (32, 64, 128)), (1, 256)]
)
def test_every_head_is_what_it_was_built_to_be(hand_built, seed, length):
    built, model = hand_built(seed)
    found = survey(model, seed=900 + seed, batch_size=8, length=length).found
    for head, role in built.roles.items():
        if role.kind in ON_TARGETS or found.verdict[head] in ON_TARGETS:
            assert found.verdict[head] == role.verdict, (head, role)


def test_the_other_kinds_are_named_too(hand_built):
    roles = {
        (0, 0): Role("previous-token", slot=0),
        (0, 1): Role("duplicate-token"),
        (0, 2): Role("bos-sink"),
        (0, 3): Role("uniform"),
        (1, 0): Role("before-duplicate", slot=0),
        (1, 1): Role("fixed-offset", offset=4),
        (1, 2): Role("random"),
        (1, 3): Role("induction", strength=0.5, slot=0, writing=COPY),
    }
    found = survey(hand_built(roles)[1], seed=3, batch_size=8, length=64).found
    assert {head: found.verdict[head] for head in roles} == {head: role.verdict for head, role in roles.items()}


def test_rows_without_repeats_have_no_induction(hand_built, mini):
    for model in (hand_built(0)[1], mini):
        drawn, other = (battery(model.ordinary(), model.bos, rows=16, length=64, seed=seed) for seed in (0, 1))
        evidence = gather_evidence(model, drawn, batch_size=8, advance=lambda rows: None)
        assert evidence.decide(None).induction.any()
        without = dataclasses.replace(evidence, repeats=scores.score(model, other.controls, batch_size=8))
        assert not without.decide(None).attends.any()


def test_a_survey_is_settled_where_the_least_sure_verdict_is_sure_enough():
    def settled(*confidence: float) -> bool:
        return Survey(SimpleNamespace(confidence=np.array([confidence])), None, rows=32, length=64).settled

    assert settled(1.0, 0.95)
    assert not settled(1.0, 0.949)


@pytest.mark.parametrize(("settled", "rows"), [(True, 32), (False, 64)])
def test_a_settled_survey_stops_and_an_unsettled_one_draws_more(random_gpt2, monkeypatch, settled, rows):
    """Of each lot of 32 rows, effects are measured on 16."""
    monkeypatch.setattr(Survey, "settled", property(lambda state: settled))
    told = []

    @contextmanager
    def progress(what, total):
        told.append((what, total))
        yield told.append

    found = survey(random_gpt2, seed=0, batch_size=32, length=12, progress=progress)
    assert (found.rows, found.length) == (rows, 12)
    assert len(found.evidence.repeats.sums["prefix_matching"].counts) == rows
    assert len(found.evidence.total) == len(found.evidence.direct) == rows // 2
    assert [one for one in told if isinstance(one, tuple)] == [
        ("scoring heads, rows 1 to 32", 80), ("scoring heads, rows 33 to 64", 80),
    ][: rows // 32]  # fmt: skip
    assert sum(one for one in told if isinstance(one, int)) == 80 * rows // 32


def test_rows_have_128_tokens_or_as_many_as_the_model_reads(mini, random_gpt2, monkeypatch):
    monkeypatch.setattr(Survey, "settled", property(lambda state: True))
    assert survey(mini, seed=0, batch_size=32).length == 128
    assert survey(random_gpt2, seed=0, batch_size=32).length == 64


def test_lots_of_rows_are_the_rows_of_one_battery(mini):
    """Rows drawn later are those that one larger battery would have held."""
    whole = battery(mini.ordinary(), mini.bos, rows=6, length=40, seed=0)
    first, later = (battery(mini.ordinary(), mini.bos, rows=3, length=40, seed=0, first=n) for n in (0, 3))
    joined = scores.score(mini, first.repeats, batch_size=8) + scores.score(mini, later.repeats, batch_size=8)
    expected = scores.score(mini, whole.repeats, batch_size=8)
    for kind in expected.sums:
        assert joined.mean(kind) == pytest.approx(expected.mean(kind), abs=1e-6)


# --- each decoy, its guard, and what happens without the guard ---


def evidence_of(hand_built, role: Role, **options):
    """The evidence on a head of this role, as (1, 1) arrays, beside the model it stands in."""
    roles = {(0, 0): Role("previous-token", slot=0), (1, 0): role}
    model = hand_built(roles)[1]
    drawn = options.pop("drawn", battery(model.ordinary(), model.bos, rows=16, length=64, seed=5))
    return model, drawn, gather_evidence(model, drawn, batch_size=8, advance=lambda rows: None)


def verdict(evidence, **changed) -> str:
    parts = {
        "repeats": evidence.repeats.sums,
        "controls": evidence.controls.sums,
        "effect": evidence.total,
    } | changed
    return str(detect(parts["repeats"], parts["controls"], parts["effect"]).verdict[1, 0])


def always_the_same_distance(ordinary: np.ndarray, bos: int, period: int) -> Battery:
    """Rows BOS R R, in which the target of every query is one period less one back: the rows that others test on."""
    rng = np.random.default_rng(0)
    bodies = [rng.choice(ordinary, size=2 * period, replace=False) for _ in range(16)]
    repeats = TokenBatch.of([np.array([bos, *body[:period], *body[:period]]) for body in bodies], pad=bos)
    controls = np.stack([np.array([bos, *body]) for body in bodies])
    return Battery(repeats, TokenBatch(controls, repeats.lengths, repeats.cells))


def test_fixed_offset_is_turned_away_by_its_control_rows(hand_built, mini):
    drawn = always_the_same_distance(mini.ordinary(), mini.bos, period=20)
    _, _, evidence = evidence_of(hand_built, Role("fixed-offset", offset=19, writing=COPY), drawn=drawn)
    assert evidence.repeats.mean("prefix_matching")[1, 0] > 0.8, "it hits every target of such rows"
    assert verdict(evidence) == "none"
    blind = {kind: RowSums(0 * sums.sums, sums.counts) for kind, sums in evidence.controls.sums.items()}
    assert verdict(evidence, controls=blind, effect=np.ones((8, 2, 1))) == "induction", "without the control it passes"


def test_varied_distances_leave_a_fixed_offset_little_to_hit(hand_built):
    _, _, evidence = evidence_of(hand_built, Role("fixed-offset", offset=19, writing=COPY))
    assert evidence.repeats.mean("prefix_matching")[1, 0] < 0.3


@pytest.mark.parametrize(("kind", "shift"), [("duplicate-token", 1), ("before-duplicate", 2)])
def test_neighbours_of_the_target_are_turned_away_by_the_exact_cell(hand_built, kind, shift):
    model, drawn, evidence = evidence_of(hand_built, Role(kind, slot=0, writing=0.1))
    assert verdict(evidence) == {"duplicate-token": "duplicate-token"}.get(kind, "none")
    cells = drawn.repeats.cells["prefix_matching"]
    off_by = dataclasses.replace(cells, key=np.maximum(cells.key - shift, 0))
    shifted = [
        scores.score(model, dataclasses.replace(rows, cells=rows.cells | {"prefix_matching": off_by}), batch_size=8)
        for rows in (drawn.repeats, drawn.controls)
    ]
    wrong = {"repeats": shifted[0].sums, "controls": shifted[1].sums, "effect": np.ones((8, 2, 1))}
    assert verdict(evidence, **wrong) == "induction", "reading the wrong cell would take it for an induction head"


@pytest.mark.parametrize("kind", ["attends-only", "suppression"])
def test_heads_that_attend_and_do_not_raise_are_told_apart_by_their_effect(hand_built, kind):
    writing = {"attends-only": 0.0, "suppression": -COPY}[kind]
    _, _, evidence = evidence_of(hand_built, Role(kind, strength=0.7, slot=0, writing=writing))
    assert verdict(evidence) == kind
    assert verdict(evidence, effect=np.ones((8, 2, 1))) == "induction", "attention alone cannot tell"


def test_a_faint_lift_is_turned_away_by_the_rule_on_size(hand_built, monkeypatch):
    _, _, evidence = evidence_of(hand_built, Role("induction", strength=0.008, slot=0, writing=COPY))
    assert verdict(evidence, effect=np.ones((8, 2, 1))) == "first-token"
    monkeypatch.setattr("common.heads.detection.LEAST_LIFT", 0.0)
    assert verdict(evidence, effect=np.ones((8, 2, 1))) == "induction"


@pytest.mark.parametrize("kind", ["bos-sink", "uniform", "random"])
def test_heads_that_ignore_tokens_are_turned_away_by_the_null(hand_built, kind, monkeypatch):
    _, _, evidence = evidence_of(hand_built, Role(kind))
    assert verdict(evidence, effect=np.ones((8, 2, 1))) != "induction"
    monkeypatch.setattr("common.heads.detection.LEAST_LIFT", 0.0)
    monkeypatch.setattr("common.heads.detection.FALSE_POSITIVES", 1.0)
    blind = {kind: RowSums(0 * sums.sums, sums.counts) for kind, sums in evidence.controls.sums.items()}
    assert verdict(evidence, controls=blind, effect=np.ones((8, 2, 1))) == "induction", (
        "without null and size it passes"
    )


@pytest.mark.parametrize("slope", [0.0, -1.0, 0.01])
def test_what_a_notable_head_does_is_measured_and_not_estimated(hand_built, monkeypatch, slope):
    """A gradient of 0, of the wrong sign, or too small, as behind a saturated softmax: no verdict rests on it."""
    roles = {
        (0, 0): Role("previous-token", slot=0),
        (0, 1): Role("uniform"),
        (1, 0): Role("induction", strength=0.6, slot=0, writing=COPY),
        (1, 1): Role("attends-only", strength=0.6, slot=0),
    }
    model = hand_built(roles)[1]

    def wrong(*args, **options):
        found = attribution.attribute(*args, **options)
        return dataclasses.replace(found, total=slope * found.total)

    monkeypatch.setattr("common.heads.survey.attribute", wrong)
    found = survey(model, seed=0, batch_size=8)
    assert found.found.verdict[1].tolist() == ["induction", "attends-only"]
    assert found.evidence.effect.mean(0)[1] == pytest.approx([3.6, 0.0], abs=0.1)
    assert np.isnan(found.evidence.exact[:, 0]).all(), "what attends to nothing of interest is estimated"
    assert np.array_equal(found.evidence.effect[:, 0], found.evidence.total[:, 0])


def test_effects_are_measured_on_rows_from_the_nearest_repeat_to_the_farthest(random_gpt2):
    """Of rows with distances 1 to 32, every second: 2, 4, 6 and so on, whatever the order they were drawn in."""
    distances = np.random.default_rng(0).permutation(np.arange(2, 34))
    rows = [np.array([random_gpt2.bos, 40, 41, *range(42, 40 + distance), 40, 41]) for distance in distances]
    chosen = for_effects(TokenBatch.of(rows, pad=random_gpt2.bos))
    cells = chosen.cells["prefix_matching"]
    found = [int((cells.query - cells.key + 1)[cells.row == row][0]) for row in range(len(chosen.tokens))]
    assert found == list(range(3, 34, 2))
    few = for_effects(TokenBatch.of(rows[:3], pad=random_gpt2.bos))
    assert len(few.tokens) == 3


def test_a_head_is_measured_once_on_each_row(hand_built, monkeypatch):
    """Two lots of 16 effect rows: each is handed over once, and both are in the evidence."""
    model = hand_built({(0, 0): Role("previous-token", slot=0), (1, 0): Role("induction", slot=0, writing=COPY)})[1]
    asked = []

    def counted(model, rows, heads, **options):
        asked.append((rows.tokens.tobytes(), tuple(heads)))
        return attribution.exact_effect(model, rows, heads, **options)

    monkeypatch.setattr("common.heads.survey.exact_effect", counted)
    monkeypatch.setattr(Survey, "settled", property(lambda state: False))
    found = survey(model, seed=0, batch_size=8, length=40)
    assert len(asked) == len({rows for rows, _ in asked}) == 2 and asked[0][1] == asked[1][1]
    assert found.evidence.exact.shape[0] == 32 and not np.isnan(found.evidence.exact[:, 1, 0]).any()
