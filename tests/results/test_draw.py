"""Both backends show what the specification says, and drawing leaves no trace in matplotlib's settings."""

from __future__ import annotations

import html
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import rcParams
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from common.heads.detection import Detection
from common.heads.labels import Labels
from common.heads.tokens import BUDGET
from common.interventions.experiments import PATHS, WHOLE
from common.results import figures_circuits, figures_heads, spec
from common.results.draw import draw, legible, save
from common.results.plotly_figures import compressed, plotly
from tests.results.test_figures_circuits import PARTS, circuits, composition, decomposition, masked_scores, path
from tests.results.test_figures_heads import ABLATED, HEADS

TOKENS = ["BOS", "<b>a</b>", "·b", "c & d", "a", "·b"]
CELLS = [(4, 2), (5, 3)]


def detection() -> Detection:
    score = np.array([[0.1, 0.9, 0.2], [0.05, 0.3, 0.02]])
    verdict = np.array([["none", "induction", "suppression"], ["none", "attends-only", "previous-token"]])
    control, threshold, sure = np.full((2, 3), 0.05), np.full((2, 3), 0.11), np.ones((2, 3))
    return Detection(score, control, threshold, score, score, sure, verdict, (verdict == "induction")[None])


def every_figure() -> dict[str, spec.Figure]:
    found, scores, pattern = detection(), masked_scores(), np.tril(np.full((6, 6), 0.2))
    paths = [path(sender, which, metric, place / 10 - 0.2) for place, which in enumerate((*PATHS, WHOLE))
             for sender in ("0.0", "0.1") for metric in figures_circuits.PATH_TITLES]  # fmt: skip
    labels = Labels(frozenset({(0, 1), (1, 0)}), "by hand")
    long = [f"t{place}" for place in range(120)]
    return {
        "mosaic": figures_heads.mosaic_figure(found, "<i>model</i>"),
        "thresholds": figures_heads.threshold_figure(found, "title"),
        "budget": figures_heads.budget_figure(found, dict.fromkeys(BUDGET, np.full((2, 3), 1 / 6)), "title"),
        "precision_recall": figures_heads.precision_recall_figure(found, labels, "title"),
        "effects": figures_heads.effect_figure(HEADS, "title"),
        "ablation": figures_heads.ablation_figure(ABLATED, "title"),
        "patterns": figures_heads.token_figure("pattern", [("one", pattern)] * 4, TOKENS, CELLS, "title"),
        "scores": figures_heads.token_figure("scores", [("a", scores), ("b", scores)], TOKENS, CELLS, "title"),
        "long": figures_heads.token_figure("scores", [("a", masked_scores(pos=120))], long, [(100, 60)], "title"),
        "head": figures_circuits.head_figure(scores, pattern, TOKENS, CELLS, "title"),
        "decomposition": figures_circuits.decomposition_figure(decomposition(np.eye(4)), "title", TOKENS),
        "composition": figures_circuits.composition_figure(composition(), ((0, 1), 0), "title"),
        "circuits": figures_circuits.circuit_figure(circuits({0: np.eye(3)}, np.eye(6)), TOKENS[:3], 6, "title"),
        "parts": figures_circuits.part_figure(PARTS, "title"),
        "paths": figures_circuits.path_figure(paths, "title"),
    }


FIGURES = every_figure()


class Shown:
    """One panel by both backends, as far as they can be compared."""

    def __init__(self, number: int, panel: spec.Panel, axes, made) -> None:
        self.panel, self.axes, self.layout = panel, axes, made["layout"]
        self.end = "" if number == 0 else str(number + 1)
        of = f"x{self.end}", f"y{self.end}"
        self.traces = [trace for trace in made["data"] if (trace.get("xaxis"), trace.get("yaxis")) == of]
        self.shapes = [
            one for one in self.layout["shapes"] if of[0] in one["xref"].split() and of[1] in one["yref"].split()
        ]

    def plotly_axis(self, which: str) -> dict:
        return self.layout[f"{which}axis{self.end}"]


def words(text: str) -> str:
    """A text of Plotly's, as it is read."""
    return html.unescape(text.replace("<br>", "\n"))


@pytest.fixture(params=FIGURES)
def both(request):
    figure = FIGURES[request.param]
    drawn, made = draw(figure), plotly(figure)
    panels = [panel for row in figure.panels for panel in row if panel is not None]
    return figure, drawn, made, [Shown(n, panel, drawn.axes[n], made) for n, panel in enumerate(panels)]


def test_titles_legends_and_captions_agree(both):
    figure, drawn, made, panels = both
    alone = len(panels) == 1 and not panels[0].panel.title
    assert (drawn.axes[0].get_title() if alone else drawn.get_suptitle()) == figure.title
    assert words(made["layout"]["title"]["text"]) == figure.title
    legends = [*drawn.legends, *(one for axes in drawn.axes if (one := axes.get_legend()))]
    texts = [text.get_text() for legend in legends for text in legend.get_texts()]
    assert texts == [words(one["name"]) for one in made["data"] if one["showlegend"]] if texts else not figure.legend
    notes = [words(note["text"]) for note in made["layout"]["annotations"]]
    wanted = [] if alone else [one.axes.get_title() for one in panels if one.axes.get_title()]
    wanted += [text for one in panels for _, text in one.panel.headings]
    wanted += [drawn.get_supxlabel()] if drawn.get_supxlabel() else []
    assert sorted(notes) == sorted(wanted)
    headings = {text.get_text() for one in panels for text in one.axes.texts}
    assert all(text in headings for one in panels for _, text in one.panel.headings)


def test_labels_ticks_limits_and_scales_agree(both):
    _, _, _, panels = both
    for one in panels:
        for which, axis, artist in (("x", one.panel.x, one.axes.xaxis), ("y", one.panel.y, one.axes.yaxis)):
            there = one.plotly_axis(which)
            assert artist.get_label_text() == words(there["title"]["text"]) == axis.label
            if axis.ticks is not None:
                assert [text.get_text() for text in artist.get_ticklabels()] == [words(t) for t in there["ticktext"]]
                places = [compressed(place, axis.linear_to) for place in artist.get_ticklocs()]
                assert places == pytest.approx(there["tickvals"])
            if "range" in there:
                low, high = one.axes.get_xlim() if which == "x" else one.axes.get_ylim()
                assert there["range"] == pytest.approx(
                    [compressed(low, axis.linear_to), compressed(high, axis.linear_to)]
                )


def test_cells_frames_and_written_values_agree(both):
    _, _, _, panels = both
    for one in panels:
        maps = sorted((trace for trace in one.traces if trace["type"] == "heatmap"), key=lambda trace: trace["x"][0])
        images = one.axes.images
        assert bool(maps) == bool(images)
        frames = {(shape["x0"], shape["y0"], shape["line"]["color"]) for shape in one.shapes if "label" in shape}
        artists = [patch for patch in one.axes.patches if isinstance(patch, Rectangle) and patch.get_linewidth() > 1]
        assert frames == {(*patch.get_xy(), to_hex(patch.get_edgecolor())) for patch in artists}
        if not maps:
            continue
        values = np.concatenate([np.array(trace["z"], dtype=float) for trace in maps], axis=1)
        here = np.ma.filled(images[0].get_array(), np.nan)
        if len(images) == 2:
            here = np.where(np.isnan(here), np.ma.filled(images[1].get_array(), np.nan), here)
        np.testing.assert_allclose(here, values, rtol=1e-6, equal_nan=True)
        coloured = [(image.get_clim(), to_hex(image.cmap(1.0))) for image in images]
        assert coloured == [((trace["zmin"], trace["zmax"]), trace["colorscale"][-1][1]) for trace in maps[::-1]]
        written = {}
        for trace in maps:
            for row, line in enumerate(trace.get("text", [])):
                written |= {(column, row): text for column, text in zip(trace["x"], line, strict=True) if text}
        named = {shape["label"]["text"] for shape in one.shapes if shape.get("label", {}).get("text")}
        beside = named | {text for _, text in one.panel.headings}
        texts = [text for text in one.axes.texts if text.get_text() not in beside]
        bold = {text.get_position(): text.get_fontweight() == "bold" for text in texts}
        assert {place: text.startswith("<b>") for place, text in written.items()} == bold
        plain = {place: text.removeprefix("<b>").removesuffix("</b>") for place, text in written.items()}
        assert {text.get_position(): text.get_text() for text in texts} == plain
        assert named <= {text.get_text() for text in one.axes.texts}


def test_marks_bars_and_lines_agree(both):
    _, _, _, panels = both
    for one in panels:
        compress = [one.panel.x.linear_to, one.panel.y.linear_to]
        there = {tuple(place) for trace in one.traces if trace["type"] == "scatter" and trace["mode"] != "lines"
                 for place in zip(trace["x"], trace["y"], strict=True)}  # fmt: skip
        places = [place for line in one.axes.lines if line.get_marker() != "None"
                  for place in zip(*line.get_data(), strict=True)]  # fmt: skip
        places += [
            place for dots in one.axes.collections if dots.get_array() is not None for place in dots.get_offsets()
        ]
        assert {tuple(map(compressed, place, compress)) for place in places} == there
        bars = [bar.get_width() for bars in one.axes.containers for bar in bars]
        widths = [width for trace in one.traces if trace["type"] == "bar" for width in trace["x"]]
        assert bars == pytest.approx(widths)
        names = {
            text for trace in one.traces if "markers+text" in trace.get("mode", "") for text in trace["text"] if text
        }
        assert names <= {text.get_text() for text in one.axes.texts}
        lines = [trace for trace in one.traces if trace.get("mode") == "lines"]
        drawn = [line for line in one.axes.lines if line.get_marker() == "None" and len(line.get_xdata()) > 2]
        for trace, line in zip(lines, drawn, strict=True):
            np.testing.assert_allclose(np.array(trace["x"], dtype=float), line.get_xdata(), rtol=1e-6)


def test_colour_bars_agree(both):
    _, drawn, made, panels = both
    bars = [axes.get_ylabel() for axes in drawn.axes[len(panels) :]]
    found = [trace.get("colorbar") or trace.get("marker", {}).get("colorbar") for trace in made["data"]]
    assert bars == [words(one["title"]["text"]) for one in found if one]


@pytest.mark.parametrize("name", FIGURES)
def test_the_page_uses_only_what_plotly_knows_and_its_texts_hold_no_tags(name):
    graph_objects = pytest.importorskip("plotly.graph_objects")
    made = plotly(FIGURES[name])
    graph_objects.Figure(made)  # raises for a property that Plotly does not have
    with pytest.raises(ValueError, match="nonsense"):
        graph_objects.Figure({**made, "layout": {"nonsense": 1}})
    assert "<i>" not in str(made) and "<b>a" not in str(made)


@pytest.mark.parametrize("name", FIGURES)
def test_panels_and_their_labels_keep_apart_on_the_page(name):
    """No two panels share room, and a colour bar stands right of its panel and left of the next."""
    layout = plotly(FIGURES[name])["layout"]
    ends = [key.removeprefix("xaxis") for key in layout if key.startswith("xaxis")]
    boxes = [(*layout[f"xaxis{end}"]["domain"], *layout[f"yaxis{end}"]["domain"]) for end in ends]
    for left, right, bottom, top in boxes:
        assert 0 < left < right < 1 and 0 < bottom < top < 1
    for number, one in enumerate(boxes):
        for other in boxes[number + 1 :]:
            beside = one[1] < other[0] or other[1] < one[0]
            assert beside or one[2] > other[3] or other[2] > one[3]


def test_names_of_an_effect_stand_on_the_same_side_in_both():
    figure = FIGURES["effects"]
    sides = {text.get_text(): text.get_ha() for text in draw(figure).axes[0].texts}
    there = {name: side for trace in plotly(figure)["data"] if "textposition" in trace
             for name, side in zip(trace["text"], trace["textposition"], strict=True) if name}  # fmt: skip
    assert sides == {name: {"middle right": "left", "middle left": "right"}[side] for name, side in there.items()}


# --- no trace ---


def settings() -> dict:
    return {key: dict.__getitem__(rcParams, key) for key in rcParams}


def test_drawing_and_saving_leave_the_settings_alone(tmp_path):
    before = settings()
    save(FIGURES["mosaic"], tmp_path / "mosaic.png")
    assert settings() == before
    assert (tmp_path / "mosaic.png").stat().st_size > 5000


def test_importing_leaves_backend_and_settings_alone():
    code = (
        "import matplotlib as m\n"
        "read = lambda: {key: dict.__getitem__(m.rcParams, key) for key in m.rcParams}\n"
        "before = read()\n"
        "import sys, common.results.draw, common.results.page, common.results.figures_circuits\n"
        "assert read() == before, 'settings changed'\n"
        "assert 'matplotlib.pyplot' not in sys.modules and 'seaborn' not in sys.modules\n"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=120)


def test_the_specification_needs_no_backend():
    code = (
        "import sys, common.results.spec\n"
        "assert not {'matplotlib', 'plotly', 'torch'} & set(sys.modules), 'a backend was loaded'\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True, timeout=120)


def test_what_the_font_lacks_is_escaped_and_long_labels_are_cut(tmp_path):
    tokens = ["BOS", "漢", "x" * 40, "é"]
    figure = figures_heads.token_figure("pattern", [("\x07", np.tri(4))], tokens, [], "\u202e")
    drawn = draw(figure)
    assert [label.get_text() for label in drawn.axes[0].get_xticklabels()] == ["BOS", "\\u6f22", "x" * 27 + "…", "é"]
    assert (drawn.get_suptitle(), drawn.axes[0].get_title()) == ("\\u202e", "\\x07")
    drawn.savefig(tmp_path / "again.png")
    assert [label.get_text() for label in drawn.axes[0].get_xticklabels()][1] == "\\u6f22"
    assert legible("a\nb") == "a\nb" and legible("\x07") == "\\x07"
