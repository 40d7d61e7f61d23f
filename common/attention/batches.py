"""How many rows go through a model at once: as many as help, and no more than fit into the memory that is free.

1. More than some thousand tokens at once make no forward pass faster, so there is no need for more rows.
2. Rows that do not fit would be worse: what a row needs is estimated from the model's sizes, generously, and half of
   the free memory may be used.
3. Where it runs out all the same, the work that failed is done again with half as many rows.

Scores do not depend on it: every row is scored by itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeVar

import torch

from common import UserError

ENOUGH = 2048  # tokens at once, from which on more of them make a forward pass on a CPU no faster
ENOUGH_GPU = 32768  # the same on a GPU
WIDTHS = 24  # what a layer holds of a token at once, in vectors of the residual stream's width: MLP, q, k, v, norms
PATTERNS = 4  # copies of its pattern that a layer makes which shows it whole: scores, masked, pattern, a difference
SHARE = 0.5  # of the free memory that may be used

Result = TypeVar("Result")

# progress(what, total) is entered for each piece of work and yields advance(count), to be told of what is done
Advance = Callable[[int], None]
Progress = Callable[[str, int], AbstractContextManager[Advance]]


@contextmanager
def silent(what: str, total: int) -> Iterator[Advance]:
    """Progress that nobody watches."""
    yield lambda count: None


class Sizes(Protocol):
    """What memory depends on."""

    @property
    def n_layers(self) -> int: ...
    @property
    def n_heads(self) -> int: ...
    @property
    def d_model(self) -> int: ...
    @property
    def d_vocab(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...


def batch_size(model: Sizes, length: int) -> int:
    """Rows of `length` tokens to run at once, at least 1, where a backward pass may have to keep all layers."""
    enough = (ENOUGH if model.device.type == "cpu" else ENOUGH_GPU) // length
    fitting = int(SHARE * free_memory(model.device)) // bytes_per_row(model, length)
    return max(1, min(enough, fitting))


def bytes_per_row(model: Sizes, length: int) -> int:
    """About what a row of `length` tokens needs in a forward pass whose every activation is kept, logits included."""
    per_layer = length * (WIDTHS * model.d_model + PATTERNS * model.n_heads * length)
    size = torch.finfo(model.dtype).bits // 8
    return size * (model.n_layers * per_layer + 2 * length * model.d_vocab)


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on the device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def in_batches(
    work: Callable[[tuple[int, int]], Result],
    rows: int,
    batch_size: int,
    advance: Advance = lambda rows: None,
) -> list[Result]:
    """What `work` makes of rows (start, stop) at a time, in order; `advance` is told of each finished group.

    Where memory runs out it goes on with half as many rows and logs a warning; UserError where one row is too much.
    """
    results: list[Result] = []
    start = 0
    while start < rows:
        stop = min(start + batch_size, rows)
        result = _attempt(work, (start, stop))
        if result is None:
            batch_size = _half(stop - start)
            continue
        results.append(result)
        advance(stop - start)
        start = stop
    return results


def _attempt(work: Callable[[tuple[int, int]], Result], rows: tuple[int, int]) -> Result | None:
    """What `work` makes of the rows, or None where memory runs out; what it held by then is free again."""
    try:
        return work(rows)
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
        return None


def _half(rows: int) -> int:
    if rows == 1:
        raise UserError("a single row does not fit into memory: shorter texts, --dtype bfloat16 or a smaller model may")
    logging.getLogger(__name__).warning("out of memory with %d rows at once: going on with %d", rows, rows // 2)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return rows // 2


def _out_of_memory(error: BaseException) -> bool:
    """Whether this is what torch (on GPU or CPU) or NumPy raises where memory runs out."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
