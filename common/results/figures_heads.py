"""What the pictures of the first question show: which heads are induction heads, and what they do.

Each function takes what was measured and returns a `spec.Figure`. Attention is drawn in blues that read in print and
for colour-blind readers, marks in vermilion. Cells that a query may not see stay blank. The BOS column has a grey scale
of its own, because most heads rest there and would otherwise leave the other cells pale.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from common.attention.head import Head
from common.heads.detection import LEAST_EFFECT, Detection, by_score
from common.heads.metrics import agreement, compared_with
from common.heads.statistics import Floats
from common.results import spec
from common.results.spec import BLUE, MARK, Axis, Entry, Figure, Heatmap, Marks, Outline, Panel, Rule, Scale

if TYPE_CHECKING:
    from common.heads.labels import Labels

Row = Mapping[str, Any]  # of a table in results.json: numbers, words, intervals by column
Places = Sequence[tuple[int, int]]  # (query, key)

ATTENTION, RESTING, SIGNED, COPYING = "Blues", "Greys", "PRGn_r", "PuOr_r"
UNITS = {"pattern": "attention", "scores": "score before softmax"}
LONGEST = 48  # tokens that stay legible on one axis
WITH_VALUES = 14  # tokens up to which every cell of a large map carries its value
MOST_HEADS = 40  # heads that stay legible in one list
MOST_VALUES = 400  # heads up to which the mosaic carries numbers
MOST_NAMED = 14  # heads named among the marks of a scatter
HABIT = 0.4  # the best-known fixed threshold
# verdict -> colour and line of its frame, shape of its mark, what the legend says
VERDICTS_SHOWN: dict[str, tuple[str, spec.Stroke, str, str]] = {
    "induction": (MARK, "-", "circle", "induction head: attends to the token after an earlier copy, and raises it"),
    "suppression": ("#882255", "--", "triangle-down", "suppression head: attends to it, and lowers it"),
    "attends-only": ("black", ":", "diamond", "attends to it, and does neither"),
}
BUDGET_COLOURS = {"targets": MARK, "previous": BLUE, "self": "#56B4E9", "duplicates": "#009E73", "bos": "0.75",
                  "other": "0.9"}  # fmt: skip
ABLATION_TITLES = {
    "mean": "mean ablation: the head's output is its mean in control rows",
    "knockout": "attention knockout: no attention to the tokens after earlier copies",
}


# --- heads of a model ---


def mosaic_figure(found: Detection, title: str) -> Figure:
    """Layer × head prefix matching; heads that attend to their targets are framed and named."""
    layers, heads = found.score.shape
    texts = np.full((layers, heads), "", dtype="<U4")
    names, hover = np.full((2, layers, heads), "", dtype=object)
    for place, score in np.ndenumerate(found.score):
        names[place] = str(Head.at(*place))
        hover[place] = f"head {names[place]}\n{found.verdict[place]}\nprefix matching {number(score)}"
        if found.score.size <= MOST_VALUES and np.isfinite(score):
            texts[place] = f"{score:.2f}"
    outlines, legend = [], []
    for verdict, (colour, line, _, said) in VERDICTS_SHOWN.items():
        of = [Head.at(*place) for place in np.argwhere(found.verdict == verdict)]
        outlines += [Outline(*head.place, colour, line, str(head)) for head in of]
        legend += [Entry(said, "frame", colour, line)] if of else []
    label = "prefix matching: attention to the tokens\nafter earlier copies of the current one"
    heatmap = Heatmap(
        found.score, Scale(ATTENTION, 0.0, 1.0, label), outlines, texts, hover=hover, heads=names, gaps=True
    )
    x, y = Axis("head", [str(head) for head in range(heads)]), Axis("layer", [str(layer) for layer in range(layers)])
    # 0.62 inches hold a number of two digits and the head's name above it
    width, height = max(7.0, 0.62 * heads + 3), max(3.4, 0.42 * layers + 1.8)
    return Figure(title, [[Panel(x, y, [heatmap])]], width, height, legend)


def threshold_figure(found: Detection, title: str) -> Figure:
    """Each head's score against its own null and its own threshold, highest score on top."""
    heads = by_score(found.score)[:MOST_HEADS]
    names, passed = [str(Head.at(*head)) for head in heads], np.array([found.induction[head] for head in heads])
    drawn = (found.score, found.control, found.threshold)
    score, control, limit = (np.array([of[head] for head in heads]) for of in drawn)
    rows, every = np.arange(len(heads)), np.ones(len(heads), dtype=bool)
    between = np.stack([control, score, np.full(len(heads), np.nan)], axis=1)
    elements: list[spec.Element] = [spec.Line(between.ravel().tolist(), np.repeat(rows, 3).tolist(), "0.8")]
    legend = []
    for some, along, said, shape, colour, size, filled in (
        (every, control, "control rows, no repeat", "circle", "0.45", 5, False),
        (passed, score, "score: induction head", "circle", MARK, 6, True),
        (~passed, score, "score: no induction head", "square", "0.35", 6, True),
        (every, limit, "its threshold", "tick", "black", 11, True),
    ):
        at, of = along[some].tolist(), [name for name, here in zip(names, some, strict=True) if here]
        elements.append(Marks(at, rows[some].tolist(), shape, colour, size, filled, heads=of))
        legend += [Entry(said, shape, colour, filled=filled)] if of else []
    cut = f" (the {len(heads)} highest of {found.score.size})" if len(heads) < found.score.size else ""
    x = Axis("prefix matching (share of attention, 0 to 1)", limits=(-0.02, 1.02), grid=True)
    panel, height = Panel(x, listed(names, "head" + cut), elements), 0.24 * len(heads) + 1.6
    return Figure(title, [[panel]], 8.0, height, legend, "lower right")


def budget_figure(found: Detection, paid: Mapping[str, Floats], title: str) -> Figure:
    """Where each head's attention goes at queries that have a target, highest score on top; the parts sum to 1."""
    heads = by_score(found.score)[:MOST_HEADS]
    names = [f"{'' if found.verdict[head] == 'none' else found.verdict[head] + '  '}{Head.at(*head)}" for head in heads]
    bars, left = [], np.zeros(len(heads))
    for part, colour in BUDGET_COLOURS.items():
        width = np.array([paid[part][head] for head in heads])
        bars.append(spec.Bars(left, width, colour))
        left = left + width
    legend = [Entry("BOS" if part == "bos" else part, "patch", colour) for part, colour in BUDGET_COLOURS.items()]
    panel = Panel(Axis("share of attention, mean over queries with a target", limits=(0.0, 1.0)), listed(names), bars)
    return Figure(title, [[panel]], 9.0, 0.24 * len(heads) + 1.8, legend, "above", len(legend))


def precision_recall_figure(found: Detection, labels: Labels, title: str) -> Figure:
    """Precision against recall of every fixed threshold on the score, and of each head's own, as far as the labels can
    judge it (`compared_with`)."""
    from sklearn.metrics import precision_recall_curve  # importing it writes to the environment

    truth, counted = labels.mask(found.score.shape), labels.counted(found.score.shape)
    precision, recall, _ = precision_recall_curve(truth[counted], found.score[counted])
    compared, verdicts, _ = compared_with(found, labels)
    elements: list[spec.Element] = [spec.Line(recall.tolist(), precision.tolist(), "0.45", steps=True)]
    legend = [Entry("one fixed threshold for all heads, any value", "line", "0.45")]
    for detected, shape, colour, said in (
        (found.score >= HABIT, "square", "0.2", f"fixed threshold {HABIT}, the habit of the field"),
        (verdicts, "circle", MARK, f"this run's {compared.split(',')[0]}"),
    ):
        precise, recalled, f1 = agreement(truth, detected & counted).tolist()
        elements.append(Marks([recalled], [precise], shape, colour, 9.0))
        legend.append(Entry(f"{said} (F1 {f1:.2f})", shape, colour))
    panel = Panel(Axis("recall", limits=(-0.03, 1.03)), Axis("precision", limits=(-0.03, 1.06)), elements)
    title += f"\n{textwrap.fill(labels.called(), 76)}\n{textwrap.shorten(labels.source, 76, placeholder=' …')}"
    return Figure(title, [[panel]], 6.4, 4.8, legend, "lower left")


def listed(names: Sequence[str], label: str = "") -> Axis:
    """An axis with a name per line, the first on top."""
    return Axis(label, names, limits=(len(names) - 0.5, -0.5))


# --- what heads do ---


def effect_figure(heads: Sequence[Row], title: str) -> Figure:
    """Prefix matching against total effect for every head; colour: OV copying, shape: verdict.

    Heads far to the right near 0 look inductive and do nothing; heads high on the left do it without looking so.
    """
    shown = [head for head in heads if known(head["prefix_matching"]) and known(head["total_effect"])]
    size = [max(head["prefix_matching"], abs(head["total_effect"])) for head in shown]
    order = sorted(range(len(shown)), key=lambda place: -size[place])[:MOST_NAMED]
    named = [shown[place] for place in order if size[place] >= LEAST_EFFECT]
    sides = dict(zip(map(name_of, named), named_on_the_right(*_scatter_places(named)), strict=True))
    elements: list[spec.Element] = [Rule("y", -LEAST_EFFECT, LEAST_EFFECT, "0.95"), Rule("y", 0.0)]
    legend: list[Entry] = []
    shapes = {verdict: shape for verdict, (_, _, shape, _) in VERDICTS_SHOWN.items()}
    for verdict, shape in {**shapes, "other": "square"}.items():
        some = [head for head in shown if shapes.get(head["verdict"], "square") == shape]
        halves = ([head for head in some if known(head["copying"]) == wanted] for wanted in (True, False))
        elements += [_scattered(half, shape, sides) for half in halves if half]
        legend += [Entry(verdict, shape, "0.2", filled=False)] if some else []
    if any(not known(head["copying"]) for head in shown):
        legend.append(Entry("OV copying not measured", "square", "0.75"))
    score, effect = _scatter_places(shown)
    ticks = [0.0, *(sign * far for far in (0.05, 0.2, 1.0, 5.0, 20.0) for sign in (-1, 1))]
    # On the logarithmic axis a factor of 2 keeps marks and their names off the edges.
    limits = 2 * min([-LEAST_EFFECT, *effect]), 2 * max([0.1, *effect])
    y = Axis("total effect on the correct token's logit (nats)", [f"{tick:+g}" if tick else "0" for tick in ticks],
             ticks, limits, linear_to=LEAST_EFFECT)  # fmt: skip
    x = Axis("prefix matching (share of attention on the tokens after earlier copies)",
             limits=(-0.03, max([1.0, *score]) + 0.05))  # fmt: skip
    return Figure(title, [[Panel(x, y, elements)]], 8.0, 5.4, legend, "upper left")


def _scattered(heads: Sequence[Row], shape: str, sides: Mapping[str, bool]) -> Marks:
    """Marks of one shape, named where `sides` has them; grey where OV copying was not measured."""
    names, colour = [name_of(head) for head in heads], "0.75"
    hover = ["\n".join([f"head {name_of(head)}", *map(" ".join, numbers(head))]) for head in heads]
    values, scale = None, None
    if known(heads[0]["copying"]):
        values, colour = [head["copying"] for head in heads], "0.2"
        scale = Scale(COPYING, -1.0, 1.0, "OV copying: suppresses (-1) to copies (+1)")
    return Marks(
        *_scatter_places(heads), shape, colour, 5.0 if shape == "square" else 8.0, values=values, scale=scale,
        names=[name if name in sides else "" for name in names], right=[sides.get(name, True) for name in names],
        hover=hover, heads=names,
    )  # fmt: skip


def _scatter_places(heads: Sequence[Row]) -> tuple[list[float], list[float]]:
    return [float(head["prefix_matching"]) for head in heads], [float(head["total_effect"]) for head in heads]


def named_on_the_right(score: Sequence[float], effect: Sequence[float]) -> list[bool]:
    """On which side each mark's name stands: away from the nearest other mark, so that no name is read as another's."""
    places = list(zip(score, effect, strict=True))
    sides = []
    for place, (x, y) in enumerate(places):
        others = [(abs(x - a) + abs(y - b), a, other) for other, (a, b) in enumerate(places) if other != place]
        _, nearest, other = min(others, default=(0.0, x, -1))
        sides.append((x, place) > (nearest, other))
    return sides


def ablation_figure(effects: Sequence[Row], title: str) -> Figure:
    """The rise of the loss without each head and without all, beside random heads; a panel per kind of ablation."""
    kinds = [kind for kind in ABLATION_TITLES if any(one["name"] == kind for one in effects)]
    made = [_ablation_panel([one for one in effects if one["name"] == kind], ABLATION_TITLES[kind]) for kind in kinds]
    series = [marks for panel in made for marks in panel.elements if isinstance(marks, Marks) and marks.x]
    legend = [Entry(said, shape, colour) for said, (shape, colour, _) in _LOSSES.items()
              if any(marks.shape == shape for marks in series)]  # fmt: skip
    rows = max(len({tuple(one["heads"]) for one in effects}), 2)
    height = len(kinds) * (0.34 * rows + 1.1) + 0.9
    return Figure(title, [[panel] for panel in made], 8.0, height, legend, legend_columns=3)


_LOSSES = {  # what is drawn -> shape, colour, how far below the middle of its line
    "loss at repeats": ("circle", MARK, -0.15),
    "loss at fresh tokens": ("triangle-up", BLUE, 0.15),
    "loss at repeats, random heads of the same layers": ("square", "0.45", 0.0),
}


def _ablation_panel(effects: Sequence[Row], title: str) -> Panel:
    at_repeats = [one for one in effects if one["metric"] == "loss_at_repeats"]
    at_repeats.sort(key=lambda one: (len(one["heads"]), -(one["effect"] or 0.0)))
    fresh = {tuple(one["heads"]): one for one in effects if one["metric"] == "loss_at_fresh"}
    heads = [" ".join(one["heads"]) for one in at_repeats]
    beside = [fresh.get(tuple(one["heads"])) for one in at_repeats]
    rows: tuple[Sequence[Row | None], ...] = at_repeats, beside, [one["control"] for one in at_repeats]
    marks = [interval_marks(of, heads, said, *_LOSSES[said]) for said, of in zip(_LOSSES, rows, strict=True)]
    names = [heads[at] if len(one["heads"]) == 1 else f"all {len(one['heads'])}" for at, one in enumerate(at_repeats)]
    x = Axis("rise of the loss (nats), 95 % interval over rows", grid=True)
    return Panel(x, listed(names, "head taken away"), [Rule("x", 0.0), *marks], title)


def interval_marks(
    rows: Sequence[Row | None], names: Sequence[str], said: str, shape: str, colour: str, shift: float
) -> Marks:
    """A mark with its interval for each row that was measured, `shift` below the middle of its line."""
    at = [(place, row) for place, row in enumerate(rows) if row and known(row["effect"])]
    ends = [row["interval"][0] for _, row in at], [row["interval"][1] for _, row in at]
    hover = [f"{names[place]}\n{said}: {row['effect']:+.3f}{_interval(row['interval'])}" for place, row in at]
    x, y = [row["effect"] for _, row in at], [place + shift for place, _ in at]
    return Marks(x, y, shape, colour, ends=ends, hover=hover, heads=[names[place] for place, _ in at])


# --- a row of results.json in words ---


def name_of(head: Row) -> str:
    """The head that a row is about."""
    return str(Head.at(head["layer"], head["head"]))


def numbers(head: Row) -> list[tuple[str, str]]:
    """Every number of a head as (what, value); an interval stands behind its number."""
    return [
        (key, number(value) + _interval(head.get(f"{key}_interval")))
        for key, value in head.items()
        if key not in ("layer", "head") and not key.endswith("_interval")
    ]


def number(value: object) -> str:
    """Four significant digits; words as they are, a dash for what was not measured."""
    if isinstance(value, (float, np.floating)):
        return f"{value:.4g}" if np.isfinite(value) else "–"
    return "–" if value is None else str(value)


def known(value: float | None) -> bool:
    """Whether a number was measured."""
    return value is not None and bool(np.isfinite(value))


def _interval(ends: Sequence[float | None] | None) -> str:
    return f" [{number(ends[0])}, {number(ends[1])}]" if ends is not None and all(map(known, ends)) else ""


# --- tokens × tokens ---


def drawn_places(length: int, cells: Places) -> list[int]:
    """BOS and the positions of a text that are drawn: all, or the stretch with most induction `cells`."""
    if length <= LONGEST:
        return list(range(length))
    first, last = (np.array([of(cell) for cell in cells], dtype=int) for of in (min, max))
    held = [int(((first >= start) & (last < start + LONGEST)).sum()) for start in range(length - LONGEST + 1)]
    start = int(np.argmax(held))
    return [0, *range(max(start, 1), start + LONGEST)]


def drawn_cells(cells: Places, places: Sequence[int]) -> Places:
    """Those of the cells that are drawn, counted in the `places` that are."""
    at = {place: index for index, place in enumerate(places)}
    return [(at[query], at[key]) for query, key in cells if query in at and key in at]


def token_panel(
    kind: str, values: Floats, tokens: Sequence[str], cells: Places, title: str, *, written: bool = False
) -> Panel:
    """A map [query, key] of one head on a text, cut to its `drawn_places`. As `map_panel`."""
    places = drawn_places(len(tokens), cells)
    part, shown = values[np.ix_(places, places)], [tokens[place] for place in places]
    return map_panel(kind, part, shown, drawn_cells(cells, places), title, written=written)


def map_panel(
    kind: str, values: Floats, tokens: Sequence[str], cells: Places, title: str = "", *, written: bool = False
) -> Panel:
    """A map [query, key] of one head with tokens on both axes and the induction `cells` (query, key) framed.

    `kind`: "pattern", blues from 0 to the largest cell off the BOS column, that column grey from 0 to 1; or "scores",
    green below 0 and purple above, as far as the largest cell off the BOS column, too, so that BOS may lie beyond. NaN
    where a query may not see. `written`: every cell carries its value. BOS has no row: it sees itself alone.
    """
    part = np.where(np.tri(len(values), dtype=bool), values, np.nan)[1:]
    scale, bos = signed_scale(part[:, 1:], UNITS[kind], part), None
    if kind == "pattern":
        scale, bos = Scale(ATTENTION, 0.0, scale.high, UNITS[kind]), Scale(RESTING, 0.0, 1.0, "attention to BOS")
    outlines = [Outline(query - 1, key) for query, key in cells if query > 0]
    texts = written_values(part, 2 if kind == "pattern" else 1) if written else None
    x, y = Axis("key (attended to)", tokens, turned=True), Axis("query (attends)", tokens[1:])
    heatmap = Heatmap(part, scale, outlines, texts, bos=bos)
    return Panel(x, y, [heatmap, Rule("x", 0.5, colour="black")], title, square=True)


def signed_scale(values: Floats, label: str, every: Floats | None = None) -> Scale:
    """Green below 0, purple above, equally dark at equal distance from 0, up to the largest of `values`. `every`:
    all that is drawn; where some of it is larger, it lies beyond the scale."""
    limit = max(float(np.nanmax(np.abs(values), initial=0.0)), 1e-6)
    return Scale(SIGNED, -limit, limit, label, every is not None and bool((np.abs(every) > limit).any()))


def written_values(values: Floats, digits: int, least: float = 0.0) -> np.ndarray:
    """[row, column]: values as texts; "" for NaN and for what is smaller than `least`."""
    return np.array([[f"{value:.{digits}f}" if abs(value) >= least else "" for value in row] for row in values])


def token_figure(
    kind: str, panels: Sequence[tuple[str, Floats]], tokens: Sequence[str], cells: Places, title: str
) -> Figure:
    """A `token_panel` (title, map) beside the other: heads of a layer, their mean."""
    side = side_of(min(len(tokens), LONGEST))
    columns = min(len(panels), 3 if side < 7 else 2)
    made: list[Panel | None] = [token_panel(kind, values, tokens, cells, label) for label, values in panels]
    made += [None] * (-len(made) % columns)
    rows = [made[start : start + columns] for start in range(0, len(made), columns)]
    width, height = side * columns + 0.8, 0.88 * side * len(rows) + 1.2
    return Figure(title + cut(len(tokens), cells), rows, width, height, token_legend(made), legend_columns=2)


def side_of(tokens: int) -> float:
    """Inches of a map with so many tokens on its axes, labels and all."""
    return max(3.6, 0.21 * tokens + 1.6)


def token_legend(panels: Sequence[Panel | None]) -> list[Entry]:
    """What is framed in maps of tokens, if anything is, and what is grey."""
    maps = [one for panel in panels if panel for one in panel.elements if isinstance(one, Heatmap)]
    framed = Entry("induction cell: the token after an earlier copy", "frame", MARK)
    resting = Entry("attention to BOS (grey, 0 to 1)", "patch", "0.6")
    there = [framed] if any(one.outlines for one in maps) else []
    return [*there, resting] if any(one.bos for one in maps) else there


def cut(length: int, cells: Places) -> str:
    """What of a long text is drawn, for its title."""
    places = drawn_places(length, cells)
    return f" (tokens {places[1]} to {places[-1]} of {length - 1})" if len(places) < length else ""
