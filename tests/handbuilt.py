"""Hand-built GPT-2 models: what each head attends to and what it writes is known by construction.

Real `GPT2LMHeadModel` weights with LayerNorm in place; no training, no special case in the code that loads them. The
idea of a model compiled from a known algorithm is that of Lindner et al. 2023, "Tracr" (arXiv 2301.05062); how two
heads make induction is Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits" (K-composition).

1. Residual stream. Orthogonal subspaces, in a random basis in which every vector has mean 0, so that LayerNorm only
   divides: a constant (`CONSTANT`, the same everywhere), the token (a random unit code of `TOKEN` numbers; BOS has a
   direction of its own), the position (`POSITION` / 2 Fourier pairs, a unit vector; position 0 has a direction of its
   own), a slow quarter turn from the first position to the last, one slot "token before me" per previous-token head
   that feeds others, and the prediction, which alone is unembedded.
2. Norm. The constant dominates, so every residual of a layer has about the same norm, known beforehand; weights are
   divided by it. Query, key and value are then what they would be without LayerNorm, up to a few hundredths.
3. Attention. The score of a head before softmax is a sum of three terms: `sharpness` times the inner product of a code
   read from the query and one read from the key (1 where they are equal); the same for position codes turned by a fixed
   offset, where a negative sharpness forbids that offset; and a constant for the key BOS, where a head without a match
   rests. With one matching key the softmax is a logistic function of the difference of two numbers, so a head of
   strength s has BOS score = match score + log((1 - s) / s).
4. Writing. A feeding previous-token head copies the token it attends to into its slot. Every other head adds `writing`
   times the token's code to the prediction: positive raises that token's logit (`LOGIT` per unit), negative lowers it.
   MLPs are zero. A token that no head has written about has logit 0: without induction the loss is log(vocabulary).

Every kind of head and the verdict it deserves stand in `VERDICTS`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

Floats = NDArray[np.float64]
Head = tuple[int, int]

VERDICTS = {
    "induction": "induction",  # attends to the tokens after earlier copies and raises them
    "suppression": "suppression",  # attends to them and lowers them
    "attends-only": "attends-only",  # attends to them and writes nothing
    "previous-token": "previous-token",
    "duplicate-token": "duplicate-token",  # attends to earlier copies of the token itself
    "bos-sink": "first-token",
    "before-duplicate": "none",  # attends to the tokens before earlier copies
    "fixed-offset": "none",  # looks back a fixed distance other than 1
    "uniform": "none",
    "recency": "none",  # the nearer a token the more attention, over dozens of tokens
    "salient": "none",  # attends to a few tokens of the vocabulary wherever they stand: heavy tails over rows
    "random": "none",
}
ON_TARGETS = ("induction", "suppression", "attends-only")  # what these attend to is the same
NEED_A_SLOT = (*ON_TARGETS, "before-duplicate")  # these read what a previous-token head below wrote

TOKEN, POSITION = 32, 32  # dimensions of the codes
D_HEAD = TOKEN + POSITION + 1  # most that a head compares: token, position, BOS
CONTEXT = 300
BOS = 0
EPSILON = 1e-5  # of LayerNorm
CONSTANT = 6.0
SHARPNESS = 24.0  # of one comparison; codes of different tokens have cosines up to about 0.75
DRIFT = 6.0  # how much higher than BOS a recency head scores a key at the end of the context
SALIENCE = 10.0  # sharpness of a salient head: its favourite token gets e^10 times what an average one gets
SHARPER, EXCLUSION = 80.0, 20.0  # where an offset is forbidden, which blurs the scores of all others
FEEDING = 0.99  # strength of a previous-token head that others read
LOGIT = 24.0  # logit per unit of prediction, in a model whose prediction is small against CONSTANT
COPY = 0.25  # an induction head of strength and writing 1 adds this much, 6 nats
DECOY_COPY = 0.08  # the same of a decoy that copies
MOST_COPIERS = 4  # so that the prediction stays below 1


@dataclass(frozen=True)
class Role:
    """What one head does.

    `strength`: attention on its target where there is one target, in (0, 1), the rest on BOS; uniform, random and sink
    heads have none. `offset`: how far a fixed-offset head looks back; for want of a key there it rests on BOS. `slot`:
    which "token before me" it reads, or writes if it is a previous-token head. `writing`: what it adds to the
    prediction per unit of attention, in units of the token's code.
    """

    kind: str
    strength: float = FEEDING
    offset: int = 1
    slot: int | None = None
    writing: float = 0.0

    @property
    def verdict(self) -> str:
        return VERDICTS[self.kind]


@dataclass(frozen=True)
class HandBuilt:
    """A model, and what each of its heads (layer, head) does."""

    model: GPT2LMHeadModel
    roles: dict[Head, Role]

    def heads(self, *kinds: str) -> list[Head]:
        """The heads of these kinds, in order."""
        return [head for head, role in sorted(self.roles.items()) if role.kind in kinds]


def build(seed: int, *, vocabulary: int, weakest: float = 0.1) -> HandBuilt:
    """A random model: 2 to 4 layers of 3 to 8 heads, every head with a random role. Depends on its arguments alone.

    `weakest`: the least attention on its targets that a head may have.
    """
    rng = np.random.default_rng([seed, 1])
    return assemble(draw_roles(rng, weakest), vocabulary=vocabulary, seed=seed)


def decoys(seed: int, *, vocabulary: int) -> HandBuilt:
    """A random model, 2 to 4 layers of 8 heads, in which no head attends to the targets and every head copies what it
    attends to, so that each raises the right token wherever it happens to look at it."""
    rng = np.random.default_rng([seed, 3])
    kinds = [kind for kind in VERDICTS if kind not in NEED_A_SLOT]
    places = [(layer, head) for layer in range(int(rng.integers(2, 5))) for head in range(8)]
    drawn = [_draw_role(rng, str(rng.choice(kinds)), place, {}) for place in places]
    roles = {place: replace(role, writing=DECOY_COPY) for place, role in zip(places, drawn, strict=True)}
    return assemble(roles, vocabulary=vocabulary, seed=seed)


def paper_case(*, vocabulary: int) -> HandBuilt:
    """Two layers of three heads, whose score table on one row can be derived on paper."""
    roles = {
        (0, 0): Role("previous-token", slot=0),
        (0, 1): Role("uniform"),
        (0, 2): Role("fixed-offset", offset=2),
        (1, 0): Role("induction", strength=0.75, slot=0, writing=COPY),
        (1, 1): Role("duplicate-token"),
        (1, 2): Role("bos-sink"),
    }
    return assemble(roles, vocabulary=vocabulary, seed=0)


def save(built: HandBuilt, folder: Path, tokenizer: Any) -> Path:
    """Write the model and its tokenizer as a folder that `common.models.load` takes."""
    built.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# --- drawing roles ---


def word_tokenizer(words: int) -> Any:
    """A tokenizer of that many ordinary tokens, `w1`, `w2` and so on, with BOS as token 0."""
    vocabulary = {"<bos>": BOS, **{f"w{number}": number for number in range(1, words + 1)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>")


def draw_roles(rng: np.random.Generator, weakest: float = 0.1) -> dict[Head, Role]:
    """At least one previous-token head below at least two induction heads, the first of them strong; else at random."""
    n_layers, n_heads = int(rng.integers(2, 5)), int(rng.integers(3, 9))
    feeding_layer = int(rng.integers(0, n_layers - 1))
    free = [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    rng.shuffle(free)
    roles = {_take(free, lowest=feeding_layer, highest=feeding_layer): Role("previous-token", slot=0)}
    if n_layers * n_heads > 8 and rng.random() < 0.5:
        roles[_take(free, highest=n_layers - 2)] = Role("previous-token", slot=1)
    feeders = {role.slot: layer for (layer, _), role in roles.items()}
    for number in range(2):
        place = _take(free, lowest=feeding_layer + 1)
        roles[place] = _draw_role(rng, "induction", place, feeders, weakest, strong=number == 0)
    for place in free:
        kind = _draw_kind(rng, place, feeders, [role.kind for role in roles.values()])
        roles[place] = _draw_role(rng, kind, place, feeders, weakest)
    return roles


def _take(free: list[Head], *, lowest: int = 0, highest: int = 99) -> Head:
    """Remove and return the first free place in these layers."""
    place = next(place for place in free if lowest <= place[0] <= highest)
    free.remove(place)
    return place


def _draw_kind(rng: np.random.Generator, place: Head, feeders: dict[int | None, int], taken: list[str]) -> str:
    """A kind that can stand here; fixed offsets, which fool most detectors, three times as often as others."""
    most = {"induction": MOST_COPIERS, "suppression": 1, "attends-only": 2}
    fed = any(layer < place[0] for layer in feeders.values())
    kinds = [
        kind
        for kind in (*VERDICTS, "fixed-offset", "fixed-offset")
        if (fed or kind not in NEED_A_SLOT) and taken.count(kind) < most.get(kind, 99)
    ]
    return kinds[rng.integers(len(kinds))]


def _draw_role(
    rng: np.random.Generator, kind: str, place: Head, feeders: dict[int | None, int], weakest: float = 0.1, *,
    strong: bool = False,
) -> Role:  # fmt: skip
    """Strength, offset and writing of a head of this kind, and the slot it reads."""
    slots = [slot for slot, layer in feeders.items() if layer < place[0]]
    slot = slots[rng.integers(len(slots))] if kind in NEED_A_SLOT else None
    if kind in ON_TARGETS:
        strength = _draw_strength(rng, weakest, strong)
        share = rng.uniform(0.5, 1.0)
        writing = {"induction": COPY * share, "suppression": -COPY / 2 * share, "attends-only": 0.0}[kind]
        return Role(kind, strength, slot=slot, writing=float(writing))
    if kind == "random":
        return Role(kind)
    writing = float(rng.choice([0.0, DECOY_COPY]))  # it may copy: its cells tell it from induction
    if kind == "fixed-offset":
        return Role(kind, float(rng.uniform(0.5, 0.99)), offset=_draw_offset(rng), writing=writing)
    if kind == "previous-token":
        return Role(kind, float(rng.uniform(0.5, 0.99)), writing=writing)
    return Role(kind, slot=slot, writing=writing)


def _draw_strength(rng: np.random.Generator, weakest: float, strong: bool) -> float:
    """Strong, half sink, or anything from `weakest` to 0.99 with equal chances per factor."""
    if strong:
        return float(rng.uniform(0.8, 0.99))
    if rng.random() < 0.2:
        return 0.5
    return float(np.exp(rng.uniform(math.log(weakest), math.log(0.99))))


def _draw_offset(rng: np.random.Generator) -> int:
    """A third near (0 is the token itself), a third anywhere, a third where a common test row has its repeat.

    In BOS and a segment said twice, induction looks back the segment's length less 1. Rows of 32, 64, 128 and 256
    tokens have segments of 15, 31, 63 and 127 tokens, or 16, 32, 64 and 128 where BOS is not counted.
    """
    near, far = [0, *range(2, 13)], range(15, 128)
    usual = [14, 15, 30, 31, 62, 63, 126, 127]
    return int(rng.choice([near, far, usual][rng.integers(3)]))


# --- the residual stream ---


@dataclass(frozen=True)
class Residual:
    """Orthonormal directions of the residual stream, each [d_model, dimensions], all orthogonal to (1, …, 1)."""

    constant: Floats
    token: Floats
    bos: Floats
    position: Floats
    start: Floats
    drift: Floats
    slots: list[Floats]
    prediction: Floats

    @classmethod
    def of(cls, d_model: int, n_slots: int, rng: np.random.Generator) -> Residual:
        """Cut a random orthonormal basis, whose first vector is (1, …, 1), into subspaces."""
        drawn = np.column_stack([np.ones(d_model), rng.normal(size=(d_model, d_model - 1))])
        basis = torch.linalg.qr(torch.from_numpy(drawn)).Q.numpy()  # NumPy's takes seconds on a busy machine
        widths = [1, 1, TOKEN, 1, POSITION, 1, 2, TOKEN, *[TOKEN + 1] * n_slots]
        _, constant, token, bos, position, start, drift, prediction, *rest = np.split(basis, np.cumsum(widths), axis=1)
        return cls(constant, token, bos, position, start, drift, rest[:n_slots], prediction)


def fourier_code(positions: Floats) -> Floats:
    """Unit code of each position, [positions, POSITION]; adding an offset to the position turns the code."""
    angles = np.multiply.outer(positions, _frequencies())
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1) / math.sqrt(POSITION / 2)


@functools.cache
def _frequencies() -> Floats:
    """Of 1,000 random sets of frequencies that whose codes of different positions are least alike (0.40 at most)."""
    drawn = np.random.default_rng(0).uniform(0, math.pi, size=(1000, POSITION // 2))
    likeness = np.cos(np.multiply.outer(drawn, np.arange(1, CONTEXT))).mean(1)
    return drawn[np.abs(likeness).max(1).argmin()]


def turned_back(offset: int) -> Floats:
    """The matrix, [POSITION, POSITION], that takes the code of position i to that of i - offset."""
    cos, sin = np.diag(np.cos(offset * _frequencies())), np.diag(np.sin(offset * _frequencies()))
    return np.block([[cos, sin], [-sin, cos]])


# --- weights ---


def assemble(roles: dict[Head, Role], *, vocabulary: int, seed: int) -> HandBuilt:
    """A model in which each head (layer, head) plays its role. Token 0 is BOS."""
    rng = np.random.default_rng([seed, 2])
    n_layers, n_heads = (1 + max(head[axis] for head in roles) for axis in (0, 1))
    n_slots = 1 + max((role.slot for role in roles.values() if role.slot is not None), default=-1)
    room = 6 + 2 * TOKEN + POSITION + n_slots * (TOKEN + 1)
    d_head = max(D_HEAD, -(-room // n_heads))
    residual = Residual.of(n_heads * d_head, n_slots, rng)
    model = _empty_model(n_layers, n_heads, n_heads * d_head, vocabulary)
    _set_embeddings(model, residual, n_slots, rng)
    for layer, block in enumerate(model.transformer.h):
        sigma = _sigma(sum(_feeds(role) for (at, _), role in roles.items() if at < layer), n_heads * d_head)
        heads = [head_weights(roles[layer, head], residual, sigma, d_head, rng) for head in range(n_heads)]
        query, key, value, out = zip(*heads, strict=True)
        _set(block.attn.c_attn.weight, np.hstack([*query, *key, *value]))
        _set(block.attn.c_proj.weight, np.vstack(out))
    return HandBuilt(model.eval(), dict(sorted(roles.items())))


@dataclass(frozen=True)
class Term:
    """`weight` times the inner product of what is read from the query and what is read from the key, a part of a score.

    `query`, `key`: [d_model, dimensions].
    """

    query: Floats
    key: Floats
    weight: float


def head_weights(
    role: Role, residual: Residual, sigma: float, d_head: int, rng: np.random.Generator
) -> tuple[Floats, Floats, Floats, Floats]:
    """W_Q, W_K, W_V [d_model, d_head] and W_O [d_head, d_model] of a head whose input LayerNorm divides by `sigma`."""
    if role.kind == "random":
        return _random_weights(len(residual.token), d_head, rng)
    terms = attention_terms(role, residual, rng)
    query = np.hstack([term.query * term.weight for term in terms]) * sigma**2 * math.sqrt(d_head)
    key = np.hstack([term.key for term in terms])
    if _feeds(role):
        value, out = np.hstack([residual.token, residual.bos]), residual.slots[role.slot].T
    else:
        value, out = residual.token, role.writing * residual.prediction.T
    query, key, value = (_widened(matrix, d_head) for matrix in (query, key, value * sigma))
    return query, key, value, _widened(out.T, d_head).T


def attention_terms(role: Role, residual: Residual, rng: np.random.Generator) -> list[Term]:
    """The terms whose sum is the score of a (query, key) cell before softmax."""
    if role.kind == "recency":  # every query asks for the same: a late key
        return [Term(residual.constant, residual.drift[:, 1:], DRIFT / CONSTANT), _bos(residual, 0.0)]
    if role.kind == "salient":  # every query asks for the same token code
        favourite = rng.normal(size=(TOKEN, 1))
        wanted = residual.token @ favourite / np.linalg.norm(favourite)
        return [Term(residual.constant, wanted, SALIENCE / CONSTANT), _bos(residual, 0.0)]
    rest = SHARPNESS + math.log((1 - role.strength) / role.strength)
    if role.kind in ON_TARGETS:  # the token before the key is the query's token
        return [_same(residual.token, residual.slots[role.slot], SHARPNESS / FEEDING), _bos(residual, rest)]
    if role.kind in ("fixed-offset", "previous-token"):
        return [_at_offset(residual, role.offset, SHARPNESS), _bos(residual, rest)]
    forbid, rest = -EXCLUSION, SHARPER - EXCLUSION / 2
    if role.kind == "duplicate-token":  # the key's token is the query's, and the key is not the query
        return [_same(residual.token, residual.token, SHARPER), _at_offset(residual, 0, forbid), _bos(residual, rest)]
    if role.kind == "before-duplicate":  # the key's token is the one before the query, and not that very one
        before = _same(residual.slots[role.slot], residual.token, SHARPER / FEEDING)
        return [before, _at_offset(residual, 1, forbid), _bos(residual, rest)]
    if role.kind == "bos-sink":
        return [_bos(residual, SHARPNESS / 2)]
    return [_bos(residual, 0.0)]  # uniform


def _same(query: Floats, key: Floats, sharpness: float) -> Term:
    """`sharpness` where the token code read from the query equals the one read from the key."""
    return Term(query[:, :TOKEN], key[:, :TOKEN], sharpness)


def _at_offset(residual: Residual, offset: int, sharpness: float) -> Term:
    """`sharpness` where the key stands `offset` before the query, at most 0.40 of it elsewhere."""
    return Term(residual.position @ turned_back(offset).T, residual.position, sharpness)


def _bos(residual: Residual, score: float) -> Term:
    """`score` where the key is BOS."""
    return Term(residual.constant, residual.bos, score / CONSTANT)


def _random_weights(d_model: int, d_head: int, rng: np.random.Generator) -> tuple[Floats, Floats, Floats, Floats]:
    """Scores spread by about 2 around what all keys have in common; what is written, anywhere, has norm 0.03."""
    inner, outer = math.sqrt(8 / d_model), math.sqrt(0.03 / (d_model * math.sqrt(d_head)))
    query, key = rng.normal(0, inner, size=(2, d_model, d_head))
    value, out = rng.normal(0, outer, size=(2, d_model, d_head))
    return query, key, value, out.T


def _widened(matrix: Floats, d_head: int) -> Floats:
    """[d_model, d_head]: zero columns on the right."""
    return np.pad(matrix, ((0, 0), (0, d_head - matrix.shape[1])))


def _feeds(role: Role) -> bool:
    """Whether it is a previous-token head that writes what other heads read."""
    return role.kind == "previous-token" and role.slot is not None


def _sigma(feeding_below: int, d_model: int) -> float:
    """What LayerNorm divides by. The constant has norm CONSTANT, token, position and drift 1, a filled slot FEEDING."""
    return math.sqrt((CONSTANT**2 + 3 + feeding_below * FEEDING**2) / d_model + EPSILON)


def _empty_model(n_layers: int, n_heads: int, d_model: int, vocabulary: int) -> GPT2LMHeadModel:
    """A GPT-2 whose weights and biases are all 0, but for LayerNorm, which has weight 1."""
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=CONTEXT, n_embd=d_model, n_layer=n_layers, n_head=n_heads, n_inner=1,
        layer_norm_epsilon=EPSILON, tie_word_embeddings=False, bos_token_id=BOS, eos_token_id=BOS,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if ".ln_" in name and name.endswith("weight") else 0.0)
    return model


def _set_embeddings(model: GPT2LMHeadModel, residual: Residual, feeding: int, rng: np.random.Generator) -> None:
    """Embeddings write constant, token, BOS and position; the unembedding reads the prediction."""
    codes = rng.normal(size=(model.config.vocab_size, TOKEN))
    codes /= np.linalg.norm(codes, axis=1, keepdims=True)
    codes[BOS] = 0
    tokens = codes @ residual.token.T
    tokens[BOS] = residual.bos[:, 0]
    positions = CONSTANT * residual.constant.T + fourier_code(np.arange(CONTEXT)) @ residual.position.T
    positions[0] = (CONSTANT * residual.constant + residual.start)[:, 0]
    angle = np.arange(CONTEXT) * (math.pi / 2 / CONTEXT)
    positions += np.stack([np.cos(angle), np.sin(angle)], 1) @ residual.drift.T
    _set(model.transformer.wte.weight, tokens)
    _set(model.transformer.wpe.weight, positions)
    _set(model.lm_head.weight, LOGIT * _sigma(feeding, model.config.n_embd) * codes @ residual.prediction.T)


def _set(parameter: torch.nn.Parameter, values: Floats) -> None:
    if parameter.shape != values.shape:
        raise ValueError(f"weights of shape {values.shape} do not fit {tuple(parameter.shape)}")
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(values))
