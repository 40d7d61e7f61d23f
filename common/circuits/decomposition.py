"""Which part of the model makes a score: a score as a sum over query source × key source.

With the scale of every norm frozen at the value that it has in this run, q and k of a head are sums over what each part
of the model wrote into the residual stream (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits").

1. Read what each part wrote (`written`). What MLP 0 makes of a token, or of a head of layer 0, counts as theirs.
2. Read each part as the head does (`split_heads`): through the frozen norm, the head's weights, and rotation.
3. Multiply query parts with key parts (`decompose`). Softmax ignores a constant added to a row, so the terms are given
   relative to the other tokens that the query could have looked at, too: their sum is the score advantage.

BOS competes in the softmax like any key, but does not count among these others. The advantage asks what makes the head
look at this token and not at another one; whether it looks at any token at all, or rests on BOS, is another question.
BOS is where the attention goes that goes nowhere, and its score would rule the mean over a few tokens. So BOS is left
out, that is said wherever the number is, and the advantage over BOS alone stands beside it. A cell whose query sees no
other token has no advantage: it is left out of the mean, and counted.

Every sum is compared with what it must add up to; one that does not is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from common import UserError
from common.attention.call import Edit
from common.attention.head import Head
from common.circuits.maps import Bools, Interaction, Rules, largest_allowed
from common.heads.statistics import Floats, Ints
from common.loading.families import UNCHANGED, Norm, plain

if TYPE_CHECKING:
    from common.loading.model import Model

SUM_ERRORS = 1e-4, 5e-2  # largest relative error of a sum: in float32; in 16 bits, which round after every layer
INDUCTION_CELLS = "induction cells"
FALLBACK_CELLS = 3  # cells decomposed on a row that has no induction cell
CONTEXTS = 32  # rows over which the mean output of MLP 0 is taken

CellPairs = Sequence[tuple[int, int]]  # (query, key) each
Seen = dict[tuple[int, str], Floats]  # what a run showed, by layer and point, each [batch, pos, ...]


# --- how a head reads the stream ---


@dataclass(frozen=True)
class Side:
    """How one head makes its query, or its key, of the residual stream: `weight` [d_model, d_head], `bias` [d_head],
    and the norms `before` and `after` them, or `UNCHANGED`."""

    before: Norm
    weight: Floats
    bias: Floats
    after: Norm

    def folded(self) -> Floats:
        """[d_model, d_head]: the weights with all that is linear in the norms around them."""
        return self.after.linear(self.before.linear(np.eye(len(self.weight))) @ self.weight)

    def read(self, stream: Floats) -> Floats:
        """Query or key [pos, d_head] of a residual stream [pos, d_model], before rotation."""
        return self.read_parts(stream, (self.before.linear(stream) @ self.weight)[None])[0]

    def read_part(self, part: Floats, typical: Floats) -> Floats:
        """What a part of the stream [pos, d_model] adds, norms at their mean scale on `typical`; no constant."""
        # A part has no scale of its own: alone it would be blown up to the size of a whole stream.
        made = self.before.linear(part) @ self.weight / self.before.scale(typical).mean()
        return self.after.linear(made) / self.after.scale(replace(self, after=UNCHANGED).read(typical)).mean()

    def read_parts(self, stream: Floats, parts: Floats) -> Floats:
        """Parts [source, pos, d_head] of the query or key, from `before.linear(written) @ weight` of each source; the
        last source also gets every constant."""
        parts = parts / self.before.scale(stream)
        # The constants come before the norm of the head, whose scale depends on them.
        parts[-1] += np.broadcast_to(self.before.offset, len(self.weight)) @ self.weight + self.bias
        parts = self.after.linear(parts) / self.after.scale(parts.sum(0))
        parts[-1] += self.after.offset
        return parts


def sides_of(model: Model, head: Head) -> tuple[Side, Side]:
    """How a head reads its queries, and its keys. UserError for models that norm the queries of all heads at once."""
    layer = model.parts.layers[head.layer]
    weights, norms = layer.weights, layer.norms_of_heads()
    if any(norm and norm.gain.shape not in ((1,), (weights.W_Q.shape[-1],)) for norm in norms):
        raise UserError(f"{model.name} norms the queries of all heads at once: one head's score is no sum of parts")

    def side(matrices: Tensor, biases: Tensor | None, place: int, after: Norm | None) -> Side:
        bias = np.zeros(matrices.shape[-1]) if biases is None else plain(biases[place])
        return Side(layer.norm or UNCHANGED, plain(matrices[place]), bias, after or UNCHANGED)

    # Where several query heads share a key head, those of one group stand side by side.
    shared = head.head * len(weights.W_K) // model.n_heads
    return side(weights.W_Q, weights.b_Q, head.head, norms[0]), side(weights.W_K, weights.b_K, shared, norms[1])


# --- which part of the model wrote what ---


def written(model: Model, tokens: Ints, layer: int) -> Iterator[tuple[str, Floats]]:
    """What each part of the model wrote into the residual stream that `layer` reads, on one row of ids [pos].

    Yields (source, [pos, d_model]), which sum to the stream exactly: `embed`, the token: its embedding (with the
    model's own scaling or norm of it) and, where `layer` comes after MLP 0, what MLP 0 makes of the token whatever its
    context (`mean_first_mlp`); `pos_embed`, where positions are added; per earlier layer its heads (`0.1`), those of
    layer 0 with what MLP 0 makes of them (`through_first_mlp`), and its MLP, `mlp0` being the rest of what MLP 0 wrote;
    and last `bias`, the output biases of all attention layers. Post-norms are frozen and shared out.
    Raises UserError where the heads of a layer do not add up to what its attention wrote.
    """
    seen = _see_stream(model, tokens[None], layer)
    token = mean_first_mlp(model, tokens) if layer else 0.0
    constant = np.zeros((len(tokens), model.d_model))
    positions = constant + seen.get((0, "pos_embed"), constant[None])[0]
    yield "embed", seen[0, "resid_pre"][0] - positions + token
    if (0, "pos_embed") in seen:
        yield "pos_embed", positions
    for earlier in range(layer):
        heads, bias = _head_outputs(model, seen, earlier)
        mlp = seen[earlier, "mlp"][0]
        if earlier == 0:
            made = through_first_mlp(model, tokens)
            heads, mlp = heads + made, mlp - token - made.sum(0)  # so that all sources still sum to the stream
        yield from ((str(Head.at(earlier, head)), output) for head, output in enumerate(heads))
        yield f"mlp{earlier}", mlp
        constant = constant + bias
    yield "bias", constant


def mean_first_mlp(model: Model, tokens: Ints) -> Floats:
    """What MLP 0 makes of each of the ids [pos] on average over contexts, [pos, d_model]: what depends on it alone.

    Later layers of many models read little of the embedding itself, because MLP 0 rewrites it. The contexts are
    `CONTEXTS` rows, the same for every run: BOS, then in random order the tokens and as many others, if they fit.
    """
    every, place = np.unique(tokens, return_inverse=True)
    own = every[every != model.bos]
    rows = np.full((CONTEXTS, min(2 * len(own) + 1, model.context)), model.bos)
    for number, row in enumerate(rows):
        rng = np.random.default_rng([CONTEXTS, number])
        # Other tokens too: among a text's own few, a token would meet the same neighbours in every context.
        others = rng.choice(model.ordinary(), size=len(row) - 1 - len(own))
        row[1:] = rng.permutation(np.concatenate([own, others]))
    made = _see_stream(model, rows, 1)[0, "mlp"]
    return np.stack([made[rows == token].mean(0) for token in every])[place]


def through_first_mlp(model: Model, tokens: Ints) -> Floats:
    """What MLP 0 makes of each head of layer 0, [head, pos, d_model]: its output less its output with that head silent.

    These parts need not add up to what MLP 0 wrote; the rest is the source `mlp0`. Zero where MLP 0 does not see these
    heads (parallel blocks).
    """
    # All rows are in one run: one per silent head, and the last is left as it is.
    rows = np.repeat(tokens[None], model.n_heads + 1, axis=0)

    def silence(head: int, output: Tensor, rows: slice) -> Tensor:
        return output.index_fill(0, torch.tensor(head, device=output.device), 0.0)

    edits = [Edit(Head.at(0, head), "z", partial(silence, head)) for head in range(model.n_heads)]
    made = _see_stream(model, rows, 1, edits)[0, "mlp"]
    return made[-1] - made[:-1]


def _see_stream(model: Model, tokens: Ints, layer: int, edits: Sequence[Edit] = ()) -> Seen:
    """What the layers up to `layer` read of the stream; of those before it `z`, and what attention and MLP added."""
    # Parallel blocks have no stream between attention and MLP: there the attention's own output is read.
    middle = ["resid_mid" if one.sequential else "attn_out" for one in model.parts.layers]
    wanted = {(index, point) for index in range(layer) for point in ("resid_pre", middle[index], "z")}
    added: list[Tensor] = []
    positions = model.parts.positions
    taps = [] if positions is None else [(positions, "output", added.append)]
    found = model.record(tokens, wanted | {(layer, "resid_pre")}, edits, taps=taps)
    seen = {point: plain(value) for point, value in found.items()}
    if added:
        seen[0, "pos_embed"] = plain(added[0])
    for index in range(layer):
        before, after = seen[index, "resid_pre"], seen[index, middle[index]]
        # Bloom's attention hands on the stream with its output in it, so the difference is taken where there is one.
        seen[index, "attention"] = after - before if middle[index] == "resid_mid" else after
        seen[index, "mlp"] = seen[index + 1, "resid_pre"] - before - seen[index, "attention"]
    return seen


def _head_outputs(model: Model, seen: Seen, layer: int) -> tuple[Floats, Floats]:
    """What each head of `layer` wrote, [head, pos, d_model], and its attention besides, [pos, d_model], in row 0."""
    weights, behind = model.parts.layers[layer].weights, model.parts.layers[layer].norm_behind or UNCHANGED
    heads = np.matmul(seen[layer, "z"][0].swapaxes(0, 1), plain(weights.W_O))
    bias = np.zeros(heads.shape[1:]) + (0.0 if weights.b_O is None else plain(weights.b_O))
    # The norm acts on the sum of the heads; with its scale frozen, what is left is linear in each of them.
    scale = behind.scale(heads.sum(0) + bias)
    heads, bias = behind.linear(heads) / scale, behind.linear(bias) / scale + behind.offset
    output = seen[layer, "attention"][0]
    if np.abs(heads.sum(0) + bias - output).max() > largest_allowed(SUM_ERRORS, model.dtype) * np.abs(output).max():
        raise UserError(f"the heads of layer {layer} of {model.name} do not add up to what its attention writes")
    return heads, bias


# --- a score as a sum ---


@dataclass(frozen=True)
class SplitHead:
    """q and k of one head on one row, by source, after norm and rotation: each [source, pos, d_head]."""

    sources: tuple[str, ...]
    q: Floats
    k: Floats


@dataclass(frozen=True)
class Decomposition:
    """The mean score of some cells of one head, by query source (rows) and key source (columns).

    `cells` are (query, key), `kind` says which: induction cells, or those with most attention. `raw`: [source, source],
    sums to `score`, the mean over the cells of scale · q·k (before soft-cap and position bias). `terms`: the same for
    `score_advantage`, the mean over the cells of the score minus the mean score of the other keys that the query sees,
    BOS and the query's other cells left out: what is the same for every key drops out. `alone`: how many of the cells
    have no such key; `score` and `raw` count them, the score advantage does not. `over_bos`: the mean over the cells of
    the score minus that of BOS at the same query, None where a window hides BOS from all of them. `error` is the
    largest error of both sums over the cells, relative to the head's largest score on the row.
    """

    sources: tuple[str, ...] = field(repr=False)
    cells: tuple[tuple[int, int], ...] = field(repr=False)
    kind: str
    raw: Floats = field(repr=False)
    terms: Floats = field(repr=False)
    score: float
    score_advantage: float
    over_bos: float | None
    alone: int
    error: float

    def title(self, head: str) -> str:
        """What is decomposed; where the text has no induction cell, that other cells are shown."""
        on = "" if self.kind == INDUCTION_CELLS else f" (no induction cell here: {self.kind})"
        return f"What the scores of head {head} are made of{on}"

    def advantage(self) -> str:
        """The score advantage for a reader, and over what it is one."""
        bos = "BOS is out of sight" if self.over_bos is None else f"over BOS: {self.over_bos:.2f}"
        said = f"score advantage {self.score_advantage:.2f} over the other tokens in sight, BOS left out ({bos})"
        if not self.alone:
            return said
        cells = "1 cell has" if self.alone == 1 else f"{self.alone} cells have"
        return f"{said}; {cells} no other token in sight and so no part in it"

    def top(self, count: int) -> list[tuple[str, str, float]]:
        """The `count` largest terms in size, largest first: (query source, key source, part of `score_advantage`)."""
        order = np.argsort(-np.abs(self.terms), axis=None, kind="stable")[:count]
        pairs = [divmod(int(place), len(self.sources)) for place in order]
        return [(self.sources[query], self.sources[key], float(self.terms[query, key])) for query, key in pairs]

    def record(self, count: int) -> dict[str, object]:
        """The numbers as results.json holds them, with the `count` largest terms."""
        return {
            "cells": self.cells, "cells_are": self.kind, "score": self.score, "score_advantage": self.score_advantage,
            "score_advantage_over_bos": self.over_bos, "cells_without_advantage": self.alone,
            "relative_error": self.error, "sources": self.sources,
            "terms": [{"query": query, "key": key, "value": value} for query, key, value in self.top(count)],
        }  # fmt: skip


def split_heads(model: Model, tokens: Ints, layer: int, heads: Sequence[int], rules: Rules) -> dict[int, SplitHead]:
    """q and k of each of the `heads` of `layer` on one row of ids [pos], by source."""
    sides = [side for head in heads for side in sides_of(model, Head.at(layer, head))]
    weights = np.stack([side.weight for side in sides])
    names, read, stream = list[str](), list[Floats](), np.zeros(())
    # A source is [pos, d_model] and there may be hundreds: each is read by all heads and let go.
    for source, output in written(model, tokens, layer):
        names.append(source)
        stream = stream + output
        read.append(sides[0].before.linear(output) @ weights)
    made = [side.read_parts(stream, parts) for side, parts in zip(sides, np.stack(read, 1), strict=True)]
    if rules.rotation is not None:
        made = [rules.rotation.turn(part) for part in made]
    return {head: SplitHead(tuple(names), q, k) for head, q, k in zip(heads, made[::2], made[1::2], strict=True)}


def decompose(
    model: Model, tokens: Ints, interaction: Interaction, heads: Sequence[int], cells: CellPairs
) -> dict[int, Decomposition]:
    """The mean score of `cells` (query, key) of each of `heads` on one row of ids [pos], by query source × key source.

    `heads` are numbers within the layer of `interaction`, whose row 0 is `tokens`. Without cells those
    `FALLBACK_CELLS` with most attention are taken, head by head. Raises UserError where the terms do not sum to the
    model's own score within `SUM_ERRORS`, relative: then q and k are no linear function of the residual stream; and
    where no cell of a head has another token in sight.
    """
    allowed = largest_allowed(SUM_ERRORS, model.dtype)
    found = {}
    for head, split in split_heads(model, tokens, interaction.layer, heads, interaction.rules).items():
        found[head] = one = _decomposition(split, interaction, head, cells)
        if not one.error <= allowed:  # NaN is refused, too
            raise UserError(
                f"the parts of head {Head.at(interaction.layer, head)} of {model.name} do not add up to its score (off "
                f"by {one.error:.2g} of its largest score, allowed {allowed:.2g}): no decomposition of it is shown"
            )
    return found


def _decomposition(split: SplitHead, interaction: Interaction, head: int, cells: CellPairs) -> Decomposition:
    rules, products = interaction.rules, interaction.products[0, head]
    visible = rules.visible[0]
    chosen = cells or largest_cells(interaction.pattern[0, head], FALLBACK_CELLS)
    query, key = np.array(chosen, dtype=np.int64).T
    others = _other_keys(visible, query, key)
    compared = others.any(-1)
    if not compared.any():
        raise UserError(
            f"no score advantage of head {Head.at(interaction.layer, head)}: no query of its cells sees another token "
            "besides BOS; a longer text has more"
        )
    q, k = rules.scale * split.q[:, query], split.k[:, key]
    against = k[:, compared] - np.einsum("cp,spd->scd", others[compared], split.k)
    score, advantage = products[query, key], score_advantages(products, visible, query, key)[compared]
    # What the parts sum to, cell by cell, less what they must sum to.
    off = [(q.sum(0) * k.sum(0)).sum(-1) - score, (q[:, compared].sum(0) * against.sum(0)).sum(-1) - advantage]
    resting = (score - products[query, 0])[visible[query, 0]]
    return Decomposition(
        sources=split.sources,
        cells=tuple((int(query), int(key)) for query, key in chosen),
        kind=INDUCTION_CELLS if cells else "cells with most attention",
        raw=np.tensordot(q, k, axes=([1, 2], [1, 2])) / len(chosen),  # mean over cells of q·k, source by source
        terms=np.tensordot(q[:, compared], against, axes=([1, 2], [1, 2])) / compared.sum(),
        score=float(score.mean()),
        score_advantage=float(advantage.mean()),
        over_bos=float(resting.mean()) if len(resting) else None,
        alone=int((~compared).sum()),
        error=float(np.abs(np.concatenate(off)).max() / max(np.abs(products[visible]).max(), np.finfo(float).tiny)),
    )


def score_advantages(products: Floats, visible: Bools, query: Ints, key: Ints) -> Floats:
    """[cells]: each cell's entry of `products` [query, key], less the mean over its query's `_other_keys`; NaN for a
    cell without such keys, which has no advantage."""
    others = _other_keys(visible, query, key)
    return np.where(others.any(-1), products[query, key] - (others * products[query]).sum(-1), np.nan)


def _other_keys(visible: Bools, query: Ints, key: Ints) -> Floats:
    """[cells, pos]: weights that average over the keys a query sees besides BOS and its own cells; 0 if none."""
    others = visible.copy()
    others[:, 0] = False  # why, the module's first lines say
    others[query, key] = False
    return others[query] / np.maximum(others[query].sum(-1, keepdims=True), 1.0)


def largest_cells(pattern: Floats, count: int) -> list[tuple[int, int]]:
    """The `count` (query, key) cells with most attention in a pattern [query, key], one per query, BOS and first query
    left out."""
    # One per query: two cells of one query would leave each other out of the keys they are compared with.
    candidates = np.where(np.tril(np.ones_like(pattern, dtype=bool)), pattern, -1.0)
    candidates[:, 0] = -1.0
    best = [(int(query), int(candidates[query].argmax())) for query in range(2, len(pattern))]  # 1 sees BOS and itself
    return sorted(best, key=lambda cell: -candidates[cell])[:count]
