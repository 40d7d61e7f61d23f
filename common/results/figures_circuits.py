"""What the pictures of the second question show: how queries and keys meet, what their scores are made of, what the
weights say, and what a head does when a part of it, or a path into it, is taken away.

Each function takes what was measured and returns a `spec.Figure`, or several by the stem of the file's name. Signed
numbers run from green (below 0) over white to purple (above 0).
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from common.attention.head import Head
from common.heads.detection import LEAST_EFFECT
from common.heads.statistics import Floats
from common.results import figures_heads
from common.results.figures_heads import Places, Row, signed_scale, written_values
from common.results.spec import BLUE, MARK, Axis, Element, Entry, Figure, Heatmap, Outline, Panel, Rule

if TYPE_CHECKING:  # pictures need no torch
    from common.circuits.composition import Composition, Pair
    from common.circuits.decomposition import Decomposition
    from common.circuits.maps import Interaction
    from common.circuits.weights import Direction, HeadCircuits

MOST_SOURCES = 14  # sources that stay legible in a decomposition on paper
MOST_ZOOMED = 40  # the same on the page, where one can hover
MOST_WRITERS = 36  # earlier heads that stay legible in a map of composition
MOST_POSITIONS = 32  # positions that stay legible in a circuit
MOST_SENDERS = 30  # earlier heads that stay legible in a path map
WAY_TITLES = {"Q": "Q: into the query", "K": "K: into the key", "V": "V: into the value"}
REPLACED = {  # kind of edit -> what the picture calls it
    "uniform": "pattern: uniform",
    "pattern": "pattern of another row",
    "query": "query of another row",
    "key": "key of another row",
    "values": "values of another row",
    "knockout": "knockout of induction cells",
    "mean": "whole head: its mean output",
}
THROUGH_MLPS = " through MLPs"  # how the name of a path ends that MLPs pass on
ALL_PATHS = "whole sender"
PATH_COLUMNS = [
    *(f"path to {part}{way}" for way in ("", THROUGH_MLPS) for part in ("query", "key", "values")),
    ALL_PATHS,
]
PATH_TITLES = {
    "prefix_matching": "change of prefix matching",
    "loss_at_repeats": "change of the loss at repeats (nats)",
}


# --- queries and keys on a text ---


def text_figures(
    met: Interaction, split: Mapping[int, Decomposition | str], heads: Sequence[int], tokens: Sequence[str],
    cells: Places, title: str, number: int,
) -> dict[str, Figure]:  # fmt: skip
    """The pictures of text `number`, by the stem of the file's name.

    `heads` of the layer side by side, scores and patterns, and the mean over all its heads; the heads of `split` large,
    and what their scores are made of, where that is known.
    """
    every = met.pattern.shape[1]
    maps = {"scores": met.scores[0], "pattern": met.pattern[0]}
    maps = {kind: np.where(met.rules.visible[0], values, np.nan) for kind, values in maps.items()}
    names = {head: str(Head.at(met.layer, head)) for head in range(every)}
    some = "" if len(heads) == every else f", {len(heads)} of its {every} heads"
    figures = {}
    for kind, stem in (("scores", "scores"), ("pattern", "patterns")):
        panels = [(f"head {names[head]}", maps[kind][head]) for head in heads]
        panels.append((f"mean over the {every} heads", maps[kind].mean(0)))
        above = f"{stem.capitalize()} of layer {met.layer}{some}: {title}"
        figures[f"{stem}_{number:02d}"] = figures_heads.token_figure(kind, panels, tokens, cells, above)
    for head, found in split.items():
        above = f"Head {names[head]}: {title}"
        shown = head_figure(maps["scores"][head], maps["pattern"][head], tokens, cells, above)
        figures[f"head_{names[head]}_{number:02d}"] = shown
        if not isinstance(found, str):
            above = f"{found.title(names[head])}: {title}"
            figures[f"decomposition_{names[head]}_{number:02d}"] = decomposition_figure(found, above, tokens)
    return figures


def head_figure(scores: Floats, pattern: Floats, tokens: Sequence[str], cells: Places, title: str) -> Figure:
    """One head large: its scores and its pattern, [query, key], NaN where masked, with values on short texts."""
    written, shown = len(tokens) <= figures_heads.WITH_VALUES, len(figures_heads.drawn_places(len(tokens), cells))
    side = max(5.2, (0.42 if written else 0.24) * shown + 1.8)
    panels = [
        figures_heads.token_panel(kind, values, tokens, cells, f"{kind}, {when} softmax", written=written)
        for kind, values, when in (("scores", scores, "before"), ("pattern", pattern, "after"))
    ]
    legend, title = figures_heads.token_legend(panels), title + figures_heads.cut(len(tokens), cells)
    return Figure(title, [panels], 2 * side + 0.8, 0.9 * side + 1.2, legend, legend_columns=2)


def decomposition_figure(found: Decomposition, title: str, tokens: Sequence[str], most: int = MOST_SOURCES) -> Figure:
    """Query source × key source of the mean score of some cells; the largest term is framed. Of more than `most`
    sources, what is small is added up as one source, `rest`."""
    names, terms = grouped(found.sources, found.terms, most)
    scale = signed_scale(terms, "part of the score advantage (score units)")
    digits = int(np.clip(2 - np.floor(np.log10(scale.high)), 2, 4))
    written = written_values(terms, digits, 0.02 * scale.high) if len(names) <= MOST_SOURCES else None
    row, column = np.unravel_index(int(np.abs(terms).argmax()), terms.shape)
    heatmap = Heatmap(terms, scale, [Outline(int(row), int(column))], written)
    x = Axis("key source (written where the head looks)", names, turned=True)
    y = Axis("query source (written where it looks from)", names)
    # 0.52 inches hold a value; cells that carry none may be smaller
    side = max((0.52 if written is not None else 0.26) * len(names) + 2.4, 5.6)
    above, below = "\n".join(textwrap.wrap(title, 70)), _decomposed(found, tokens)
    return Figure(above, [[Panel(x, y, [heatmap], square=True)]], side + 1.4, side + 0.5, caption=below)


def _decomposed(found: Decomposition, tokens: Sequence[str]) -> str:
    query, key = found.cells[0]
    first = f"the first {tokens[query]} looking at {tokens[key]} (tokens {query} and {key})"
    return (
        f"Mean over {len(found.cells)} {found.kind}, {first}.\n"
        f"{textwrap.fill(found.advantage(), 104)}:\nthe score less the mean score of these tokens. Its parts sum to it "
        f"(error {found.error:.0e}).\n"
        "embed: the token, with what MLP 0 makes of it in any context; heads of layer 0: with what MLP 0 makes of\n"
        "them; mlp0: the rest of MLP 0. Framed: the largest."
    )


def grouped(sources: Sequence[str], terms: Floats, most: int) -> tuple[list[str], Floats]:
    """The sources with the largest terms, at most `most`, in their order, and the sum of the others as `rest`."""
    if len(sources) <= most:
        return list(sources), terms
    weight = np.maximum(np.abs(terms).max(0), np.abs(terms).max(1))
    kept = np.sort(np.argsort(-weight, kind="stable")[: most - 1])
    into = np.zeros((len(sources), most))
    into[kept, np.arange(most - 1)] = 1.0
    into[np.setdiff1d(np.arange(len(sources)), kept), most - 1] = 1.0
    return [*(sources[place] for place in kept), "rest"], into.T @ terms @ into


# --- weights ---


def weight_figures(
    circuits: HeadCircuits, composition: Composition | None, pair: Pair | None, tokens: Sequence[str], positions: int,
    title: str,
) -> dict[str, Figure]:  # fmt: skip
    """The pictures of weights, by the stem of the file's name: circuits of a head, composition of its layer.

    `tokens` are those of `circuits`, `positions` how many the text has; `title` names model and text.
    """
    head = str(circuits.head)
    figures = {f"circuits_{head}": circuit_figure(circuits, tokens, positions, f"Weights of head {head}: {title}")}
    if composition and pair:
        above = f"What the heads of layer {composition.layer} read of what earlier heads write: {title.split(',')[0]}"
        figures["composition"] = composition_figure(composition, pair, above)
    return figures


def composition_figure(found: Composition, pair: Pair, title: str) -> Figure:
    """z of every earlier head (row) with every head of the layer (column), a panel per way; `pair` framed under K."""
    highest = np.max([found.z[way].max(1) for way in WAY_TITLES], axis=0)
    highest[found.senders.index(pair[0])] = np.inf  # the framed pair is always drawn
    rows = np.sort(np.argsort(-highest, kind="stable")[:MOST_WRITERS])
    framed = [Outline(int(np.searchsorted(rows, found.senders.index(pair[0]))), pair[1].head)]
    scale = signed_scale(np.stack([found.z[way][rows] for way in WAY_TITLES]), "z-score")
    writers = [str(found.senders[row]) for row in rows]
    readers = [str(Head.at(found.layer, head)) for head in range(found.z["Q"].shape[1])]
    panels = []
    for way, said in WAY_TITLES.items():
        z = found.z[way][rows]
        texts = np.array([[f"{round(value):d}" for value in row] for row in z])
        heatmap = Heatmap(z, scale, framed if way == "K" else (), texts, z > found.limit)
        panels.append(Panel(Axis("reads", readers, turned=True), Axis("writes", writers), [heatmap], said, square=True))
    cut = f" ({len(rows)} of {len(found.senders)} earlier heads)" if len(rows) < len(found.senders) else ""
    caption = (
        f"number: standard deviations above random rotations; bold: above {found.limit:.1f}, corrected for all pairs. "
        "Framed: the strongest previous-token → induction pair"
    )
    width, height = 3 * (0.42 * len(readers) + 2.2), max(2.8, 0.3 * len(rows) + 1.9)
    return Figure(title + cut, [panels], width, height, caption=caption)


def circuit_figure(found: HeadCircuits, labels: Sequence[str], positions: int, title: str) -> Figure:
    """The circuits of one head and its singular directions, by token; `labels` are the tokens of `found`."""
    panels = _circuit_panels(found, labels, positions)
    side = max(3.8, 0.22 * max(len(panel.x.ticks or ()) for panel in panels) + 1.6)
    height = 0.34 * len(found.directions) + 1.9
    below = [_direction_panel(found.directions, labels, which) for which in ("query", "key")]
    caption = (
        "Scores that the weights give two tokens by themselves, wherever they stand. What an earlier head writes of a "
        "token\nstands one place on if that head attends to the previous token: a dark diagonal then means that a "
        "token looks for the place behind its own copy."
    )
    width = max(side * len(panels), 9.0) + 0.6
    return Figure(title, [panels, below], width, side + height + 0.5, caption=caption, heights=(side, height))


def _circuit_panels(found: HeadCircuits, labels: Sequence[str], positions: int) -> list[Panel]:
    apart = {distance: f", {distance} apart" if distance else "" for distance in found.by_distance}
    panels = [
        _circuit_panel(f"token × token{apart[distance]}", values, labels, "token")
        for distance, values in found.by_distance.items()
    ]
    if found.composed is not None and found.sender is not None:
        title = f"token × output of {found.sender} at a token{next(iter(apart.values()))}"
        panels.append(_circuit_panel(title, found.composed, labels, "token"))
    if found.position is not None:
        shown = min(positions, MOST_POSITIONS)
        places = [str(place) for place in range(shown)]
        panels.append(_circuit_panel("position × position", found.position[:shown, :shown], places, "position"))
    return panels


def _circuit_panel(title: str, values: Floats, labels: Sequence[str], what: str) -> Panel:
    heatmap = Heatmap(values, signed_scale(values[1:, 1:], "score", values))  # BOS comes first and may lie beyond
    return Panel(Axis(f"key {what}", labels, turned=True), Axis(f"query {what}", labels), [heatmap], title, square=True)


def _direction_panel(directions: Sequence[Direction], labels: Sequence[str], which: str) -> Panel:
    along = np.stack([one.query if which == "query" else one.key for one in directions])
    rows = [f"direction {number} ({one.share:.0%})" for number, one in enumerate(directions, start=1)]
    heatmap = Heatmap(along, signed_scale(along[:, 1:], "strength along it", along))
    title = f"singular directions of W_Q W_K^T: each token as a {which}"
    return Panel(Axis("", labels, turned=True), Axis("", rows), [heatmap], title)


# --- interventions ---


def intervention_figures(effects: Sequence[Row], model: str) -> dict[str, Figure]:
    """The pictures of interventions on heads, by the stem of the file's name: per head its parts, and the paths into
    the one receiver."""
    parts, paths = ([one for one in effects if ("sender" in one) == wanted] for wanted in (False, True))
    figures = {}
    for head in dict.fromkeys(one["heads"][0] for one in parts):
        own = [one for one in parts if one["heads"] == [head]]
        figures[f"parts_{head}"] = part_figure(own, f"{model}, head {head}: one part replaced, the rest kept")
    if paths:
        head = paths[0]["heads"][0]
        figures[f"paths_{head}"] = path_figure(paths, f"{model}: what earlier heads tell head {head}, input by input")
    return figures


def part_figure(effects: Sequence[Row], title: str) -> Figure:
    """What one head's attention, and the model's loss, do when one part of the head is replaced."""
    clean = {one["metric"]: one["clean"] for one in effects}
    before = f"{clean['loss_at_repeats']:.2f} at repeats, {clean['loss_at_fresh']:.2f} at fresh tokens before"
    metrics = {"prefix_matching": "prefix matching"}
    own = _part_panel(effects, metrics, f"its own attention: prefix matching {clean['prefix_matching']:.2f} before")
    metrics = {"loss_at_repeats": "loss at repeats", "loss_at_fresh": "loss at fresh tokens"}
    loss = _part_panel(effects, metrics, f"the model's loss: {before}")
    legend = [
        Entry("prefix matching; loss at repeats", "circle", MARK),
        Entry("loss at fresh tokens", "triangle-up", BLUE),
        Entry("the same on random heads of the layer", "square", "0.45"),
    ]
    drawn = any(one["control"] for one in effects)
    return Figure(title, [[own, loss]], 11.5, 4.4, legend if drawn else legend[:2], legend_columns=3)


def _part_panel(effects: Sequence[Row], metrics: Mapping[str, str], title: str) -> Panel:
    """How far each kind of edit on one head moves the metrics, and random heads of the layer the first of them."""
    found = {(one["name"], one["metric"]): one for one in effects}
    first, unit = next(iter(metrics)), "" if "prefix_matching" in metrics else " (nats)"
    shown = [kind for kind in REPLACED if (kind, first) in found]
    names, controls = [REPLACED[kind] for kind in shown], [found[kind, first]["control"] for kind in shown]
    marks = [figures_heads.interval_marks(controls, names, "random heads of the layer", "square", "0.45", 0.0)]
    drawn = (("circle", MARK, -0.17), ("triangle-up", BLUE, 0.17))
    for (metric, said), look in zip(metrics.items(), drawn, strict=False):
        rows = [found.get((kind, metric)) for kind in shown]
        marks.append(figures_heads.interval_marks(rows, names, said, *look))
    # at least ± LEAST_EFFECT: what does not matter shall not look large
    ends = [end for one in marks if one.ends for side in (*one.ends, one.x) for end in side]
    low, high = min([*ends, -LEAST_EFFECT]), max([*ends, LEAST_EFFECT])
    room = 0.05 * (high - low)
    what = "the loss" if unit else "prefix matching"
    x = Axis(f"change of {what}{unit}, 95 % interval over rows", limits=(low - room, high + room), grid=True)
    y = figures_heads.listed(names if not unit else [""] * len(names))
    return Panel(x, y, [Rule("x", 0.0), *marks], title)


def path_figure(effects: Sequence[Row], title: str) -> Figure:
    """What the sender, an earlier head, tells the receiver: both metrics, of many senders those with the largest
    effects."""
    every = list(dict.fromkeys(one["sender"] for one in effects))
    size = [np.nanmax(np.abs(path_values(effects, metric, every)), axis=1, initial=0.0) for metric in PATH_TITLES]
    weight = sum(of / max(float(of.max()), 1e-9) for of in size)
    senders = [every[place] for place in np.sort(np.argsort(-weight, kind="stable")[:MOST_SENDERS])]
    panels = [path_panel(effects, metric, senders) for metric in PATH_TITLES]
    cut = f" ({len(senders)} of {len(every)} earlier heads)" if len(senders) < len(every) else ""
    framed = " Framed: the strongest path." if any("strongest" in panel.title for panel in panels) else ""
    caption = (
        "Direct: the MLPs in between as they are; through MLPs: recomputed; whole sender: ablated for all that "
        f"reads it.{framed}\nValues cannot change where the receiver attends."
    )
    return Figure(title + cut, [panels], 12.5, max(3.4, 0.3 * len(senders) + 2.4), caption=caption)


def path_panel(effects: Sequence[Row], metric: str, senders: Sequence[str]) -> Panel:
    """The effect of every sender (row) by every kind of path (column) on one metric; the strongest path is framed.

    Columns: query, key and values by the direct path, the same with MLPs recomputed, and the whole sender. What was not
    measured stays blank.
    """
    values = path_values(effects, metric, senders)
    scale, title, framed = signed_scale(values, PATH_TITLES[metric]), PATH_TITLES[metric], []
    short = [which.removeprefix("path to ").removesuffix(THROUGH_MLPS) for which in PATH_COLUMNS]
    if strongest := strongest_path(values):
        framed = [Outline(*strongest)]
        direct = "" if PATH_COLUMNS[strongest[1]].endswith(THROUGH_MLPS) else ", direct"
        which = PATH_COLUMNS[strongest[1]].removeprefix("path to ")
        title += f"\nstrongest path: {senders[strongest[0]]} → {which}{direct}: {values[strongest]:+.2f}"
    hover = np.array([[f"sender {sender}\n{path}\n{PATH_TITLES[metric]} {value:+.3f}"
                       for path, value in zip(PATH_COLUMNS, of, strict=True)]
                      for sender, of in zip(senders, values, strict=True)], dtype=object)  # fmt: skip
    headings = [
        (place, said + (": not measured" if np.isnan(values[:, place]).all() else ""))
        for place, said in ((1, "direct path"), (4, "through MLPs too"), (6, ALL_PATHS))
    ]
    heatmap = Heatmap(values, scale, framed, written_values(values, 2, 0.02 * scale.high), hover=hover)
    elements: list[Element] = [heatmap, Rule("x", 2.5, colour="0.3"), Rule("x", 5.5, colour="0.3")]
    x = Axis("", [*short[:-1], "all paths"])
    return Panel(x, Axis("sender (mean-ablated)", senders), elements, title, headings=headings)


def path_values(effects: Sequence[Row], metric: str, senders: Sequence[str]) -> Floats:
    """[sender, path]: the effects on a metric, columns as `PATH_COLUMNS`; NaN where not measured."""
    values = np.full((len(senders), len(PATH_COLUMNS)), np.nan)
    for one in effects:
        if one["metric"] == metric and one.get("sender") in senders and one["name"] in PATH_COLUMNS:
            values[senders.index(one["sender"]), PATH_COLUMNS.index(one["name"])] = one["effect"]
    return values


def strongest_path(values: Floats) -> tuple[int, int] | None:
    """(row, column) of the largest effect of a path, whatever its sign; the last column, the whole sender, is none."""
    paths = np.nan_to_num(values[:, :-1])
    if not paths.any():
        return None
    row, column = np.unravel_index(int(np.abs(paths).argmax()), paths.shape)
    return int(row), int(column)
