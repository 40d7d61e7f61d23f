"""What interventions on a head's parts and on the paths into it found, as rows and sentences for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common.qk_interventions import KINDS, THROUGH, WHOLE

COLUMNS = ("replaced", "prefix matching", "loss at repeats", "loss at fresh", "random heads, at repeats")
MEANINGS = {
    "uniform": "pattern, uniform",
    "pattern": "pattern, another row's",
    "query": "query",
    "key": "key",
    "values": "values",
    "forbid": "induction cells forbidden",
    "mean": "whole head, its mean",
}


def part_lines(effects: Sequence[dict[str, Any]], head: str) -> list[list[str]]:
    """One line per kind of intervention on the head: the change of each metric, with its interval, and the control."""
    of = {(one["name"], one["metric"]): one for one in effects if one["head"] == head}
    lines = []
    for kind in (kind for kind in KINDS if (kind, "prefix_matching") in of):
        measured = [of[kind, metric] for metric in ("prefix_matching", "loss_at_repeats", "loss_at_fresh")]
        control = measured[1]["control"]
        beside = f"{control['effect']:+.2f}" if control else "none left"
        lines.append([MEANINGS[kind], *(_with_interval(one) for one in measured), beside])
    return lines


def part_title(effects: Sequence[dict[str, Any]], head: str) -> str:
    """What the lines are about, and the level of each metric before."""
    clean = {one["metric"]: one for one in effects if one["head"] == head}
    pattern, repeats, fresh = (clean[f"{metric}"] for metric in ("prefix_matching", "loss_at_repeats", "loss_at_fresh"))
    return (
        f"Head {head}, one part replaced: change over {pattern['rows']} rows (before: prefix matching "
        f"{pattern['clean']:.2f}, loss at repeats {repeats['clean']:.2f}, at fresh tokens {fresh['clean']:.2f})"
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
        f"(directly, past the MLPs, {_share(shares, f'path to {part}')})"
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
        f"Without {found['source']} in its key, the score of {decomposed['head']} on these cells changes by "
        f"{found['measured']:+.4f}; its decomposition predicts {found['predicted']:+.4f} "
        f"(off by {found['relative_error']:.0e} of it)."
    )


def _share(shares: dict[str, float], which: str) -> str:
    return f"{shares[which]:.0%}" if which in shares else "an amount not measured"


def _with_interval(one: dict[str, Any]) -> str:
    low, high = one["interval"]
    return f"{one['effect']:+.2f} ({low:+.2f} to {high:+.2f})"
