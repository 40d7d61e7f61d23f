"""Many interventions on the same rows, without running again what does not change.

An intervention whose lowest layer is L runs from L on, on the clean residual stream that enters L. Of the clean stream
the latest layer's is kept beside the bottom one, so a sweep takes interventions from the lowest layer up. Logits are
made only where a prediction is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common import UserError
from common.attention.batches import Advance
from common.heads.statistics import Floats, Ints

if TYPE_CHECKING:
    from common.attention.call import Call
    from common.attention.head import Head
    from common.interventions.edits import Intervene, Intervention
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
    """A model, rows of ids [rows, pos] and the predictions in them, ready to be run under many interventions. Raises
    UserError where there is nothing to predict."""

    def __init__(self, model: Model, tokens: Ints, predictions: Predictions, *, batch_size: int = 8):
        if not len(predictions.row):
            raise UserError("no token of these rows continues an earlier copy: there is no prediction to read")
        self.model, self.tokens, self.predictions = model, tokens, predictions
        self._chunks = []
        for start in range(0, len(tokens), batch_size):
            rows = slice(start, min(start + batch_size, len(tokens)))
            inside = (predictions.row >= rows.start) & (predictions.row < rows.stop)
            self._chunks.append(_Chunk(rows, np.flatnonzero(inside)))

    def measure(self, intervention: Intervention | None, metrics: Mapping[str, Metric]) -> dict[str, Floats]:
        """Each metric at each prediction, {name: [n]}, under the intervention (None: clean)."""
        found = {name: np.full(len(self.predictions.row), np.nan) for name in metrics}
        for which, logits in self._run(intervention):
            for name, metric in metrics.items():
                found[name][which] = metric(logits, which).double().cpu().numpy()
        return found

    def log_probs(self, intervention: Intervention | None) -> Floats:
        """`log_prob` alone at each prediction, [n]."""
        return self.measure(intervention, {"log_prob": self.log_prob})["log_prob"]

    def logits_above_mean(self, intervention: Intervention | None) -> Floats:
        """The logit of the right token less the mean logit at each prediction, [n], in nats."""
        metric: Metric = lambda logits, which: self._right(logits, which)[:, 0] - logits.mean(-1)  # noqa: E731
        return self.measure(intervention, {"logit": metric})["logit"]

    def watch(self, layer: int, intervention: Intervention | None, reader: Callable[[Call, slice], None]) -> None:
        """Show the attention of one layer to `reader(call, rows)`, some rows at a time; no layer above it is run."""
        edits = intervention.edits if intervention else ()
        first = min(layer, intervention.first_layer) if intervention else layer
        for chunk in self._chunks:
            rows, start = chunk.rows, self._stream(chunk, first)
            show = lambda _, call, rows=rows: reader(call, rows)  # noqa: E731
            self.model.read(self.tokens[rows], show, [layer], edits, rows=rows, start=start)

    def log_prob(self, logits: Tensor, which: Ints) -> Tensor:
        """Metric: log-probability of the right token, in nats; the loss is its negative."""
        return self._right(logits, which)[:, 0] - logits.logsumexp(-1)

    def rank(self, logits: Tensor, which: Ints) -> Tensor:
        """Metric: the place of the right token among all, 1 the likeliest; of equals the best place."""
        return (logits > self._right(logits, which)).sum(-1) + 1

    def kl(self, logits: Tensor, which: Ints) -> Tensor:
        """Metric: Kullback-Leibler divergence of the prediction from the clean one, KL(clean || this), in nats."""
        clean = self._clean_log_probs[which].to(logits.device)
        return (clean.exp() * (clean - logits.log_softmax(-1))).sum(-1)

    def _right(self, logits: Tensor, which: Ints) -> Tensor:
        """[n, 1]: the logit of what really comes next."""
        return logits.gather(-1, torch.from_numpy(self.predictions.token[which]).to(logits.device)[:, None])

    @cached_property
    def _clean_log_probs(self) -> Tensor:
        # n x d_vocab numbers are kept: one clean run serves all interventions.
        kept = torch.empty(len(self.predictions.row), self.model.d_vocab)
        for which, logits in self._run(None):
            kept[which] = logits.log_softmax(-1).cpu()
        return kept

    def _run(self, intervention: Intervention | None) -> Iterator[tuple[Ints, Tensor]]:
        """Yield some of the predictions, as indices, with their logits [n, d_vocab] in float32, until all are had."""
        edits, first = (intervention.edits, intervention.first_layer) if intervention else ((), 0)
        for chunk in self._chunks:
            rows, which = chunk.rows, chunk.predictions
            if not len(which):
                continue
            at = self.predictions.row[which] - rows.start, self.predictions.position[which]
            start = self._stream(chunk, first)
            yield which, self.model.logits(self.tokens[rows], edits, rows=rows, at=at, start=start).float()

    def _stream(self, chunk: _Chunk, layer: int) -> tuple[int, Tensor] | None:
        """The layer and the clean stream that enters it; None for the bottom, where nothing is saved."""
        if layer == 0:
            return None
        if layer not in chunk.streams:
            below = next((kept for kept in chunk.streams.items() if kept[0] < layer), None)
            point = layer, "resid_pre"
            chunk.streams = {layer: self.model.record(self.tokens[chunk.rows], {point}, start=below)[point]}
        return layer, chunk.streams[layer]


def sweep(
    runner: Runner, interventions: Iterable[Intervention], *, advance: Advance = lambda count: None,
    measure: Callable[[Runner, Intervention], Floats] = Runner.log_probs,
) -> Iterator[tuple[Intervention, Floats]]:  # fmt: skip
    """Yield each intervention with what is measured at each prediction [n], the log-probability of the right token if
    nothing else is said, from the lowest layer up; `advance` is told of each. What was yielded stays good when the loop
    is interrupted."""
    for intervention in sorted(interventions, key=lambda one: one.first_layer):
        yield intervention, measure(runner, intervention)
        advance(1)


def greedy(
    runner: Runner, heads: Sequence[Head], intervene: Intervene, *, most: int, advance: Advance = lambda count: None
) -> Iterator[tuple[Head, Floats]]:
    """Yield the head to add next for the largest mean loss, at most `most` of them, with the loss at each prediction
    [n] of all heads chosen so far together. `advance` is told of each intervention that was tried."""
    chosen: list[Head] = []
    while len(chosen) < min(most, len(heads)):
        tried = {}
        for head in sorted(set(heads) - set(chosen)):
            tried[head] = -runner.log_probs(intervene([*chosen, head]))
            advance(1)
        # of equals the lowest head: the order must not depend on the order of a set
        best = max(tried, key=lambda head: (tried[head].mean(), (-head.layer, -head.head)))
        chosen.append(best)
        yield best, tried[best]
