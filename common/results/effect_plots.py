"""Pictures of what heads do: score against effect, what is lost without them or a part of them, paths between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from common.attention.head import Head
from common.heads.detection import LEAST_EFFECT
from common.heads.statistics import Floats
from common.interventions.experiments import PATHS, REPLACEMENTS, THROUGH, WHOLE
from common.results.plots import MARK
from common.results.qk_plots import label_tokens, limit_of, outline, signed, write_values

if TYPE_CHECKING:  # pictures need no torch
    from common.interventions.ablation import Ablation

COPYING = "PuOr_r"
MARKERS = {"induction": "o", "suppression": "v", "attends-only": "D"}
MOST_NAMED = 14
TITLES = {
    "mean": "mean ablation: the head's output is its mean in control rows",
    "knockout": "forbidden: no attention to the tokens after earlier copies",
}
PARTS = {
    "uniform": "pattern: uniform",
    "pattern": "pattern of another row",
    "query": "query of another row",
    "key": "key of another row",
    "values": "values of another row",
    "knockout": "induction cells forbidden",
    "mean": "whole head: its mean output",
}
FRESH = "#0072B2"
MOST_SENDERS = 30  # earlier heads that stay legible in a path map
PATH_TITLES = {
    "prefix_matching": "change of prefix matching",
    "loss_at_repeats": "change of the loss at repeats (nats)",
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
    size = np.maximum(score, np.abs(effect))
    named = [place for place in np.argsort(-size, kind="stable")[:MOST_NAMED] if size[place] >= LEAST_EFFECT]
    for place, right in zip(named, named_on_the_right(score[named], effect[named]), strict=True):
        label = str(Head.at(heads[place]["layer"], heads[place]["head"]))
        aside = (6, -3) if right else (-20, -3)
        axes.annotate(label, (score[place], effect[place]), xytext=aside, textcoords="offset points", fontsize=8)
    axes.set(
        xlabel="prefix matching (share of attention on the tokens after earlier copies)",
        ylabel="total effect on the correct token's logit (nats)",
        title=title,
    )
    axes.set_xlim(-0.03, max(1.0, float(score.max())) + 0.03)
    axes.figure.colorbar(drawn, ax=axes, label="OV copying: suppresses (-1) to copies (+1)", fraction=0.046, pad=0.03)
    axes.legend(handles=_shape_legend(heads), loc="upper left", fontsize=8, frameon=False)
    return axes


def named_on_the_right(score: Floats, effect: Floats) -> list[bool]:
    """On which side each mark's name stands: away from the nearest other mark, so that no name is read as another's."""
    places = list(zip(score.tolist(), effect.tolist(), strict=True))
    sides = []
    for number, (x, y) in enumerate(places):
        others = [(abs(x - a) + abs(y - b), a, other) for other, (a, b) in enumerate(places) if other != number]
        _, nearest, other = min(others, default=(0.0, x, -1))
        sides.append((x, number) > (nearest, other))
    return sides


def scatter_figure(heads: Sequence[dict[str, Any]], title: str) -> Figure:
    """Score against effect."""
    figure, axes = plt.subplots(figsize=(8.0, 5.4), layout="constrained")
    scatter(axes, heads, title)
    return figure


def ablation_bars(axes: Axes, ablation: Ablation, kind: str) -> Axes:
    """The rise of the loss at repeats and at fresh tokens without each head and without all, beside random heads."""
    rows = [one for one in ablation.effects if one["name"] == kind and one["metric"] == "loss_at_repeats"]
    rows.sort(key=lambda one: (len(" ".join(one["heads"]).split()), -one["effect"]))
    for place, one in enumerate(rows):
        _point(axes, place - 0.15, one, "o", MARK)
        fresh = ablation.of(one["heads"], kind, "loss_at_fresh")
        if fresh:
            _point(axes, place + 0.15, fresh, "^", FRESH)
        if one["control"]:
            _point(axes, place, one["control"], "s", "0.45")
    labels = [
        " ".join(one["heads"]) if " " not in " ".join(one["heads"]) else f"all {len(one['heads'])}" for one in rows
    ]
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
    rows = max(len({" ".join(one["heads"]) for one in ablation.effects}), 2)
    figure, axes = plt.subplots(
        len(kinds), 1, figsize=(8.0, len(kinds) * (0.34 * rows + 1.1) + 0.9), squeeze=False, layout="constrained"
    )
    for place, kind in zip(axes.flat, kinds, strict=True):
        ablation_bars(place, ablation, kind)
    style: dict[str, Any] = {"linestyle": "none", "markersize": 6}
    handles = [
        Line2D([], [], marker="o", color=MARK, label="loss at repeats", **style),
        Line2D([], [], marker="^", color=FRESH, label="loss at fresh tokens", **style),
        Line2D([], [], marker="s", color="0.45", label="loss at repeats, random heads of the same layers", **style),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=11)
    return figure


def part_bars(axes: Axes, effects: Sequence[dict[str, Any]], metrics: Sequence[str]) -> Axes:
    """How far each replacement on one head moves the metrics, beside the first of them on random heads of the layer."""
    found = {(one["name"], one["metric"]): one for one in effects}
    shown = [kind for kind in REPLACEMENTS if (kind, metrics[0]) in found]
    for place, kind in enumerate(shown):
        control = found[kind, metrics[0]]["control"]
        if control:
            _point(axes, place, control, "s", "0.45")
        for metric, shift, marker, colour in zip(metrics, (-0.17, 0.17), "o^", (MARK, FRESH), strict=False):
            _point(axes, place + shift, found[kind, metric], marker, colour)
    axes.set_yticks(range(len(shown)), [PARTS[kind] for kind in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, -LEAST_EFFECT), max(high, LEAST_EFFECT))  # what does not matter shall not look large
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.axvline(0, color="0.7", linewidth=0.8)
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    return axes


def parts_figure(effects: Sequence[dict[str, Any]], title: str) -> Figure:
    """What one head's attention, and the model's loss, do when one part of the head is replaced."""
    clean = {one["metric"]: one["clean"] for one in effects}
    figure, axes = plt.subplots(1, 2, figsize=(11.5, 4.4), sharey=True, layout="constrained")
    part_bars(axes[0], effects, ["prefix_matching"])
    axes[0].set(xlabel="change of prefix matching, 95 % interval over rows")
    axes[0].set_title(f"its own attention: prefix matching {clean['prefix_matching']:.2f} before", fontsize=10)
    part_bars(axes[1], effects, ["loss_at_repeats", "loss_at_fresh"])
    axes[1].set(xlabel="change of the loss (nats), 95 % interval over rows")
    before = f"{clean['loss_at_repeats']:.2f} at repeats, {clean['loss_at_fresh']:.2f} at fresh tokens before"
    axes[1].set_title(f"the model's loss: {before}", fontsize=10)
    style: dict[str, Any] = {"linestyle": "none", "markersize": 6}
    handles = [
        Line2D([], [], marker="o", color=MARK, label="prefix matching; loss at repeats", **style),
        Line2D([], [], marker="^", color=FRESH, label="loss at fresh tokens", **style),
        Line2D([], [], marker="s", color="0.45", label="the same on random heads of the layer", **style),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


def path_map(axes: Axes, effects: Sequence[dict[str, Any]], metric: str, senders: Sequence[str]) -> Axes:
    """The effect of every sender (row) by every kind of path (column) on one metric; the strongest path is framed.

    Columns: query, key and values by the direct path, the same with MLPs recomputed, and the whole sender. What was not
    measured stays blank.
    """
    columns = [*PATHS, WHOLE]
    values = path_values(effects, metric, senders)
    limit = limit_of(values)
    signed(axes, values, limit=limit, label=PATH_TITLES[metric])
    write_values(axes, np.where(np.abs(values) >= 0.02 * limit, values, np.nan), limit, 2)
    title = PATH_TITLES[metric]
    if strongest := strongest_path(values):
        outline(axes, [strongest])
        which = columns[strongest[1]].removeprefix("path to ")
        way = "" if which.endswith(THROUGH) else ", direct"
        title += f"\nstrongest path: {senders[strongest[0]]} → {which}{way}: {values[strongest]:+.2f}"
    label_tokens(axes, senders, [_column_label(which) for which in columns])
    axes.tick_params(axis="x", rotation=0, labelsize=8)
    for edge in (2.5, 5.5):
        axes.axvline(edge, color="0.3", linewidth=1.0)
    for place, heading in ((1, "direct path"), (4, "through MLPs too"), (6, "whole sender")):
        if np.isnan(values[:, place]).all():
            heading += ": not measured"
        axes.annotate(heading, (place, 1), xycoords=("data", "axes fraction"), xytext=(0, 4), ha="center", fontsize=8,
                      textcoords="offset points")  # fmt: skip
    axes.set(ylabel="sender (mean-ablated)")
    axes.set_aspect("auto")
    axes.set_title(title, fontsize=10, pad=18)
    return axes


def path_values(effects: Sequence[dict[str, Any]], metric: str, senders: Sequence[str]) -> Floats:
    """[sender, path]: the effects on a metric, columns as `path_map` has them; NaN where not measured."""
    columns = [*PATHS, WHOLE]
    values = np.full((len(senders), len(columns)), np.nan)
    for one in effects:
        if one["metric"] == metric and one.get("sender") in senders and one["name"] in columns:
            values[senders.index(one["sender"]), columns.index(one["name"])] = one["effect"]
    return values


def strongest_path(values: Floats) -> tuple[int, int] | None:
    """(row, column) of the largest effect of a path, whatever its sign; the last column, the whole sender, is none."""
    paths = np.nan_to_num(values[:, :-1])
    if not paths.any():
        return None
    row, column = np.unravel_index(int(np.abs(paths).argmax()), paths.shape)
    return int(row), int(column)


def _column_label(which: str) -> str:
    return "all paths" if which == WHOLE else which.removeprefix("path to ").removesuffix(THROUGH)


def path_figure(effects: Sequence[dict[str, Any]], title: str) -> Figure:
    """Who tells the receiver what: both metrics side by side, of many senders those with the largest effects."""
    every = list(dict.fromkeys(one["sender"] for one in effects))
    size = [np.nanmax(np.abs(path_values(effects, metric, every)), axis=1) for metric in PATH_TITLES]
    weight = sum(of / max(float(of.max()), 1e-9) for of in size)
    senders = [every[place] for place in np.sort(np.argsort(-weight, kind="stable")[:MOST_SENDERS])]
    height = max(3.4, 0.3 * len(senders) + 2.4)
    figure, axes = plt.subplots(1, 2, figsize=(12.5, height), layout="constrained")
    for place, metric in zip(axes, PATH_TITLES, strict=True):
        path_map(place, effects, metric, senders)
    cut = f" ({len(senders)} of {len(every)} earlier heads)" if len(senders) < len(every) else ""
    figure.suptitle(title + cut, fontsize=11)
    figure.supxlabel(
        "Direct: the MLPs in between as they are; through MLPs: recomputed; whole sender: ablated for all that "
        "reads it. Framed: the strongest path.\nValues cannot change where the receiver attends.",
        fontsize=8,
    )
    return figure


def intervention_figures(effects: Sequence[dict[str, Any]], model: str) -> Iterator[tuple[str, Figure]]:
    """The pictures of interventions on heads, each with the stem of its file's name: per head its parts, and the paths
    into the one receiver."""
    parts = [one for one in effects if "sender" not in one]
    for head in dict.fromkeys(" ".join(one["heads"]) for one in parts):
        title = f"{model}, head {head}: one part replaced, the rest kept"
        yield f"parts_{head}", parts_figure([one for one in parts if " ".join(one["heads"]) == head], title)
    paths = [one for one in effects if "sender" in one]
    if paths:
        head = paths[0]["heads"][0]
        yield f"paths_{head}", path_figure(paths, f"{model}: what earlier heads tell head {head}, input by input")


def _point(axes: Axes, place: float, one: Mapping[str, Any], marker: str, colour: str) -> None:
    low, high = one["interval"]
    axes.plot([low, high], [place, place], color=colour, linewidth=1.2)
    axes.plot(one["effect"], place, marker, color=colour, markersize=6)


def _shape_legend(heads: Sequence[dict[str, Any]]) -> list[Line2D]:
    shown = [*(verdict for verdict in MARKERS if any(head["verdict"] == verdict for head in heads)), "other"]
    style: dict[str, Any] = {"linestyle": "none", "markerfacecolor": "white", "color": "0.2", "markersize": 6}
    return [Line2D([], [], marker=MARKERS.get(verdict, "s"), label=verdict, **style) for verdict in shown]
