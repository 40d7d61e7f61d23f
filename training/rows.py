"""Training rows: English, and four kinds of repetition. Every row is a pure function of its random generator.

english: a stretch of text.
loop:    2 to 6 random tokens said 2 to 5 times on end, then others: what stands a few tokens back pays at once, so
         heads that look back a fixed short distance form first.
chain:   4 to 23 tokens under a successor map drawn for this row, followed 85 % of the time. Only content tells what
         comes next: the offset to the target is random, so no head that looks back a fixed distance solves it.
random:  random tokens, then one segment again, once or twice, after random gaps.
natural: English with one stretch of it again, once or twice, after gaps of English.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

KINDS = ("english", "loop", "chain", "random", "natural")
FOLLOW = 0.85

Row = NDArray[np.int64]


def make_batch(
    rng: np.random.Generator, text: Row, ordinary: Row, bos: int, *, rows: int, length: int, mix: dict[str, float]
) -> tuple[NDArray[np.int64], list[str]]:
    """`rows` rows of `length` token ids, [rows, length], and the kind of each; `mix` gives each kind's probability."""
    makers = {"english": english, "loop": loop, "chain": chain, "random": random_repeat, "natural": natural_repeat}
    kinds = list(rng.choice(list(mix), size=rows, p=list(mix.values())))
    sources = {kind: text if kind in ("english", "natural") else ordinary for kind in mix}
    bodies = [makers[kind](rng, sources[kind], length - 1) for kind in kinds]
    return np.stack([np.concatenate([[bos], body]) for body in bodies]), kinds


def english(rng: np.random.Generator, text: Row, length: int) -> Row:
    """A stretch of the text."""
    start = rng.integers(len(text) - length)
    return text[start : start + length]


def loop(rng: np.random.Generator, ordinary: Row, length: int) -> Row:
    """Stretches of 2 to 6 random tokens, each said 2 to 5 times on end, one stretch after the other."""
    parts: list[Row] = []
    while sum(len(part) for part in parts) < length:
        period, times = int(rng.integers(2, 7)), int(rng.integers(2, 6))
        parts.append(np.tile(rng.choice(ordinary, size=period, replace=False), times))
    return np.concatenate(parts)[:length]


def chain(rng: np.random.Generator, ordinary: Row, length: int) -> Row:
    """A walk over a few tokens: to the successor with probability `FOLLOW`, else anywhere among them."""
    count = int(rng.integers(4, 24))
    successor = rng.permutation(count)
    walk = np.empty(length, dtype=np.int64)
    place = 0
    for step in range(length):
        walk[step] = place
        place = int(successor[place] if rng.random() < FOLLOW else rng.integers(count))
    return rng.choice(ordinary, size=count, replace=False)[walk]


def random_repeat(rng: np.random.Generator, ordinary: Row, length: int) -> Row:
    """Random tokens in which one segment comes again, once or twice."""
    return _repeat(rng, rng.choice(ordinary, size=length), length)


def natural_repeat(rng: np.random.Generator, text: Row, length: int) -> Row:
    """English in which one stretch comes again, once or twice."""
    return _repeat(rng, english(rng, text, length), length)


def _repeat(rng: np.random.Generator, background: Row, length: int) -> Row:
    """Insert one or two further copies of a segment of `background`, gaps left as they are, cut to `length`."""
    copies = int(rng.integers(1, 3))
    size = int(rng.integers(3, length // (copies + 1)))
    start = int(rng.integers(0, length - size * (copies + 1) + 1))
    segment, rest = background[start : start + size], background[start + size :]
    parts = [background[: start + size]]
    slack = length - start - size * (copies + 1)
    for _ in range(copies):
        gap = int(rng.integers(0, slack + 1)) if rng.random() < 0.7 else 0
        parts += [rest[:gap], segment]
        rest, slack = rest[gap:], slack - gap
    return np.concatenate([*parts, rest])[:length]
