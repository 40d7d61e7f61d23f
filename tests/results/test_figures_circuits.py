"""Pictures of the second question: what they show, checked through matplotlib's artists."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.patches import Rectangle

from common.attention.head import Head
from common.circuits.composition import WAYS, Composition
from common.circuits.decomposition import Decomposition
from common.circuits.maps import Check, Interaction, Rules
from common.circuits.weights import Direction, HeadCircuits
from common.interventions.experiments import PATHS, REPLACEMENTS, THROUGH, WHOLE
from common.results import figures_circuits, figures_heads
from common.results.draw import draw

TOKENS = ["BOS", "a", "·b", "c", "a", "·b"]
CELLS = [(4, 2), (5, 3)]
PAIR = Head.at(0, 1), Head.at(1, 0)


def masked_scores(seed: int = 0, pos: int = 6) -> np.ndarray:
    """Scores between -1 and 1 with a BOS column of 50; NaN in the future."""
    scores = np.random.default_rng(seed).uniform(-1, 1, (pos, pos))
    scores[:, 0] = 50.0
    return np.where(np.tril(np.ones((pos, pos), dtype=bool)), scores, np.nan)


def score_axes(scores: np.ndarray):
    return draw(figures_heads.token_figure("scores", [("head", scores)], TOKENS, CELLS, "title")).axes[0]


def outlines(axes) -> list[tuple[float, float]]:
    return [patch.get_xy() for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_linewidth() > 1]


def points(axes, marker: str) -> list[tuple[float, float]]:
    return [place for line in axes.lines if line.get_marker() == marker for place in zip(*line.get_data(), strict=True)]


def labels_of(axes, which: str) -> list[str]:
    return [label.get_text() for label in (axes.get_xticklabels() if which == "x" else axes.get_yticklabels())]


# --- queries and keys on a text ---


def test_scores_are_centred_at_0_and_bos_does_not_set_the_colours():
    scores = masked_scores()
    low, high = score_axes(scores).images[0].get_clim()
    assert low == -high and high == pytest.approx(np.nanmax(np.abs(scores[1:, 1:])))
    assert high <= 1.0


def test_bos_beyond_the_scale_is_shown_on_the_colour_bar():
    figure = figures_heads.token_figure("scores", [("head", masked_scores())], TOKENS, CELLS, "title")
    assert figure.panels[0][0].scale.beyond
    tame = masked_scores()
    tame[:, 0] = 0.0
    assert not figures_heads.token_figure("scores", [("head", tame)], TOKENS, CELLS, "title").panels[0][0].scale.beyond


def test_what_a_query_may_not_see_has_no_colour():
    drawn = score_axes(masked_scores()).images[0].get_array()
    assert drawn.shape == (5, 6)
    assert (np.ma.getmaskarray(drawn) == ~np.tril(np.ones((6, 6), dtype=bool))[1:]).all()


def test_cells_are_outlined_where_they_are_drawn_and_tokens_stand_on_both_axes():
    scores = masked_scores()
    axes = score_axes(scores)
    assert set(outlines(axes)) == {(key - 0.5, query - 1.5) for query, key in CELLS}
    for query, key in CELLS:
        assert axes.images[0].get_array()[query - 1, key] == pytest.approx(scores[query, key])
    assert labels_of(axes, "x") == TOKENS and labels_of(axes, "y") == TOKENS[1:]


def test_a_long_text_is_cut_to_a_window_and_says_so():
    cells = [(query, query - 30) for query in range(150, 170)]
    figure = figures_heads.token_figure("scores", [("head 1.0", masked_scores(pos=200))], ["t"] * 200, cells, "title")
    drawn = draw(figure)
    assert drawn.axes[0].images[0].get_array().shape == (48, 49)
    assert len(outlines(drawn.axes[0])) >= 15
    assert "of 199" in drawn.get_suptitle()


def test_a_short_text_carries_its_values_and_a_long_one_does_not():
    scores, pattern = masked_scores(), np.tril(np.full((6, 6), 0.25))
    drawn = draw(figures_circuits.head_figure(scores, pattern, TOKENS, CELLS, "title"))
    written = {text.get_position(): text.get_text() for text in drawn.axes[0].texts}
    assert len(written) == 2 + 3 + 4 + 5 + 6
    assert written[(2, 3)] == f"{scores[4, 2]:.1f}"  # column 2 is key 2, row 3 is query 4: BOS has no row
    assert {text.get_text() for text in drawn.axes[1].texts} == {"0.25"}
    long = masked_scores(pos=30), np.tril(np.full((30, 30), 0.03))
    assert not draw(figures_circuits.head_figure(*long, ["t"] * 30, [], "title")).axes[0].texts


def test_a_text_gives_its_grids_and_a_refused_head_no_decomposition():
    scores, pattern = np.zeros((1, 3, 6, 6)), np.tril(np.full((1, 3, 6, 6), 0.2))
    scores[0, 1] = 2.0
    visible = np.tril(np.ones((1, 6, 6), dtype=bool))
    visible[0, 5, 1] = False  # as in a layer that sees the last tokens alone
    rules = Rules(1.0, None, None, visible, None)
    met = Interaction(1, scores, scores, scores, scores, pattern, rules, Check(0.0, 0.0))
    split = {1: decomposition(np.eye(3)), 2: "the parts do not add up"}
    figures = figures_circuits.text_figures(met, split, [0, 1], TOKENS, CELLS, "mini, text 1", 7)
    assert list(figures) == ["scores_07", "patterns_07", "head_1.1_07", "decomposition_1.1_07", "head_1.2_07"]
    drawn = draw(figures["scores_07"])
    panels = [axes for axes in drawn.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["head 1.0", "head 1.1", "mean over the 3 heads"]
    assert panels[2].images[0].get_array().max() == pytest.approx(2 / 3)
    assert "layer 1, 2 of its 3 heads" in drawn.get_suptitle()
    for figure in figures.values():
        assert "mini, text 1" in figure.title.replace("\n", " ")
    for stem in ("scores_07", "patterns_07", "head_1.1_07"):
        assert np.isnan(figures[stem].panels[0][0].elements[0].values[4, 1]), "what a query may not see stays blank"


def decomposition(terms: np.ndarray) -> Decomposition:
    sources = tuple(f"s{number}" for number in range(len(terms)))
    return Decomposition(sources, ((4, 2),), "induction cells", terms, terms, 1.0, float(terms.sum()), 0.5, 0, 1e-7)


def test_the_largest_part_is_framed_and_rows_are_queries():
    terms = np.zeros((5, 5))
    terms[1, 3], terms[2, 2] = -4.0, 2.0
    drawn = draw(figures_circuits.decomposition_figure(decomposition(terms), "title", TOKENS))
    axes = drawn.axes[0]
    assert outlines(axes) == [(2.5, 0.5)]
    assert axes.images[0].get_clim() == (-4.0, 4.0)
    assert {text.get_position(): text.get_text() for text in axes.texts} == {(3, 1): "-4.00", (2, 2): "2.00"}
    assert "a looking at ·b" in drawn.get_supxlabel() and "-2.00" in drawn.get_supxlabel()


def test_small_sources_are_added_up_and_the_sum_stays():
    terms = np.random.default_rng(0).standard_normal((40, 40)) * 0.01
    terms[7, 30] = 5.0
    names, shown = figures_circuits.grouped([str(source) for source in range(40)], terms, 10)
    assert len(names) == 10 and names[-1] == "rest" and {"7", "30"} <= set(names)
    assert shown.sum() == pytest.approx(terms.sum())
    assert shown[names.index("7"), names.index("30")] == 5.0
    same, all_of_them = figures_circuits.grouped(["a", "b"], np.eye(2), 10)
    assert same == ["a", "b"] and (all_of_them == np.eye(2)).all()


# --- weights ---


def composition(senders: int = 3) -> Composition:
    z = {way: np.zeros((senders, 2)) for way in "QKV"}
    z["K"][1, 0] = 20.0
    pairs = tuple(Head.at(0, head) for head in range(senders))
    return Composition(1, pairs, z, z, z, 3.0)


def test_composition_frames_the_pair_under_k_and_prints_bold_what_counts():
    drawn = draw(figures_circuits.composition_figure(composition(), PAIR, "title"))
    panels = drawn.axes[:3]
    assert [axes.get_title()[0] for axes in panels] == list(WAYS) == list(figures_circuits.WAY_TITLES)
    assert [outlines(axes) for axes in panels] == [[], [(-0.5, 0.5)], []]
    bold = [(axes.get_title()[0], text.get_position()) for axes in panels for text in axes.texts
            if text.get_fontweight() == "bold"]  # fmt: skip
    assert bold == [("K", (0, 1))]
    assert labels_of(panels[1], "y") == ["0.0", "0.1", "0.2"] and labels_of(panels[1], "x") == ["1.0", "1.1"]


def test_of_many_earlier_heads_those_that_compose_most_are_shown():
    drawn = draw(figures_circuits.composition_figure(composition(100), PAIR, "title"))
    labels = labels_of(drawn.axes[1], "y")
    assert len(labels) == figures_circuits.MOST_WRITERS and "0.1" in labels
    assert outlines(drawn.axes[1]) == [(-0.5, labels.index("0.1") - 0.5)]
    assert "36 of 100" in drawn.get_suptitle()


def circuits(by_distance: dict[int, np.ndarray], position: np.ndarray | None) -> HeadCircuits:
    directions = [Direction(0.5, np.arange(3.0), -np.arange(3.0))] * 2
    return HeadCircuits(Head.at(1, 0), np.arange(3), by_distance, Head.at(0, 1), np.eye(3), position, directions)


def test_circuits_have_a_panel_each_and_name_the_distance():
    added = draw(figures_circuits.circuit_figure(circuits({0: np.eye(3)}, np.eye(6)), ["BOS", "a", "b"], 6, "title"))
    titles = [axes.get_title() for axes in added.axes if axes.get_title()]
    assert titles[:3] == ["token × token", "token × output of 0.1 at a token", "position × position"]
    assert [title[-8:] for title in titles[3:]] == [" a query", "as a key"]
    by_name = {axes.get_title(): axes for axes in added.axes}
    assert by_name[titles[3]].images[0].get_array()[0].tolist() == [0.0, 1.0, 2.0]
    assert by_name[titles[4]].images[0].get_array()[0].tolist() == [0.0, -1.0, -2.0]
    assert labels_of(by_name[titles[3]], "y") == ["direction 1 (50%)", "direction 2 (50%)"]
    both = circuits({1: np.eye(3), 4: np.eye(3)}, None)
    rotary = draw(figures_circuits.circuit_figure(both, ["BOS", "a", "b"], 6, "title"))
    titles = [axes.get_title() for axes in rotary.axes if axes.get_title()]
    assert titles[:2] == ["token × token, 1 apart", "token × token, 4 apart"]
    assert titles[2] == "token × output of 0.1 at a token, 1 apart"
    assert labels_of(rotary.axes[0], "x") == ["BOS", "a", "b"]


def test_weights_give_circuits_and_where_there_are_earlier_heads_composition():
    found, labels = circuits({0: np.eye(3)}, None), ["BOS", "a", "b"]
    both = figures_circuits.weight_figures(found, composition(), PAIR, labels, 6, "mini, tokens of: a b")
    assert list(both) == ["circuits_1.0", "composition"]
    assert "head 1.0: mini" in both["circuits_1.0"].title and "mini" in both["composition"].title
    assert list(figures_circuits.weight_figures(found, None, None, labels, 6, "mini")) == ["circuits_1.0"]


# --- parts of a head, paths ---


def part(kind: str, metric: str, size: float, control: float | None = 0.0, which: str = "1.0") -> dict:
    beside = None if control is None else {"effect": control, "interval": [control - 0.1, control + 0.1]}
    return {"name": kind, "heads": [which], "metric": metric, "effect": size, "interval": [size - 0.2, size + 0.2],
            "control": beside, "clean": 0.9}  # fmt: skip


PARTS = [
    part(kind, metric, size + place, None if kind == "mean" else 0.5)
    for place, kind in enumerate(REPLACEMENTS)
    for metric, size in (("prefix_matching", -10.0), ("loss_at_repeats", 20.0), ("loss_at_fresh", 40.0))
]


def test_every_part_stands_at_its_effect_beside_its_control():
    own, loss = draw(figures_circuits.part_figure(PARTS, "title")).axes
    at = {marker: [x for x, _ in points(loss, marker)] for marker in "o^s"}
    assert at == {"o": [20 + n for n in range(7)], "^": [40 + n for n in range(7)], "s": [0.5] * 6}
    assert [x for x, _ in points(own, "o")] == [-10 + n for n in range(7)]
    ends = {tuple(segment[:, 0]) for lines in loss.collections for segment in lines.get_segments()}
    assert {(20 + n - 0.2, 20 + n + 0.2) for n in range(7)} | {(0.4, 0.6)} <= ends
    assert labels_of(own, "y") == list(figures_circuits.REPLACED.values())
    assert "0.90 before" in own.get_title()


def test_every_kind_of_edit_and_path_that_is_measured_has_its_place():
    assert list(figures_circuits.REPLACED) == list(REPLACEMENTS)
    assert list(figures_circuits.PATH_COLUMNS) == [*PATHS, WHOLE]


def test_effects_too_small_to_matter_do_not_fill_the_axes():
    tiny = [one | {"effect": 1e-4, "interval": [0.0, 2e-4], "control": None} for one in PARTS]
    figure = figures_circuits.part_figure(tiny, "title")
    for axes in draw(figure).axes:
        low, high = axes.get_xlim()
        assert low <= -figures_heads.LEAST_EFFECT and high >= figures_heads.LEAST_EFFECT
    assert [entry.shape for entry in figure.legend] == ["circle", "triangle-up"], "no random heads were measured"


def path(sender: str, which: str, metric: str, size: float) -> dict:
    return part(which, metric, size) | {"sender": sender}


def path_axes(effects: list[dict], place: int = 0):
    return draw(figures_circuits.path_figure(effects, "title")).axes[place]


def test_each_path_has_its_place_in_the_map_and_the_strongest_is_framed_and_named():
    """The whole sender is no path, however large; what was not measured is blank."""
    columns = [*PATHS, WHOLE]
    found = [path("0.0", "path to key", "prefix_matching", -0.55), path("0.0", "path to key", "loss_at_repeats", 9.0)]
    found += [path("0.1", which, "prefix_matching", -place / 10) for place, which in enumerate(columns)]
    axes = path_axes(found)
    drawn = axes.images[0].get_array()
    assert drawn[1].tolist() == pytest.approx([-place / 10 for place in range(7)])
    assert drawn[0, 1] == -0.55 and drawn.mask[0].tolist() == [True, False, *[True] * 5]
    low, high = axes.images[0].get_clim()
    assert (low, high) == (-0.6, 0.6)
    (frame,) = axes.patches
    assert frame.get_xy() == (0.5, -0.5)
    assert "strongest path: 0.0 → key, direct: -0.55" in axes.get_title()
    assert labels_of(axes, "x") == ["query", "key", "values"] * 2 + ["all paths"]
    assert labels_of(axes, "y") == ["0.0", "0.1"]


def test_a_map_says_which_paths_were_not_measured():
    found = [path("0.1", which, metric, -0.1) for which in (*PATHS, WHOLE) if THROUGH not in which
             for metric in figures_circuits.PATH_TITLES]  # fmt: skip
    axes = path_axes(found)
    assert "through MLPs too: not measured" in [text.get_text() for text in axes.texts]
    assert "direct path" in [text.get_text() for text in axes.texts]


def test_of_many_senders_those_that_matter_are_drawn_in_their_order():
    found = [
        path(f"{number // 8}.{number % 8}", which, metric, 1.0 if number in (3, 38) else 0.001)
        for number in range(40) for which in PATHS for metric in figures_circuits.PATH_TITLES
    ]  # fmt: skip
    drawn = draw(figures_circuits.path_figure(found, "title"))
    labels = labels_of(drawn.axes[0], "y")
    assert len(labels) == figures_circuits.MOST_SENDERS and labels == sorted(labels)
    assert {"0.3", "4.6"} <= set(labels)
    assert "30 of 40 earlier heads" in drawn.get_suptitle()


def test_every_head_has_a_picture_of_its_parts_and_the_receiver_one_of_paths():
    parts = [one | {"heads": [head]} for head in ("1.0", "1.3") for one in PARTS]
    paths = [path("0.1", which, metric, 0.1) for which in PATHS for metric in figures_circuits.PATH_TITLES]
    figures = figures_circuits.intervention_figures(parts + paths, "mini")
    assert list(figures) == ["parts_1.0", "parts_1.3", "paths_1.0"]
    assert figures_circuits.intervention_figures([], "mini") == {}
