"""Results as rows: for results.json, for heads.csv, for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common.attention.head import Head
from common.heads.detection import Detection, by_score
from common.heads.statistics import Floats, interval_over_rows
from common.heads.survey import Survey
from common.heads.texts import FEW, TextScores
from common.heads.tokens import BUDGET, HEAD_TYPES
from common.interventions.ablation import Ablation

ON_TARGETS = ("induction", "suppression", "attends-only")
MOST_PRINTED = 20  # heads in the table at the terminal; all are in the files


def head_rows(measured: Survey, copying: Floats) -> list[dict[str, Any]]:
    """One row per head: where it is, what it is, and the numbers that say so."""
    found, evidence = measured.found, measured.evidence
    columns = {
        "verdict": found.verdict,
        "confidence": found.confidence,
        "prefix_matching": found.score,
        "prefix_matching_interval": _pairs(found.low, found.high),
        "control": found.control,
        "threshold": found.threshold,
        "induction": found.induction,
        **{kind: evidence.repeats.mean(kind) for kind in HEAD_TYPES if kind != "prefix_matching"},
        "copying": copying,
        **{f"budget_{part}": paid for part, paid in evidence.repeats.budget().items()},
    }
    for kind, effect in (("total_effect", evidence.total), ("direct_effect", evidence.direct)):
        columns |= {kind: effect.mean(0), f"{kind}_interval": _pairs(*interval_over_rows(effect))}
    return _per_head(columns)


def add_ablation(heads: Sequence[dict[str, Any]], ablation: Ablation | None) -> None:
    """Give each head its `ablation_effect`: the rise of the loss at repeats under mean ablation, with its interval;
    None where it was not measured."""
    for head in heads:
        one = ablation and ablation.of(str(Head.at(head["layer"], head["head"])), "mean", "loss_at_repeats")
        head["ablation_effect"] = one["effect"] if one else None
        head["ablation_effect_interval"] = one["interval"] if one else (None, None)


def text_entry(found: Detection, text: str, tokens: Sequence[str], on_text: TextScores) -> dict[str, Any]:
    """What results.json holds of one text. `ranked`: the induction heads, highest score on this text first."""
    columns: dict[str, Any] = {kind: on_text.scores.mean(kind) for kind in HEAD_TYPES}
    attention = on_text.attention
    if attention:
        columns |= {"control": attention.control, "threshold": attention.threshold, "attends": attention.attends}
        columns["confidence"] = attention.confidence
        if on_text.queries >= FEW:
            columns["prefix_matching_interval"] = _pairs(attention.low, attention.high)
    return {
        "text": text,
        "tokens": list(tokens),
        "queries": on_text.queries,
        "induction_at_work": [str(Head.at(*head)) for head in at_work(found, on_text)],
        "ranked": [str(Head.at(*head)) for head in ranked_on(found, on_text)],
        "heads": _per_head(columns),
    }


def ranked_on(found: Detection, on_text: TextScores) -> list[tuple[int, int]]:
    """The induction heads, highest prefix matching on this text first; as on the battery where no token repeats."""
    if on_text.attention is None:
        return [head.place for head in found.ranked()]
    return [head for head in by_score(on_text.attention.score) if found.induction[head]]


def at_work(found: Detection, on_text: TextScores) -> list[tuple[int, int]]:
    """The induction heads whose score on this text reaches their threshold there, highest first."""
    attention = on_text.attention
    return [head for head in ranked_on(found, on_text) if attention and attention.attends[head]]


def head_lines(heads: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Lines for the terminal: the heads that attend to their targets, highest score first."""
    shown = sorted((head for head in heads if head["verdict"] in ON_TARGETS), key=lambda head: -head["prefix_matching"])
    return [
        [
            str(Head.at(head["layer"], head["head"])),
            f"{head['verdict']} {head['confidence']:.2f}",
            f"{head['prefix_matching']:.2f}",
            f"{head['threshold']:.2f}",
            _signed(head["total_effect"]),
            _signed(head["direct_effect"]),
            _signed(head["copying"]),
            " ".join(f"{100 * head[f'budget_{part}']:3.0f}" for part in BUDGET),
        ]
        for head in shown[:MOST_PRINTED]
    ]


def _signed(value: float) -> str:
    """A number with its sign; a dash where it was not measured."""
    return "–" if np.isnan(value) else f"{value:+.2f}"


HEAD_COLUMNS = (
    "head",
    "verdict, confidence",
    "prefix\nmatching",
    "thres-\nhold",
    "total\neffect",
    "direct\neffect",
    "copy-\ning",
    "attention paid to, %\ntgt prv slf dup BOS oth",
)


def verdict_sentence(heads: Sequence[Mapping[str, Any]], ablation: Ablation | None) -> str:
    """How many induction heads there are, which, and what the model loses without them where that was measured."""
    found = sorted((head for head in heads if head["induction"]), key=lambda head: -head["prefix_matching"])
    if not found:
        return "No head of this model is an induction head by this test."
    named = ", ".join(
        f"{Head.at(head['layer'], head['head'])} ({head['prefix_matching']:.2f})" for head in found[:MOST_PRINTED]
    )
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
    beside = f"random heads of the same layers: {control['effect']:+.2f}" if control else one["note"]
    return (
        f"; without {'them' if ' ' in ablation.together else 'it'} (mean ablation) the model loses "
        f"{one['effect']:.2f} of the {gained:.2f} nats that it gains from repeats "
        f"(95 %: {low:.2f} to {high:.2f}; {beside})"
    )


def other_heads(heads: Sequence[Mapping[str, Any]]) -> str:
    """A sentence on the heads that the table leaves out."""
    on_targets = [head for head in heads if head["verdict"] in ON_TARGETS]
    counts = Counter(str(head["verdict"]) for head in heads if head["verdict"] not in ON_TARGETS)
    parts = (
        [f"{len(on_targets) - MOST_PRINTED} further such heads (heads.csv)"] if len(on_targets) > MOST_PRINTED else []
    )
    for verdict in ("previous-token", "duplicate-token", "first-token"):
        named = [str(Head.at(head["layer"], head["head"])) for head in heads if head["verdict"] == verdict]
        if named:
            parts.append(f"{verdict} {', '.join(named[:6])}{' …' if len(named) > 6 else ''}")
    parts.append(f"{counts['none']} of no kind named here")
    return f"Other heads: {'; '.join(parts)}."


def text_line(number: int, entry: Mapping[str, Any]) -> str:
    """A sentence on whether induction is at work in a text, and how much that rests on."""
    queries, start = entry["queries"], f"Text {number}: "
    if not queries:
        return start + "no token comes again, so there is nothing for induction to do."
    rests_on = f"{queries} {'query' if queries == 1 else 'queries'} with a target"
    rests_on += ", which is few" if queries < FEW else ""
    if not entry["induction_at_work"]:
        return start + f"no induction head is at work ({rests_on})."
    scores = {str(Head.at(head["layer"], head["head"])): head["prefix_matching"] for head in entry["heads"]}
    named = ", ".join(f"{head} ({scores[head]:.2f})" for head in entry["induction_at_work"][:6])
    return start + f"induction is at work: {named}; {rests_on}."


def unsure(measured: Survey) -> str | None:
    """A sentence on the verdicts that more rows could change, if there are any."""
    if measured.settled:
        return None
    found = measured.found
    places = [(int(layer), int(head)) for layer, head in np.argwhere(found.confidence < measured.sure)]
    places.sort(key=lambda head: found.confidence[head])
    named = ", ".join(f"{Head.at(*head)} {found.verdict[head]} ({found.confidence[head]:.3f})" for head in places[:6])
    return f"Not certain after {measured.rows} rows: {named}{' …' if len(places) > 6 else ''}"


def _per_head(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    layers, heads = next(iter(columns.values())).shape[:2]
    return [
        {"layer": layer, "head": head, **{key: values[layer, head] for key, values in columns.items()}}
        for layer in range(layers)
        for head in range(heads)
    ]


def _pairs(low: Floats, high: Floats) -> Floats:
    """[..., 2]"""
    return np.stack([low, high], axis=-1)
