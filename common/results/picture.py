"""A figure in report.html: the picture that matplotlib draws, as SVG, and what is said where the pointer rests.

The page loads the SVG as an image, in which no script runs and nothing is fetched. Places are shares of the picture, or
of one panel, from the upper left corner; page.js finds the spot under the pointer.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

from common.results import spec
from common.results.draw import draw, style
from common.results.spec import Bars, Figure, Heatmap, Marks, Panel

INCH = 80  # pixels at which the fonts are legible
WIDEST = 1180  # pixels that the page has room for; wider figures shrink to it
DIGITS = 4  # of a place: a tenth of a pixel

Spot = tuple[float, float, float, float, str, str]


@dataclass(frozen=True)
class Picture:
    """An SVG `image` as a data address, `width` pixels wide.

    `panels`: of each panel its `box` [left, top, width, height] and its `spots` [x, y, half width, half height, text,
    head]; `bars`: the box of each colour bar.
    """

    image: str
    width: int
    panels: list[dict[str, object]]
    bars: list[list[float]]


def picture(figure: Figure, *, numbered: bool = True) -> Picture:
    """The figure as the page shows it. `numbered`: whether colour bars carry numbers; where they change, the page
    writes them itself."""
    drawn, file = draw(figure), io.BytesIO()
    panels = [panel for row in figure.panels for panel in row if panel is not None]
    bars = drawn.axes[len(panels) :]
    for bar in bars if not numbered else ():
        bar.tick_params(colors="none")  # unseen, they still keep their room
    with style():
        drawn.draw_without_rendering()
        drawn.set_layout_engine("none")  # another layout would move what is measured here
        room = drawn.get_tightbbox().padded(0.08)
        drawn.savefig(file, format="svg", bbox_inches=room, transparent=True, metadata={"Date": None})
    svg = " ".join(file.getvalue().decode("utf-8").split())  # its indents are a tenth of it
    placed = zip(drawn.axes, panels, strict=False)
    return Picture(
        f"data:image/svg+xml;base64,{base64.b64encode(svg.encode('utf-8')).decode('ascii')}",
        round(min(INCH * room.width, WIDEST)),
        [{"box": _box(axes, room), "spots": _placed(axes, panel)} for axes, panel in placed],
        [_box(bar, room) for bar in bars],
    )


def _box(axes: Axes, room: Bbox) -> list[float]:
    """Where a panel stands in the `room` (inches) that is saved."""
    at = axes.get_window_extent().transformed(axes.figure.dpi_scale_trans.inverted())
    corner = (at.x0 - room.x0) / room.width, (room.y1 - at.y1) / room.height
    return [round(float(share), DIGITS) for share in (*corner, at.width / room.width, at.height / room.height)]


def _placed(axes: Axes, panel: Panel) -> list[Spot]:
    """The spots of a panel, from its data to shares of it."""
    found = [spot for one in panel.elements for spot in _spots(one, panel)]
    middle, half = (np.array([spot[start : start + 2] for spot in found]).reshape(-1, 2) for start in (0, 2))
    shares = axes.transData + axes.transAxes.inverted()
    low, high = shares.transform(middle - half), shares.transform(middle + half)
    x, y = ((low + high) / 2).round(DIGITS).T.tolist()
    across, along = (abs(high - low) / 2).round(DIGITS).T.tolist()
    said = ((text, head) for *_, text, head in found)
    return [
        (left, round(1 - up, DIGITS), wide, high, *words)
        for left, up, wide, high, words in zip(x, y, across, along, said, strict=True)
    ]


def _spots(one: spec.Element, panel: Panel) -> Iterator[Spot]:
    """What an element says and where: the middle and half the size, in its data."""
    if isinstance(one, Heatmap):
        for (row, column), value in np.ndenumerate(one.values):
            if np.isfinite(value):
                text = _cell(one, panel, row, column) if one.hover is None else str(one.hover[row, column])
                yield column, row, 0.5, 0.5, text, "" if one.heads is None else str(one.heads[row, column])
    elif isinstance(one, Marks):
        texts = one.hover or [f"{x:.4g}" for x in one.x]
        for x, y, text, head in zip(one.x, one.y, texts, one.heads or [""] * len(one.x), strict=True):
            yield x, y, 0.0, 0.0, text, head
    elif isinstance(one, Bars):
        for row, (left, width) in enumerate(zip(one.left, one.width, strict=True)):
            yield left + width / 2, row, width / 2, 0.4, f"{width:.3f}", ""


def _cell(one: Heatmap, panel: Panel, row: int, column: int) -> str:
    """What a cell is, by the labels of its axes: row, column, value."""
    query, key, what = (text.split(" (")[0] for text in (panel.y.label, panel.x.label, one.scale.label))
    rows, columns = panel.y.ticks or (), panel.x.ticks or ()
    return f"{query} {rows[row]}\n{key} {columns[column]}\n{what} {one.values[row, column]:+.3f}"
