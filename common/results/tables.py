"""What was found, as rows (results.json, CSV files, data frames) and as sentences and lines (terminal, page)."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from common.attention.head import Head
from common.heads.detection import ON_TARGETS
from common.heads.statistics import Floats
from common.heads.tokens import BUDGET

if TYPE_CHECKING:
    from common.interventions.ablation import Ablation
    from common.interventions.effects import PathEffect

MOST_PRINTED = 20  # heads in the table at the terminal; all are in the files
TERMS = 8  # terms listed of each decomposition
SCREEN_LINES, SCREEN_WIDTH = 24, 100  # of a repr: a terminal's default height, and what fits beside other windows

HEAD_COLUMNS = ("head", "verdict, confidence", "prefix\nmatching", "thres-\nhold", "total\neffect", "direct\neffect",
                "copy-\ning", "attention paid to, %\ntgt prv slf dup BOS oth")  # fmt: skip
TERM_COLUMNS = ("query source", "key source", "part of the score advantage")
PART_COLUMNS = ("replaced", "prefix matching", "loss at repeats", "random heads", "at fresh")
PARTS_REPLACED = {
    "uniform": "pattern, uniform",
    "pattern": "pattern, other row",
    "query": "query",
    "key": "key",
    "values": "values",
    "knockout": "cells knocked out",
    "mean": "whole head, mean",
}

Interval = tuple[float | None, float | None]
Made = TypeVar("Made")


class Screenful:
    """A dataclass whose repr fits a screen: the lines of `summary`, wrapped and cut."""

    def summary(self) -> Iterable[str]:
        """What was found, a sentence each."""
        said = (f"{key} {one:.4g}" if isinstance(one, float) else f"{key} {one}" for key, one in vars(self).items())
        yield f"{type(self).__name__}: {', '.join(said)}"

    def __repr__(self) -> str:
        lines = [part for line in self.summary() for part in textwrap.wrap(line, SCREEN_WIDTH, subsequent_indent="  ")]
        return "\n".join(lines if len(lines) <= SCREEN_LINES else [*lines[: SCREEN_LINES - 1], "…"])


@dataclass(frozen=True, repr=False)
class HeadRow(Screenful):
    """What was measured of one head: a row of heads.csv.

    Scores, `confidence`, `control`, `threshold` and the `budget_*` shares of attention (at queries with a target) lie
    in [0, 1]; `copying` in [-1, 1], NaN where the model has no direct path to the logits. Effects are in nats, above 0
    where the head helps: on the repeated token's logit (`total_effect`, to first order, or by attention knockout where
    `total_effect_exact`; `direct_effect`), and the rise of the loss at repeats without the head (`ablation_effect`,
    None where it was not measured). Intervals are 95 % over rows.
    """

    layer: int
    head: int
    verdict: str
    confidence: float
    prefix_matching: float
    prefix_matching_interval: Interval
    control: float
    threshold: float
    induction: bool
    previous_token: float
    duplicate_token: float
    first_token: float
    current_token: float
    copying: float
    budget_targets: float
    budget_previous: float
    budget_self: float
    budget_duplicates: float
    budget_bos: float
    budget_other: float
    total_effect: float
    total_effect_interval: Interval
    total_effect_exact: bool
    direct_effect: float
    direct_effect_interval: Interval
    ablation_effect: float | None = None
    ablation_effect_interval: Interval = (None, None)

    @property
    def name(self) -> str:
        """`5.1`"""
        return str(Head.at(self.layer, self.head))

    def flat(self) -> dict[str, object]:
        """As a table holds it: an interval takes two columns, `_low` and `_high`."""
        found: dict[str, object] = {}
        for key, value in asdict(self).items():
            what = key.removesuffix("_interval")
            found |= {key: value} if what == key else {f"{what}_low": value[0], f"{what}_high": value[1]}
        return found

    def summary(self) -> Iterable[str]:
        yield (
            f"head {self.name}: {self.verdict} (confidence {self.confidence:.2f}), prefix matching "
            f"{self.prefix_matching:.2f} (threshold {self.threshold:.2f}), total effect {with_sign(self.total_effect)}"
        )


@dataclass(frozen=True, repr=False)
class HeadOnText(Screenful):
    """One head's scores on one text, each in [0, 1]; `control` is the mean over control texts, `control_highest` the
    highest of them. One text is one draw: its score has no interval. None: no token of the text repeats."""

    layer: int
    head: int
    prefix_matching: float
    previous_token: float
    duplicate_token: float
    first_token: float
    current_token: float
    control: float | None = None
    threshold: float | None = None
    attends: bool | None = None
    control_highest: float | None = None


def rows(make: Callable[..., Made], columns: Mapping[str, NDArray[np.generic]]) -> tuple[Made, ...]:
    """One row per head, layer by layer, from arrays [layers, heads] or, for intervals, [layers, heads, 2]."""
    plain = {key: values.tolist() for key, values in columns.items()}
    layers, heads = next(iter(columns.values())).shape[:2]
    return tuple(
        make(layer=layer, head=head, **{key: values[layer][head] for key, values in plain.items()})
        for layer, head in np.ndindex(layers, heads)
    )


def pairs(low: Floats, high: Floats) -> Floats:
    """The two ends of intervals [layers, heads] as [layers, heads, 2]."""
    return np.stack([low, high], axis=-1)


def shortened(text: str, most: int = 70) -> str:
    """A text on one line, at most `most` characters of it, for a title."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def with_sign(value: float | None) -> str:
    """A number with its sign; a dash where it was not measured."""
    return "–" if value is None or np.isnan(value) else f"{value:+.2f}"


# --- induction heads ---


def head_lines(heads: Sequence[HeadRow]) -> list[list[str]]:
    """Lines for the terminal: the heads that attend to their targets, highest score first; * beside an exact effect."""
    shown = sorted((head for head in heads if head.verdict in ON_TARGETS), key=lambda head: -head.prefix_matching)
    lines = []
    for head in shown[:MOST_PRINTED]:
        total, *others = map(with_sign, (head.total_effect, head.direct_effect, head.copying))
        effects = total + "*" * head.total_effect_exact, *others
        paid = " ".join(f"{100 * getattr(head, f'budget_{part}'):3.0f}" for part in BUDGET)
        scores = f"{head.prefix_matching:.2f}", f"{head.threshold:.2f}"
        lines.append([head.name, f"{head.verdict} {head.confidence:.2f}", *scores, *effects, paid])
    return lines


def exact_sentence(heads: Sequence[HeadRow]) -> str | None:
    """What the * of `head_lines` means; None where there is none."""
    if any(head.total_effect_exact for head in heads):
        return "* measured by attention knockout; the other total effects are estimated to first order."
    return None


def verdict_sentence(heads: Sequence[HeadRow], ablation: Ablation | None) -> str:
    """How many induction heads there are, which, and what the model loses without them where that was measured."""
    found = sorted((head for head in heads if head.induction), key=lambda head: -head.prefix_matching)
    if not found:
        return "No head of this model is an induction head by this test."
    named = ", ".join(f"{head.name} ({head.prefix_matching:.2f})" for head in found[:MOST_PRINTED])
    more = f" and {len(found) - MOST_PRINTED} more" if len(found) > MOST_PRINTED else ""
    lost = ablation_clause(ablation) if ablation else ""
    return f"{len(found)} induction {'head' if len(found) == 1 else 'heads'}: {named}{more}{lost}."


def ablation_clause(ablation: Ablation) -> str:
    """What the model loses without all its induction heads; empty where that was not measured."""
    one = ablation.of(ablation.together, "mean", "loss_at_repeats")
    if not one:
        return ""
    gained = ablation.clean["loss_at_fresh"] - ablation.clean["loss_at_repeats"]
    low, high = one["interval"]
    control = one["control"]
    beside = f"random heads of the same layers: {spread(control)}, {drawn(control)}" if control else one["note"]
    return (
        f"; without {'them' if len(ablation.together) > 1 else 'it'} (mean ablation) the model loses "
        f"{one['effect']:.2f} of the {gained:.2f} nats that it gains from repeats "
        f"(95 %: {low:.2f} to {high:.2f}; {beside})"
    )


def spread(control: Mapping[str, Any]) -> str:
    """The median effect of random heads, and the lowest and the highest."""
    median, low, high = (_change(control[key]) for key in ("median", "lowest", "highest"))
    return f"{median} [{low}, {high}]"


def drawn(control: Mapping[str, Any]) -> str:
    """How many sets of random heads were taken."""
    count = control["draws"]
    if not control["exhaustive"]:
        return f"{count} draws"
    return f"all {count} sets there are" if count > 1 else "the only set there is"


def other_heads(heads: Sequence[HeadRow]) -> str:
    """A sentence on the heads that the table leaves out."""
    counts = Counter(head.verdict for head in heads)
    further = sum(counts[verdict] for verdict in ON_TARGETS) - MOST_PRINTED
    # What the table left out for length is said, or a reader takes the table for all.
    parts = [f"{further} further such heads (heads.csv)"] if further > 0 else []
    for verdict in ("undecided", "previous-token", "duplicate-token", "first-token"):
        if named := [head.name for head in heads if head.verdict == verdict]:
            parts.append(f"{verdict} {', '.join(named[:6])}{' …' if len(named) > 6 else ''}")
    none = counts["none"]
    parts.append(f"{none} {'head fits' if none == 1 else 'heads fit'} none of these types")
    return f"Other heads: {'; '.join(parts)}."


# --- queries and keys of a layer ---


def check_sentence(max_abs_error: float) -> str:
    """The self-check of the maps."""
    return f"Our scores reproduce the model's: largest error {max_abs_error:.1e}"


def part_lines(effects: Sequence[PathEffect], head: str) -> list[list[str]]:
    """One line per kind of intervention on the head: the change of prefix matching and of the loss at repeats, each
    with its interval, that of the latter on random heads, and the change of the loss at fresh tokens."""
    of = {(one["name"], one["metric"]): one for one in effects if one["heads"] == [head]}
    lines = []
    for kind in (kind for kind in PARTS_REPLACED if (kind, "prefix_matching") in of):
        own, repeats, fresh = (of[kind, metric] for metric in ("prefix_matching", "loss_at_repeats", "loss_at_fresh"))
        beside = spread(repeats["control"]) if repeats["control"] else "none left"
        changes = _with_interval(own), _with_interval(repeats), beside, _change(fresh["effect"])
        lines.append([PARTS_REPLACED[kind], *changes])
    return lines


def part_sentence(effects: Sequence[PathEffect], head: str) -> str:
    """What the lines are about, and the level of each metric before."""
    clean = {one["metric"]: one for one in effects if one["heads"] == [head] and "sender" not in one}
    pattern, repeats, fresh = (clean[metric] for metric in ("prefix_matching", "loss_at_repeats", "loss_at_fresh"))
    control = repeats["control"]
    beside = f"\n(median [lowest, highest] of {drawn(control)})" if control else ""
    return (
        f"Head {head}, one part replaced (before: prefix matching {pattern['clean']:.2f}, loss {repeats['clean']:.2f} "
        f"at repeats, {fresh['clean']:.2f} at fresh tokens):\nchange over {pattern['rows']} rows [95 % interval], and "
        f"that of the loss at repeats on random heads of the layer{beside}"
    )


def path_sentence(effects: Sequence[PathEffect]) -> str | None:
    """How much of what the most needed earlier head does to the receiver's prefix matching goes by which path; None
    where no path was measured or no earlier head matters."""
    paths = [one for one in effects if one.get("sender") and one["metric"] == "prefix_matching"]
    # Only heads whose ablation lowers the score: a share of an effect near 0 says nothing.
    whole = [one for one in paths if one["name"] == "whole sender" and one["effect"] < 0]
    if not whole:
        return None
    most = min(whole, key=lambda one: one["effect"])
    shares = {one["name"]: one["effect"] / most["effect"] for one in paths if one.get("sender") == most.get("sender")}
    said = [
        f"its path into the {part} carries {_share(shares, f'path to {part} through MLPs')} of that "
        f"({_share(shares, f'path to {part}')} where the MLPs in between stay as they are)"
        for part in ("key", "query")
    ]
    return (
        f"Without {most.get('sender')} the prefix matching of {most['heads'][0]} changes by {most['effect']:+.2f}; "
        f"{'; '.join(said)}; values cannot change where a head attends."
    )


def _share(shares: Mapping[str, float], which: str) -> str:
    return f"{round(100 * shares[which])} %" if which in shares else "an unknown share"


def _with_interval(one: PathEffect) -> str:
    low, high = one["interval"]
    return f"{_change(one['effect'])} [{_change(low)}, {_change(high)}]"


def _change(value: float | None) -> str:
    """Two digits and a sign, but none for what is 0.00; a dash where it was not measured."""
    if value is None or np.isnan(value):
        return "–"
    text = f"{value:+.2f}"  # -0.00 would look like an effect
    return text if float(text) else "0.00"
