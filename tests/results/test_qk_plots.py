"""Pictures of queries and keys, checked through their artists."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from common.circuits.circuits import Composition, Direction, HeadCircuits
from common.circuits.qk import Check, Decomposition, Interaction, Rules
from matplotlib.patches import Rectangle

from common.results import qk_plots

TOKENS = ["BOS", "a", "·b", "c", "a", "·b"]
CELLS = [(4, 2), (5, 3)]


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture
def axes():
    return plt.subplots()[1]


def masked_scores(seed: int = 0, pos: int = 6) -> np.ndarray:
    """Scores between -1 and 1 with a BOS column of 50; NaN in the future."""
    scores = np.random.default_rng(seed).uniform(-1, 1, (pos, pos))
    scores[:, 0] = 50.0
    return np.where(np.tril(np.ones((pos, pos), dtype=bool)), scores, np.nan)


def outlines(axes) -> list[tuple[float, float]]:
    return [patch.get_xy() for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_linewidth() > 1]


def test_scores_are_centred_at_0_and_bos_does_not_set_the_colours(axes):
    scores = masked_scores()
    qk_plots.scores(axes, scores, TOKENS, CELLS, "title", slice(0, 6))
    low, high = axes.images[0].get_clim()
    assert low == -high and high == pytest.approx(np.nanmax(np.abs(scores[1:, 1:])))
    assert high <= 1.0


def test_what_a_query_may_not_see_has_no_colour(axes):
    qk_plots.scores(axes, masked_scores(), TOKENS, CELLS, "title", slice(0, 6))
    drawn = axes.images[0].get_array()
    assert drawn.shape == (5, 6)
    assert (np.ma.getmaskarray(drawn) == ~np.tril(np.ones((6, 6), dtype=bool))[1:]).all()


def test_cells_are_outlined_where_they_are_drawn_and_tokens_stand_on_both_axes(axes):
    scores = masked_scores()
    qk_plots.scores(axes, scores, TOKENS, CELLS, "title", slice(0, 6))
    assert set(outlines(axes)) == {(key - 0.5, query - 1.5) for query, key in CELLS}
    for query, key in CELLS:
        assert axes.images[0].get_array()[query - 1, key] == pytest.approx(scores[query, key])
    assert [label.get_text() for label in axes.get_xticklabels()] == TOKENS
    assert [label.get_text() for label in axes.get_yticklabels()] == TOKENS[1:]


def test_a_long_text_is_cut_to_a_window_and_says_so():
    cells = [(query, query - 30) for query in range(150, 170)]
    figure = qk_plots.score_grid([("head 1.0", masked_scores(pos=200))], ["t"] * 200, cells, "title")
    drawn = figure.axes[0].images[0].get_array()
    assert drawn.shape == (48, 49)
    assert len(outlines(figure.axes[0])) >= 15
    assert "of 199" in figure.get_suptitle()


def test_a_short_text_carries_its_values_and_a_long_one_does_not():
    scores, pattern = masked_scores(), np.tril(np.full((6, 6), 0.25))
    figure = qk_plots.head_figure(scores, pattern, TOKENS, CELLS, "title")
    written = {text.get_position(): text.get_text() for text in figure.axes[0].texts}
    assert len(written) == 2 + 3 + 4 + 5 + 6
    assert written[(2, 3)] == f"{scores[4, 2]:.1f}"  # column 2 is key 2, row 3 is query 4: BOS has no row
    assert {text.get_text() for text in figure.axes[1].texts} == {"0.25"}
    figure = qk_plots.head_figure(masked_scores(pos=30), np.tril(np.full((30, 30), 0.03)), ["t"] * 30, [], "title")
    assert not figure.axes[0].texts


def decomposition(terms: np.ndarray) -> Decomposition:
    sources = tuple(f"s{number}" for number in range(len(terms)))
    return Decomposition(sources, ((4, 2),), "induction cells", terms, terms, 1.0, float(terms.sum()), 1e-7)


def test_the_largest_part_is_framed_and_rows_are_queries():
    terms = np.zeros((5, 5))
    terms[1, 3], terms[2, 2] = -4.0, 2.0
    figure = qk_plots.decomposition_figure(decomposition(terms), "title", TOKENS)
    axes = figure.axes[0]
    assert outlines(axes) == [(2.5, 0.5)]
    assert axes.images[0].get_clim() == (-4.0, 4.0)
    assert {text.get_position(): text.get_text() for text in axes.texts} == {(3, 1): "-4.00", (2, 2): "2.00"}
    assert "a looking at ·b" in figure.get_supxlabel() and "-2.00" in figure.get_supxlabel()


def test_small_sources_are_added_up_and_the_sum_stays():
    terms = np.random.default_rng(0).standard_normal((40, 40)) * 0.01
    terms[7, 30] = 5.0
    names, shown = qk_plots.grouped([str(source) for source in range(40)], terms, 10)
    assert len(names) == 10 and names[-1] == "rest" and {"7", "30"} <= set(names)
    assert shown.sum() == pytest.approx(terms.sum())
    assert shown[names.index("7"), names.index("30")] == 5.0
    same, all_of_them = qk_plots.grouped(["a", "b"], np.eye(2), 10)
    assert same == ["a", "b"] and (all_of_them == np.eye(2)).all()


def composition(senders: int = 3) -> Composition:
    z = {way: np.zeros((senders, 2)) for way in "QKV"}
    z["K"][1, 0] = 20.0
    pairs = tuple((0, head) for head in range(senders))
    return Composition(1, pairs, z, z, z, 3.0)


def test_composition_frames_the_pair_under_k_and_prints_bold_what_counts():
    figure = qk_plots.composition_figure(composition(), ((0, 1), 0), "title")
    panels = figure.axes[:3]
    assert [outlines(axes) for axes in panels] == [[], [(-0.5, 0.5)], []]
    bold = [(axes.get_title()[0], text.get_position()) for axes in panels for text in axes.texts
            if text.get_fontweight() == "bold"]  # fmt: skip
    assert bold == [("K", (0, 1))]
    assert [label.get_text() for label in panels[1].get_yticklabels()] == ["0.0", "0.1", "0.2"]
    assert [label.get_text() for label in panels[1].get_xticklabels()] == ["1.0", "1.1"]


def test_of_many_earlier_heads_those_that_compose_most_are_shown():
    figure = qk_plots.composition_figure(composition(100), ((0, 1), 0), "title")
    labels = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    assert len(labels) == qk_plots.MOST_SENDERS and "0.1" in labels
    assert outlines(figure.axes[1]) == [(-0.5, labels.index("0.1") - 0.5)]
    assert "36 of 100" in figure.get_suptitle()


def circuits(by_distance: dict[int, np.ndarray], position: np.ndarray | None) -> HeadCircuits:
    directions = [Direction(0.5, np.arange(3.0), np.arange(3.0))] * 2
    return HeadCircuits((1, 0), np.arange(3), by_distance, (0, 1), np.eye(3), position, directions)


def test_circuits_have_a_panel_each_and_name_the_distance():
    added = qk_plots.circuit_figure(circuits({0: np.eye(3)}, np.eye(6)), ["BOS", "a", "b"], 6, "title")
    titles = [axes.get_title() for axes in added.axes if axes.get_title()]
    assert titles[:3] == ["token × token", "token × what 0.1 writes of a token", "position × position"]
    rotary = qk_plots.circuit_figure(circuits({1: np.eye(3), 4: np.eye(3)}, None), ["BOS", "a", "b"], 6, "title")
    titles = [axes.get_title() for axes in rotary.axes if axes.get_title()]
    assert titles[:2] == ["token × token, 1 apart", "token × token, 4 apart"]
    assert titles[2] == "token × what 0.1 writes of a token, 1 apart"
    assert [label.get_text() for label in rotary.axes[0].get_xticklabels()] == ["BOS", "a", "b"]


def test_weights_give_circuits_and_where_there_are_earlier_heads_composition():
    found, labels = circuits({0: np.eye(3)}, None), ["BOS", "a", "b"]
    both = dict(qk_plots.weight_figures(found, composition(), ((0, 1), 0), labels, 6, "mini, tokens of: a b"))
    assert list(both) == ["circuits_1.0", "composition"]
    assert "head 1.0: mini" in both["circuits_1.0"].get_suptitle() and "mini" in both["composition"].get_suptitle()
    assert list(dict(qk_plots.weight_figures(found, None, None, labels, 6, "mini"))) == ["circuits_1.0"]


def test_a_text_gives_its_grids_and_a_refused_head_no_decomposition():
    scores, pattern = np.zeros((1, 3, 6, 6)), np.tril(np.full((1, 3, 6, 6), 0.2))
    scores[0, 1] = 2.0
    rules = Rules(1.0, None, None, np.tril(np.ones((1, 6, 6), dtype=bool)), None)
    met = Interaction(1, scores, scores, scores, scores, pattern, rules, Check(0.0, 0.0))
    split = {1: decomposition(np.eye(3)), 2: "the parts do not add up"}
    figures = dict(qk_plots.text_figures(met, split, [0, 1], TOKENS, CELLS, "mini, text 1"))
    assert list(figures) == ["scores", "patterns", "head_1.1", "decomposition_1.1", "head_1.2"]
    panels = [axes for axes in figures["scores"].axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["head 1.0", "head 1.1", "mean over the 3 heads"]
    assert panels[2].images[0].get_array().max() == pytest.approx(2 / 3)
    assert "layer 1, 2 of its 3 heads" in figures["scores"].get_suptitle()
    for figure in figures.values():
        assert "mini, text 1" in figure.get_suptitle() + figure.axes[0].get_title().replace("\n", " ")


def test_mathtext_in_a_token_stays_text(axes, tmp_path):
    hostile = ["BOS", "$x_1", "\\frac{", "a$", "%", "^_"]
    qk_plots.scores(axes, masked_scores(), hostile, CELLS, "$\\bad", slice(0, 6))
    axes.figure.savefig(tmp_path / "hostile.png")
    assert [label.get_text() for label in axes.get_xticklabels()] == hostile
