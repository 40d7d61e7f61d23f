"""Many interventions on the same rows, without running again what does not change.

An intervention whose lowest layer is L runs from L on, on the clean residual stream that enters L. Of the clean stream
the latest layer's is kept beside the bottom one, so a sweep takes interventions from the lowest layer up. Logits are
made only where a prediction is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common import UserError
from common.attention.batches import Advance
from common.heads.statistics import Floats, Ints, mean_per_row

if TYPE_CHECKING:
    from common.attention.call import Call
    from common.attention.head import Head
    from common.interventions.edits import Intervention
    from common.loading.model import Model


@dataclass(frozen=True)
class Predictions:
    """Predictions to read: `row`, `position` [n] of the query, and `token` [n], what really comes next there."""

    row: Ints
    position: Ints
    token: Ints

    @classmethod
    def of(cls, tokens: Ints, predicted: NDArray[np.bool_]) -> Predictions:
        """The predictions of the tokens in the mask `predicted` [rows, pos], each read one position before."""
        row, position = np.nonzero(predicted[:, 1:])
        return cls(row, position, tokens[row, position + 1])


# logits [n, d_vocab] of some predictions, and which predictions they are, to a value each [n]
Metric = Callable[[Tensor, Ints], Tensor]


@dataclass
class _Chunk:
    """Some of the rows, the predictions in them, and the clean stream that enters some layers."""

    rows: slice
    predictions: Ints
    streams: dict[int, Tensor] = field(default_factory=dict)


class Runner:
    """A model, rows of ids and the predictions in them, ready to be run under many interventions.

    `tokens`: [rows, pos]. Raises UserError where there is nothing to predict.
    """

    def __init__(self, model: Model, tokens: Ints, predictions: Predictions, *, batch_size: int = 8):
        if not len(predictions.row):
            raise UserError("no token of these rows continues an earlier copy: there is no prediction to read")
        self.model = model
        self.tokens = tokens
        self.predictions = predictions
        starts = range(0, len(tokens), batch_size)
        self._chunks = [self._chunk(slice(start, min(start + batch_size, len(tokens)))) for start in starts]

    def _chunk(self, rows: slice) -> _Chunk:
        inside = (self.predictions.row >= rows.start) & (self.predictions.row < rows.stop)
        return _Chunk(rows, np.flatnonzero(inside))

    def measure(self, intervention: Intervention | None, metrics: Mapping[str, Metric]) -> dict[str, Floats]:
        """Each metric at each prediction, {name: [n]}, under the intervention (None: clean)."""
        found = {name: np.full(len(self.predictions.row), np.nan) for name in metrics}
        for chunk in self._chunks:
            if not len(chunk.predictions):
                continue
            logits = self._logits(chunk, intervention)
            for name, metric in metrics.items():
                found[name][chunk.predictions] = metric(logits, chunk.predictions).double().cpu().numpy()
        return found

    def watch(self, layer: int, intervention: Intervention | None, reader: Callable[[Call, slice], None]) -> None:
        """Show the attention of one layer to `reader(call, rows)`, some rows at a time; no layer above it is run."""
        for chunk in self._chunks:
            edits = intervention.edits if intervention else ()
            start = self._stream(chunk, min(layer, intervention.first_layer if intervention else layer))
            rows = chunk.rows
            shown = partial(_show, reader, rows)
            self.model.read(self.tokens[rows], shown, [layer], edits, rows=rows, start=start)

    # --- metrics ---

    def log_prob(self, logits: Tensor, which: Ints) -> Tensor:
        """Metric: log-probability of the right token, in nats; the loss is its negative."""
        right = logits.gather(-1, self._right(logits, which))[:, 0]
        return right - logits.logsumexp(-1)

    def rank(self, logits: Tensor, which: Ints) -> Tensor:
        """Metric: the place of the right token among all, 1 the likeliest; of equals the best place."""
        return (logits > logits.gather(-1, self._right(logits, which))).sum(-1) + 1

    def kl(self, logits: Tensor, which: Ints) -> Tensor:
        """Metric: Kullback-Leibler divergence of the prediction from the clean one, KL(clean || this), in nats.

        Keeps the clean log-probabilities of every prediction: n x d_vocab numbers.
        """
        clean = self._clean_log_probs[torch.from_numpy(which)].to(logits.device)
        return (clean.exp() * (clean - logits.log_softmax(-1))).sum(-1)

    def _right(self, logits: Tensor, which: Ints) -> Tensor:
        return torch.from_numpy(self.predictions.token[which]).to(logits.device)[:, None]

    @cached_property
    def _clean_log_probs(self) -> Tensor:
        kept = torch.empty(len(self.predictions.row), self.model.d_vocab)
        for chunk in self._chunks:
            if len(chunk.predictions):
                kept[torch.from_numpy(chunk.predictions)] = self._logits(chunk, None).log_softmax(-1).cpu()
        return kept

    # --- runs ---

    def _logits(self, chunk: _Chunk, intervention: Intervention | None) -> Tensor:
        """[predictions of the chunk, d_vocab] in float32."""
        edits = intervention.edits if intervention else ()
        start = self._stream(chunk, intervention.first_layer if intervention else 0)
        row = self.predictions.row[chunk.predictions] - chunk.rows.start
        at = row, self.predictions.position[chunk.predictions]
        return self.model.logits(self.tokens[chunk.rows], edits, rows=chunk.rows, at=at, start=start).float()

    def _stream(self, chunk: _Chunk, layer: int) -> tuple[int, Tensor] | None:
        """The layer and the clean stream that enters it; None for the bottom, where nothing is saved."""
        if layer == 0:
            return None
        if layer not in chunk.streams:
            below = max((at for at in chunk.streams if at < layer), default=None)
            start = None if below is None else (below, chunk.streams[below])
            point = layer, "resid_pre"
            chunk.streams = {layer: self.model.record(self.tokens[chunk.rows], {point}, start=start)[point]}
        return layer, chunk.streams[layer]


def _show(reader: Callable[[Call, slice], None], rows: slice, layer: int, call: Call) -> None:
    reader(call, rows)


# --- many interventions ---


def sweep(
    runner: Runner,
    interventions: Iterable[Intervention],
    metrics: Mapping[str, Metric] | None = None,
    *,
    advance: Advance = lambda count: None,
) -> Iterator[tuple[Intervention, dict[str, Floats]]]:
    """Yield each intervention with its metrics at each prediction (by default the log-probability of the right token),
    from the lowest layer up; `advance` is told of each. What was yielded stays good when the loop is interrupted."""
    metrics = metrics or {"log_prob": runner.log_prob}
    for intervention in sorted(interventions, key=lambda one: one.first_layer):
        yield intervention, runner.measure(intervention, metrics)
        advance(1)


def greedy(
    runner: Runner,
    candidates: Sequence[Head],
    intervene: Callable[[Sequence[Head]], Intervention],
    *,
    most: int,
    advance: Advance = lambda count: None,
) -> Iterator[tuple[Head, Floats]]:
    """Yield the head to add next for the largest mean loss, at most `most` of them, with the loss at each prediction
    [n] of all heads chosen so far together. `advance` is told of each intervention that was tried."""
    chosen: list[Head] = []
    while len(chosen) < min(most, len(candidates)):
        tried = {}
        for head in sorted(set(candidates) - set(chosen)):
            tried[head] = -runner.measure(intervene([*chosen, head]), {"log_prob": runner.log_prob})["log_prob"]
            advance(1)
        # of equals the lowest head: the order must not depend on the order of a set
        best = max(tried, key=lambda head: (tried[head].mean(), (-head.layer, -head.head)))
        chosen.append(best)
        yield best, tried[best]


def row_means(predictions: Predictions, values: Floats, rows: int) -> Floats:
    """[n] values of predictions to means per row [rows]; NaN for a row without a prediction."""
    return mean_per_row(values, predictions.row, rows)
