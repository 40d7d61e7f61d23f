"""Take a part of a circuit away and put the model back exactly as it was.

1. An intervention is a set of edits. An edit names one head's activation (its output, pattern, query or key), says what
   to put there, and how much of it: in which rows and positions, in which subspace, with which coefficient.
2. `with applied(model, intervention):` hooks the edits in for the length of a block. Each hook works on a copy, writes
   its heads' columns alone, and is removed at the end whatever happens.
3. What is put there comes from `Recordings`: the same model's activations on rows of tokens (the clean rows, their
   control rows), read as they are needed and kept.

What can be put where (Zhang & Nanda 2023, arXiv 2309.16042, on which to prefer: resample or mean over zero):

| intervention | what changes | what stays |
|---|---|---|
| zero, mean, resample | the head's output before W_O | its pattern, all other heads |
| uniform, pattern_from, forbid | the pattern | the values |
| query_from, key_from | query or key, attention recomputed | the other two |
| values_from | the values | the pattern |

Interventions add up: `a + b` applies both. Heads are (layer, head).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from common.errors import UserError
from common.models import Model
from common.sequences import Cells

Head = tuple[int, int]
Hook = tuple[str, Callable[..., Any]]

POINTS = {  # what is edited or read, as the bridge names it inside a block
    "resid_pre": "hook_in",
    "z": "attn.hook_z",
    "pattern": "attn.hook_pattern",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "attn_out": "hook_attn_out",
    "o": "attn.o.hook_out",
    "scale": "ln1.hook_scale",
}


def hook_name(layer: int, point: str) -> str:
    """The bridge's name of a hook point, such as `blocks.3.attn.hook_z`."""
    return f"blocks.{layer}.{POINTS[point]}"


# --- what an edit is ---


@dataclass(frozen=True)
class Run:
    """The forward pass under way: which `rows` of those an intervention was made for it runs, and, by point, the
    layer's activations `seen` so far in it."""

    rows: slice
    seen: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Amount:
    """How much of an edit: `coefficient` from 0 (clean) to 1 (whole), `mask` [rows, pos] bool of the places it touches,
    `subspace` [d_head, k] with orthonormal columns in which alone it changes the activation. None: no limit."""

    coefficient: float = 1.0
    mask: torch.Tensor | None = None
    subspace: torch.Tensor | None = None

    def blend(self, old: torch.Tensor, new: torch.Tensor, rows: slice) -> torch.Tensor:
        """`old` moved towards `new`, both [rows, pos, width]; exactly `old` at 0 and, unprojected, `new` at 1."""
        if self.subspace is not None:
            basis = self.subspace.to(old)
            new = old + (new - old) @ basis @ basis.T
        if self.mask is None:
            return torch.lerp(old, new.to(old), self.coefficient)
        weight = self.coefficient * self.mask[rows].to(old)[..., None]
        return torch.lerp(old, new.to(old), weight.expand_as(old))


@dataclass(frozen=True)
class Edit:
    """One change: what `change(old, run)` gives replaces column `head` of `point` in `layer`.

    `old` is the head's activation, [rows, pos, d_head], or [rows, query, key] for a pattern. `reads` are points of the
    same layer that `change` finds in `run.seen`.
    """

    layer: int
    point: str
    head: int
    change: Callable[[torch.Tensor, Run], torch.Tensor]
    reads: tuple[str, ...] = ()
    amount: Amount = Amount()

    def write(self, activation: torch.Tensor, run: Run) -> None:
        """Edit `activation` in place: the head axis is 1 for a pattern, else 2."""
        old = activation.select(1 if self.point == "pattern" else 2, self.head)
        old.copy_(self.amount.blend(old, self.change(old, run), run.rows))


@dataclass(frozen=True)
class Intervention:
    """A named set of edits on `heads`, (layer, head)."""

    name: str
    heads: tuple[Head, ...]
    edits: tuple[Edit, ...]

    def __add__(self, other: Intervention) -> Intervention:
        """Both, this one's edits first where they meet at the same activation."""
        heads = self.heads + tuple(head for head in other.heads if head not in self.heads)
        return Intervention(f"{self.name} + {other.name}", heads, self.edits + other.edits)

    @property
    def first_layer(self) -> int:
        """The lowest layer it touches: what lies below is as in the clean run."""
        return min(edit.layer for edit in self.edits)

    def limited(
        self,
        *,
        coefficient: float = 1.0,
        rows: NDArray[np.bool_] | None = None,
        positions: NDArray[np.bool_] | None = None,
        subspace: torch.Tensor | None = None,
    ) -> Intervention:
        """The same, in part. `coefficient`: 0 (clean) to 1 (whole). `rows`: [rows]; `positions`: [rows, pos], or [pos]
        for every row: for a pattern or an output the query's position, for a key the key's. `subspace`: [d_head, k]
        with orthonormal columns, for queries, keys and outputs.

        Raises UserError for a coefficient outside 0 to 1, or a subspace of a pattern.
        """
        if not 0.0 <= coefficient <= 1.0:
            raise UserError(f"a coefficient of {coefficient} is not between 0 (clean) and 1 (the whole intervention)")
        if subspace is not None and any(edit.point == "pattern" for edit in self.edits):
            raise UserError(f"'{self.name}' edits a pattern, which has no subspace: use a query, key or output")
        amount = Amount(coefficient, _mask(rows, positions), subspace)
        return replace(self, edits=tuple(replace(edit, amount=amount) for edit in self.edits))


def _mask(rows: NDArray[np.bool_] | None, positions: NDArray[np.bool_] | None) -> torch.Tensor | None:
    """Both limits as one [rows, pos] mask (a size of 1 where one side sets no limit)."""
    if rows is None and positions is None:
        return None
    mask = np.ones((1, 1), dtype=bool) if positions is None else np.atleast_2d(positions)
    if rows is not None:
        mask = mask & rows[:, None]
    return torch.from_numpy(mask)


# --- applying it ---


@contextmanager
def applied(model: Model, intervention: Intervention | None, rows: slice = slice(None)) -> Iterator[None]:
    """Hold the intervention in place for the length of a `with` block; None leaves the model clean.

    Every forward pass in the block must run the `rows` (of those the intervention was made for) that are named here.
    """
    hooks = [] if intervention is None else hooks_of(intervention, rows)
    with model.bridge.hooks(fwd_hooks=hooks):
        yield


def hooks_of(intervention: Intervention, rows: slice = slice(None)) -> list[Hook]:
    """The intervention as (hook name, function) for `bridge.hooks`: readers first, then one writer per hook point."""
    by_point: dict[tuple[int, str], list[Edit]] = defaultdict(list)
    for edit in intervention.edits:
        by_point[edit.layer, edit.point].append(edit)
    runs = {layer: Run(rows) for layer, _ in by_point}
    wanted = {(edit.layer, point) for edit in intervention.edits for point in edit.reads}
    writers = [
        (hook_name(layer, point), _writer(edits, runs[layer])) for (layer, point), edits in sorted(by_point.items())
    ]
    # A reader comes after the writers of its own point: what is read is what the rest of the layer sees.
    return writers + [(hook_name(layer, point), _reader(point, runs[layer])) for layer, point in sorted(wanted)]


def _writer(edits: Sequence[Edit], run: Run) -> Callable[..., torch.Tensor]:
    def write(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        edited = activation.clone()
        for edit in edits:
            edit.write(edited, run)
        return edited

    return write


def _reader(point: str, run: Run) -> Callable[..., None]:
    def read(activation: torch.Tensor, hook: Any) -> None:
        run.seen[point] = activation

    return read


# --- the pattern alone ---


def forbid(heads: Sequence[Head], cells: Cells) -> Intervention:
    """Attention to the `cells` is taken away and the query's row renormalised; a row left empty stays empty."""
    return _pattern("forbid", heads, _without(cells))


def _without(cells: Cells) -> Callable[[torch.Tensor, Run], torch.Tensor]:
    row, query, key = (torch.from_numpy(index) for index in (cells.row, cells.query, cells.key))

    def change(pattern: torch.Tensor, run: Run) -> torch.Tensor:
        start = run.rows.start or 0
        inside = (row >= start) & (row < start + len(pattern))
        left = pattern.clone()
        left[row[inside] - start, query[inside], key[inside]] = 0.0
        total = left.sum(-1, keepdim=True)
        return torch.where(total > 0, left / total.clamp_min(torch.finfo(left.dtype).tiny), left)

    return change


def _pattern(name: str, heads: Sequence[Head], change: Callable[[torch.Tensor, Run], torch.Tensor]) -> Intervention:
    return Intervention(name, tuple(heads), tuple(Edit(layer, "pattern", head, change) for layer, head in heads))
