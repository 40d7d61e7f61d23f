"""The decision rule on sums whose answer is plain. Constants are known by what they do, never read from the code."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from common.heads.detection import VERDICTS, attend, by_score, detect, deviations
from common.heads.statistics import RowSums

ROWS, QUERIES = 32, 20


def sums(mean: float, spread: float = 0.0, *, rows: int = ROWS, heads: int = 1, seed: int = 0) -> RowSums:
    """`heads` heads in one layer: the mean and standard deviation of the rows' means are these exactly."""
    means = np.random.default_rng(seed).normal(size=rows)
    means = mean + spread * (means - means.mean()) / means.std(ddof=1)
    return RowSums(np.tile(QUERIES * means[:, None, None], (1, 1, heads)), np.full(rows, QUERIES))


def limit(
    control: float = 0.1, spread: float = 0.0, *, rows: int = ROWS, controls: int = ROWS, heads: int = 1
) -> float:
    found = attend(sums(0.5, rows=rows, heads=heads), sums(control, spread, rows=controls, heads=heads))
    return float(found.threshold[0, 0])


def decide(score: float, control: float, spread: float = 0.0, threshold: float | None = None) -> bool:
    return bool(attend(sums(score), sums(control, spread), threshold=threshold).attends.item())


def verdict(score=0.01, control=0.01, effect=0.0, threshold=None, spread=0.0, **others) -> str:
    """The verdict on one head with this prefix matching; `others`: duplicate_token and shares of the budget."""
    kinds = {"prefix_matching": score, "duplicate_token": 0.01, "budget_previous": 0.0, "budget_bos": 0.0} | others
    repeats = {kind: sums(value) for kind, value in kinds.items()}
    controls = {"prefix_matching": sums(control, spread), "duplicate_token": sums(0.01)}
    return str(detect(repeats, controls, np.full((8, 1, 1), effect), threshold=threshold).verdict.item())


@pytest.mark.parametrize(
    ("rows", "controls", "heads"), [(32, 32, 1), (32, 32, 144), (64, 64, 144), (2, 32, 24), (5, 9, 2)]
)
def test_the_threshold_is_the_bound_of_a_t_test_with_one_false_model_in_a_hundred(rows, controls, heads):
    bound = scipy.stats.t.isf(0.01 / heads, rows + controls - 2) * np.sqrt(1 / rows + 1 / controls)
    spread = np.sqrt((controls - 1) * 0.2**2 / (rows + controls - 2))
    assert limit(0.1, 0.2, rows=rows, controls=controls, heads=heads) == pytest.approx(0.1 + bound * spread)
    assert deviations(heads, rows, controls) == pytest.approx(bound)


def test_the_spread_of_the_rows_with_a_repeat_counts_too():
    steady, varied = (attend(sums(0.5, spread), sums(0.1, 0.2)).threshold.item() for spread in (0.0, 0.2))
    assert varied - 0.1 == pytest.approx(np.sqrt(2) * (steady - 0.1))


def test_one_row_is_enough_beside_many_controls():
    repeats, controls = RowSums(np.full((1, 1, 1), 5.0), np.array([10])), sums(0.1, 0.2)
    found = attend(repeats, controls)
    bound = scipy.stats.t.isf(0.01, ROWS - 1) * np.sqrt(1 + 1 / ROWS)
    assert (found.score.item(), found.threshold.item()) == pytest.approx((0.5, 0.1 + bound * 0.2))


def test_a_tiny_lift_is_no_induction_however_steady_the_null():
    assert limit(0.1, 1e-6) == pytest.approx(0.11)
    assert not decide(0.1099, 0.1, 1e-6)
    assert decide(0.1101, 0.1, 1e-6)


def test_a_score_on_its_threshold_attends():
    assert decide(0.4, 0.0, threshold=0.4)
    assert not decide(np.nextafter(0.4, 0) - 1e-9, 0.0, threshold=0.4)


def test_a_head_that_scores_the_same_in_the_control_is_rejected_however_high():
    assert not decide(0.99, 0.99, 0.01)


def test_a_fixed_threshold_looks_at_the_score_alone():
    assert decide(0.4, 0.4, 0.3, threshold=0.4)
    assert not decide(0.39, 0.0, 0.0, threshold=0.4)


LAWS = {
    "normal": lambda rng, size: rng.normal(size=size),
    "heavy tails": lambda rng, size: rng.standard_t(3, size),
    "skewed": lambda rng, size: rng.lognormal(size=size),
    "rarely far": lambda rng, size: (rng.random(size) < 0.05).astype(float),
}


@pytest.mark.parametrize("law", LAWS)
def test_chance_passes_no_more_often_than_the_stated_rate(law):
    """Heads that ignore the repeat: one passes in one model of a hundred, and no more where the null is not normal."""
    rng = np.random.default_rng(0)
    models, heads, rows = 2000, 12, 32
    on, off = 0.5 + 0.5 * LAWS[law](rng, (2, models, rows, 1, heads))
    counts = np.ones(rows, dtype=np.int64)
    passed = [attend(*(RowSums(one, counts) for one in pair)).attends.any() for pair in zip(on, off, strict=True)]
    assert np.mean(passed) < 0.016
    assert law != "normal" or np.mean(passed) > 0.004, "a rule that lets nothing pass would find nothing either"


@pytest.mark.parametrize(
    ("evidence", "expected"),
    [
        ({"score": 0.5, "effect": 1.0}, "induction"),
        ({"score": 0.5, "effect": 0.051}, "induction"),
        ({"score": 0.5, "effect": 0.049}, "attends-only"),
        ({"score": 0.5, "effect": -0.049}, "attends-only"),
        ({"score": 0.5, "effect": -0.051}, "suppression"),
        ({"score": 0.5, "control": 0.5, "effect": 1.0}, "none"),
        ({"score": 0.059, "effect": 0.1}, "induction"),  # little attention that matters
        ({"score": 0.059, "effect": 0.0}, "none"),  # and that does not
        ({"score": 0.061, "effect": 0.0}, "attends-only"),
        ({"duplicate_token": 0.061}, "duplicate-token"),
        ({"duplicate_token": 0.059}, "none"),
        ({"budget_previous": 0.51}, "previous-token"),
        ({"budget_bos": 0.51}, "first-token"),
        ({"budget_previous": 0.49, "budget_bos": 0.49}, "none"),
        ({"score": 0.4, "effect": 1.0, "budget_bos": 0.6}, "induction"),
        ({"score": 0.997, "control": 0.53, "spread": 1.2, "effect": 1.0}, "undecided"),  # its null holds targets
        ({"score": 0.535, "control": 0.53, "spread": 1.2, "effect": 1.0}, "none"),  # no higher than its null
        ({"score": 0.997, "control": 0.9, "effect": 1.0}, "induction"),
        ({}, "none"),
    ],
)
def test_each_verdict_has_its_evidence(evidence, expected):
    assert verdict(**evidence) == expected
    assert expected in VERDICTS


def exactly(mean: float, *, of: int = 1) -> RowSums:
    """Every row has this mean, to the last bit: `mean` over `of` values."""
    return RowSums(np.full((ROWS, 1, 1), mean), np.full(ROWS, of))


def on_the_edge(repeats: RowSums, controls: RowSums, effect: float, threshold: float | None = None) -> str:
    others = {"duplicate_token": exactly(0.0), "budget_previous": exactly(0.0), "budget_bos": exactly(0.0)}
    kinds = {"prefix_matching": repeats} | others
    found = detect(kinds, {**kinds, "prefix_matching": controls}, np.full((8, 1, 1), effect), threshold=threshold)
    return str(found.verdict.item())


def test_what_lies_on_an_edge_passes():
    a_hundredth, nothing = exactly(1.0, of=100), exactly(0.0)
    assert on_the_edge(a_hundredth, nothing, 1.0) == "induction"
    assert on_the_edge(exactly(1.0, of=20), nothing, 0.0) == "attends-only"
    assert on_the_edge(exactly(0.5), nothing, 0.05) == "induction"
    assert on_the_edge(exactly(0.5), nothing, -0.05) == "suppression"
    controls = sums(0.25, 0.3)
    limit = attend(nothing, controls).threshold.item()
    assert 0.3 < limit < 0.5
    assert on_the_edge(exactly(limit), controls, 1.0) == "induction"
    assert on_the_edge(exactly(limit), controls, 0.0) == "attends-only"
    assert on_the_edge(exactly(limit - 1e-3), controls, 0.0) == "none", "more than 0.05 above its null, and by chance"
    assert on_the_edge(exactly(1.0), exactly(99.0, of=100), 1.0) == "undecided", "a threshold of exactly 1"
    wild = RowSums(np.tile([4.0, -4.0], ROWS // 2)[:, None, None], np.ones(ROWS, dtype=np.int64))
    assert on_the_edge(a_hundredth, wild, 1.0) == "undecided", "its threshold is above 1, its lift just enough"
    assert on_the_edge(exactly(0.9, of=100), wild, 1.0) == "none"
    assert on_the_edge(exactly(0.5), exactly(0.5), 1.0, threshold=0.5) == "induction"
    assert on_the_edge(exactly(0.5), exactly(0.5), 0.0, threshold=0.5) == "attends-only"
    assert on_the_edge(exactly(0.75), exactly(0.5), 1.0, threshold=0.5) == "induction"


def test_half_of_the_attention_is_not_most_of_it():
    nothing = {"prefix_matching": exactly(0.0), "duplicate_token": exactly(0.0)}
    for part, other in (("budget_previous", "budget_bos"), ("budget_bos", "budget_previous")):
        repeats = {**nothing, part: exactly(0.5), other: exactly(0.5)}
        assert detect(repeats, nothing, np.zeros((8, 1, 1))).verdict.item() == "none"


def test_rows_of_effects_are_drawn_again_apart_from_those_of_scores():
    """A head on the edge of its threshold and of its effect, both by the same rows: a quarter passes both, not half."""
    moves = np.random.default_rng(0).normal(size=(ROWS, 1, 1))
    moves -= moves.mean()
    nothing = {"duplicate_token": exactly(0.0), "budget_previous": exactly(0.0), "budget_bos": exactly(0.0)}
    repeats = {"prefix_matching": RowSums(0.5 + 0.1 * moves, np.ones(ROWS, dtype=np.int64)), **nothing}
    controls = {"prefix_matching": exactly(0.0), **nothing}
    found = detect(repeats, controls, 0.05 + 1e-9 + moves, threshold=0.5 - 1e-9)
    assert found.verdict.item() == "induction"
    assert 0.2 < found.resampled.mean() < 0.3


def test_a_fixed_threshold_of_1_decides():
    """The user's own number is no error of the method."""
    assert verdict(score=0.5, effect=1.0, threshold=1.0) == "none"
    assert verdict(score=0.02, threshold=0.015) == "attends-only"


def test_heads_that_attend_are_those_whose_verdict_says_so():
    kinds = {"duplicate_token": 0.01, "budget_previous": 0.0, "budget_bos": 0.0}
    repeats = {kind: sums(value, heads=4) for kind, value in kinds.items()}
    scores = np.array([0.5, 0.5, 0.04, 0.04])  # with an effect and without, much and little
    repeats["prefix_matching"] = RowSums(np.full((ROWS, 1, 4), QUERIES) * scores, np.full(ROWS, QUERIES))
    controls = {kind: sums(0.01, heads=4) for kind in ("prefix_matching", "duplicate_token")}
    found = detect(repeats, controls, np.tile([1.0, 0.0, 1.0, 0.0], (8, 1, 1)))
    assert found.attends.tolist() == [[True, True, True, False]]
    assert found.induction.tolist() == [[True, False, True, False]]


def unsure(score: float):
    """A head whose score varies from row to row, with an effect that does not."""
    kinds = ("prefix_matching", "duplicate_token", "budget_previous", "budget_bos")
    repeats = {kind: sums(score, 0.1, seed=3) for kind in kinds}
    controls = {kind: sums(0.01) for kind in kinds[:2]}
    return detect(repeats, controls, np.ones((8, 1, 1)))


def test_confidence_is_the_share_of_a_thousand_resamples_that_agree():
    """Eight heads on the edge of their threshold, with an effect: each is induction in some draws, none in others."""
    draws = np.random.default_rng(0).normal(size=(ROWS, 1, 8))
    ones, nothing = np.ones(ROWS, dtype=np.int64), RowSums(np.zeros((ROWS, 1, 8)), np.ones(ROWS, dtype=np.int64))
    others = dict.fromkeys(("duplicate_token", "budget_previous", "budget_bos"), nothing)
    repeats = {"prefix_matching": RowSums(0.4 + 0.1 * draws, ones), **others}
    found = detect(repeats, {**others, "prefix_matching": nothing}, np.ones((8, 1, 8)), threshold=0.4)
    assert found.resampled.shape == (1000, 1, 8)
    assert np.array_equal(found.resampled_attends, found.resampled), "with that effect to attend is to be induction"
    share = found.resampled.mean(0)
    assert set(found.verdict.ravel()) == {"induction", "none"}
    assert (share > 0).any() and (share < 1).any()
    assert found.confidence == pytest.approx(np.where(found.verdict == "induction", share, 1 - share))


def test_a_resample_in_which_a_head_is_undecided_does_not_count_as_induction():
    wild = RowSums(np.tile([100.0, -100.0], ROWS // 2)[:, None, None], np.ones(ROWS, dtype=np.int64))
    others = dict.fromkeys(("duplicate_token", "budget_previous", "budget_bos"), exactly(0.0))
    repeats, controls = {"prefix_matching": exactly(60.0), **others}, {"prefix_matching": wild, **others}
    found = detect(repeats, controls, np.ones((8, 1, 1)))
    assert found.verdict.item() == "undecided"
    assert found.confidence.item() > 0.9 > 0.1 > found.resampled.mean()


def test_confidence_falls_where_a_head_sits_on_its_threshold():
    assert unsure(0.4).confidence.item() == 1.0
    assert 0.3 < unsure(0.053).confidence.item() < 0.8


def test_resamples_agree_with_the_confidence_and_the_interval_with_the_spread():
    found = unsure(0.06)
    assert found.verdict.item() == "induction"
    assert 0.5 < found.resampled.mean() < 1
    assert found.resampled.mean() == pytest.approx(found.confidence.item())
    half = scipy.stats.t.ppf(0.975, ROWS - 1) * 0.1 / np.sqrt(ROWS)
    assert (found.low.item(), found.high.item()) == pytest.approx((0.06 - half, 0.06 + half), abs=0.01)


@pytest.mark.parametrize(("mean", "ends"), [(0.01, (0.0, 0.118)), (0.99, (0.882, 1.0)), (0.5, (0.392, 0.608))])
def test_no_end_of_an_interval_lies_outside_0_to_1(mean, ends):
    nothing = exactly(0.0)
    others = {"duplicate_token": nothing, "budget_previous": nothing, "budget_bos": nothing}
    found = detect({"prefix_matching": sums(mean, 0.3, seed=4), **others}, {**others, "prefix_matching": nothing},
                   np.zeros((8, 1, 1)))  # fmt: skip
    assert (found.low.item(), found.high.item()) == pytest.approx(ends, abs=0.012)
    assert 0 <= found.low.item() < found.high.item() <= 1


def test_ranking_is_by_score_with_undefined_scores_last():
    assert by_score(np.array([[0.2, np.nan], [0.9, 0.5]])) == [(1, 0), (1, 1), (0, 0), (0, 1)]
