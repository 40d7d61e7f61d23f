"""Which layer, and which of its heads, are looked at."""

from __future__ import annotations

from dataclasses import dataclass

from common.attention.head import Head
from common.heads.detection import Detection, by_score


@dataclass(frozen=True)
class Chosen:
    """The layer, its `heads` to show large, the `leading` one of them, those to draw side by side (`grid`), the layer's
    induction heads, and why these."""

    layer: int
    heads: list[int]
    leading: int
    grid: list[int]
    induction: list[int]
    reason: str


def choose(found: Detection, layer: int | str, head: int | str, *, drawn: int) -> Chosen:
    """The layer of the strongest induction head ("auto"), or the one asked for; where it has none, the head closest to
    one. Of the layer the strongest head ("auto"), "all", or the one asked for; at most `drawn` side by side."""
    order = [
        place
        for place in [*(head.place for head in found.ranked()), *by_score(found.score)]
        if layer in ("auto", place[0])
    ]
    at, strongest = order[0]
    kind = "the strongest induction head is" if found.induction[order[0]] else "no induction head; the closest is"
    asked = "" if head == "auto" else f"--head {head}; "
    leading = head if isinstance(head, int) else strongest
    heads = list(range(found.score.shape[1])) if head == "all" else [leading]
    grid = sorted([one for inside, one in by_score(found.score) if inside == at][:drawn])
    reason = f"{asked}{kind} {Head.at(at, strongest)}, prefix matching {found.score[at, strongest]:.2f}"
    return Chosen(at, heads, leading, grid, [head.head for head in found.ranked() if head.layer == at], reason)
