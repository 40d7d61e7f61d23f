"""The figures of report.html, as Plotly's plain dictionaries {data, layout}; colours and marks are those of `plots`.

Plotly reads a few HTML tags in its texts, so every text of a user's or of a model's goes through `label` first.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

from common.attention.head import Head
from common.heads.detection import LEAST_EFFECT
from common.heads.statistics import Floats
from common.results.effect_plots import COPYING, MARKERS, MOST_NAMED, TITLES, named_on_the_right
from common.results.plots import ATTENTION, MARK, MOST_VALUES, OUTLINES

Figure = dict[str, Any]
Row = Mapping[str, Any]

DASHES = {"-": "solid", "--": "dash", ":": "dot"}
SYMBOLS = {"o": "circle", "v": "triangle-down", "D": "diamond", "s": "square"}
LONGEST_LABEL = 16  # characters of a token on an axis; hovering shows more of it
FRESH = "#0072B2"


def label(text: str, most: int = 60) -> str:
    """A text as Plotly takes it: shortened, and with nothing in it that it would read as a tag."""
    short = text if len(text) <= most else text[: most - 1] + "…"
    return html.escape(short, quote=False)


def colours(name: str, stops: int = 9) -> list[list[Any]]:
    """A colour map of matplotlib's as Plotly's [[place in [0, 1], "#rrggbb"], …]."""
    sampled = matplotlib.colormaps[name]
    places = np.linspace(0.0, 1.0, stops)
    return [[float(place), matplotlib.colors.to_hex(sampled(place))] for place in places]


def described(head: Row) -> str:
    """Every number of a head, a line each, as Plotly takes it."""
    lines = [label(f"{key} {value}") for key, value in numbers(head)]
    return "<br>".join([f"<b>head {Head.at(head['layer'], head['head'])}</b>", *lines])


def numbers(head: Row) -> list[tuple[str, str]]:
    """Every number of a head as (what, value); an interval stands behind its number."""
    return [
        (key, number(value) + _interval(head.get(f"{key}_interval")))
        for key, value in head.items()
        if key not in ("layer", "head") and not key.endswith("_interval")
    ]


def number(value: Any) -> str:
    """Four significant digits; words as they are, a dash for what was not measured."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _interval(ends: Sequence[float | None] | None) -> str:
    return f" [{ends[0]:.4g}, {ends[1]:.4g}]" if ends and ends[0] is not None and ends[1] is not None else ""


def mosaic(heads: Sequence[Row]) -> Figure:
    """Layer × head prefix matching, heads with a verdict outlined."""
    layers, width = (1 + max(head[axis] for head in heads) for axis in ("layer", "head"))
    values = np.full((layers, width), None, dtype=object)
    texts = np.full((layers, width), "", dtype=object)
    for head in heads:
        place = head["layer"], head["head"]
        lines = (f"head {Head.at(*place)}", head["verdict"], f"prefix matching {number(head['prefix_matching'])}")
        values[place], texts[place] = head["prefix_matching"], "<br>".join(label(line) for line in lines)
    trace = {
        "type": "heatmap", "z": values.tolist(), "hovertext": texts.tolist(), "hoverinfo": "text", "zmin": 0, "zmax": 1,
        "colorscale": colours(ATTENTION), "xgap": 1, "ygap": 1,
        "colorbar": {"title": {"text": "prefix matching", "side": "right"}, "thickness": 12},
    }  # fmt: skip
    if values.size <= MOST_VALUES:
        trace |= {"texttemplate": "%{z:.2f}", "textfont": {"size": 10}}
    axis = {"dtick": 1, "zeroline": False, "showgrid": False}
    layout = {
        "width": max(420, 46 * width + 180), "height": max(190, 30 * layers + 100),
        "margin": {"l": 60, "r": 100, "t": 15, "b": 55},
        "shapes": [_outline(head) for head in heads if head["verdict"] in OUTLINES],
        "xaxis": {"title": {"text": "head"}, **axis},
        "yaxis": {"title": {"text": "layer"}, "autorange": "reversed", **axis},
        "hoverlabel": _hover_label(),
    }  # fmt: skip
    return {"data": [trace], "layout": layout}


def _outline(head: Row) -> dict[str, Any]:
    colour, line = OUTLINES[head["verdict"]]
    x, y = head["head"], head["layer"]
    corners = {"x0": x - 0.5, "x1": x + 0.5, "y0": y - 0.5, "y1": y + 0.5}
    return {"type": "rect", **corners, "line": {"color": colour, "width": 3, "dash": DASHES[line]}}


def _hover_label() -> dict[str, Any]:
    return {"align": "left", "font": {"size": 11, "color": "#222"}, "bgcolor": "white", "bordercolor": "#888"}


def effects(heads: Sequence[Row]) -> Figure:
    """Prefix matching against total effect; colour: OV copying, shape: verdict. As `effect_plots.scatter`."""
    wanted = ("prefix_matching", "total_effect", "copying")
    shown = [head for head in heads if all(head[key] is not None for key in wanted)]
    ranked = sorted(shown, key=lambda head: -max(head["prefix_matching"], abs(head["total_effect"])))
    large = [head for head in ranked[:MOST_NAMED]
             if max(head["prefix_matching"], abs(head["total_effect"])) >= LEAST_EFFECT]  # fmt: skip
    places = (np.array([head[key] for head in large], dtype=float) for key in ("prefix_matching", "total_effect"))
    sides = {
        str(Head.at(head["layer"], head["head"])): "middle right" if right else "middle left"
        for head, right in zip(large, named_on_the_right(*places), strict=True)
    }
    names = [str(Head.at(head["layer"], head["head"])) for head in shown]
    shapes = [SYMBOLS[MARKERS.get(head["verdict"], "s")] for head in shown]
    rise = [compressed(head["total_effect"]) for head in shown]
    trace = {
        "type": "scatter", "mode": "markers+text", "hoverinfo": "text", "meta": {"names": names},
        "x": [head["prefix_matching"] for head in shown], "y": rise,
        "text": [one if one in sides else "" for one in names],
        "textposition": [sides.get(one, "middle right") for one in names],
        "hovertext": [described(head) for head in shown],
        "marker": {
            "symbol": shapes, "size": [7 if shape == "square" else 12 for shape in shapes],
            "color": [head["copying"] for head in shown], "colorscale": colours(COPYING), "cmin": -1, "cmax": 1,
            "line": {"color": "#333", "width": 1},
            "colorbar": {"title": {"text": "OV copying: suppresses (−1) to copies (+1)", "side": "right"},
                         "thickness": 12},
        },
    }  # fmt: skip
    ticks = [sign * step for step in (0.05, 0.2, 1, 5, 20) for sign in (-1, 1)]
    layout = {
        "width": 860, "height": 460, "margin": {"l": 80, "r": 110, "t": 15, "b": 60}, "hoverlabel": _hover_label(),
        "xaxis": {"title": {"text": "prefix matching"}, "range": [-0.04, 1.08], "zeroline": False},
        "yaxis": {"title": {"text": "total effect on the correct token (nats)"}, "zeroline": True, "showgrid": False,
                  "range": [min([-0.5, *rise]) - 0.3, max([1.0, *rise]) + 0.5],
                  "tickvals": [compressed(tick) for tick in (0, *ticks)],
                  "ticktext": ["0", *(f"{tick:+g}" for tick in ticks)]},
    }  # fmt: skip
    return {"data": [trace], "layout": layout}


def compressed(effect: float) -> float:
    """Linear up to `LEAST_EFFECT`, logarithmic beyond: 1 there, one more for each factor of ten."""
    size = abs(effect) / LEAST_EFFECT
    return math.copysign(size if size <= 1 else 1 + math.log10(size), effect)


def ablation(measured: Mapping[str, Any], kind: str) -> Figure | None:
    """The rise of the loss without each head and without all, beside random heads; None where it was not measured."""
    rows = [one for one in measured["effects"] if one["name"] == kind]
    at_repeats = [one for one in rows if one["metric"] == "loss_at_repeats"]
    at_repeats.sort(key=lambda one: (len(" ".join(one["heads"]).split()), -(one["effect"] or 0.0)))
    if not at_repeats:
        return None
    heads = [" ".join(one["heads"]) for one in at_repeats]
    titles = [one if " " not in one else f"all {len(one.split())}" for one in heads]
    fresh = {" ".join(one["heads"]): one for one in rows if one["metric"] == "loss_at_fresh"}
    data = [
        _points("loss at repeats", "circle", MARK, heads, at_repeats, 0.0),
        _points("loss at fresh tokens", "triangle-up", FRESH, heads, [fresh.get(head) for head in heads], 0.2),
        _points("loss at repeats, random heads of the same layers", "square", "#737373", heads,
                [one["control"] for one in at_repeats], -0.2),
    ]  # fmt: skip
    layout = {
        "title": {"text": TITLES[kind], "font": {"size": 13}}, "width": 1000, "height": 44 * len(heads) + 190,
        "margin": {"l": 90, "r": 30, "t": 45, "b": 110}, "legend": {"orientation": "h", "y": -0.32, "yref": "paper"},
        "xaxis": {"title": {"text": "rise of the loss (nats), 95 % interval over rows"}, "zeroline": True},
        "yaxis": {"tickvals": list(range(len(heads))), "ticktext": titles, "range": [len(heads) - 0.5, -0.5],
                  "zeroline": False, "title": {"text": "head taken away"}},
    }  # fmt: skip
    return {"data": data, "layout": layout}


def _points(
    title: str, symbol: str, colour: str, heads: Sequence[str], rows: Sequence[Row | None], shift: float
) -> dict[str, Any]:
    """One point with its interval per head that has one."""
    known = [(place, row) for place, row in enumerate(rows) if row and row["effect"] is not None]
    texts = [f"{heads[place]}<br>{title}: {row['effect']:+.3f}{_interval(row['interval'])}" for place, row in known]
    ends = {"array": [row["interval"][1] - row["effect"] for _, row in known],
            "arrayminus": [row["effect"] - row["interval"][0] for _, row in known]}  # fmt: skip
    return {
        "type": "scatter", "mode": "markers", "name": title, "hoverinfo": "text", "hovertext": texts,
        "x": [row["effect"] for _, row in known], "y": [place + shift for place, _ in known],
        "marker": {"symbol": symbol, "color": colour, "size": 9},
        "error_x": {"type": "data", "symmetric": False, "color": colour, "thickness": 1.5, "width": 3, **ends},
    }  # fmt: skip


def decomposition(sources: Sequence[str], terms: Floats, title: str) -> Figure:
    """Query source × key source: the parts of the lead, green below 0, purple above."""
    limit = max(float(np.abs(terms).max(initial=0.0)), 1e-6)
    texts = [
        [f"query source {query}<br>key source {key}<br>part of the lead {terms[row, column]:+.3f}"
         for column, key in enumerate(sources)]
        for row, query in enumerate(sources)
    ]  # fmt: skip
    side = 34 if len(sources) <= 16 else 22
    ticks = {"tickvals": list(range(len(sources))), "ticktext": list(sources), "zeroline": False, "showgrid": False}
    trace = {
        "type": "heatmap", "z": terms.round(4).tolist(), "hovertext": texts, "hoverinfo": "text", "xgap": 1, "ygap": 1,
        "colorscale": colours("PRGn_r"), "zmin": -limit, "zmax": limit,
        "colorbar": {"title": {"text": "part of the lead", "side": "right"}, "thickness": 10},
    }  # fmt: skip
    layout = {
        "title": {"text": title, "font": {"size": 13}},
        "width": side * len(sources) + 230, "height": side * len(sources) + 190,
        "margin": {"l": 105, "r": 105, "t": 60, "b": 110},
        "xaxis": {**ticks, "tickangle": -90, "title": {"text": "key source"}},
        "yaxis": {**ticks, "autorange": "reversed", "title": {"text": "query source"}},
    }  # fmt: skip
    return {"data": [trace], "layout": layout}
