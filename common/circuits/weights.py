"""What the weights of a head say by themselves, for the tokens of a text.

1. Token × token: the score that one token as a query gives another as a key, with the embedding that the layer really
   reads (the embedding and the mean of what MLP 0 makes of it: common/circuits/decomposition.py). On rotary models it
   depends on the distance between the two, so it is given for chosen distances.
2. The same through an earlier head: the key holds the output of that head for the token.
3. Position × position: the part of the scores that positions alone make, where positions are added to the embedding.
4. Singular directions of W_Q W_K^T: the pairs of directions of the residual stream that the head matches up, each
   with the tokens of the text that lie along them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from common.attention.head import Head
from common.circuits.decomposition import Side, SplitHead, sides_of, split_heads, written
from common.circuits.maps import Rules, interact
from common.heads.statistics import Floats, Ints
from common.loading.families import UNCHANGED, plain

if TYPE_CHECKING:
    from common.loading.model import Model

MOST_TOKENS = 24  # different tokens of a text that circuits are shown for: what stays legible
DIRECTIONS = 3  # singular directions shown of a head


@dataclass(frozen=True)
class Direction:
    """One singular direction of W_Q W_K^T: a direction of queries matched with one of keys.

    `share`: of the squared Frobenius norm, in [0, 1]; `query`, `key`: [token], how far each token lies along it, in
    units in which the product query · key is this direction's part of the score.
    """

    share: float
    query: Floats
    key: Floats

    def record(self, tokens: Sequence[str], count: int) -> dict[str, object]:
        """The share, and the `count` tokens farthest along the direction as queries and as keys, with how far."""

        def farthest(along: Floats) -> list[tuple[str, float]]:
            return [(tokens[at], float(along[at])) for at in np.argsort(-np.abs(along), kind="stable")[:count]]

        return {"share": self.share, "query": farthest(self.query), "key": farthest(self.key)}


@dataclass(frozen=True)
class HeadCircuits:
    """What the weights of one head say about the tokens of one text.

    `tokens`: the different ids of the text, in order; `by_distance`: distance -> token × token scores, for distance 0
    alone on models without rotation; `composed`: the first of these through the output of the head `sender`;
    `position`: position × position, where positions are added; `directions`: the strongest ones.
    """

    head: Head
    tokens: Ints
    by_distance: dict[int, Floats] = field(repr=False)
    sender: Head | None
    composed: Floats | None = field(repr=False)
    position: Floats | None = field(repr=False)
    directions: list[Direction] = field(repr=False)


def head_circuits(
    model: Model, head: Head, sender: Head | None, tokens: Ints, *, distances: Sequence[int]
) -> HeadCircuits:
    """The circuits of `head` on one row of ids [pos]; `distances` count on rotary models only.

    Distances that the row is too short for are left out, as is `composed` without a `sender`, a head of an earlier
    layer. Raises UserError where queries and keys cannot be read (`interact`, `sides_of`).
    """
    rules = interact(model, tokens[None], head.layer).rules
    different = tokens[np.sort(np.unique(tokens, return_index=True)[1])][:MOST_TOKENS]  # BOS stays the first
    sides, embedded = sides_of(model, head), read_embeddings(model, different, head.layer)
    q, k = (side.read(embedded) for side in sides)
    far = [distance for distance in distances if distance < len(tokens)] if rules.rotation else [0]
    by_distance = {distance: token_circuit(q, k, rules, distance) for distance in far}
    composed = None
    if sender:
        sent = sides[1].read_part(output_for_tokens(model, sender, different), embedded)
        composed = token_circuit(q, sent, rules, far[0])
    position = position_circuit(split_heads(model, tokens, head.layer, [head.head], rules)[head.head], rules)
    directions = singular_directions(sides, embedded, rules.scale, DIRECTIONS)
    return HeadCircuits(head, different, by_distance, sender, composed, position, directions)


def read_embeddings(model: Model, tokens: Ints, layer: int) -> Floats:
    """The embedding that `layer` reads of each of the ids [pos], [pos, d_model]."""
    return next(written(model, tokens, layer))[1]  # the first source, so nothing behind it is computed


def token_circuit(q: Floats, k: Floats, rules: Rules, distance: int) -> Floats:
    """[query, key]: scores of one head's queries with its keys [token, d_head], `distance` positions apart, which
    matters on rotary models only; it must be less than the positions that `rules.rotation` holds."""
    if rules.rotation is not None:
        q = rules.rotation.turn(q, slice(distance, distance + 1))
        k = rules.rotation.turn(k, slice(1))  # only the difference of positions counts, so keys stand at 0
    return rules.scale * q @ k.T


def output_for_tokens(model: Model, sender: Head, tokens: Ints) -> Floats:
    """[token, d_model]: what `sender` writes when it attends to nothing but one of the ids [token].

    Read as a key by an induction head that a previous-token head feeds, it shows a diagonal: a token looks for the
    place behind its own copy.
    """
    layer, read = model.parts.layers[sender.layer], read_embeddings(model, tokens, sender.layer)
    norm, weights = layer.norm or UNCHANGED, layer.weights
    shared = sender.head * len(weights.W_V) // model.n_heads
    value = (norm.linear(read) / norm.scale(read) + norm.offset) @ plain(weights.W_V[shared])
    bias = 0.0 if weights.b_V is None else plain(weights.b_V[shared])
    return (value + bias) @ plain(weights.W_O[sender.head])


def position_circuit(split: SplitHead, rules: Rules) -> Floats | None:
    """[query, key]: the part of the scores that added positions alone make; None on models that add none."""
    if "pos_embed" not in split.sources:
        return None
    at = split.sources.index("pos_embed")
    return rules.scale * split.q[at] @ split.k[at].T


def singular_directions(sides: tuple[Side, Side], embedded: Floats, scale: float, count: int) -> list[Direction]:
    """The `count` strongest directions of W_Q W_K^T, norm weights folded in, with the tokens of [token, d_model] along;
    the token farthest along each as a query is positive. Rotation is left out."""
    # The matrix has the rank of a head: its SVD is that of the small core between two orthogonal bases.
    (left, query_core), (right, key_core) = (np.linalg.qr(side.folded()) for side in sides)
    inner = np.linalg.svd(query_core @ key_core.T)
    scaled = embedded / sides[0].before.scale(embedded)
    root = np.sqrt(scale * inner.S)  # half of the strength to each side: their product is the score
    queries, keys = scaled @ left @ inner.U * root, scaled @ right @ inner.Vh.T * root
    # Singular vectors come with either sign; without a rule it would differ from one machine to the next.
    signs = np.sign(np.take_along_axis(queries, np.abs(queries).argmax(0, keepdims=True), 0))
    shares = (inner.S**2 / (inner.S**2).sum()).tolist()
    return [Direction(*found) for found in zip(shares[:count], (signs * queries).T, (signs * keys).T, strict=False)]
