"""Figures as Plotly's plain dictionaries {data, layout}, for report.html.

1. Places are worked out here in pixels: every panel gets a box, less the room of its labels and its colour bar. Plotly
   moves nothing (no margins), so that texts cannot overlap on one figure and not on another.
2. Plotly reads a few HTML tags in its texts, so every text goes through `label` first.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypedDict

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex

from common.results import spec
from common.results.spec import LONGEST_TICK, Axis, Entry, Figure, Heatmap, Marks, Panel, Rule, Scale

Plain = dict[str, object]


class Drawn(TypedDict):
    data: list[Plain]
    layout: Plain


INCH = 80  # pixels, with which the fonts below are legible
WIDEST = 1180  # pixels that the page has room for; wider figures shrink to it
LETTER = 6.2  # pixels of one letter of `SMALL`, on average
SMALL, USUAL = 10, 12
DASHES = {"-": "solid", "--": "dash", ":": "dot"}
SYMBOLS = {"circle": "circle", "square": "square", "triangle-down": "triangle-down", "triangle-up": "triangle-up",
           "diamond": "diamond", "tick": "line-ns", "frame": "square-open", "patch": "square"}  # fmt: skip


def label(text: str, most: int = 60) -> str:
    """A text as Plotly takes it: shortened, and with nothing in it that it would read as a tag."""
    short = text if len(text) <= most else text[: most - 1] + "…"
    return html.escape(short, quote=False)


def lines(text: str) -> str:
    """A text of several lines, whole, as Plotly takes it."""
    return "<br>".join(label(line, len(line)) for line in text.split("\n"))


def colours(name: str, stops: int = 9) -> list[list[float | str]]:
    """A colour map of matplotlib's as Plotly's [[place in [0, 1], "#rrggbb"], …]."""
    places = np.linspace(0.0, 1.0, stops)
    return [[float(place), to_hex(colormaps[name](place))] for place in places]


def compressed(value: float, linear_to: float | None) -> float:
    """Linear up to `linear_to`, logarithmic beyond: 1 there, one more for each factor of ten."""
    if linear_to is None:
        return value
    size = abs(value) / linear_to
    return math.copysign(size if size <= 1 else 1 + math.log10(size), value)


class Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float  # pixels from above


def plotly(figure: Figure) -> Drawn:
    """The figure as {data, layout}."""
    inch = min(INCH, max(INCH / 2, WIDEST / figure.width))
    captions, entries = figure.caption.count("\n") + 1 if figure.caption else 0, _legend_rows(figure)
    head, foot = 14 + 17 * (figure.title.count("\n") + 1), 8 + 18 * entries + 14 * captions
    # On paper a legend takes its room from the panels; here it gets some of its own where it is long.
    width, height = figure.width * inch, max(figure.height * inch, 150.0) + (foot if entries + captions > 2 else 0)
    drawn: Drawn = {"data": [], "layout": _frame(figure, width, height, foot)}
    shapes: list[Plain] = []
    notes = [_note(figure.caption, 0.5, 6 / height)] if figure.caption else []
    for number, (panel, box) in enumerate(_boxes(figure, Box(0, head, width, height - foot)), start=1):
        axes = "" if number == 1 else str(number)  # Plotly's names: x, x2, x3, …
        inner, (rows, columns) = _inner(panel, box), _shape(panel)
        across = [inner.left / width, inner.right / width]
        upwards = [1 - inner.bottom / height, 1 - inner.top / height]
        drawn["layout"] |= {
            f"xaxis{axes}": {**_axis(panel.x, (-0.5, columns - 0.5)), "domain": across, "anchor": f"y{axes}"},
            f"yaxis{axes}": {**_axis(panel.y, (rows - 0.5, -0.5)), "domain": upwards, "anchor": f"x{axes}"},
        }
        traces = [trace for one in panel.elements for trace in _traces(one, panel)]
        if panel.scale:
            bar = {"colorbar": _bar(panel.scale, across[1] + 8 / width, upwards), "showscale": True}
            next(one for one in map(_coloured, traces) if one is not None).update(bar)
        drawn["data"] += [{**trace, "xaxis": f"x{axes}", "yaxis": f"y{axes}"} for trace in traces]
        shapes += [shape for one in panel.elements for shape in _shapes(one, panel, f"x{axes}", f"y{axes}")]
        notes += [_note(said, at, upwards[1] + 2 / height) | {"xref": f"x{axes}"} for at, said in panel.headings]
        if panel.title:
            above = upwards[1] + (18 if panel.headings else 3) / height
            notes.append(_note(panel.title, sum(across) / 2, above, USUAL))
    drawn["data"] += map(_entry, figure.legend)
    drawn["layout"] |= {"shapes": shapes, "annotations": notes}
    return drawn


def _frame(figure: Figure, width: float, height: float, foot: float) -> Plain:
    """The layout without its panels."""
    upright = figure.legend_columns == 1 and figure.legend_at == "below"
    return {
        "width": round(width), "height": round(height), "margin": {"l": 0, "r": 0, "t": 0, "b": 0, "autoexpand": False},
        "title": {"text": lines(figure.title), "font": {"size": USUAL + 1}, "x": 0.5, "yref": "container", "y": 1,
                  "yanchor": "top", "pad": {"t": 8}},
        "hoverlabel": {"align": "left", "font": {"size": 11, "color": "#222"}, "bgcolor": "white",
                       "bordercolor": "#888"},
        "showlegend": bool(figure.legend),
        "legend": {"orientation": "v" if upright else "h", "x": 0.02, "y": (foot - 4) / height, "yanchor": "top",
                   "font": {"size": SMALL}, "itemclick": False, "itemdoubleclick": False},
    }  # fmt: skip


# --- places ---


def _legend_rows(figure: Figure) -> int:
    if not figure.legend:
        return 0
    if figure.legend_columns == 1 and figure.legend_at == "below":
        return len(figure.legend)
    longest = max(len(entry.text) for entry in figure.legend) * LETTER + 50
    return -(-len(figure.legend) // max(1, int(figure.width * INCH * 0.96 // longest)))


def _boxes(figure: Figure, whole: Box) -> Iterator[tuple[Panel, Box]]:
    """Every panel with its share of the room."""
    heights = figure.heights or [1.0] * len(figure.panels)
    top = whole.top
    for row, share in zip(figure.panels, heights, strict=True):
        bottom = top + (whole.bottom - whole.top) * share / sum(heights)
        step = (whole.right - whole.left) / len(row)
        for place, panel in enumerate(row):
            if panel is not None:
                yield panel, Box(place * step, top, (place + 1) * step, bottom)
        top = bottom


def _inner(panel: Panel, box: Box) -> Box:
    """The room of the cells alone: without labels, title and colour bar; cells as wide as high where that is asked."""
    longest = [max(min(len(tick), LONGEST_TICK) for tick in axis.ticks or ("0.00",)) for axis in (panel.y, panel.x)]
    beside, below = (LETTER * letters for letters in longest)
    left = box.left + beside + (36 if panel.y.label else 16)
    bottom = box.bottom - (below if panel.x.turned else 14) - (32 if panel.x.label else 10)
    right = box.right - ((84 if "\n" not in panel.scale.label else 100) if panel.scale else 16)
    top = box.top + (17 * (panel.title.count("\n") + 1) if panel.title else 4) + (16 if panel.headings else 0)
    right, bottom = max(right, left + 40), max(bottom, top + 40)
    if panel.square:
        rows, columns = _shape(panel)
        side = min((right - left) / columns, (bottom - top) / rows)
        right, bottom = left + side * columns, top + side * rows
    return Box(left, top, right, bottom)


def _shape(panel: Panel) -> tuple[int, int]:
    """Rows and columns of the panel's matrix; (0, 0) where it has none."""
    return next((one.values.shape for one in panel.elements if isinstance(one, Heatmap)), (0, 0))


# --- what stands in a panel ---


def _axis(axis: Axis, cells: tuple[float, float]) -> Plain:
    """`cells`: where a matrix begins and ends, or (-0.5, -0.5)."""
    made: Plain = {
        "title": {"text": lines(axis.label), "standoff": 6, "font": {"size": USUAL}},
        "tickfont": {"size": SMALL if len(axis.ticks or ()) <= 24 else SMALL - 2},
        "zeroline": False, "showgrid": axis.grid, "showline": True, "linecolor": "#888", "mirror": True,
    }  # fmt: skip
    if axis.ticks is not None:
        made |= {"tickvals": [compressed(place, axis.linear_to) for place in axis.places],
                 "ticktext": [label(tick, LONGEST_TICK) for tick in axis.ticks],
                 "tickangle": -90 if axis.turned else 0}  # fmt: skip
    if axis.limits or cells[0] != cells[1]:
        made["range"] = [compressed(end, axis.linear_to) for end in axis.limits or cells]
    return made


def _traces(one: spec.Element, panel: Panel) -> list[Plain]:
    if isinstance(one, Heatmap):
        return _heatmap(one, panel)
    if isinstance(one, Marks):
        return [_marks(one, panel)]
    if isinstance(one, spec.Bars):
        return [{
            "type": "bar", "orientation": "h", "y": list(range(len(one.width))), "x": one.width.tolist(),
            "base": one.left.tolist(), "marker": {"color": to_hex(one.colour)}, "offset": -0.4, "width": 0.8,
            "hoverinfo": "text", "hovertext": [f"{share:.3f}" for share in one.width], "showlegend": False,
        }]  # fmt: skip
    if isinstance(one, spec.Line):
        return [{
            "type": "scatter", "mode": "lines", "x": _plain(one.x), "y": _plain(one.y), "hoverinfo": "skip",
            "line": {"color": to_hex(one.colour), "shape": "hv" if one.steps else "linear"}, "showlegend": False,
        }]  # fmt: skip
    return []


def _heatmap(one: Heatmap, panel: Panel) -> list[Plain]:
    """One trace, or two where the first column has a scale of its own."""
    rows, columns = one.values.shape
    hover = one.hover if one.hover is not None else _said(one, panel)
    parts = [(one.scale, slice(1 if one.bos else 0, columns))] + ([(one.bos, slice(0, 1))] if one.bos else [])
    traces: list[Plain] = []
    for scale, part in parts:
        trace: Plain = {
            "type": "heatmap", "x": list(range(columns))[part], "y": list(range(rows)), "xgap": 1, "ygap": 1,
            "z": [_plain(row[part]) for row in one.values], "zmin": scale.low, "zmax": scale.high,
            "hovertext": [[lines(text) for text in row[part]] for row in hover], "hoverinfo": "text",
            "hoverongaps": False, "colorscale": colours(scale.colours), "showscale": False, "showlegend": False,
        }  # fmt: skip
        if one.texts is not None:
            bold = one.bold if one.bold is not None else np.zeros(one.values.shape, dtype=bool)
            trace |= {"texttemplate": "%{text}", "textfont": {"size": SMALL},
                      "text": [[f"<b>{text}</b>" if heavy else str(text) for text, heavy in zip(*of, strict=True)]
                               for of in zip(one.texts[:, part], bold[:, part], strict=True)]}  # fmt: skip
        traces.append(trace)
    return traces  # the one with the colour bar first


def _coloured(trace: Plain) -> Plain | None:
    """What of a trace has a scale of colours and may have a colour bar."""
    marker = trace.get("marker")
    of = marker if isinstance(marker, dict) else trace
    return of if "colorscale" in of else None


def _said(one: Heatmap, panel: Panel) -> list[list[str]]:
    """What a cell is, by the labels of its axes: row, column, value."""
    what = [text.split(" (")[0] for text in (panel.y.label, panel.x.label, one.scale.label)]
    rows, columns = ([f"{said} {tick}" for tick in axis.ticks or ()]
                     for said, axis in ((what[0], panel.y), (what[1], panel.x)))  # fmt: skip
    return [[f"{row}\n{column}\n{what[2]} {value:+.3f}" for column, value in zip(columns, of, strict=True)]
            for row, of in zip(rows, one.values, strict=True)]  # fmt: skip


def _marks(one: Marks, panel: Panel) -> Plain:
    colour = to_hex(one.colour)
    tick = one.shape == "tick"  # as long as `size` says; other marks look smaller on the page than on paper
    marker: Plain = {
        "symbol": SYMBOLS[one.shape], "size": one.size * (1 if tick else 1.35),
        "color": colour if one.filled else "white", "line": {"color": colour, "width": 2 if tick else 1},
    }  # fmt: skip
    if one.values is not None and one.scale:
        marker |= {"color": _plain(one.values), "colorscale": colours(one.scale.colours), "cmin": one.scale.low,
                   "cmax": one.scale.high, "showscale": False}  # fmt: skip
    x, y = ([compressed(value, axis.linear_to) for value in values]
            for values, axis in ((one.x, panel.x), (one.y, panel.y)))  # fmt: skip
    made: Plain = {
        "type": "scatter", "mode": "markers+text" if any(one.names) else "markers", "x": x, "y": y, "marker": marker,
        "showlegend": False, "cliponaxis": False, "meta": {"names": list(one.heads)},
        "hoverinfo": "text" if one.hover else "x", "hovertext": [lines(text) for text in one.hover],
    }  # fmt: skip
    if any(one.names):
        sides = ["middle right" if right else "middle left" for right in one.right]
        made |= {"text": list(one.names), "textposition": sides, "textfont": {"size": SMALL + 1}}
    if one.ends:
        ends = {"array": [high - at for high, at in zip(one.ends[1], one.x, strict=True)],
                "arrayminus": [at - low for low, at in zip(one.ends[0], one.x, strict=True)]}  # fmt: skip
        made["error_x"] = {"type": "data", "symmetric": False, "color": colour, "thickness": 1.5, "width": 3, **ends}
    return made


def _plain(values: Sequence[float] | np.ndarray) -> list[float | None]:
    """Seven significant digits, as many as float32 has; None for NaN."""
    return [float(f"{value:.7g}") if np.isfinite(value) else None for value in values]


def _shapes(one: spec.Element, panel: Panel, x: str, y: str) -> Iterator[Plain]:
    """Frames around cells, lines and bands."""
    if isinstance(one, Heatmap):
        for frame in one.outlines:
            colour = to_hex(frame.colour)
            yield {
                "type": "rect", "xref": x, "yref": y, "x0": frame.column - 0.5, "x1": frame.column + 0.5,
                "y0": frame.row - 0.5, "y1": frame.row + 0.5,
                "line": {"color": colour, "width": 3, "dash": DASHES[frame.line]},
                "label": {"text": frame.name, "textposition": "top left", "padding": 2,
                          "font": {"size": 9, "weight": 700, "color": colour, "shadow": "0 0 2px #fff, 0 0 2px #fff"}},
            }  # fmt: skip
    if isinstance(one, Rule):
        upright = one.axis == "x"
        scale = (panel.x if upright else panel.y).linear_to
        low, high = (compressed(end, scale) for end in (one.low, one.low if one.high is None else one.high))
        ends = ("x0", "x1", "y0", "y1") if upright else ("y0", "y1", "x0", "x1")
        yield {
            "type": "line" if one.high is None else "rect",
            "layer": "above" if any(_shape(panel)) else "below",  # a matrix would hide what is below
            "xref": x if upright else f"{x} domain", "yref": f"{y} domain" if upright else y,
            **dict(zip(ends, (low, high, 0, 1), strict=True)), "fillcolor": to_hex(one.colour),
            "line": {"color": to_hex(one.colour), "width": 1},
        }  # fmt: skip


def _bar(scale: Scale, left: float, upwards: Sequence[float]) -> Plain:
    return {
        "title": {"text": lines(scale.label), "side": "right", "font": {"size": SMALL}}, "thickness": 10,
        "x": left, "xanchor": "left", "xpad": 0, "y": sum(upwards) / 2, "yanchor": "middle", "ypad": 0,
        "len": upwards[1] - upwards[0], "lenmode": "fraction", "tickfont": {"size": SMALL - 1},
    }  # fmt: skip


def _note(text: str, x: float, y: float, size: int = SMALL) -> Plain:
    """A text that stands on (x, y), shares of the figure."""
    return {"text": lines(text), "x": x, "y": y, "xref": "paper", "yref": "paper", "xanchor": "center",
            "yanchor": "bottom", "showarrow": False, "font": {"size": size}}  # fmt: skip


def _entry(entry: Entry) -> Plain:
    """A trace of nothing that stands in the legend. Frames show their line; Plotly's markers have no dashes."""
    made: Plain = {"type": "scatter", "x": [None], "y": [None], "name": lines(entry.text), "showlegend": True,
                   "hoverinfo": "skip"}  # fmt: skip
    colour = to_hex(entry.colour)
    if entry.shape in ("line", "frame"):
        return made | {"mode": "lines", "line": {"color": colour, "dash": DASHES[entry.line], "width": 2}}
    marker = {"symbol": SYMBOLS[entry.shape], "size": 9, "color": colour if entry.filled else "white",
              "line": {"color": colour, "width": 2 if entry.shape == "tick" else 1}}  # fmt: skip
    return made | {"mode": "markers", "marker": marker}
