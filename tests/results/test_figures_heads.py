"""Pictures of the first question: what they show, checked through matplotlib's artists."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.patches import Rectangle

from common.attention.head import Head
from common.heads.detection import Detection, by_score
from common.heads.labels import Labels
from common.heads.tokens import BUDGET
from common.results import figures_heads
from common.results.draw import draw

TOKENS = ["BOS", "a", "·b", "c", "a", "·b"]
CELLS = [(4, 2), (5, 3)]


@pytest.fixture
def found():
    score = np.array([[0.1, 0.9, 0.2], [0.05, 0.3, 0.02]])
    verdict = np.array([["none", "induction", "suppression"], ["none", "induction", "previous-token"]])
    control, threshold = np.full((2, 3), 0.05), np.full((2, 3), 0.11)
    sure = np.ones((2, 3))
    resampled = (verdict == "induction")[None]
    return Detection(
        score, control, threshold, score - 0.01, score + 0.01, sure, verdict, resampled, (score >= threshold)[None]
    )


@pytest.fixture
def pattern():
    """Mostly on BOS, the rest on the target or the token itself."""
    pattern = np.tril(np.full((6, 6), 0.01))
    pattern[:, 0] = 0.9
    for cell in CELLS:
        pattern[cell] = 0.3
    return pattern


def first_axes(figure):
    return draw(figure).axes[0]


def outlines(axes) -> list[tuple[float, float]]:
    return [patch.get_xy() for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_linewidth() > 1]


def legend_texts(drawn) -> list[str]:
    legends = [*drawn.legends, *(legend for axes in drawn.axes if (legend := axes.get_legend()))]
    return [text.get_text() for legend in legends for text in legend.get_texts()]


def points(axes, marker: str) -> list[tuple[float, float]]:
    return [place for line in axes.lines if line.get_marker() == marker for place in zip(*line.get_data(), strict=True)]


# --- heads of a model ---


def test_mosaic_outlines_and_names_heads_that_attend_to_targets_each_in_its_way(found):
    axes = first_axes(figures_heads.mosaic_figure(found, "title"))
    assert set(outlines(axes)) == {(0.5, -0.5), (0.5, 0.5), (1.5, -0.5)}
    styles = {patch.get_xy(): patch.get_linestyle() for patch in axes.patches if isinstance(patch, Rectangle)}
    assert styles[0.5, -0.5] == styles[0.5, 0.5] != styles[1.5, -0.5]
    named = {text.get_text() for text in axes.texts if "." in text.get_text() and len(text.get_text()) == 3}
    assert named == {"0.1", "1.1", "0.2"}
    written = {text.get_position(): text.get_text() for text in axes.texts if len(text.get_text()) == 4}
    assert written == {(head, layer): f"{found.score[layer, head]:.2f}" for layer in range(2) for head in range(3)}
    assert axes.images[0].get_clim() == (0.0, 1.0)


def test_the_mosaic_explains_the_frames_that_are_there_and_no_other(found):
    said = legend_texts(draw(figures_heads.mosaic_figure(found, "title")))
    assert [text.split(":")[0] for text in said] == ["induction head", "suppression head"]
    nothing = Detection(*[*list(vars(found).values())[:6], np.full((2, 3), "none"), found.resampled, found.resampled])
    assert legend_texts(draw(figures_heads.mosaic_figure(nothing, "title"))) == []


def test_budget_bars_are_the_shares_and_fill_the_line(found):
    shares = np.linspace(0.1, 0.3, 6).reshape(2, 3)
    paid = dict.fromkeys(BUDGET[:-1], shares)
    paid["other"] = 1.0 - 5 * shares
    drawn = draw(figures_heads.budget_figure(found, paid, "title"))
    axes = drawn.axes[0]
    by_part = dict(
        zip(legend_texts(drawn), [[bar.get_width() for bar in bars] for bars in axes.containers], strict=True)
    )
    assert list(by_part) == ["BOS" if part == "bos" else part for part in BUDGET]
    assert by_part["targets"] == pytest.approx([shares[head] for head in by_score(found.score)])
    assert np.sum(list(by_part.values()), axis=0) == pytest.approx(np.ones(6))
    starts = [[bar.get_x() for bar in bars] for bars in axes.containers]
    assert np.array(starts) == pytest.approx(np.cumsum([[0.0] * 6, *by_part.values()], axis=0)[:-1])
    assert axes.get_yticklabels()[0].get_text() == "induction  0.1"


def test_the_chosen_point_is_marked_on_precision_and_recall(found):
    labels = Labels(frozenset({Head.at(0, 1), Head.at(1, 0)}), "by hand")
    figure = figures_heads.precision_recall_figure(found, labels, "title")
    drawn = draw(figure)
    place = [text.startswith("this run's induction heads") for text in legend_texts(drawn)].index(True)
    assert figure.legend[place].shape == "circle"
    assert points(drawn.axes[0], "o") == [(0.5, 0.5)]
    assert "by hand" in drawn.axes[0].get_title()
    assert drawn.axes[0].lines[0].get_drawstyle() == "steps-post"


def test_thresholds_are_drawn_where_they_are_highest_head_on_top(found):
    drawn = draw(figures_heads.threshold_figure(found, "title"))
    axes = drawn.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()][0] == "0.1"
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    order = by_score(found.score)
    assert points(axes, "|") == [(found.threshold[head], row) for row, head in enumerate(order)]
    passed = [(found.score[head], row) for row, head in enumerate(order) if found.induction[head]]
    assert passed and sorted(points(axes, "o")) == sorted([*passed, *((0.05, row) for row in range(6))])
    assert points(axes, "s") == [
        (found.score[head], row) for row, head in enumerate(order) if not found.induction[head]
    ]
    assert "score: induction head" in legend_texts(drawn)


def test_of_many_heads_the_highest_are_listed_and_the_axis_says_so(found):
    many = Detection(*(np.tile(of, (10, 1)) for of in list(vars(found).values())[:7]), found.resampled, found.resampled)
    panel = figures_heads.threshold_figure(many, "title").panels[0][0]
    assert len(panel.y.ticks) == figures_heads.MOST_HEADS
    assert panel.y.label == "head (the 40 highest of 60)"


# --- patterns on a text ---


def test_bos_does_not_set_the_colours_and_the_future_is_blank(pattern):
    axes = first_axes(figures_heads.token_figure("pattern", [("head", pattern)], TOKENS, CELLS, "title"))
    main, bos = axes.images
    assert main.get_clim() == (0.0, pytest.approx(0.3)) and bos.get_clim() == (0.0, 1.0)
    assert main.get_array().mask[:, 0].all() and not bos.get_array().mask[:, 0].any()
    assert bos.get_array().mask[:, 1:].all()
    for index, query in enumerate(range(1, 6)):
        assert main.get_array().mask[index, query + 1 :].all()
        assert not main.get_array().mask[index, 1 : query + 1].any()


def test_induction_cells_are_outlined_where_they_are_drawn(pattern):
    axes = first_axes(figures_heads.token_figure("pattern", [("head", pattern)], TOKENS, CELLS, "title"))
    assert set(outlines(axes)) == {(key - 0.5, query - 1.5) for query, key in CELLS}
    drawn = axes.images[0].get_array()
    for query, key in CELLS:
        assert drawn[query - 1, key] == pytest.approx(0.3)


def test_tokens_stand_on_both_axes(pattern):
    axes = first_axes(figures_heads.token_figure("pattern", [("head", pattern)], TOKENS, CELLS, "title"))
    assert [label.get_text() for label in axes.get_xticklabels()] == TOKENS
    assert [label.get_text() for label in axes.get_yticklabels()] == TOKENS[1:]


def test_the_legend_of_a_text_without_repeats_names_no_frame(pattern):
    with_cells, without = (
        legend_texts(draw(figures_heads.token_figure("pattern", [("head", pattern)], TOKENS, cells, "title")))
        for cells in (CELLS, [])
    )
    assert [text.split(":")[0].split(" (")[0] for text in with_cells] == ["induction cell", "attention to BOS"]
    assert without == with_cells[1:]


def test_a_long_text_is_shown_where_its_induction_is():
    cells = [(query, query - 30) for query in range(200, 220)]
    places = figures_heads.drawn_places(400, cells)
    assert places[0] == 0 and len(places) == figures_heads.LONGEST + 1
    assert places[1:] == list(range(places[1], places[-1] + 1))
    assert all(key in places and query in places for query, key in cells[:10])
    assert figures_heads.drawn_places(10, []) == list(range(10))
    assert figures_heads.drawn_places(400, [])[:2] == [0, 1]


def test_mathtext_in_a_token_stays_text(tmp_path, pattern):
    hostile = ["BOS", "$x_1", "\\frac{", "a$", "%", "^_"]
    drawn = draw(figures_heads.token_figure("pattern", [("$y_1$", pattern)], hostile, CELLS, "$\\bad"))
    drawn.savefig(tmp_path / "hostile.png")
    assert [label.get_text() for label in drawn.axes[0].get_xticklabels()] == hostile


# --- what heads do ---


def head(number: int, verdict: str, score: float, effect: float, copying: float | None) -> dict:
    return {"layer": 1, "head": number, "verdict": verdict, "prefix_matching": score, "total_effect": effect,
            "copying": copying}  # fmt: skip


HEADS = [
    head(0, "induction", 0.9, 2.0, 0.9),
    head(1, "attends-only", 0.8, 0.01, 0.1),
    head(2, "suppression", 0.4, -0.7, -0.9),
    head(3, "none", 0.01, 0.0, 0.3),
]


def test_every_head_stands_at_its_score_and_effect_in_the_shape_of_its_verdict():
    figure = figures_heads.effect_figure(HEADS, "title")
    drawn = draw(figure)
    axes = drawn.axes[0]
    assert axes.get_yscale() == "symlog"
    places = np.concatenate([points.get_offsets() for points in axes.collections if len(points.get_offsets())])
    assert {tuple(point) for point in places.tolist()} == {
        (one["prefix_matching"], one["total_effect"]) for one in HEADS
    }
    colours = np.concatenate([points.get_array() for points in axes.collections if points.get_array() is not None])
    assert sorted(colours.tolist()) == sorted(one["copying"] for one in HEADS)
    named = {text.get_text() for text in axes.texts}
    assert named == {"1.0", "1.1", "1.2"}, "the head that does nothing and looks at nothing needs no name"
    shapes = {one.heads[0]: one.shape for one in figure.panels[0][0].elements if hasattr(one, "shape")}
    assert shapes == {"1.0": "circle", "1.1": "diamond", "1.2": "triangle-down", "1.3": "square"}
    assert legend_texts(drawn) == ["induction", "suppression", "attends-only", "other"]
    low, high = axes.get_ylim()
    assert low < -0.7 and high > 2.0


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_heads_without_copying_are_drawn_grey_and_said(missing):
    half = [HEADS[0], *({**one, "copying": missing} for one in HEADS[1:])]
    figure = figures_heads.effect_figure(half, "title")
    grey = [one for one in figure.panels[0][0].elements if getattr(one, "colour", "") == "0.75"]
    assert sorted(name for one in grey for name in one.heads) == ["1.1", "1.2", "1.3"]
    assert "OV copying not measured" in legend_texts(draw(figure))
    none = figures_heads.effect_figure([{**one, "copying": missing} for one in HEADS], "title")
    assert len(draw(none).axes) == 1, "nothing is coloured, so there is no colour bar"


def test_names_stand_away_from_the_nearest_mark():
    score, effect = [0.93, 0.94, 0.2, 0.5], [2.6, 2.5, 0.1, -0.4]
    assert figures_heads.named_on_the_right(score, effect)[:2] == [False, True]
    assert figures_heads.named_on_the_right(score[::-1], effect[::-1])[2:] == [True, False]
    assert figures_heads.named_on_the_right([0.5, 0.5], [1.0, 1.0]) == [False, True]
    assert figures_heads.named_on_the_right([0.5], [1.0]) == [True]
    assert figures_heads.named_on_the_right([], []) == []


def effect(which: str, kind: str, metric: str, size: float, control: float | None) -> dict:
    beside = None if control is None else {"effect": control, "interval": [control - 0.1, control + 0.1]}
    return {"name": kind, "heads": which.split(), "metric": metric, "effect": size,
            "interval": [size - 0.2, size + 0.2], "control": beside}  # fmt: skip


ABLATED = [
    effect("1.0", "mean", "loss_at_repeats", 2.0, 0.1),
    effect("1.0", "mean", "loss_at_fresh", 0.05, None),
    effect("1.0 1.1", "mean", "loss_at_repeats", 5.0, 0.3),
]


def test_bars_show_repeats_fresh_tokens_and_random_heads():
    drawn = draw(figures_heads.ablation_figure(ABLATED, "title"))
    assert len(drawn.axes) == 1, "the knockout was not measured and gets no panel"
    axes = drawn.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1.0", "all 2"]
    assert [x for x, _ in points(axes, "o")] == [2.0, 5.0]
    assert [x for x, _ in points(axes, "^")] == [0.05] and [x for x, _ in points(axes, "s")] == [0.1, 0.3]
    ends = [tuple(segment[:, 0]) for lines in axes.collections for segment in lines.get_segments()]
    assert ends == [pytest.approx(pair) for pair in ((1.8, 2.2), (4.8, 5.2), (-0.15, 0.25), (0.0, 0.2), (0.2, 0.4))]
    assert len(legend_texts(drawn)) == 3
    alone = draw(figures_heads.ablation_figure([ABLATED[0] | {"control": None}], "title"))
    assert legend_texts(alone) == ["loss at repeats"]


def test_an_interval_stands_behind_its_number_and_a_dash_where_nothing_was_measured():
    row = {"layer": 0, "head": 1, "score": 0.123456, "score_interval": [0.1, 0.2], "none": None, "word": "x",
           "half": 1.0, "half_interval": [None, 2.0]}  # fmt: skip
    said = [("score", "0.1235 [0.1, 0.2]"), ("none", "–"), ("word", "x"), ("half", "1")]
    assert figures_heads.numbers(row) == said
