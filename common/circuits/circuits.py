"""What the weights of a layer say by themselves, and which earlier heads write what its heads read.

1. Token × token: the score that one token as a query gives another as a key, for the tokens of a text, with the
   embedding that the layer really reads (`qk.written`: the embedding and the mean of what MLP 0 makes of it). On
   rotary models it depends on the distance between the two, so it is given for chosen distances.
2. Position × position: the part of the scores that positions alone make, where positions are added to the embedding.
3. Singular directions of W_Q W_K^T: the pairs of directions of the residual stream that the head matches up, each
   with the tokens of the text that lie along them.
4. Composition (Elhage et al. 2021): how much of what a head reads, as query (Q), key (K) or value (V), is what an
   earlier head writes: ||W_OV W|| / (||W_OV|| ||W||) in Frobenius norms. Random matrices score about 1/sqrt(d_model),
   more where their spectra are steep, so each score is compared with the same two matrices, their spectra kept and a
   random rotation put between them, as a z-score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from transformer_lens import FactoredMatrix
from transformer_lens.utilities import composition_scores

from common.attention.head import Head
from common.circuits.qk import (
    UNCHANGED,
    Norm,
    Parts,
    Reader,
    Rules,
    attention_of,
    interact,
    norm_before,
    parts,
    plain,
    readers,
    rotate,
    written,
)
from common.heads.statistics import Floats, Ints
from common.loading.models import Model

Pair = tuple[tuple[int, int], int]  # an earlier head (layer, head) that writes, a head of the layer that reads
WAYS = ("Q", "K", "V")
MOST_TOKENS = 24  # different tokens of a text that circuits are shown for: what stays legible
DIRECTIONS = 3  # singular directions shown of a head
ROTATIONS = 200  # random rotations that a composition score is compared with
SIGNIFICANCE = 0.05  # chance of one false pair among all that are compared


# --- weights of one head, tokens of one text ---


@dataclass(frozen=True)
class Direction:
    """One singular direction of W_Q W_K^T: a direction of queries matched with one of keys.

    `share`: of the squared Frobenius norm, in [0, 1]; `query`, `key`: [token], how far each token lies along it, in
    units in which the product query · key is this direction's part of the score.
    """

    share: float
    query: Floats
    key: Floats

    def record(self, tokens: Sequence[str], count: int) -> dict[str, Any]:
        """The share, and the `count` tokens farthest along the direction as queries and as keys, with how far."""
        sides = {"query": self.query, "key": self.key}
        order = {side: np.argsort(-np.abs(along), kind="stable")[:count] for side, along in sides.items()}
        listed = {side: [(tokens[at], float(sides[side][at])) for at in places] for side, places in order.items()}
        return {"share": self.share, **listed}


def read_embeddings(model: Model, tokens: Ints, layer: int) -> Floats:
    """The embedding that `layer` reads of each of the ids [pos], [pos, d_model]."""
    return next(written(model, tokens, layer))[1]


def token_circuit(sides: tuple[Reader, Reader], embedded: Floats, rules: Rules, distance: int) -> Floats:
    """[query token, key token]: the scores of one head on embeddings [token, d_model], `distance` positions apart.

    `distance` matters on rotary models only; it must be less than the positions that `rules.rotation` holds.
    """
    return _meet(sides[0].read(embedded), sides[1].read(embedded), rules, distance)


def _meet(q: Floats, k: Floats, rules: Rules, distance: int) -> Floats:
    """[query, key]: scaled products of q and k [token, d_head], the queries turned `distance` positions on."""
    if rules.rotation is not None:
        cos, sin = rules.rotation
        q = rotate(q, cos[distance : distance + 1], sin[distance : distance + 1])
        k = rotate(k, cos[:1], sin[:1])
    return rules.scale * q @ k.T


def composed_circuit(
    model: Model, head: tuple[int, int], sender: tuple[int, int], tokens: Ints, rules: Rules, distance: int
) -> Floats:
    """[query token, key token]: the part of the scores of `head` that comes of what `sender` writes of the key token.

    The key position holds what the earlier head `sender` writes when it attends to nothing but the token; norms keep
    the mean scale that they have on the embeddings. An induction head fed by a previous-token head shows a diagonal:
    a token looks for the place behind its own copy.
    """
    sides, embedded = readers(model, *head), read_embeddings(model, tokens, head[0])
    attention, norm = attention_of(model, sender[0]), norm_before(model, sender[0])
    read = read_embeddings(model, tokens, sender[0])
    if norm:
        read = norm.linear(read) / norm.scale(read) + norm.offset
    group = model.n_heads // len(attention.W_V)
    value = read @ plain(attention.W_V[sender[1] // group])
    if attention.b_V is not None:
        value = value + plain(attention.b_V[sender[1] // group])
    k = sides[1].read_part(value @ plain(attention.W_O[sender[1]]), embedded)
    return _meet(sides[0].read(embedded), k, rules, distance)


def position_circuit(split: Parts, rules: Rules) -> Floats | None:
    """[query, key]: the part of the scores that added positions alone make; None on models that add none."""
    if "pos_embed" not in split.sources:
        return None
    at = split.sources.index("pos_embed")
    return rules.scale * split.q[at] @ split.k[at].T


def singular_directions(sides: tuple[Reader, Reader], embedded: Floats, scale: float, count: int) -> list[Direction]:
    """The `count` strongest directions of W_Q W_K^T, norm weights folded in, with the tokens of [token, d_model] along.

    Each is turned so that the token farthest along it as a query is positive. Rotation is left out.
    """
    (left, query_core), (right, key_core) = (torch.linalg.qr(torch.from_numpy(side.folded())) for side in sides)
    inner = torch.linalg.svd(query_core @ key_core.T)
    queries, strengths, keys = (part.numpy() for part in (left @ inner.U, inner.S, inner.Vh @ right.T))
    norm = sides[0].before
    scaled = embedded / norm.scale(embedded) if norm else embedded
    found = []
    for index in range(min(count, len(strengths))):
        query, key = scaled @ queries[:, index], scaled @ keys[index]
        sign = np.sign(query[np.argmax(np.abs(query))])
        share = float(strengths[index] ** 2 / (strengths**2).sum())
        root = np.sqrt(scale * strengths[index])
        found.append(Direction(share, sign * root * query, sign * root * key))
    return found


@dataclass(frozen=True)
class HeadCircuits:
    """What the weights of one head say about the tokens of one text.

    `head`: (layer, head); `tokens`: the different ids of the text, in order; `by_distance`: distance -> token × token
    scores, for distance 0 alone on models without rotation; `composed`: the first of these through what the head
    `sender` writes; `position`: position × position, where positions are added; `directions`: the strongest ones.
    """

    head: tuple[int, int]
    tokens: Ints
    by_distance: dict[int, Floats]
    sender: tuple[int, int] | None
    composed: Floats | None
    position: Floats | None
    directions: list[Direction]


def head_circuits(
    model: Model, head: tuple[int, int], sender: tuple[int, int] | None, tokens: Ints, *, distances: Sequence[int]
) -> HeadCircuits:
    """The circuits of `head` (layer, head) on one row of ids [pos]; `distances` count on rotary models only.

    Distances that the row is too short for are left out, as is `composed` without a `sender`.
    """
    rules = interact(model, tokens[None], head[0]).rules
    different = tokens[np.sort(np.unique(tokens, return_index=True)[1])][:MOST_TOKENS]
    sides, embedded = readers(model, *head), read_embeddings(model, different, head[0])
    far = [distance for distance in distances if distance < len(tokens)] if rules.rotation else [0]
    return HeadCircuits(
        head=head,
        tokens=different,
        by_distance={distance: token_circuit(sides, embedded, rules, distance) for distance in far},
        sender=sender,
        composed=composed_circuit(model, head, sender, different, rules, far[0]) if sender else None,
        position=position_circuit(parts(model, tokens, head[0], [head[1]], rules)[head[1]], rules),
        directions=singular_directions(sides, embedded, rules.scale, DIRECTIONS),
    )


# --- composition of heads ---


@dataclass(frozen=True)
class Composition:
    """How the heads of `layer` compose with earlier heads, by way (Q, K, V).

    `senders`: the earlier heads (layer, head); `scores`, `baseline` and `z`: way -> [sender, head of `layer`], the
    score in [0, 1], its mean over random rotations, and how many of their standard deviations it lies above that mean.
    `limit`: the z above which a pair counts, corrected for the number of pairs and ways (Bonferroni).
    """

    layer: int
    senders: tuple[tuple[int, int], ...]
    scores: dict[str, Floats]
    baseline: dict[str, Floats]
    z: dict[str, Floats]
    limit: float

    def strongest(self, way: str, senders: Sequence[tuple[int, int]], heads: Sequence[int]) -> Pair:
        """The (sender, head) of the highest z among `senders` and `heads`."""
        pairs = [(sender, head) for sender in senders for head in heads]
        return max(pairs, key=lambda pair: self.z[way][self.senders.index(pair[0]), pair[1]])

    def from_previous_token(self, previous_token: Floats, heads: Sequence[int]) -> Pair:
        """The earlier previous-token head and the one of `heads` that K-compose most.

        Previous-token heads pay at least half of their attention there, by `previous_token` [layer, head]; if none
        before this layer does, the one that pays most counts.
        """
        senders = [head for head in self.senders if previous_token[head] >= 0.5]
        return self.strongest("K", senders or [max(self.senders, key=lambda head: previous_token[head])], heads)

    def record(self, pair: Pair) -> dict[str, Any]:
        """As results.json holds it: `pair` in K-composition, and the strongest pair of each way."""
        heads = range(self.z["Q"].shape[1])
        best = {way: self._describe(way, self.strongest(way, self.senders, heads)) for way in WAYS}
        return {"z_limit": self.limit, "previous_token_to_induction": self._describe("K", pair), "strongest": best}

    def _describe(self, way: str, pair: Pair) -> dict[str, Any]:
        place = self.senders.index(pair[0]), pair[1]
        numbers = {"score": self.scores, "baseline": self.baseline, "z": self.z}
        found = {key: float(values[way][place]) for key, values in numbers.items()}
        return {"writes": str(Head.at(*pair[0])), "reads": str(Head.at(self.layer, pair[1])), **found}


def compose(model: Model, layer: int, *, seed: int) -> Composition | None:
    """Composition of every head of `layer` with every head before it; None in the first layer.

    Norm weights are folded in on the reading side and frozen scales left out. `seed` draws the random rotations.
    """
    if layer == 0:
        return None
    senders = [_writing(model, earlier) for earlier in range(layer)]
    spectra = _spectra(senders)
    corners = _corners(model.bridge.cfg.d_model, spectra.shape[1], seed)
    scores, baseline, z = {}, {}, {}
    for way in WAYS:
        reading = _reading(model, layer, way)
        scores[way] = np.concatenate([_scores(sender, reading) for sender in senders])
        random = _random_scores(spectra, _spectra([reading]), corners)
        baseline[way] = random.mean(0)
        spread = random.std(0)
        z[way] = np.divide(scores[way] - baseline[way], spread, out=np.zeros_like(spread), where=spread > 0)
    pairs = tuple((earlier, head) for earlier in range(layer) for head in range(model.n_heads))
    limit = NormalDist().inv_cdf(1 - SIGNIFICANCE / (len(WAYS) * scores["Q"].size))
    return Composition(layer, pairs, scores, baseline, z, limit)


def _writing(model: Model, layer: int) -> FactoredMatrix:
    """W_V W_O of every head of `layer`, [head, d_model, d_model]: what it writes of what it reads."""
    attention, norm = attention_of(model, layer), norm_before(model, layer) or UNCHANGED
    values = np.repeat(plain(attention.W_V), model.n_heads // len(attention.W_V), axis=0)
    outputs = plain(attention.W_O)
    block = model.bridge.blocks[layer]
    if hasattr(block, "ln1_post"):
        outputs = Norm.of(block.ln1_post).linear(outputs)
    return FactoredMatrix(torch.from_numpy(_read_through(norm, values)), torch.from_numpy(outputs))


def _reading(model: Model, layer: int, way: str) -> FactoredMatrix:
    """The matrix of every head of `layer` by which it reads, [head, d_model, d_model]: W_QK, its transpose, or W_OV."""
    if way == "V":
        return _writing(model, layer)
    sides = [readers(model, layer, head) for head in range(model.n_heads)]
    queries, keys = (torch.from_numpy(np.stack([pair[side].folded() for pair in sides])) for side in (0, 1))
    meeting = FactoredMatrix(queries, keys.transpose(-2, -1))
    return meeting if way == "Q" else meeting.T


def _read_through(norm: Norm, weights: Floats) -> Floats:
    """Weights [head, d_model, d_head] with what is linear in the norm before them."""
    width = weights.shape[1]
    return np.einsum("md,hdn->hmn", norm.linear(np.eye(width)), weights)


def _scores(sender: FactoredMatrix, reading: FactoredMatrix) -> Floats:
    """[head that writes, head that reads]; 0 for a head of zeros. All pairs at once would not fit in memory."""
    columns = [composition_scores(sender, reading[head]) for head in range(reading.shape[0])]
    return torch.stack(columns, dim=-1).nan_to_num(0.0).numpy()


def _spectra(matrices: Sequence[FactoredMatrix]) -> Floats:
    """Squared singular values of every head, [head, d_head], scaled to sum to 1."""
    values = torch.cat([torch.linalg.svdvals(_core(matrix)) ** 2 for matrix in matrices]).numpy()
    return values / np.maximum(values.sum(-1, keepdims=True), np.finfo(float).tiny)


def _core(matrix: FactoredMatrix) -> torch.Tensor:
    """[head, d_head, d_head] with the same singular values as the factored [head, d_model, d_model]."""
    left, right = torch.linalg.qr(matrix.A).R, torch.linalg.qr(matrix.B.transpose(-2, -1)).R
    return left @ right.transpose(-2, -1)


def _corners(width: int, size: int, seed: int) -> Floats:
    """Squared entries of the corner of random rotations of `width` dimensions, [rotation, size, size]."""
    rng = np.random.default_rng([seed, width])
    draws = (torch.from_numpy(rng.standard_normal((width, size))) for _ in range(ROTATIONS))
    return np.stack([torch.linalg.qr(draw).Q[:size].numpy() ** 2 for draw in draws])


def _random_scores(writing: Floats, reading: Floats, corners: Floats) -> Floats:
    """Composition scores of matrices with these spectra and a random rotation between them, [rotation, sender, reader].

    ||A R B||^2 = sum_ij a_i^2 Z_ij^2 b_j^2, with a and b the singular values and Z a block of the rotation R in their
    bases, which is distributed as a corner of R whatever the bases are.
    """
    return np.sqrt(writing @ corners @ reading.T)
