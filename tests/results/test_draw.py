"""A figure shows what its specification says, on paper and on the page, and drawing leaves no trace in settings."""

from __future__ import annotations

import base64
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import rcParams
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from common.attention.head import Head
from common.heads.detection import Detection
from common.heads.labels import Labels
from common.heads.tokens import BUDGET
from common.interventions.experiments import PATHS, WHOLE
from common.results import figures_circuits, figures_heads, spec
from common.results.draw import draw, legible, save
from common.results.picture import INCH, WIDEST, picture
from tests.results.test_figures_circuits import PAIR, PARTS, circuits, composition, decomposition, masked_scores, path
from tests.results.test_figures_heads import ABLATED, HEADS

TOKENS = ["BOS", "<b>a</b>", "·b", "c & d", "a", "·b"]
CELLS = [(4, 2), (5, 3)]


def detection() -> Detection:
    score = np.array([[0.1, 0.9, 0.2], [0.05, 0.3, 0.02]])
    verdict = np.array([["none", "induction", "suppression"], ["none", "attends-only", "previous-token"]])
    control, threshold, sure = np.full((2, 3), 0.05), np.full((2, 3), 0.11), np.ones((2, 3))
    return Detection(
        score,
        control,
        threshold,
        score,
        score,
        sure,
        verdict,
        (verdict == "induction")[None],
        (score >= threshold)[None],
    )


def every_figure() -> dict[str, spec.Figure]:
    found, scores, pattern = detection(), masked_scores(), np.tril(np.full((6, 6), 0.2))
    paths = [path(sender, which, metric, place / 10 - 0.2) for place, which in enumerate((*PATHS, WHOLE))
             for sender in ("0.0", "0.1") for metric in figures_circuits.PATH_TITLES]  # fmt: skip
    labels = Labels(frozenset({Head.at(0, 1), Head.at(1, 0)}), "by hand")
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
        "composition": figures_circuits.composition_figure(composition(), PAIR, "title"),
        "circuits": figures_circuits.circuit_figure(circuits({0: np.eye(3)}, np.eye(6)), TOKENS[:3], 6, "title"),
        "parts": figures_circuits.part_figure(PARTS, "title"),
        "paths": figures_circuits.path_figure(paths, "title"),
    }


FIGURES = every_figure()


@pytest.fixture(params=FIGURES)
def shown(request):
    """A figure, drawn, and its panels beside their axes."""
    figure = FIGURES[request.param]
    drawn, panels = draw(figure), [panel for row in figure.panels for panel in row if panel is not None]
    return figure, drawn, list(zip(panels, drawn.axes, strict=False))


def of_kind(panel: spec.Panel, kind: type) -> list:
    return [one for one in panel.elements if isinstance(one, kind)]


def test_titles_legends_and_captions_are_there(shown):
    figure, drawn, panels = shown
    alone = len(panels) == 1 and not panels[0][0].title
    assert (drawn.axes[0].get_title() if alone else drawn.get_suptitle()) == figure.title
    legends = [*drawn.legends, *(one for axes in drawn.axes if (one := axes.get_legend()))]
    texts = [text.get_text() for legend in legends for text in legend.get_texts()]
    assert texts == [entry.text for entry in figure.legend]
    assert (drawn.get_supxlabel() or "") == figure.caption
    for panel, axes in panels:
        assert alone or axes.get_title() == panel.title
        assert {text for _, text in panel.headings} <= {text.get_text() for text in axes.texts}


def test_labels_ticks_limits_and_scales_are_there(shown):
    for panel, axes in shown[2]:
        for axis, artist, limits in ((panel.x, axes.xaxis, axes.get_xlim()), (panel.y, axes.yaxis, axes.get_ylim())):
            assert artist.get_label_text() == axis.label
            if axis.ticks is not None:
                assert [text.get_text() for text in artist.get_ticklabels()] == list(axis.ticks)
                assert artist.get_ticklocs() == pytest.approx(list(axis.places))
            assert axis.limits is None or limits == pytest.approx(axis.limits)
            assert artist.get_scale() == ("symlog" if axis.linear_to else "linear")


def test_cells_frames_and_written_values_are_there(shown):
    for panel, axes in shown[2]:
        maps = of_kind(panel, spec.Heatmap)
        assert bool(maps) == bool(axes.images)
        artists = [patch for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_linewidth() > 1]
        frames = {(one.column - 0.5, one.row - 0.5, to_hex(one.colour)) for each in maps for one in each.outlines}
        assert frames == {(*patch.get_xy(), to_hex(patch.get_edgecolor())) for patch in artists}
        for one in maps:
            here = np.ma.filled(axes.images[0].get_array(), np.nan)
            if one.bos:
                here = np.where(np.isnan(here), np.ma.filled(axes.images[1].get_array(), np.nan), here)
            np.testing.assert_allclose(here, one.values, rtol=1e-6, equal_nan=True)
            scales = [one.scale, one.bos] if one.bos else [one.scale]
            coloured = [(image.get_clim(), image.cmap.name) for image in axes.images]
            assert coloured == [((scale.low, scale.high), scale.colours) for scale in scales]
            named = {frame.name for frame in one.outlines if frame.name}
            beside = named | {text for _, text in panel.headings}
            texts = [text for text in axes.texts if text.get_text() not in beside]
            cells = [] if one.texts is None else [(place[::-1], text) for place, text in np.ndenumerate(one.texts)]
            assert {text.get_position(): text.get_text() for text in texts} == {at: text for at, text in cells if text}
            bold = {text.get_position() for text in texts if text.get_fontweight() == "bold"}
            wanted = {at for at, text in cells if text and one.bold is not None and one.bold[at[::-1]]}
            assert bold == wanted and named <= {text.get_text() for text in axes.texts}


def test_marks_bars_and_lines_are_there(shown):
    for panel, axes in shown[2]:
        marks = of_kind(panel, spec.Marks)
        places = [place for line in axes.lines if line.get_marker() != "None"
                  for place in zip(*line.get_data(), strict=True)]  # fmt: skip
        places += [tuple(at) for dots in axes.collections if dots.get_array() is not None for at in dots.get_offsets()]
        assert sorted(places) == sorted(place for one in marks for place in zip(one.x, one.y, strict=True))
        bars = [bar.get_width() for bars in axes.containers for bar in bars]
        assert bars == pytest.approx([width for one in of_kind(panel, spec.Bars) for width in one.width])
        names = {name for one in marks for name in one.names if name}
        assert names <= {text.get_text() for text in axes.texts}
        drawn = [line for line in axes.lines if line.get_marker() == "None" and len(line.get_xdata()) > 2]
        for one, line in zip(of_kind(panel, spec.Line), drawn, strict=True):
            np.testing.assert_allclose(np.array(one.x, dtype=float), line.get_xdata(), rtol=1e-6)


def test_each_panel_with_a_scale_has_one_colour_bar(shown):
    _, drawn, panels = shown
    bars = [axes.get_ylabel() for axes in drawn.axes[len(panels) :]]
    assert bars == [panel.scale.label for panel, _ in panels if panel.scale]


def test_names_of_an_effect_stand_on_their_side():
    sides = {text.get_text(): text.get_ha() for text in draw(FIGURES["effects"]).axes[0].texts}
    wanted = {name: "left" if right else "right" for one in of_kind(FIGURES["effects"].panels[0][0], spec.Marks)
              for name, right in zip(one.names, one.right, strict=True) if name}  # fmt: skip
    assert sides == wanted


# --- on the page ---


@pytest.fixture(scope="module", params=FIGURES)
def on_page(request):
    figure = FIGURES[request.param]
    return [panel for row in figure.panels for panel in row if panel is not None], picture(figure)


def test_every_cell_mark_and_bar_has_a_spot_that_says_what_it_is(on_page):
    panels, made = on_page
    assert made.width <= WIDEST and made.width > 3 * INCH
    for panel, there in zip(panels, made.panels, strict=True):
        texts = [spot[4] for spot in there["spots"]]
        cells = [one for each in of_kind(panel, spec.Heatmap) for one in each.values.ravel() if np.isfinite(one)]
        marks = [x for one in of_kind(panel, spec.Marks) for x in one.x]
        bars = [width for one in of_kind(panel, spec.Bars) for width in one.width]
        assert len(texts) == len(cells) + len(marks) + len(bars) and all(texts)
        said = [text for one in of_kind(panel, spec.Marks) for text in one.hover]
        assert set(said) <= set(texts)


def test_spots_stand_where_the_data_stand(on_page):
    """A slow oracle: on linear axes a place follows from the limits alone."""
    panels, made = on_page
    for panel, there in zip(panels, made.panels, strict=True):
        spots = there["spots"]
        for one in of_kind(panel, spec.Heatmap):
            rows, columns = one.values.shape
            at = [((column + 0.5) / columns, (row + 0.5) / rows, 0.5 / columns, 0.5 / rows)
                  for (row, column), value in np.ndenumerate(one.values) if np.isfinite(value)]  # fmt: skip
            np.testing.assert_allclose([spot[:4] for spot in spots[: len(at)]], at, atol=1e-4)
        if panel.x.limits and not panel.x.linear_to:
            left, right = panel.x.limits
            marks = [(x - left) / (right - left) for one in of_kind(panel, spec.Marks) for x in one.x]
            np.testing.assert_allclose([spot[0] for spot in spots if spot[2:4] == (0, 0)], marks, atol=1e-4)


def test_heads_are_named_where_a_click_chooses_one():
    (mosaic,), (effects,) = (picture(FIGURES[name]).panels for name in ("mosaic", "effects"))
    assert [spot[5] for spot in mosaic["spots"]] == ["0.0", "0.1", "0.2", "1.0", "1.1", "1.2"]
    assert {spot[5] for spot in effects["spots"]} == {"1.0", "1.1", "1.2", "1.3"}
    assert all(spot[4].startswith(f"head {spot[5]}\n") for spot in (*mosaic["spots"], *effects["spots"]))


def test_panels_and_their_colour_bars_keep_apart_on_the_page(on_page):
    """No two panels share room, and a colour bar stands right of its panel and left of the next."""
    _, made = on_page
    boxes = [*(panel["box"] for panel in made.panels), *made.bars]
    for left, top, width, height in boxes:
        assert 0 < left < left + width < 1 and 0 < top < top + height < 1
    for number, one in enumerate(boxes):
        for other in boxes[number + 1 :]:
            beside = one[0] + one[2] < other[0] or other[0] + other[2] < one[0]
            assert beside or one[1] + one[3] < other[1] or other[1] + other[3] < one[1]


def test_a_picture_is_the_same_each_time_and_holds_no_markup_of_its_texts():
    made = picture(FIGURES["mosaic"])
    assert made == picture(FIGURES["mosaic"])
    svg = base64.b64decode(made.image.partition(",")[2]).decode()
    assert svg.rstrip().endswith("</svg>") and "<i>" not in svg and "<script" not in svg and "http://127" not in svg


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
        "assert not {'matplotlib', 'torch'} & set(sys.modules), 'a backend was loaded'\n"
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
