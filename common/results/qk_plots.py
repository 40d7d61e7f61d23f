"""Pictures of how queries and keys meet. Each function draws on the Axes it is given and returns it, or makes a Figure.

Scores run from green (below 0) over white to purple (above 0), equally dark at equal distance from 0. The colours
reach as far as the largest drawn cell off the BOS column; most heads give BOS a score of its own size, which would
otherwise leave the other cells pale, so cells of the BOS column may lie beyond the scale. Cells that a query may not
see stay blank. Marks are vermilion, as in `plots`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from common.attention.head import Head
from common.circuits.composition import WAYS, Composition, Pair
from common.circuits.decomposition import Decomposition
from common.circuits.maps import Interaction
from common.circuits.weights import Direction, HeadCircuits
from common.heads.statistics import Floats
from common.results import plots
from common.results.plots import LONGEST, MARK

SIGNED = "PRGn_r"
WITH_VALUES = 14  # tokens up to which every cell carries its value
MOST_SOURCES = 14  # sources that stay legible in a decomposition
MOST_SENDERS = 36  # earlier heads that stay legible in a map of composition
MOST_POSITIONS = 32  # positions that stay legible in a circuit

Cells = Sequence[tuple[int, int]]


def signed(axes: Axes, values: Floats, *, limit: float, label: str, beyond: bool = False) -> Axes:
    """A matrix in colours centred at 0 and reaching to ±`limit`; NaN stays blank. `beyond`: cells may lie outside."""
    image = axes.imshow(np.ma.masked_invalid(values), cmap=SIGNED, vmin=-limit, vmax=limit, aspect="equal")
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03, extend="both" if beyond else "neither")
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return axes


def limit_of(values: Floats) -> float:
    """The largest absolute value that is not NaN; a little above 0 where there is none."""
    return max(float(np.nanmax(np.abs(values), initial=0.0)), 1e-6)


def scores(axes: Axes, values: Floats, tokens: Sequence[str], cells: Cells, title: str, window: slice) -> Axes:
    """Scores [query, key] of one head, NaN where a query may not see, induction `cells` (query, key) outlined."""
    shown = shown_places(len(tokens), window)
    part = values[np.ix_(shown[1:], shown)]
    limit = limit_of(part[:, 1:])
    signed(axes, part, limit=limit, label="score before softmax", beyond=bool((np.abs(part[:, 0]) > limit).any()))
    axes.axvline(0.5, color="black", linewidth=0.8)
    outline(axes, [(shown[1:].index(query), shown.index(key)) for query, key in _drawn(cells, shown)])
    label_tokens(axes, [tokens[place] for place in shown[1:]], [tokens[place] for place in shown])
    axes.set(xlabel="key (attended to)", ylabel="query (attends)")
    axes.set_title(title, fontsize=10)
    return axes


def shown_places(length: int, window: slice) -> list[int]:
    """BOS and the positions of `window`."""
    return [0, *(place for place in range(*window.indices(length)) if place > 0)]


def _drawn(cells: Cells, shown: Sequence[int]) -> list[tuple[int, int]]:
    return [(query, key) for query, key in cells if query in shown[1:] and key in shown]


def outline(axes: Axes, cells: Cells) -> None:
    """Frame (row, column) cells of a drawn matrix."""
    for row, column in cells:
        corner = (column - 0.5, row - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=MARK, linewidth=1.8, zorder=3))


def label_tokens(axes: Axes, rows: Sequence[str], columns: Sequence[str]) -> None:
    """Tokens on both axes, smaller where there are many."""
    size = 8 if len(columns) <= 32 else 6
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=size)
    axes.set_yticks(range(len(rows)), rows, fontsize=size)


def write_values(axes: Axes, values: Floats, limit: float, digits: int, size: float = 7) -> None:
    """Write every value that is not NaN into its cell, light on dark colours."""
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            color = "white" if abs(value) > 0.62 * limit else "0.15"
            axes.text(column, row, f"{value:.{digits}f}", ha="center", va="center", fontsize=size, color=color)


def score_grid(panels: Sequence[tuple[str, Floats]], tokens: Sequence[str], cells: Cells, title: str) -> Figure:
    """One panel (title, scores [query, key], NaN where masked) beside the other: heads of a layer, their mean."""
    window = plots.attention_window(len(tokens), cells)
    side = max(3.4, 0.21 * min(len(tokens), LONGEST) + 1.6)
    columns = min(len(panels), 3 if side < 7 else 2)
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(side * columns + 0.8, 0.9 * side * rows + 1.2), squeeze=False, layout="constrained"
    )
    for place, (label, values) in zip(axes.flat, panels, strict=False):
        scores(place, values, tokens, cells, label, window)
    for place in axes.flat[len(panels) :]:
        place.set_visible(False)
    _title_and_legend(figure, title + cut(len(tokens), window))
    return figure


def cut(length: int, window: slice) -> str:
    """What of a long text is drawn, for its title."""
    return f" (tokens {window.start} to {window.stop - 1} of {length - 1})" if length > LONGEST else ""


def _title_and_legend(figure: Figure, title: str, *others: Patch) -> None:
    figure.suptitle(title, fontsize=11)
    key = Patch(fill=False, edgecolor=MARK, linewidth=1.8, label="induction cell: the token after an earlier copy")
    figure.legend(handles=[key, *others], loc="outside lower center", ncols=2, frameon=False, fontsize=9)


def head_figure(values: Floats, pattern: Floats, tokens: Sequence[str], cells: Cells, title: str) -> Figure:
    """One head large: its scores (NaN where masked) and its pattern, [query, key], with values on short texts."""
    window = plots.attention_window(len(tokens), cells)
    shown = shown_places(len(tokens), window)
    side = max(5.2, (0.42 if len(tokens) <= WITH_VALUES else 0.24) * len(shown) + 1.8)
    figure, axes = plt.subplots(1, 2, figsize=(2 * side + 0.8, 0.9 * side + 1.2), layout="constrained")
    scores(axes[0], values, tokens, cells, "scores, before softmax", window)
    plots.attention(axes[1], pattern, tokens, cells, "pattern, after softmax", window)
    if len(tokens) <= WITH_VALUES:
        part = values[np.ix_(shown[1:], shown)]
        write_values(axes[0], part, limit_of(part[:, 1:]), 1)
        seen = np.where(np.isfinite(part), pattern[np.ix_(shown[1:], shown)], np.nan)
        write_values(axes[1], seen, max(limit_of(seen[:, 1:]), 0.3), 2)
    grey = Patch(facecolor="0.6", label="attention to BOS (grey, 0 to 1)")
    _title_and_legend(figure, title + cut(len(tokens), window), grey)
    return figure


def decomposition_figure(found: Decomposition, title: str, tokens: Sequence[str]) -> Figure:
    """Query source × key source of the mean score of some cells; what is small is added up as one source, `rest`.

    The largest term is framed.
    """
    names, terms = grouped(found.sources, found.terms, MOST_SOURCES)
    side = max(0.52 * len(names) + 2.4, 5.6)
    figure, axes = plt.subplots(figsize=(side + 1.4, side + 0.5), layout="constrained")
    limit = limit_of(terms)
    signed(axes, terms, limit=limit, label="part of the lead (score units)")
    digits = int(np.clip(2 - np.floor(np.log10(limit)), 2, 4))
    write_values(axes, np.where(np.abs(terms) >= 0.02 * limit, terms, np.nan), limit, digits)
    row, column = np.unravel_index(int(np.abs(terms).argmax()), terms.shape)
    outline(axes, [(int(row), int(column))])
    label_tokens(axes, names, names)
    axes.set(xlabel="key source (written where the head looks)", ylabel="query source (written where it looks from)")
    axes.set_title("\n".join(textwrap.wrap(title, 70)), fontsize=10)
    figure.supxlabel(_caption(found, tokens), fontsize=8)
    return figure


def _caption(found: Decomposition, tokens: Sequence[str]) -> str:
    query, key = found.cells[0]
    return (
        f"Mean over {len(found.cells)} {found.kind}, the first {tokens[query]} looking at {tokens[key]} "
        f"(tokens {query} and {key}).\nThe lead, {found.score_advantage:.2f}, is the score less the mean score of the "
        f"other tokens in sight; its parts sum to it (error {found.error:.0e}).\n"
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


def composition_figure(found: Composition, pair: Pair, title: str) -> Figure:
    """z of every earlier head (row) with every head of the layer (column), a panel per way; `pair` framed under K."""
    highest = np.max([found.z[way].max(1) for way in WAYS], axis=0)
    highest[found.senders.index(pair[0])] = np.inf
    rows = np.sort(np.argsort(-highest, kind="stable")[:MOST_SENDERS])
    heads = found.z["Q"].shape[1]
    size = (3 * (0.42 * heads + 2.2), max(2.8, 0.3 * len(rows) + 1.9))
    figure, axes = plt.subplots(1, 3, figsize=size, layout="constrained")
    limit = max(limit_of(found.z[way][rows]) for way in WAYS)
    for place, way in zip(axes, WAYS, strict=True):
        _composition(place, found, way, rows, limit)
    outline(axes[WAYS.index("K")], [(int(np.searchsorted(rows, found.senders.index(pair[0]))), pair[1].head)])
    left_out = len(found.senders) - len(rows)
    figure.suptitle(title + (f" ({len(rows)} of {len(found.senders)} earlier heads)" if left_out else ""), fontsize=11)
    figure.supxlabel(
        f"number: standard deviations above random rotations; bold: above {found.limit:.1f}, corrected for all pairs. "
        "Framed: the strongest previous-token → induction pair",
        fontsize=8,
    )
    return figure


def _composition(axes: Axes, found: Composition, way: str, rows: np.ndarray, limit: float) -> None:
    z = found.z[way][rows]
    signed(axes, z, limit=limit, label="z-score")
    for (row, column), value in np.ndenumerate(z):
        color = "white" if abs(value) > 0.62 * limit else "0.15"
        weight = "bold" if value > found.limit else "normal"
        axes.text(
            column, row, f"{round(value):d}", ha="center", va="center", fontsize=7, color=color, fontweight=weight
        )
    label_tokens(
        axes,
        [str(found.senders[row]) for row in rows],
        [str(Head.at(found.layer, head)) for head in range(z.shape[1])],
    )
    axes.set(xlabel="reads", ylabel="writes")
    axes.set_title({"Q": "Q: into the query", "K": "K: into the key", "V": "V: into the value"}[way], fontsize=10)


def circuit_figure(found: HeadCircuits, labels: Sequence[str], positions: int, title: str) -> Figure:
    """The circuits of one head and its singular directions, by token; `labels` are the tokens of `found`."""
    panels = _circuit_panels(found, labels, positions)
    side = max(3.8, 0.22 * max(len(names) for _, _, names, _ in panels) + 1.6)
    height = 0.34 * len(found.directions) + 1.9
    figure = plt.figure(figsize=(max(side * len(panels), 9.0) + 0.6, side + height + 0.5), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[side, height], squeeze=False).flat
    for axes, (label, values, names, what) in zip(
        upper.subplots(1, len(panels), squeeze=False).flat, panels, strict=True
    ):
        limit = limit_of(values[1:, 1:])  # BOS comes first
        signed(axes, values, limit=limit, label="score", beyond=bool((np.abs(values) > limit).any()))
        label_tokens(axes, names, names)
        axes.set(xlabel=f"key {what}", ylabel=f"query {what}")
        axes.set_title(label, fontsize=9)
    for axes, which in zip(lower.subplots(1, 2), ("query", "key"), strict=True):
        _directions(axes, found.directions, labels, which)
    figure.suptitle(title, fontsize=11)
    figure.supxlabel(
        "Scores that the weights give two tokens by themselves, wherever they stand. What an earlier head writes of a "
        "token\nstands one place on if that head attends to the previous token: a dark diagonal then means that a "
        "token looks for the place behind its own copy.",
        fontsize=8,
    )
    return figure


def _circuit_panels(
    found: HeadCircuits, labels: Sequence[str], positions: int
) -> list[tuple[str, Floats, Sequence[str], str]]:
    """(title, matrix, labels, what its axes are) of each panel."""
    apart = {distance: f", {distance} apart" if distance else "" for distance in found.by_distance}
    panels: list[tuple[str, Floats, Sequence[str], str]] = [
        (f"token × token{apart[distance]}", values, labels, "token") for distance, values in found.by_distance.items()
    ]
    if found.composed is not None and found.sender is not None:
        title = f"token × what {found.sender} writes of a token{next(iter(apart.values()))}"
        panels.append((title, found.composed, labels, "token"))
    if found.position is not None:
        shown = min(positions, MOST_POSITIONS)
        places = [str(place) for place in range(shown)]
        panels.append(("position × position", found.position[:shown, :shown], places, "position"))
    return panels


def _directions(axes: Axes, directions: Sequence[Direction], labels: Sequence[str], which: str) -> None:
    along = np.stack([getattr(direction, which) for direction in directions])
    limit = limit_of(along[:, 1:])  # BOS comes first
    signed(axes, along, limit=limit, label="strength along it", beyond=bool((np.abs(along) > limit).any()))
    rows = [f"direction {number} ({one.share:.0%})" for number, one in enumerate(directions, start=1)]
    label_tokens(axes, rows, labels)
    axes.set_aspect("auto")
    axes.set_title(f"singular directions of W_Q W_K^T: each token as a {which}", fontsize=9)


def text_figures(
    met: Interaction, split: Mapping[int, Decomposition | str], heads: Sequence[int], tokens: Sequence[str],
    cells: Cells, title: str,
) -> Iterator[tuple[str, Figure]]:  # fmt: skip
    """The pictures of one text, each with the stem of its file's name.

    `heads` of the layer side by side, scores and patterns, and the mean over all its heads; the heads of `split` large,
    and what their scores are made of, where that is known.
    """
    masked = np.where(met.rules.visible[0], met.scores[0], np.nan)
    pattern, every = met.pattern[0], len(met.pattern[0])
    names = {head: f"head {Head.at(met.layer, head)}" for head in range(every)}
    some = "" if len(heads) == every else f", {len(heads)} of its {every} heads"
    mean = f"mean over the {every} heads"
    panels = [*((names[head], masked[head]) for head in heads), (mean, masked.mean(0))]
    yield "scores", score_grid(panels, tokens, cells, f"Scores of layer {met.layer}{some}: {title}")
    panels = [*((names[head], pattern[head]) for head in heads), (mean, pattern.mean(0))]
    yield "patterns", plots.attention_grid(panels, tokens, cells, f"Patterns of layer {met.layer}{some}: {title}")
    for head, found in split.items():
        stem, shown = f"head_{Head.at(met.layer, head)}", names[head].capitalize()
        yield stem, head_figure(masked[head], pattern[head], tokens, cells, f"{shown}: {title}")
        if not isinstance(found, str):
            title_ = f"What the scores of {names[head]} are made of: {title}"
            yield f"decomposition_{Head.at(met.layer, head)}", decomposition_figure(found, title_, tokens)


def weight_figures(
    circuits: HeadCircuits, composition: Composition | None, pair: Pair | None, tokens: Sequence[str], positions: int,
    title: str,
) -> Iterator[tuple[str, Figure]]:  # fmt: skip
    """The pictures of weights, each with the stem of its file's name: circuits of a head, composition of its layer.

    `tokens` are those of `circuits`, `positions` how many the text has; `title` names model and text.
    """
    head = str(circuits.head)
    yield f"circuits_{head}", circuit_figure(circuits, tokens, positions, f"Weights of head {head}: {title}")
    if composition and pair:
        read = f"What the heads of layer {composition.layer} read of what earlier heads write: {title.split(',')[0]}"
        yield "composition", composition_figure(composition, pair, read)


def save_all(figures: Iterable[tuple[str, Figure]], folder: Path, ending: str = "") -> list[str]:
    """Write figures, each given with the stem of its file's name, as PNG into `folder` and close them; their names."""
    names = []
    for stem, figure in figures:
        names.append(f"{stem}{ending}.png")
        plots.save(figure, folder / names[-1])
    return names
