"""Which earlier heads write what the heads of a layer read: composition (Elhage et al. 2021).

How much of what a head reads, as query (Q), key (K) or value (V), is the output of an earlier head:
||W_OV W|| / (||W_OV|| ||W||) in Frobenius norms. Random matrices score about 1/sqrt(d_model), and more where their
spectra are steep. So each score is compared with the same two matrices, their spectra kept and a random rotation put
between them, as a z-score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from common.attention.head import Head
from common.circuits.decomposition import sides_of
from common.heads.statistics import Floats
from common.loading.families import UNCHANGED, plain

if TYPE_CHECKING:
    from common.loading.model import Model

Pair = tuple[Head, Head]  # an earlier head that writes, and a head of the layer that reads
WAYS = ("Q", "K", "V")
ROTATIONS = 200  # random rotations that a composition score is compared with
SIGNIFICANCE = 0.05  # chance of one false pair among all that are compared


@dataclass(frozen=True)
class Composition:
    """How the heads of `layer` compose with earlier heads, by way (Q, K, V).

    `senders`: the earlier heads; `scores`, `baseline` and `z`: way -> [sender, head of `layer`], the score in [0, 1],
    its mean over random rotations, and how many of their standard deviations it lies above that. `limit`: the z above
    which a pair counts, corrected for the number of pairs and ways (Bonferroni).
    """

    layer: int
    senders: tuple[Head, ...] = field(repr=False)
    scores: dict[str, Floats] = field(repr=False)
    baseline: dict[str, Floats] = field(repr=False)
    z: dict[str, Floats] = field(repr=False)
    limit: float

    def strongest(self, way: str, senders: Sequence[Head], heads: Sequence[Head]) -> Pair:
        """The (sender, head) of the highest z among `senders` and `heads` of the layer."""
        return max(product(senders, heads), key=lambda pair: self.z[way][self._place(pair)])

    def from_previous_token(self, previous_token: Floats, heads: Sequence[Head]) -> Pair:
        """The earlier previous-token head and the one of `heads` that K-compose most. `previous_token`: what each
        [layer, head] pays there, at least half; if none before this layer does, the one that pays most counts."""
        # With most of its attention there, a head can hand on little but the token before.
        senders = [head for head in self.senders if previous_token[head.place] >= 0.5]
        return self.strongest("K", senders or [max(self.senders, key=lambda head: previous_token[head.place])], heads)

    def record(self, pair: Pair) -> dict[str, object]:
        """As results.json holds it: `pair` in K-composition, and the strongest pair of each way."""
        heads = [Head.at(self.layer, head) for head in range(self.z["Q"].shape[1])]
        best = {way: self._describe(way, self.strongest(way, self.senders, heads)) for way in WAYS}
        return {"z_limit": self.limit, "previous_token_to_induction": self._describe("K", pair), "strongest": best}

    def _describe(self, way: str, pair: Pair) -> dict[str, object]:
        numbers = {"score": self.scores, "baseline": self.baseline, "z": self.z}
        found = {key: float(values[way][self._place(pair)]) for key, values in numbers.items()}
        return {"writes": str(pair[0]), "reads": str(pair[1]), **found}

    def _place(self, pair: Pair) -> tuple[int, int]:
        return self.senders.index(pair[0]), pair[1].head


def compose(model: Model, layer: int, *, seed: int) -> Composition | None:
    """Composition of every head of `layer` with every head before it; None in the first layer.

    Norm weights are folded in on the reading side and frozen scales left out. `seed` draws the random rotations.
    Raises UserError for models that norm the queries of all heads at once.
    """
    if layer == 0:
        return None
    writing = np.concatenate([_onto(*reversed(_values_and_outputs(model, earlier))) for earlier in range(layer)])
    corners = _corners(model.d_model, writing.shape[-1], seed)
    scores, baseline, z = {}, {}, {}
    sides = [sides_of(model, Head.at(layer, head)) for head in range(model.n_heads)]
    queries, keys = (np.stack([pair[side].folded() for pair in sides]) for side in (0, 1))
    read = {"Q": (queries, keys), "K": (keys, queries), "V": _values_and_outputs(model, layer)}
    for way, matrices in read.items():
        reading = _onto(*matrices)
        scores[way] = _scores(writing, reading)
        # ||A R B||^2 = sum_ij a_i^2 Z_ij^2 b_j^2, with a and b the singular values and Z a block of the rotation R in
        # their bases, which is distributed as a corner of R whatever the bases are.
        random = np.sqrt(_spectra(writing) @ corners @ _spectra(reading).T)  # [rotation, sender, reader]
        baseline[way], spread = random.mean(0), random.std(0)
        # A head of zeros has no spread: no z, rather than 0/0.
        z[way] = np.divide(scores[way] - baseline[way], spread, out=np.zeros_like(spread), where=spread > 0)
    senders = tuple(Head.at(earlier, head) for earlier in range(layer) for head in range(model.n_heads))
    limit = NormalDist().inv_cdf(1 - SIGNIFICANCE / (len(WAYS) * scores["Q"].size))
    return Composition(layer, senders, scores, baseline, z, limit)


def _values_and_outputs(model: Model, layer: int) -> tuple[Floats, Floats]:
    """W_V and W_O^T of every head with the norms around them, [head, d_model, d_head]: W_OV is values · outputs^T."""
    parts = model.parts.layers[layer]
    values = np.repeat(plain(parts.weights.W_V), model.n_heads // len(parts.weights.W_V), axis=0)
    # The scale of the norm is one number per position: it cancels in a ratio of norms.
    through = (parts.norm or UNCHANGED).linear(np.eye(model.d_model))
    return through @ values, (parts.norm_behind or UNCHANGED).linear(plain(parts.weights.W_O)).swapaxes(1, 2)


def _onto(near: Floats, far: Floats) -> Floats:
    """The matrix near · far^T [head, d_model, d_model] of every head without the rotation on its far side, [head,
    d_model, d_head]: of the same norm and singular values, also in products on the near side. The full one would not
    fit in memory for all heads."""
    return near @ np.linalg.qr(far).R.swapaxes(-2, -1)


def _scores(writing: Floats, reading: Floats) -> Floats:
    """[head that writes, head that reads]; 0 for a head of zeros."""
    # One reader at a time: all pairs at once would be heads² · d_head² numbers.
    products = [np.linalg.norm(writing.swapaxes(1, 2) @ one, axis=(1, 2)) for one in reading]
    sizes = np.linalg.norm(writing, axis=(1, 2))[:, None] * np.linalg.norm(reading, axis=(1, 2))
    return np.divide(np.stack(products, -1), sizes, out=np.zeros_like(sizes), where=sizes > 0)


def _spectra(matrices: Floats) -> Floats:
    """Squared singular values of every head, [head, d_head], scaled to sum to 1."""
    values = np.linalg.svd(matrices, compute_uv=False) ** 2
    return values / np.maximum(values.sum(-1, keepdims=True), np.finfo(float).tiny)


def _corners(width: int, size: int, seed: int) -> Floats:
    """Squared entries of the corner of random rotations of `width` dimensions, [rotation, size, size]."""
    rng = np.random.default_rng([seed, width])
    # Q of a Gaussian matrix is a random rotation up to the signs of its columns, and squares have no sign.
    draws = (rng.standard_normal((width, size)) for _ in range(ROTATIONS))
    return np.stack([np.linalg.qr(draw).Q[:size] ** 2 for draw in draws])
