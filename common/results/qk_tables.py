"""What the second script found, as rows and sentences for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from common.interventions.qk_interventions import KINDS, THROUGH, WHOLE

TERM_COLUMNS = ("query source", "key source", "part of the lead")
COLUMNS = ("replaced", "prefix matching", "loss at repeats", "random heads", "at fresh")
MEANINGS = {
    "uniform": "pattern, uniform",
    "pattern": "pattern, another row's",
    "query": "query",
    "key": "key",
    "values": "values",
    "forbid": "induction cells forbidden",
    "mean": "whole head, its mean",
}


def lead_sentence(decomposed: dict[str, Any]) -> str:
    """Which cells were decomposed, and how far they lead."""
    which = f"{len(decomposed['cells'])} {decomposed['cells_are']} of text {decomposed['text']}"
    return (
        f"Head {decomposed['head']} on {which}: ahead of the other tokens in sight by {decomposed['lead']:.2f}, made of"
    )


def term_lines(decomposed: dict[str, Any]) -> list[list[str]]:
    """The largest terms of a decomposition."""
    return [[term["query"], term["key"], f"{term['value']:.2f}"] for term in decomposed["terms"]]


def head_rows(layer: int, measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The heads of a layer with what was `measured` of each, [layer, head] per key."""
    n_heads = next(iter(measured.values())).shape[1]
    return [
        {"layer": layer, "head": head, **{key: values[layer, head] for key, values in measured.items()}}
        for head in range(n_heads)
    ]


def sentences(results: Mapping[str, Any]) -> list[str]:
    """The self-check, and the composed pair where there is one."""
    said = [f"Our scores reproduce the model's: largest error {results['check']['max_abs_error']:.1e}"]
    return [*said, composition_sentence(results["composition"])] if results["composition"] else said


def composition_sentence(composition: dict[str, Any]) -> str:
    """The strongest pair of a previous-token head and an induction head that reads it, by their weights."""
    pair, limit = composition["previous_token_to_induction"], composition["z_limit"]
    chance = f"{pair['baseline']:.3f} by chance, z = {pair['z']:.1f} (above {limit:.1f} counts)"
    return f"K-composition {pair['writes']} → {pair['reads']}: {pair['score']:.3f}, {chance}"


def part_lines(effects: Sequence[dict[str, Any]], head: str) -> list[list[str]]:
    """One line per kind of intervention on the head: the change of prefix matching and of the loss at repeats, each
    with its interval, that of the latter on random heads, and the change of the loss at fresh tokens."""
    of = {(one["name"], one["metric"]): one for one in effects if one["head"] == head}
    lines = []
    for kind in (kind for kind in KINDS if (kind, "prefix_matching") in of):
        measured = [of[kind, metric] for metric in ("prefix_matching", "loss_at_repeats", "loss_at_fresh")]
        control = measured[1]["control"]
        beside = _signed(control["effect"]) if control else "none left"
        own, repeats, fresh = measured
        lines.append([MEANINGS[kind], _with_interval(own), _with_interval(repeats), beside, _signed(fresh["effect"])])
    return lines


def part_sentence(effects: Sequence[dict[str, Any]], head: str) -> str:
    """What the lines are about, and the level of each metric before."""
    clean = {one["metric"]: one for one in effects if one["head"] == head}
    pattern, repeats, fresh = (clean[metric] for metric in ("prefix_matching", "loss_at_repeats", "loss_at_fresh"))
    return (
        f"Head {head}, one part replaced (before: prefix matching {pattern['clean']:.2f}, loss {repeats['clean']:.2f} "
        f"at repeats, {fresh['clean']:.2f} at fresh tokens):\nchange over {pattern['rows']} rows [95 % interval], and "
        "that of the loss at repeats on random heads of the layer"
    )


def path_sentence(effects: Sequence[dict[str, Any]]) -> str | None:
    """How much of what the most needed earlier head does to the receiver's prefix matching goes by which path; None
    where no path was walked or no earlier head matters."""
    moved = {
        (one["sender"], one["name"]): one["effect"]
        for one in effects
        if one.get("sender") and one["metric"] == "prefix_matching"
    }
    whole = {sender: effect for (sender, which), effect in moved.items() if which == WHOLE and effect < 0}
    if not whole:
        return None
    sender = min(whole, key=lambda one: whole[one])
    head = next(one["head"] for one in effects if one.get("sender") == sender)
    shares = {which: effect / whole[sender] for (of, which), effect in moved.items() if of == sender}
    said = [
        f"its path into the {part} carries {_share(shares, f'path to {part}{THROUGH}')} of that "
        f"({_share(shares, f'path to {part}')} where the MLPs in between stay as they are)"
        for part in ("key", "query")
    ]
    return (
        f"Without {sender} the prefix matching of {head} changes by {whole[sender]:+.2f}; {'; '.join(said)}; "
        "values cannot change where a head attends."
    )


def removal_sentence(decomposed: dict[str, Any]) -> str | None:
    """What a decomposition predicts of its score without the strongest key source, beside what was measured."""
    found = decomposed.get("removal")
    if not found or "predicted" not in found:
        return None
    return (
        f"Without {found['source']} in its key, the lead changes by {found['measured']:+.4f}, where the decomposition "
        f"predicts {found['predicted']:+.4f} (off by {found['relative_error']:.0e} of it); the score by "
        f"{found['score_measured']:+.4f}, predicted {found['score_predicted']:+.4f}."
    )


def _share(shares: dict[str, float], which: str) -> str:
    return f"{round(100 * shares[which])} %" if which in shares else "an unknown share"


def _with_interval(one: dict[str, Any]) -> str:
    low, high = one["interval"]
    return f"{_signed(one['effect'])} [{_signed(low)}, {_signed(high)}]"


def _signed(value: float) -> str:
    """Two digits and a sign, but for what is 0.00."""
    text = f"{value:+.2f}"
    return text if float(text) else "0.00"
