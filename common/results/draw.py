"""Figures by matplotlib, for PNG files and for notebooks.

A figure is made without pyplot: nothing is registered anywhere, so nothing has to be closed. Fonts and the like are set
in a context while a figure is drawn or saved; the settings of whoever imports this stay as they are.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.text import Text

from common.heads.statistics import Floats
from common.loading.escapes import escape
from common.results import spec

FONT = "DejaVu Sans"
SHAPES = {"circle": "o", "square": "s", "triangle-down": "v", "triangle-up": "^", "diamond": "D", "tick": "|"}


def draw(figure: spec.Figure) -> Figure:
    """The figure by matplotlib, its texts made legible."""
    with style():
        made = Figure(figsize=(figure.width, figure.height), dpi=120, layout="constrained")
        FigureCanvasAgg(made)
        # Rows may hold different numbers of panels: the grid is as fine as all of them need.
        columns = math.lcm(*(len(row) for row in figure.panels))
        grid = made.add_gridspec(len(figure.panels), columns, height_ratios=figure.heights)
        panels: list[Axes] = []  # all before their colour bars, so that figure.axes begins with them
        shown = [panel for row in figure.panels for panel in row if panel is not None]
        for number, row in enumerate(figure.panels):
            width = columns // len(row)
            places = [place for place, panel in enumerate(row) if panel is not None]
            panels += [made.add_subplot(grid[number, place * width : (place + 1) * width]) for place in places]
        for axes, panel in zip(panels, shown, strict=True):
            _panel(axes, panel)
        if len(panels) == 1 and not shown[0].title:
            panels[0].set_title(figure.title, fontsize=11, pad=24 if figure.legend_at == "above" else None)
        else:
            made.suptitle(figure.title, fontsize=11)
        if figure.caption:
            made.supxlabel(figure.caption, fontsize=8)
        if figure.legend:
            _legend(made, panels[0], figure)
        for text in made.findobj(Text):
            if isinstance(text, Text):
                text.set_text(legible(text.get_text()))
    return made


def save(figure: spec.Figure, path: Path) -> None:
    """Write the figure as PNG, 120 dots per inch."""
    drawn = draw(figure)
    with style():
        drawn.savefig(path, dpi=120, bbox_inches="tight", metadata={"Software": None})


def style() -> AbstractContextManager[None]:
    """Settings under which figures are drawn and saved."""
    # A token such as "$x_1" is no formula. The salt makes the names inside an SVG file the same in every run.
    return rc_context({"font.family": [FONT], "text.parse_math": False, "svg.hashsalt": "page"})


def legible(text: str, most: int | None = None) -> str:
    """`text` as the font can show it: glyphs that it lacks become escapes such as `\\u4e2d`, and so does what cannot be
    printed; at most `most` characters, the end cut off."""
    known = get_font(findfont(FontProperties(family=FONT))).get_charmap()
    shown = "".join(
        char if char == "\n" or (char.isprintable() and ord(char) in known) else escape(char) for char in text
    )
    return shown if most is None or len(shown) <= most else shown[: most - 1] + "…"


def _panel(axes: Axes, panel: spec.Panel) -> None:
    drawn = [_element(axes, element, panel) for element in panel.elements]
    coloured = next((one for one in drawn if one is not None), None)
    if panel.scale and coloured is not None:
        extend = "both" if panel.scale.beyond else "neither"
        bar = axes.figure.colorbar(coloured, ax=axes, fraction=0.046, pad=0.03, extend=extend)
        bar.set_label(panel.scale.label, fontsize=8)
        bar.ax.tick_params(labelsize=7)
    _axis(axes, "x", panel.x, coloured is not None)
    _axis(axes, "y", panel.y, coloured is not None)
    for place, heading in panel.headings:
        axes.annotate(heading, (place, 1), xycoords=("data", "axes fraction"), xytext=(0, 4), ha="center", fontsize=8,
                      textcoords="offset points")  # fmt: skip
    axes.set_title(panel.title, fontsize=10, pad=18 if panel.headings else None)


def _axis(axes: Axes, which: Literal["x", "y"], axis: spec.Axis, coloured: bool) -> None:
    def change(what: str, *values: object, **options: object) -> None:
        getattr(axes, f"set_{which}{what}")(*values, **options)

    if axis.linear_to is not None:
        change("scale", "symlog", linthresh=axis.linear_to)
    if axis.ticks is not None:
        size = 6 if len(axis.ticks) > 32 else 8 if coloured else 9
        # Legible here: matplotlib writes tick labels anew from these whenever it draws.
        labels = [legible(tick, spec.LONGEST_TICK) for tick in axis.ticks]
        change("ticks", list(axis.places), labels, rotation=90 if axis.turned else 0, fontsize=size)
    change("label", axis.label)
    if axis.limits:  # after the ticks, which would move them
        change("lim", axis.limits)
    if axis.grid:
        axes.grid(axis=which, color="0.92")
        axes.set_axisbelow(True)


def _element(axes: Axes, one: spec.Element, panel: spec.Panel) -> ScalarMappable | None:
    """Draw one element; what a colour bar needs, where it has a scale."""
    if isinstance(one, spec.Heatmap):
        return _heatmap(axes, one, "equal" if panel.square else "auto")
    if isinstance(one, spec.Marks):
        return _marks(axes, one)
    if isinstance(one, spec.Bars):
        rows = range(len(one.width))
        axes.barh(rows, one.width, left=one.left, color=one.colour, edgecolor="white", linewidth=0.4)
        axes.spines[["top", "right", "left"]].set_visible(False)
    elif isinstance(one, spec.Line):
        axes.plot(one.x, one.y, color=one.colour, drawstyle="steps-post" if one.steps else "default", zorder=1)
    elif one.high is None:
        (axes.axvline if one.axis == "x" else axes.axhline)(one.low, color=one.colour, linewidth=0.8)
    else:
        (axes.axvspan if one.axis == "x" else axes.axhspan)(one.low, one.high, color=one.colour, zorder=0)
    return None


def _heatmap(axes: Axes, one: spec.Heatmap, aspect: Literal["equal", "auto"]) -> ScalarMappable:
    first = np.arange(one.values.shape[1]) == 0  # the BOS column, where it has a scale of its own
    image = _image(axes, np.where(first, np.nan, one.values) if one.bos else one.values, one.scale, aspect)
    if one.bos:
        _image(axes, np.where(first, one.values, np.nan), one.bos, aspect)
    if one.gaps:
        rows, columns = one.values.shape
        axes.hlines(np.arange(1, rows) - 0.5, -0.5, columns - 0.5, color="white", linewidth=0.5)
        axes.vlines(np.arange(1, columns) - 0.5, -0.5, rows - 0.5, color="white", linewidth=0.5)
        axes.spines[:].set_visible(False)
    for frame in one.outlines:
        _outline(axes, frame)
    if one.texts is not None:
        _cell_texts(axes, one, one.texts)
    return image


def _image(axes: Axes, values: Floats, scale: spec.Scale, aspect: Literal["equal", "auto"]) -> ScalarMappable:
    shown = np.ma.masked_invalid(values)
    return axes.imshow(shown, cmap=scale.colours, vmin=scale.low, vmax=scale.high, aspect=aspect)


def _outline(axes: Axes, frame: spec.Outline) -> None:
    corner, width = (frame.column - 0.5, frame.row - 0.5), 2.5 if frame.name else 1.8
    axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=frame.colour, linestyle=frame.line, linewidth=width,
                             zorder=3))  # fmt: skip
    if frame.name:
        label = axes.text(
            frame.column - 0.46, frame.row - 0.46, frame.name, color=frame.colour, fontsize=8, zorder=4, va="top"
        )
        label.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
        label.set_fontweight("bold")


def _cell_texts(axes: Axes, one: spec.Heatmap, texts: np.ndarray) -> None:
    """What stands in cells: light on dark colours."""
    size = 10 if one.gaps else 7
    for (row, column), text in np.ndenumerate(texts):
        scale = one.bos if one.bos and not column else one.scale
        share = (one.values[row, column] - scale.low) / (scale.high - scale.low)
        light = np.dot(colormaps[scale.colours](float(share))[:3], (0.2126, 0.7152, 0.0722)) > 0.5  # ITU-R BT.709
        weight = "bold" if one.bold is not None and one.bold[row, column] else "normal"
        if text:
            axes.text(column, row, text, ha="center", va="center", fontsize=size, fontweight=weight,
                      color="0.15" if light else "white")  # fmt: skip


def _marks(axes: Axes, one: spec.Marks) -> ScalarMappable | None:
    drawn = None
    if one.ends:
        axes.hlines(one.y, *one.ends, color=one.colour, linewidth=1.2)
    if one.values is not None and one.scale:
        norm = Normalize(one.scale.low, one.scale.high)
        drawn = axes.scatter(one.x, one.y, c=one.values, marker=SHAPES[one.shape], s=one.size**2, linewidths=0.6,
                             edgecolors=one.colour, cmap=one.scale.colours, norm=norm, zorder=3)  # fmt: skip
    else:
        axes.plot(one.x, one.y, **_look(one.shape, one.colour, one.size, one.filled))
    for x, y, name, right in zip(one.x, one.y, one.names, one.right, strict=False):
        if name:
            away, side = (6, "left") if right else (-6, "right")
            axes.annotate(name, (x, y), xytext=(away, -3), ha=side, textcoords="offset points", fontsize=8)
    return drawn


def _look(shape: str, colour: str, size: float, filled: bool) -> dict[str, Any]:
    """Marks without a line between them, as matplotlib's `plot` takes it."""
    inside, edge = colour if filled else "white", 2 if shape == "tick" else 1
    return {"linestyle": "none", "marker": SHAPES[shape], "markersize": size, "color": colour, "zorder": 3,
            "markerfacecolor": inside, "markeredgewidth": edge}  # fmt: skip


def _legend(figure: Figure, axes: Axes, shown: spec.Figure) -> None:
    look: dict[str, Any] = {"handles": [_handle(entry) for entry in shown.legend], "ncols": shown.legend_columns}
    if shown.legend_at == "below":
        look["loc"] = f"outside lower {'center' if shown.legend_columns > 1 else 'left'}"
        figure.legend(**look, frameon=False, fontsize=9)
    elif shown.legend_at == "above":
        axes.legend(**look, loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=8, borderaxespad=0)
    else:
        axes.legend(handles=look["handles"], loc=shown.legend_at, fontsize=8)


def _handle(entry: spec.Entry) -> Artist:
    if entry.shape == "frame":
        return Patch(fill=False, linewidth=2, edgecolor=entry.colour, linestyle=entry.line, label=entry.text)
    if entry.shape == "patch":
        return Patch(facecolor=entry.colour, label=entry.text)
    if entry.shape == "line":
        return Line2D([], [], color=entry.colour, label=entry.text)
    return Line2D([], [], label=entry.text, **_look(entry.shape, entry.colour, 6, entry.filled))
