"""Pictures, checked through their artists."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.patches import Rectangle

from common.attention.head import Head
from common.heads.detection import Detection, by_score
from common.heads.labels import Labels
from common.heads.tokens import BUDGET
from common.results import plots

TOKENS = ["BOS", "a", "·b", "c", "a", "·b"]
CELLS = [(4, 2), (5, 3)]


@pytest.fixture
def axes():
    figure, axes = plt.subplots()
    yield axes
    plt.close(figure)


@pytest.fixture
def found():
    score = np.array([[0.1, 0.9, 0.2], [0.05, 0.3, 0.02]])
    verdict = np.array([["none", "induction", "suppression"], ["none", "induction", "previous-token"]])
    control, threshold = np.full((2, 3), 0.05), np.full((2, 3), 0.11)
    sure = np.ones((2, 3))
    resampled = (verdict == "induction")[None]
    return Detection(score, control, threshold, score - 0.01, score + 0.01, sure, verdict, resampled)


@pytest.fixture
def pattern():
    """Mostly on BOS, the rest on the target or the token itself."""
    pattern = np.tril(np.full((6, 6), 0.01))
    pattern[:, 0] = 0.9
    for cell in CELLS:
        pattern[cell] = 0.3
    return pattern


def outlines(axes) -> list[tuple[float, float]]:
    return [patch.get_xy() for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_linewidth() > 1]


def test_mosaic_outlines_and_names_heads_that_attend_to_targets_each_in_its_way(axes, found):
    plots.mosaic(axes, found, "title")
    assert set(outlines(axes)) == {(1, 0), (1, 1), (2, 0)}
    styles = {patch.get_xy(): patch.get_linestyle() for patch in axes.patches if isinstance(patch, Rectangle)}
    assert styles[1, 0] == styles[1, 1] != styles[2, 0]
    named = {text.get_text() for text in axes.texts if "." in text.get_text() and len(text.get_text()) == 3}
    assert named == {"0.1", "1.1", "0.2"}


def test_budget_bars_are_the_shares_and_fill_the_line(axes, found):
    shares = np.linspace(0.1, 0.3, 6).reshape(2, 3)
    paid = dict.fromkeys(BUDGET[:-1], shares)
    paid["other"] = 1.0 - 5 * shares
    plots.budget(axes, found, paid, "title")
    by_part = {bars.get_label(): [bar.get_width() for bar in bars] for bars in axes.containers}
    assert by_part["targets"] == pytest.approx([shares[head] for head in by_score(found.score)])
    assert np.sum(list(by_part.values()), axis=0) == pytest.approx(np.ones(6))
    assert axes.get_yticklabels()[0].get_text() == "induction  0.1"


def test_the_chosen_point_is_marked_on_precision_and_recall(axes, found):
    plots.precision_recall(axes, found, Labels(frozenset({Head.at(0, 1), Head.at(1, 0)}), "by hand"), "title")
    chosen = next(line for line in axes.lines if "verdicts" in line.get_label())
    assert (chosen.get_xdata()[0], chosen.get_ydata()[0]) == (0.5, 0.5)
    assert "by hand" in axes.get_title()


def test_thresholds_are_drawn_where_they_are_highest_head_on_top(axes, found):
    plots.thresholds(axes, found, "title")
    assert [label.get_text() for label in axes.get_yticklabels()][0] == "0.1"
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    drawn = {round(float(line.get_xdata()[0]), 6) for line in axes.lines if line.get_marker() == "|"}
    assert drawn == {round(value, 6) for value in found.threshold.ravel().tolist()}


def test_bos_does_not_set_the_colours_and_the_future_is_blank(axes, pattern):
    plots.attention(axes, pattern, TOKENS, CELLS, "title", slice(0, 6))
    main, bos = axes.images
    assert main.get_clim() == (0.0, pytest.approx(0.3))
    assert main.get_array().mask[:, 0].all() and not bos.get_array().mask[:, 0].any()
    for index, query in enumerate(range(1, 6)):
        assert main.get_array().mask[index, query + 1 :].all()
        assert not main.get_array().mask[index, 1 : query + 1].any()


def test_induction_cells_are_outlined_where_they_are_drawn(axes, pattern):
    plots.attention(axes, pattern, TOKENS, CELLS, "title", slice(0, 6))
    assert set(outlines(axes)) == {(key - 0.5, query - 1.5) for query, key in CELLS}
    drawn = axes.images[0].get_array()
    for query, key in CELLS:
        assert drawn[query - 1, key] == pytest.approx(0.3)


def test_tokens_stand_on_both_axes(axes, pattern):
    plots.attention(axes, pattern, TOKENS, CELLS, "title", slice(0, 6))
    assert [label.get_text() for label in axes.get_xticklabels()] == TOKENS
    assert [label.get_text() for label in axes.get_yticklabels()] == TOKENS[1:]


def test_a_long_text_is_shown_where_its_induction_is():
    cells = [(query, query - 30) for query in range(200, 220)]
    window = plots.attention_window(400, cells)
    assert window.stop - window.start == plots.LONGEST
    assert all(window.start <= key and query < window.stop for query, key in cells[:10])
    assert plots.attention_window(10, []) == slice(0, 10)
    assert plots.attention_window(400, []).start == 0


def test_mathtext_in_a_token_stays_text(axes, tmp_path, pattern):
    hostile = ["BOS", "$x_1", "\\frac{", "a$", "%", "^_"]
    plots.attention(axes, pattern, hostile, CELLS, "$\\bad", slice(0, 6))
    axes.figure.savefig(tmp_path / "hostile.png")
    assert [label.get_text() for label in axes.get_xticklabels()] == hostile
