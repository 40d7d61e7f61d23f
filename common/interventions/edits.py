"""The interventions by name: a part of some heads is changed, and nothing else. Each returns an `Intervention` to run.

| intervention | what changes | what stays |
|---|---|---|
| zero, mean | the head output | the pattern, all other heads |
| uniform, pattern_from, knockout | the pattern | the values |
| input_from "q", "k" | the query or the key, attention recomputed | the other two |
| input_from "v" | the values | the pattern |

Paths from one head to another stand in common/interventions/paths.py. Zero ablation also deletes the constant part of
a head's output; mean ablation keeps it (Zhang & Nanda 2023, arXiv 2309.16042). Of queries, keys and values, the first
two decide where a head looks and the last what it brings back.

What is put in place comes from `Recordings`: the model's own activations on rows of tokens. The edits themselves are
made at the door (common/attention/call.py), one query head at a time, also where several share a key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from common import UserError
from common.attention.call import Edit, knocked_out
from common.attention.head import Head
from common.heads.statistics import Ints
from common.heads.tokens import Cells, TokenBatch

if TYPE_CHECKING:
    from common.loading.model import Model, Point

INPUTS = {"q": "query", "k": "key", "v": "values"}
Change = Callable[[Tensor, slice], Tensor]
Addition = tuple[nn.Module, str, Tensor]  # a module, a side of it, and what to add [rows, ...] to what passes there


@dataclass(frozen=True, repr=False)
class Intervention:
    """A named set of edits on `heads`. `a + b` does both: where they meet, b sees what a has changed."""

    name: str
    heads: tuple[Head, ...]
    edits: tuple[Edit, ...]

    def __add__(self, other: Intervention) -> Intervention:
        heads = tuple(dict.fromkeys(self.heads + other.heads))
        return Intervention(f"{self.name} + {other.name}", heads, self.edits + other.edits)

    def __repr__(self) -> str:
        return f"Intervention({self.name} on {', '.join(map(str, self.heads))})"

    @property
    def first_layer(self) -> int:
        """The lowest layer it touches: what lies below is as in the clean run."""
        return min(edit.head.layer for edit in self.edits)

    def of(self, head: Head) -> Intervention:
        """The edits of one head alone."""
        return Intervention(self.name, (head,), tuple(edit for edit in self.edits if edit.head == head))


Intervene = Callable[[Sequence[Head]], Intervention]  # an intervention by the heads that it is made on


class Recordings:
    """A model's activations on [rows, pos] ids, recorded when asked for and kept; clean, or `under` an intervention."""

    def __init__(self, model: Model, tokens: Ints, *, batch_size: int = 8, under: Intervention | None = None):
        self.model, self.tokens, self.batch_size = model, tokens, batch_size
        self._edits = under.edits if under else ()
        self._kept: dict[Point, Tensor] = {}

    def get(self, layer: int, point: str) -> Tensor:
        """[rows, ...] of one point, as `Model.record` gives it."""
        self.fetch({(layer, point)})
        return self._kept[layer, point]

    def fetch(self, wanted: set[Point]) -> None:
        """Record all (layer, point) in one pass over the rows: cheaper than one by one."""
        if missing := wanted - self._kept.keys():
            self._kept |= self.run(missing, self._edits)

    def run(
        self, wanted: set[Point], edits: Sequence[Edit], stream: Tensor | None = None, added: Addition | None = None
    ) -> dict[Point, Tensor]:
        """As `Model.record`, for all rows, some at a time; nothing is kept. `stream`: [rows, pos, d_model], what enters
        the lowest layer that is wanted, None: what does in the model."""
        layer, parts = min(wanted)[0], []
        for first in range(0, len(self.tokens), self.batch_size):
            rows = slice(first, first + self.batch_size)
            start = None if stream is None else (layer, stream[rows])
            taps = [(added[0], added[1], partial(torch.add, added[2][rows]))] if added else ()
            parts.append(self.model.record(self.tokens[rows], wanted, edits, rows=rows, start=start, taps=taps))
        return {point: torch.cat([part[point] for part in parts]) for point in wanted}


def zero(heads: Sequence[Head]) -> Intervention:
    """The heads write nothing (but what the layer's output bias adds)."""
    return each_head("zero", heads, "z", lambda head: lambda old, rows: torch.zeros_like(old))


def mean(heads: Sequence[Head], reference: Recordings, classes: Ints) -> Intervention:
    """Each head output is its mean over the reference rows' positions of the same class. `classes`: [rows, pos] of the
    reference rows and of the rows to run, such as `position_classes` gives; negative where nothing is averaged."""
    reference.fetch({(head.layer, "z") for head in heads})
    places = torch.from_numpy(np.maximum(classes, 0))

    def change(head: Head) -> Change:
        output = reference.get(head.layer, "z")[:, :, head.head]
        used = torch.from_numpy(classes >= 0).to(output.device)
        place = places.to(output.device)[used]
        # Thousands of positions are added up: in float32 the order of rows would show in the sixth digit.
        sums = torch.zeros(int(place.max()) + 1, output.shape[-1], dtype=torch.float64, device=output.device)
        table = sums.index_add_(0, place, output[used].double()) / torch.bincount(place).clamp_min(1)[:, None]
        return lambda old, rows: table[places[rows].to(old.device)]

    return each_head("mean", heads, "z", change)


def position_classes(batch: TokenBatch) -> Ints:
    """[rows, pos]: 0 BOS, 1 a query without a target, 2 a query with one, -1 padding."""
    classes, cells = np.ones_like(batch.tokens), batch.cells["prefix_matching"]
    classes[cells.row, cells.query] = 2
    classes[:, 0] = 0  # what a head says of BOS is like nothing else it says
    classes[np.arange(batch.tokens.shape[1]) >= batch.lengths[:, None]] = -1
    return classes


def donor_rows(rows: int, seed: int) -> Ints:
    """For each of `rows` another row, every row once: a random cycle through all of them."""
    if rows < 2:
        raise UserError("resampling needs at least two rows: no row may get its own")
    cycle = np.random.default_rng(seed).permutation(rows)
    return np.roll(cycle, 1)[np.argsort(cycle)]  # the giver of each row is the one before it in the cycle


def uniform(heads: Sequence[Head]) -> Intervention:
    """Attention is the same to every position up to the query (a sliding window is not regarded)."""

    def change(pattern: Tensor, rows: slice) -> Tensor:
        seen = torch.ones_like(pattern[0]).tril()
        return (seen / seen.sum(-1, keepdim=True)).expand_as(pattern)

    return each_head("uniform pattern", heads, "pattern", lambda head: change)


def pattern_from(heads: Sequence[Head], source: Recordings) -> Intervention:
    """The pattern that the heads have in `source`: the control rows', or another run's, which freezes it."""
    return _recorded("pattern", heads, "pattern", 1, source)


def knockout(heads: Sequence[Head], cells: Cells) -> Intervention:
    """Attention knockout: no attention to the `cells`, the rest of the query's row renormalised. A row in which nothing
    is left stays empty."""
    change = knocked_out(cells.row, cells.query, cells.key)
    return each_head("knockout", heads, "scores", lambda head: change)


def input_from(heads: Sequence[Head], part: str, source: Recordings) -> Intervention:
    """The heads' query ("q"), key ("k") or values ("v") are those of `source`; the other two stay.

    Attention is recomputed for a new query or key, and kept for new values. Where query heads share a key, only the
    named heads see the new one. A row's own control has the same first segment, and with it the same keys and values at
    the targets: take those from another row (`donor_rows`).
    """
    return _recorded(f"{INPUTS[part]} alone", heads, part, 2, source)


def _recorded(name: str, heads: Sequence[Head], point: str, axis: int, source: Recordings) -> Intervention:
    """What the heads have at `point` in `source`; `axis`: the one of that point that counts heads."""
    source.fetch({(head.layer, point) for head in heads})

    def change(head: Head) -> Change:
        recorded = source.get(head.layer, point).select(axis, head.head)
        return lambda old, rows: recorded[rows]

    return each_head(name, heads, point, change)


def each_head(name: str, heads: Sequence[Head], point: str, change: Callable[[Head], Change]) -> Intervention:
    """The same kind of edit at `point` for every head; `change` gives the function that makes it."""
    return Intervention(name, tuple(heads), tuple(Edit(head, point, change(head)) for head in heads))
