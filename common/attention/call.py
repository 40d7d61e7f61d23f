"""One call of a layer's attention: what is read of it, and how edits of single heads are made in it.

A head is computed in the order of `POINTS`. An edit changes one of these for one head, and
what comes after is computed from the change. Heads without an edit come out of the fused kernel, which keeps no
pattern (FlashAttention: Dao et al. 2022, arXiv 2205.14135).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from numpy.typing import NDArray
from torch import Tensor, nn

from common import UserError
from common.attention.head import Head

BLOCK = 1 << 19  # numbers of a pattern that stand in memory at once, unless one query has more: fits a CPU's cache
BLOCK_GPU = 1 << 25  # the same on a GPU, which small blocks would leave idle

POINTS = ("q", "k", "scores", "pattern", "v", "z")  # in the order in which a head computes them; z is its output


Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Edit:
    """One change of one head: what `change(old, rows)` returns takes the place of `old` at `point`, one of `POINTS`.

    `old`: [rows, pos, d_head] for q, k, v and z; [rows, query, key] for scores (-inf where a query may not see) and
    pattern. `rows`: which rows of those that the edit was made for this run holds.
    """

    head: Head
    point: str
    change: Callable[[Tensor, slice], Tensor]


class Call:
    """What one layer's attention was called with, and what comes of it under the edits of the run.

    `q`: [batch, head, query, d_head]; `k`, `v`: [batch, key head, key, d_head], each shared by as many query heads;
    `mask`: true where a query may see a key, or a number added to the scores, to be broadcast over
    [batch, head, query, key]; None where it sees all keys, or where `causal`, all up to itself. `scale` multiplies q·k,
    `softcap` c then makes c·tanh(x / c) of it, `bias` is added; `sinks` [head] takes part in the softmax as a key that
    has no value.
    """

    def __init__(
        self,
        module: nn.Module,
        q: Float[Tensor, "batch head query d_head"],
        k: Float[Tensor, "batch key_head key d_head"],
        v: Float[Tensor, "batch key_head key d_head"],
        mask: Shaped[Tensor, "#batch #head #query #key"] | None,
        *,
        scale: float | None = None,
        causal: bool | None = None,
        softcap: float | None = None,
        bias: Float[Tensor, "#batch #head #query #key"] | None = None,
        sinks: Float[Tensor, " head"] | None = None,
    ):
        self.module = module
        self.q, self.k, self.v, self.mask = q, k, v, mask
        self.scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
        # The rule of transformers' own fused function: without a mask, the module says whether it is causal.
        is_causal = bool(getattr(module, "is_causal", True)) if causal is None else causal
        self.causal = is_causal and mask is None and q.shape[2] > 1
        self.softcap, self.bias, self.sinks = softcap, bias, sinks
        self.rows = slice(None)
        self._edits: Mapping[int, Mapping[str, list[Edit]]] = {}

    @property
    def n_heads(self) -> int:
        return self.q.shape[1]

    def under(self, edits: Sequence[Edit], rows: slice) -> None:
        """Let the edits, whose heads are of this layer, hold in the order in which they are given.

        Raises UserError for a head or a point that does not exist.
        """
        sorted_out: dict[int, dict[str, list[Edit]]] = defaultdict(lambda: defaultdict(list))
        for edit in edits:
            if edit.point not in POINTS:  # it would change nothing, and nobody would know
                raise UserError(f"there is no point {edit.point!r} in a head: an edit is made at {', '.join(POINTS)}")
            if not 0 <= edit.head.head < self.n_heads:
                raise UserError(f"there is no head {edit.head}: the heads of its layer are 0 to {self.n_heads - 1}")
            sorted_out[edit.head.head][edit.point].append(edit)
        self._edits, self.rows = sorted_out, rows

    # --- one head, step by step ---

    def query_of(self, head: int) -> Float[Tensor, "batch query d_head"]:
        """The query of one head."""
        return self._changed(head, "q", self.q[:, head])

    def key_of(self, head: int) -> Float[Tensor, "batch key d_head"]:
        """The key of one query head, though several may share it."""
        return self._changed(head, "k", self.k[:, self._shared(head)])

    def value_of(self, head: int) -> Float[Tensor, "batch key d_head"]:
        """The values of one query head, though several may share them."""
        return self._changed(head, "v", self.v[:, self._shared(head)])

    def scores_of(self, head: int) -> Float[Tensor, "batch query key"]:
        """As softmax gets them, in float32; -inf where a query may not see."""
        made = self._scores(self.query_of(head)[:, None], self.key_of(head)[:, None], slice(head, head + 1))
        return self._changed(head, "scores", made[:, 0])

    def pattern_of(self, head: int) -> Float[Tensor, "batch query key"]:
        """In float32; rows sum to 1, or to 0 where nothing is left to see."""
        sink = None if self.sinks is None else self.sinks[head].reshape(1, 1, 1)
        return self._changed(head, "pattern", _softmax(self.scores_of(head), sink))

    def output_of(self, head: int) -> Float[Tensor, "batch query d_head"]:
        """What the head hands to the output projection."""
        if self._edits.get(head, {}).keys() <= {"z"}:  # nothing before the output is edited: it is the fused one
            return self._changed(head, "z", self._fused[:, :, head])
        value = self.value_of(head)
        return self._changed(head, "z", self.pattern_of(head).to(value.dtype) @ value)

    def _changed(self, head: int, point: str, value: Tensor) -> Tensor:
        for edit in self._edits.get(head, {}).get(point, ()):
            value = edit.change(value, self.rows).to(value)
        return value

    def _shared(self, head: int) -> int:
        return head * self.k.shape[1] // self.n_heads

    # --- all heads ---

    def keys(self) -> Float[Tensor, "batch {self.n_heads} key d_head"]:
        """`key_of` every query head."""
        return torch.stack([self.key_of(head) for head in range(self.n_heads)], 1)

    def queries(self) -> Float[Tensor, "batch {self.n_heads} query d_head"]:
        """`query_of` every head."""
        return torch.stack([self.query_of(head) for head in range(self.n_heads)], 1)

    def values(self) -> Float[Tensor, "batch {self.n_heads} key d_head"]:
        """`value_of` every query head."""
        return torch.stack([self.value_of(head) for head in range(self.n_heads)], 1)

    def pattern(self) -> Float[Tensor, "batch {self.n_heads} query key"]:
        """The patterns of all heads, in float32."""
        return torch.cat([nn.functional.pad(block, (0, self._behind(block))) for _, block in self.blocks()], 2)

    def _behind(self, block: Tensor) -> int:
        return self.k.shape[2] - block.shape[-1]

    def blocks(self) -> Iterator[tuple[int, Float[Tensor, "batch head queries keys"]]]:
        """Yield the pattern some queries at a time, in float32, with the first of these queries.

        Keys reach from 0 to the last key that a query of the block may see.
        """
        edited = {head: self.pattern_of(head) for head, steps in self._edits.items() if steps.keys() - {"v", "z"}}
        for start, scores in self._score_blocks():
            block = self._softmax(scores)
            for head, pattern in edited.items():
                block[:, head] = pattern[:, start : start + block.shape[2], : block.shape[-1]]
            yield start, block

    def _score_blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the first query and the scores [batch, head, queries, keys] of some queries at a time; no edits."""
        batch, heads, length, _ = self.q.shape
        most = BLOCK if self.q.device.type == "cpu" else BLOCK_GPU
        at_once = max(1, most // (batch * heads * self.k.shape[2]))
        for start in range(0, length, at_once):
            yield start, self._scores(self.q[:, :, start : start + at_once], self.k, slice(None), start)

    def _softmax(self, scores: Tensor) -> Tensor:
        """The pattern of all heads from their scores [batch, head, queries, keys]."""
        return _softmax(scores, None if self.sinks is None else self.sinks.reshape(1, -1, 1, 1))

    def due_to(
        self, row: Int[Tensor, " n"], query: Int[Tensor, " n"], key: Int[Tensor, " n"]
    ) -> Float[Tensor, "batch length {self.n_heads} d_head"]:
        """The output of all heads less their output without the cells (`row`, `query`, `key`), where attention to
        those is knocked out and the rest renormalised. Edits are not regarded.

        The pattern without the cells is the softmax of the other scores, not the pattern less the cells over what is
        left: that is 0/0 in float32 where nearly all attention is on the cells.
        """
        values = self.v.float().repeat_interleave(self.n_heads // self.v.shape[1], dim=1)
        made = []
        for start, scores in self._score_blocks():
            inside = (query >= start) & (query < start + scores.shape[2])
            kept = scores.clone()
            kept[row[inside], :, query[inside] - start, key[inside]] = -torch.inf
            moved = self._softmax(scores) - self._softmax(kept)
            made.append(moved @ values[:, :, : scores.shape[-1]])
        return torch.cat(made, 2).transpose(1, 2)

    def _scores(self, q: Tensor, k: Tensor, heads: slice, start: int = 0) -> Tensor:
        """[batch, head, queries, keys] in float32, masked, for queries from `start` on."""
        batch, _, length, width = q.shape
        visible = start + length if self.causal else k.shape[2]
        # Query heads that share a key head are laid side by side: one product for all of them, no copy of the key.
        grouped = (q.float() * self.scale).reshape(batch, k.shape[1], -1, width)
        scores = (grouped @ k[:, :, :visible].float().transpose(-1, -2)).view(batch, -1, length, visible)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        for added in (self.bias, self.mask):
            if added is not None:
                scores = _masked(scores, added, heads, start, length, visible)
        if self.causal:
            places = torch.arange(visible, device=q.device)
            scores.masked_fill_(places > places[start : start + length, None], -torch.inf)
        return scores

    @cached_property
    def output(self) -> Float[Tensor, "batch query {self.n_heads} d_head"]:
        """The outputs of all heads, edited ones step by step, the others fused."""
        if not self._edits:
            return self._fused
        made = self._fused.clone()
        for head in self._edits:
            made[:, :, head] = self.output_of(head)
        return made

    @property
    def unfused(self) -> str | None:
        """What the layer does that the fused kernel does not know, so that it runs block by block; None if nothing."""
        if self.softcap is not None:
            return "caps its scores"
        return None if self.sinks is None else "has an attention sink"

    @cached_property
    def _fused(self) -> Tensor:
        """[batch, query, head, d_head] without edits."""
        if self.unfused:
            return self._in_blocks()
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        q, k, v = self.q, self.k, self.v
        if v.device.type == "cpu":  # the fused kernel there is coarse in 16 bits: three times the error in the scores
            q, k, v = q.float(), k.float(), v.float()
        bias = None if self.bias is None else self.bias.to(q.dtype)
        mask = self.mask if self.mask is None or self.mask.dtype == torch.bool else self.mask.to(q.dtype)
        shared = _Grouping(self.n_heads // k.shape[1])
        attended, _ = sdpa_attention_forward(
            cast(nn.Module, shared), q, k, v, mask, scaling=self.scale, is_causal=self.causal, position_bias=bias
        )
        return cast(Tensor, attended).to(self.v.dtype)

    def _in_blocks(self) -> Tensor:
        values = self.v.repeat_interleave(self.n_heads // self.v.shape[1], dim=1)
        blocks = (self._softmax(scores).to(values.dtype) for _, scores in self._score_blocks())
        return torch.cat([block @ values[:, :, : block.shape[-1]] for block in blocks], 2).transpose(1, 2)


def knocked_out(row: Indices, query: Indices, key: Indices) -> Callable[[Tensor, slice], Tensor]:
    """The change of an edit at "scores" that leaves no attention to the cells (`row`, `query`, `key`) [n]. A row of
    attention in which nothing is left stays empty."""

    def change(scores: Tensor, rows: slice) -> Tensor:
        start = rows.start or 0
        inside = (row >= start) & (row < start + len(scores))
        left = scores.clone()
        # Before softmax: renormalising the pattern would be 0/0 in float32 where all attention is on the cells.
        left[row[inside] - start, query[inside], key[inside]] = -torch.inf
        return left

    return change


@dataclass(frozen=True)
class _Grouping:
    """The one thing that transformers' fused function asks of a module: how many query heads share a key head."""

    num_key_value_groups: int


def _masked(scores: Tensor, added: Tensor, heads: slice, start: int, length: int, visible: int) -> Tensor:
    """Scores with a mask or bias, to be broadcast over [batch, head, query, key], laid over them."""
    part = added[:, heads] if added.shape[1] > 1 else added
    part = part[:, :, start : start + length] if part.shape[2] > 1 else part
    part = part[..., :visible]
    if part.dtype == torch.bool:
        return scores.masked_fill(~part, -torch.inf)
    # A mask in numbers forbids by the lowest number of its type. Added in another type that is not quite -inf.
    lowest = torch.finfo(part.dtype).min
    return (scores + part.float()).masked_fill(part <= lowest / 2, -torch.inf)


def _softmax(scores: Tensor, sink: Tensor | None) -> Tensor:
    """Softmax over keys; 0 where a query sees nothing. A `sink` takes its share and gets no column."""
    if sink is not None:
        scores = torch.cat([scores, sink.float().expand(*scores.shape[:-1], 1)], -1)
        return scores.softmax(-1)[..., :-1]
    made = scores.softmax(-1)
    return made.nan_to_num(0.0) if made[..., 0].isnan().any() else made  # a row that sees nothing is NaN throughout
