"""Pictures. Each function draws on the Axes it is given and returns it; `save` alone makes files.

Attention is drawn in blues that read in print and for colour-blind readers, marks in vermilion (Okabe and Ito's
palette). Cells that a query may not see stay blank. The BOS column has a grey scale of its own, because most heads
rest there and would otherwise leave the other cells pale.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.ticker import FixedFormatter
from sklearn.metrics import precision_recall_curve

from common.attention.head import Head
from common.heads.detection import Detection, by_score
from common.heads.labels import Labels
from common.heads.metrics import agreement
from common.heads.statistics import Floats
from common.loading.escapes import escape

MARK = "#D55E00"
ATTENTION = "Blues"
RESTING = "Greys"
LONGEST = 48  # tokens that stay legible on one axis
LONGEST_LABEL = 24  # characters of one token on an axis
MOST_HEADS = 40  # heads that stay legible in one list
OUTLINES: dict[str, tuple[str, Any]] = {
    "induction": (MARK, "-"),
    "suppression": ("#882255", "--"),
    "attends-only": ("black", ":"),
}
LEGENDS = {
    "induction": "induction head: attends to the token after an earlier copy, and raises it",
    "suppression": "suppression head: attends to it, and lowers it",
    "attends-only": "attends to it, and does neither",
}
HABIT = 0.4  # the best-known fixed threshold
PARTS = {  # of the attention budget, in colours of Okabe and Ito's palette
    "targets": MARK,
    "previous": "#0072B2",
    "self": "#56B4E9",
    "duplicates": "#009E73",
    "bos": "0.75",
    "other": "0.9",
}
MOST_VALUES = 400  # heads up to which the mosaic carries numbers

plt.rcParams.update({"font.family": ["DejaVu Sans"], "figure.dpi": 120, "text.parse_math": False})


def legible(text: str, most: int | None = None) -> str:
    """`text` as the font can show it: glyphs that it lacks become escapes such as `\\u4e2d`, and so does what cannot be
    printed; at most `most` characters, the end cut off."""
    known = get_font(findfont(FontProperties(family="DejaVu Sans"))).get_charmap()
    shown = "".join(
        char if char == "\n" or (char.isprintable() and ord(char) in known) else escape(char) for char in text
    )
    return shown if most is None or len(shown) <= most else shown[: most - 1] + "…"


def save(figure: Figure, path: Path) -> None:
    """Write the figure as PNG, its texts made legible, and close it."""
    for axis in (axis for axes in figure.findobj(Axes) for axis in (axes.xaxis, axes.yaxis)):
        if isinstance(labels := axis.get_major_formatter(), FixedFormatter):
            axis.set_major_formatter(FixedFormatter([legible(label, LONGEST_LABEL) for label in labels.seq]))
    for text in figure.findobj(Text):
        text.set_text(legible(text.get_text()))
    figure.savefig(path, dpi=120, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def mosaic(axes: Axes, found: Detection, title: str) -> Axes:
    """Layer × head prefix matching, induction heads outlined and named."""
    layers, heads = found.score.shape
    sns.heatmap(
        found.score,
        ax=axes,
        vmin=0.0,
        vmax=1.0,
        cmap=ATTENTION,
        annot=layers * heads <= MOST_VALUES,
        fmt=".2f",
        linewidths=0.5,
        linecolor="white",
        cbar_kws={"label": "prefix matching: attention to the tokens\nafter earlier copies of the current one"},
    )
    for verdict, (colour, line) in OUTLINES.items():
        for layer, head in np.argwhere(found.verdict == verdict):
            axes.add_patch(
                Rectangle((head, layer), 1, 1, fill=False, edgecolor=colour, linestyle=line, linewidth=2.5, zorder=3)
            )
            label = axes.text(head + 0.06, layer + 0.22, str(Head.at(layer, head)), color=colour, fontsize=8, zorder=4)
            label.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
            label.set_fontweight("bold")
    axes.set(xlabel="head", ylabel="layer", title=title)
    axes.tick_params(axis="y", rotation=0)
    return axes


def mosaic_figure(found: Detection, title: str) -> Figure:
    """The mosaic at a size at which every square is legible."""
    layers, heads = found.score.shape
    size = max(7.0, 0.62 * heads + 3), max(3.4, 0.42 * layers + 1.8)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    mosaic(axes, found, title)
    handles = [
        Patch(fill=False, edgecolor=colour, linestyle=line, linewidth=2, label=LEGENDS[verdict])
        for verdict, (colour, line) in OUTLINES.items()
        if (found.verdict == verdict).any() or verdict == "induction"
    ]
    figure.legend(handles=handles, loc="outside lower left", frameon=False, fontsize=9)
    return figure


def thresholds(axes: Axes, found: Detection, title: str) -> Axes:
    """Each head's score against its own null and its own threshold, highest score on top."""
    heads = by_score(found.score)[:MOST_HEADS]
    for place, head in enumerate(heads):
        passed = bool(found.induction[head])
        axes.plot([found.control[head], found.score[head]], [place, place], color="0.8", linewidth=1, zorder=1)
        axes.plot(found.control[head], place, "o", markerfacecolor="white", markeredgecolor="0.45", markersize=5)
        axes.plot(found.score[head], place, "o" if passed else "s", color=MARK if passed else "0.35", markersize=6)
        axes.plot(found.threshold[head], place, "|", color="black", markersize=11, markeredgewidth=2)
    axes.set_yticks(range(len(heads)), [str(Head.at(*head)) for head in heads])
    axes.invert_yaxis()
    left_out = found.score.size - len(heads)
    axes.set(
        xlabel="prefix matching (share of attention, 0 to 1)",
        ylabel="head" + (f" (the {len(heads)} highest of {found.score.size})" if left_out else ""),
        title=title,
    )
    axes.set_xlim(-0.02, 1.02)
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    style: dict[str, Any] = {"linestyle": "none", "markersize": 6}
    axes.legend(
        handles=[
            Line2D([], [], marker="o", color=MARK, label="score: induction head", **style),
            Line2D([], [], marker="s", color="0.35", label="score: no induction head", **style),
            Line2D([], [], marker="|", color="black", markeredgewidth=2, label="its threshold", **style),
            Line2D([], [], marker="o", markerfacecolor="white", color="0.45", label="control rows, no repeat", **style),
        ],
        loc="lower right",
        fontsize=8,
    )
    return axes


def threshold_figure(found: Detection, title: str) -> Figure:
    """Heads against their thresholds, a line each."""
    figure, axes = plt.subplots(figsize=(8.0, 0.24 * min(found.score.size, MOST_HEADS) + 1.6))
    thresholds(axes, found, title)
    return figure


def budget(axes: Axes, found: Detection, paid: Mapping[str, Floats], title: str) -> Axes:
    """Where each head's attention goes at queries that have a target, highest score on top; the parts sum to 1."""
    heads = by_score(found.score)[:MOST_HEADS]
    left = np.zeros(len(heads))
    for part, colour in PARTS.items():
        width = np.array([paid[part][head] for head in heads])
        shown = "BOS" if part == "bos" else part
        axes.barh(range(len(heads)), width, left=left, color=colour, edgecolor="white", linewidth=0.4, label=shown)
        left += width
    verdicts = [
        str(Head.at(*head)) if found.verdict[head] == "none" else f"{found.verdict[head]}  {Head.at(*head)}"
        for head in heads
    ]
    axes.set_yticks(range(len(heads)), verdicts)
    axes.invert_yaxis()
    axes.set(xlabel="share of attention, mean over queries with a target", xlim=(0, 1))
    axes.legend(ncols=len(PARTS), loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=8, borderaxespad=0)
    axes.set_title(title, pad=24)
    sns.despine(ax=axes, left=True)
    return axes


def budget_figure(found: Detection, paid: Mapping[str, Floats], title: str) -> Figure:
    """The attention budgets, a bar each."""
    figure, axes = plt.subplots(figsize=(9.0, 0.24 * min(found.score.size, MOST_HEADS) + 1.8))
    budget(axes, found, paid, title)
    return figure


def precision_recall(axes: Axes, found: Detection, labels: Labels, title: str) -> Axes:
    """Precision against recall of every fixed threshold on the score, and of each head's own."""
    truth = labels.mask(found.score.shape)
    precision, recall, _ = precision_recall_curve(truth.ravel(), found.score.ravel())
    axes.plot(
        recall, precision, color="0.45", drawstyle="steps-post", label="one fixed threshold for all heads, any value"
    )
    at_fixed = found.score >= HABIT
    for detected, marker, colour, label in (
        (at_fixed, "s", "0.2", f"fixed threshold {HABIT}, the habit of the field"),
        (found.induction, "o", MARK, "this run's verdicts"),
    ):
        precision_there, recall_there, f1 = agreement(truth, detected)
        axes.plot(recall_there, precision_there, marker, color=colour, markersize=9, label=f"{label} (F1 {f1:.2f})")
    axes.set(xlabel="recall", ylabel="precision", xlim=(-0.03, 1.03), ylim=(-0.03, 1.06))
    axes.set_title(f"{title}\n{textwrap.shorten(labels.source, 90, placeholder=' …')}", fontsize=10)
    axes.legend(loc="lower left", frameon=False, fontsize=8)
    return axes


def precision_recall_figure(found: Detection, labels: Labels, title: str) -> Figure:
    """Precision against recall."""
    figure, axes = plt.subplots(figsize=(6.4, 4.8))
    precision_recall(axes, found, labels, title)
    return figure


def attention(
    axes: Axes, pattern: Floats, tokens: Sequence[str], cells: Sequence[tuple[int, int]], title: str, window: slice
) -> Axes:
    """One attention pattern [query, key] with tokens on both axes and the induction `cells` (query, key) outlined.

    Draws queries and keys of `window`, and BOS beside them. Blues run from 0 to the largest drawn cell off the BOS
    column; the BOS column is grey from 0 to 1.
    """
    shown = [0, *(place for place in range(*window.indices(len(tokens))) if place > 0)]
    queries = shown[1:]
    part = pattern[np.ix_(queries, shown)]
    future = np.array(shown)[None, :] > np.array(queries)[:, None]
    off_bos = np.ma.masked_array(part, mask=future | (np.arange(len(shown)) == 0))
    only_bos = np.ma.masked_array(part, mask=np.arange(len(shown)) != np.zeros((len(queries), 1)))
    image = axes.imshow(off_bos, cmap=ATTENTION, vmin=0.0, vmax=max(float(off_bos.max()), 1e-6), aspect="equal")
    axes.imshow(only_bos, cmap=RESTING, vmin=0.0, vmax=1.0, aspect="equal")
    axes.set_xlim(-0.5, len(shown) - 0.5)
    axes.axvline(0.5, color="black", linewidth=0.8)
    places = {place: index for index, place in enumerate(shown)}
    for query, key in cells:
        if query in places and key in places and query > 0:
            corner = (places[key] - 0.5, places[query] - 1.5)
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=MARK, linewidth=1.6, zorder=3))
    size = 8 if len(shown) <= 32 else 6
    axes.set_xticks(range(len(shown)), [tokens[place] for place in shown], rotation=90, fontsize=size)
    axes.set_yticks(range(len(queries)), [tokens[place] for place in queries], fontsize=size)
    axes.set(xlabel="key (attended to)", ylabel="query (attends)")
    axes.set_title(title, fontsize=10)
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    bar.set_label("attention", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return axes


def attention_window(length: int, cells: Sequence[tuple[int, int]]) -> slice:
    """The `LONGEST` positions of a text that hold the most of its induction `cells`; all of a text that is short."""
    if length <= LONGEST:
        return slice(0, length)
    first = np.array([min(cell) for cell in cells], dtype=int)
    last = np.array([max(cell) for cell in cells], dtype=int)
    starts = np.arange(0, length - LONGEST + 1)
    held = [int(((first >= start) & (last < start + LONGEST)).sum()) for start in starts]
    best = int(starts[int(np.argmax(held))])
    return slice(best, best + LONGEST)


def attention_grid(
    panels: Sequence[tuple[str, Floats]], tokens: Sequence[str], cells: Sequence[tuple[int, int]], title: str
) -> Figure:
    """A figure with one attention panel (title, pattern [query, key]) beside the other."""
    window = attention_window(len(tokens), cells)
    side = max(3.6, 0.21 * min(len(tokens), LONGEST) + 1.6)
    columns = min(len(panels), 3 if side < 7 else 2)
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(side * columns + 0.8, 0.88 * side * rows + 1.2), squeeze=False, layout="constrained"
    )
    for place, (label, pattern) in zip(axes.flat, panels, strict=False):
        attention(place, pattern, tokens, cells, label, window)
    for place in axes.flat[len(panels) :]:
        place.set_visible(False)
    cut = f" (tokens {window.start} to {window.stop - 1} of {len(tokens) - 1})" if len(tokens) > LONGEST else ""
    figure.suptitle(title + cut, fontsize=11)
    key = Patch(fill=False, edgecolor=MARK, linewidth=1.6, label="induction cell: the token after an earlier copy")
    grey = Patch(facecolor="0.6", label="attention to BOS (grey, 0 to 1)")
    figure.legend(handles=[key, grey], loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure
