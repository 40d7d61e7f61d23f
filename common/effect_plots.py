"""Pictures of what heads do: score against effect, and what is lost without them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from common.ablation import Ablation
from common.detection import LEAST_EFFECT, name
from common.plots import MARK

COPYING = "PuOr_r"
MARKERS = {"induction": "o", "suppression": "v", "attends-only": "D"}
MOST_NAMED = 14
TITLES = {
    "mean": "mean ablation: the head's output is its mean in control rows",
    "forbid": "forbidden: no attention to the tokens after earlier copies",
}


def scatter(axes: Axes, heads: Sequence[dict[str, Any]], title: str) -> Axes:
    """Prefix matching against total effect for every head; colour: OV copying, shape: verdict.

    Heads far to the right near 0 look inductive and do nothing; heads high on the left do it without looking so.
    """
    score, effect, copying = (
        np.array([head[key] for head in heads], dtype=float) for key in ("prefix_matching", "total_effect", "copying")
    )
    shapes = np.array([MARKERS.get(head["verdict"], "s") for head in heads])
    for shape in sorted(set(shapes)):
        some = shapes == shape
        drawn = axes.scatter(
            score[some], effect[some], c=copying[some], marker=shape, cmap=COPYING, vmin=-1, vmax=1,
            s=60 if shape != "s" else 22, edgecolors="0.2", linewidths=0.6, zorder=3, plotnonfinite=True,
        )  # fmt: skip
    axes.axhline(0, color="0.7", linewidth=0.8)
    axes.set_yscale("symlog", linthresh=LEAST_EFFECT)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:+g}" if value else "0"))
    axes.axhspan(-LEAST_EFFECT, LEAST_EFFECT, color="0.95", zorder=0)
    for place in np.argsort(-np.maximum(score, np.abs(effect)), kind="stable")[:MOST_NAMED]:
        if max(score[place], abs(effect[place])) >= LEAST_EFFECT:
            label = name(heads[place]["layer"], heads[place]["head"])
            axes.annotate(label, (score[place], effect[place]), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.set(
        xlabel="prefix matching (share of attention on the tokens after earlier copies)",
        ylabel="total effect on the correct token's logit (nats)",
        title=title,
    )
    axes.set_xlim(-0.03, max(1.0, float(score.max())) + 0.03)
    axes.figure.colorbar(drawn, ax=axes, label="OV copying: suppresses (-1) to copies (+1)", fraction=0.046, pad=0.03)
    axes.legend(handles=_shape_legend(heads), loc="upper left", fontsize=8, frameon=False)
    return axes


def scatter_figure(heads: Sequence[dict[str, Any]], title: str) -> Figure:
    """Score against effect."""
    figure, axes = plt.subplots(figsize=(8.0, 5.4), layout="constrained")
    scatter(axes, heads, title)
    return figure


def ablation_bars(axes: Axes, ablation: Ablation, kind: str) -> Axes:
    """The rise of the loss at repeats and at fresh tokens without each head and without all, beside random heads."""
    rows = [one for one in ablation.effects if one["name"] == kind and one["metric"] == "loss_at_repeats"]
    rows.sort(key=lambda one: (len(one["head"].split()), -one["effect"]))
    for place, one in enumerate(rows):
        _point(axes, place - 0.15, one, "o", MARK)
        fresh = ablation.of(one["head"], kind, "loss_at_fresh")
        if fresh:
            _point(axes, place + 0.15, fresh, "^", "#0072B2")
        if one["control"]:
            _point(axes, place, one["control"], "s", "0.45")
    labels = [one["head"] if " " not in one["head"] else f"all {len(one['head'].split())}" for one in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.axvline(0, color="0.7", linewidth=0.8)
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    axes.set(xlabel="rise of the loss (nats), 95 % interval over rows", ylabel="head taken away")
    axes.set_title(TITLES[kind], fontsize=10)
    return axes


def ablation_figure(ablation: Ablation, title: str) -> Figure:
    """Both interventions, one above the other."""
    kinds = [kind for kind in TITLES if any(one["name"] == kind for one in ablation.effects)]
    rows = max(len({one["head"] for one in ablation.effects}), 2)
    figure, axes = plt.subplots(
        len(kinds), 1, figsize=(8.0, len(kinds) * (0.34 * rows + 1.1) + 0.9), squeeze=False, layout="constrained"
    )
    for place, kind in zip(axes.flat, kinds, strict=True):
        ablation_bars(place, ablation, kind)
    style: dict[str, Any] = {"linestyle": "none", "markersize": 6}
    handles = [
        Line2D([], [], marker="o", color=MARK, label="loss at repeats", **style),
        Line2D([], [], marker="^", color="#0072B2", label="loss at fresh tokens", **style),
        Line2D([], [], marker="s", color="0.45", label="loss at repeats, random heads of the same layers", **style),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=11)
    return figure


def _point(axes: Axes, place: float, one: dict[str, Any], marker: str, colour: str) -> None:
    low, high = one["interval"]
    axes.plot([low, high], [place, place], color=colour, linewidth=1.2)
    axes.plot(one["effect"], place, marker, color=colour, markersize=6)


def _shape_legend(heads: Sequence[dict[str, Any]]) -> list[Line2D]:
    shown = [*(verdict for verdict in MARKERS if any(head["verdict"] == verdict for head in heads)), "other"]
    style: dict[str, Any] = {"linestyle": "none", "markerfacecolor": "white", "color": "0.2", "markersize": 6}
    return [Line2D([], [], marker=MARKERS.get(verdict, "s"), label=verdict, **style) for verdict in shown]
