"""What an intervention does, measured: losses at repeats and at fresh tokens, intervals over rows.

A *repeat* is a token that continues an earlier copy: its predecessor is a query, and one of that query's targets holds
the same token. A *fresh* token stands before the row's first repeat. Losses are in nats, higher is worse.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from common.edits import Intervention, applied, run_forward
from common.models import Model
from common.sequences import Floats, TokenBatch

RESAMPLES = 2000


def repeats(batch: TokenBatch) -> NDArray[np.bool_]:
    """Which tokens, [rows, pos], are what followed an earlier copy of the token before them."""
    cells = batch.cells["prefix_matching"]
    inside = cells.query + 1 < batch.lengths[cells.row]
    row, query, key = cells.row[inside], cells.query[inside], cells.key[inside]
    same = batch.tokens[row, query + 1] == batch.tokens[row, key]
    mask = np.zeros(batch.tokens.shape, dtype=bool)
    mask[row[same], query[same] + 1] = True
    return mask


def fresh(batch: TokenBatch) -> NDArray[np.bool_]:
    """Which tokens, [rows, pos], stand after BOS and before the row's first repeat."""
    repeated = repeats(batch)
    first = np.where(repeated.any(1), repeated.argmax(1), batch.lengths)
    position = np.arange(batch.tokens.shape[1])
    return (position > 0) & (position < first[:, None])


def losses(model: Model, batch: TokenBatch, intervention: Intervention | None = None, *, batch_size: int = 8) -> Floats:
    """Loss of every token given those before it, [rows, pos], in nats, clean or under an intervention; NaN at 0."""
    found = np.full(batch.tokens.shape, np.nan)
    for start in range(0, len(batch.tokens), batch_size):
        rows = slice(start, start + batch_size)
        ids = torch.from_numpy(batch.tokens[rows]).to(model.bridge.cfg.device)
        with applied(model, intervention, rows):
            logits = run_forward(model, batch.tokens[rows]).float()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        found[rows, 1:] = loss.double().cpu().numpy()
    return found


def row_means(values: Floats, mask: NDArray[np.bool_]) -> Floats:
    """Mean of `values` [rows, pos] over `mask`, per row; NaN for a row with no place in it."""
    with np.errstate(invalid="ignore"):
        return np.where(mask, values, 0.0).sum(1) / mask.sum(1)


def interval(values: Floats, *, seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float, float]:
    """Mean over rows and its 95 % bootstrap interval (percentiles of means of rows drawn with replacement; Efron 1979):
    (estimate, low, high). Rows that are NaN are left out; NaN throughout where none is left."""
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan"), float("nan")
    drawn = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[drawn].mean(1), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)
