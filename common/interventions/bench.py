"""Many interventions on the same rows, without running again what does not change.

1. Run the rows once. Keep what each block is called with beside the residual stream (masks, positions), and the
   residual stream itself at the bottom.
2. An intervention whose lowest layer is L runs from L on: the clean stream is carried up to L once for all of a sweep,
   which takes interventions from the lowest layer up. Where it changes heads' outputs alone, it starts after L's
   attention, from the clean output of its heads.
3. Only the positions where a prediction is read go through the last block's MLP, the final norm and the unembedding.
4. At the start each short way is compared with the model's own logits, the shortest first, and the first that agrees is
   taken. "halves": a block is attention added to the stream, then an MLP added to that. "blocks": the model is its
   blocks, then a norm and an unembedding. "whole": neither, and every intervention runs the whole model.

On GPT-2 the short ways do the same operations on the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from common import UserError
from common.heads.statistics import Floats, Ints
from common.interventions.edits import (
    POINTS,
    Enough,
    Head,
    Intervention,
    applied,
    has_lone_mlp,
    mlp_output,
    run_forward,
    run_until,
)
from common.loading.models import Model

CLOSE = 1e-4  # largest difference, relative to the largest logit, that counts as the same in float32
CLOSE_HALF = 3e-2  # the same in 16 bits


@dataclass(frozen=True)
class Reads:
    """Predictions to read: `row`, `position` [reads] of the query, and `token` [reads], what comes next there."""

    row: Ints
    position: Ints
    token: Ints

    @classmethod
    def of(cls, tokens: Ints, predicted: NDArray[np.bool_]) -> Reads:
        """The predictions of the tokens in the mask `predicted` [rows, pos], each read one position before."""
        row, position = np.nonzero(predicted[:, 1:])
        return cls(row, position, tokens[row, position + 1])

    def row_means(self, values: Floats, rows: int) -> Floats:
        """[reads] to means per row [rows]; NaN for a row without a read."""
        with np.errstate(invalid="ignore"):
            return np.bincount(self.row, values, minlength=rows) / np.bincount(self.row, minlength=rows)


# logits [n, d_vocab] of some reads, and which reads they are, to a value per read [n]
Metric = Callable[[torch.Tensor, Ints], torch.Tensor]


@dataclass
class _Chunk:
    """Some of the rows: the reads in them, what each block is called with, the clean stream entering layers and the
    clean output of their heads."""

    rows: slice
    reads: Ints
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    streams: dict[int, torch.Tensor] = field(default_factory=dict)
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)


class Bench:
    """A model, rows of ids and the reads in them, ready to be run under many interventions.

    `tokens`: [rows, pos]. `way` is the one the model allows: "halves", "blocks" or "whole". Raises UserError where
    there is nothing to read.
    """

    def __init__(self, model: Model, tokens: Ints, reads: Reads, *, batch_size: int = 8):
        if not len(reads.row):
            raise UserError("no token of these rows continues an earlier copy: there is no prediction to read")
        self.model = model
        self.tokens = tokens
        self.reads = reads
        starts = range(0, len(tokens), batch_size)
        parts = [slice(start, min(start + batch_size, len(tokens))) for start in starts]
        self._chunks = [self._start(rows) for rows in parts if len(self._reads_in(rows))]
        self.way = self._shortest_way(self._chunks[0])

    def measure(self, intervention: Intervention | None, metrics: Mapping[str, Metric]) -> dict[str, Floats]:
        """Each metric at each read, {name: [reads]}, under the intervention (None: clean)."""
        found = {name: np.full(len(self.reads.row), np.nan) for name in metrics}
        for chunk in self._chunks:
            logits = self._logits(chunk, intervention)
            for name, metric in metrics.items():
                found[name][chunk.reads] = metric(logits, chunk.reads).double().cpu().numpy()
        return found

    def log_prob(self, logits: torch.Tensor, which: Ints) -> torch.Tensor:
        """Metric: log-probability of the right token, in nats; the loss is its negative."""
        right = logits.gather(-1, self._right(logits, which))[:, 0]
        return right - logits.logsumexp(-1)

    def rank(self, logits: torch.Tensor, which: Ints) -> torch.Tensor:
        """Metric: the place of the right token among all, 1 the likeliest; of equals the best place."""
        return (logits > logits.gather(-1, self._right(logits, which))).sum(-1) + 1

    def kl(self, logits: torch.Tensor, which: Ints) -> torch.Tensor:
        """Metric: Kullback-Leibler divergence of the prediction from the clean one, KL(clean || this), in nats.

        Keeps the clean log-probabilities of every read: reads x d_vocab numbers.
        """
        clean = self._clean_log_probs[torch.from_numpy(which)].to(logits.device)
        return (clean.exp() * (clean - logits.log_softmax(-1))).sum(-1)

    def _right(self, logits: torch.Tensor, which: Ints) -> torch.Tensor:
        return torch.from_numpy(self.reads.token[which]).to(logits.device)[:, None]

    @cached_property
    def _clean_log_probs(self) -> torch.Tensor:
        kept = torch.empty(len(self.reads.row), self.model.bridge.cfg.d_vocab)
        for chunk in self._chunks:
            kept[torch.from_numpy(chunk.reads)] = self._logits(chunk, None).log_softmax(-1).cpu()
        return kept

    # --- the short way ---

    def _reads_in(self, rows: slice) -> Ints:
        return np.flatnonzero((self.reads.row >= rows.start) & (self.reads.row < rows.stop))

    def _start(self, rows: slice) -> _Chunk:
        """Run some rows clean through the blocks, noting what every block is called with."""
        chunk = _Chunk(rows, self._reads_in(rows))

        def note(block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stream = args[0] if args else kwargs["hidden_states"]
            if not chunk.calls:
                chunk.streams[0] = stream.detach().clone()
            others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            chunk.calls.append((args[1:], others))

        handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in self.model.bridge.blocks]
        try:
            run_until(self.model, self.tokens[rows], "ln_final.hook_in")
        finally:
            for handle in handles:
                handle.remove()
        return chunk

    def _shortest_way(self, chunk: _Chunk) -> str:
        """The shortest way whose clean logits are the model's own."""
        own = self._whole(chunk, None)
        close = own.abs().max() * (CLOSE if own.dtype == torch.float32 else CLOSE_HALF)
        halves = all(has_lone_mlp(block) for block in self._blocks)
        for self.way in ["halves", "blocks"] if halves else ["blocks"]:
            with suppress(RuntimeError, TypeError, AttributeError):  # families whose parts cannot be called alone
                if (own - self._from_layer(chunk, None, 0, at_output=True)).abs().max() <= close:
                    return self.way
        return "whole"

    @property
    def _blocks(self) -> Any:
        return self.model.bridge.blocks

    def _places(self, chunk: _Chunk) -> tuple[Ints, Ints]:
        return self.reads.row[chunk.reads] - chunk.rows.start, self.reads.position[chunk.reads]

    def _logits(self, chunk: _Chunk, intervention: Intervention | None) -> torch.Tensor:
        """[reads of the chunk, d_vocab] in float32."""
        if self.way == "whole":
            return self._whole(chunk, intervention).float()
        layer = intervention.first_layer if intervention else 0
        at_output = intervention is not None and intervention.at_outputs(layer)
        return self._from_layer(chunk, intervention, layer, at_output=at_output).float()

    def _whole(self, chunk: _Chunk, intervention: Intervention | None) -> torch.Tensor:
        with applied(self.model, intervention, chunk.rows):
            logits = run_forward(self.model, self.tokens[chunk.rows])
        return logits[self._places(chunk)]

    def _from_layer(
        self, chunk: _Chunk, intervention: Intervention | None, layer: int, *, at_output: bool
    ) -> torch.Tensor:
        """Logits at the reads, run from `layer` on, below which the intervention does nothing, or from the output of
        its heads, before which it does nothing."""
        bridge = self.model.bridge
        with torch.no_grad():
            stream = self._clean_stream(chunk, layer)
            output = self._clean_output(chunk, layer) if at_output and self.way == "halves" else None
            with applied(self.model, intervention, chunk.rows):
                return bridge.unembed(bridge.ln_final(self._at_reads(chunk, layer, stream, output)))

    def _at_reads(self, chunk: _Chunk, layer: int, stream: torch.Tensor, output: torch.Tensor | None) -> torch.Tensor:
        """The final residual stream where predictions are read, [reads, d_model], from what enters `layer`; where the
        `output` of its heads is given, they are not run."""
        last = self.model.n_layers - 1
        if self.way == "blocks":
            return self._through(chunk, stream, layer, last + 1)[self._places(chunk)]
        attn = self._blocks[layer].attn
        middle = self._attend(chunk, layer, stream) if output is None else stream + attn.o(output)
        if layer < last:
            stream = self._through(chunk, self._feed(layer, middle), layer + 1, last)
            middle = self._attend(chunk, last, stream)
        return self._feed(last, middle[self._places(chunk)])

    def _through(self, chunk: _Chunk, stream: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """The stream after blocks `first` to `last` - 1."""
        for layer in range(first, last):
            stream = self._block(chunk, layer, stream)
        return stream

    def _block(self, chunk: _Chunk, layer: int, stream: torch.Tensor) -> torch.Tensor:
        args, kwargs = chunk.calls[layer]
        out = self._blocks[layer](stream, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def _attend(self, chunk: _Chunk, layer: int, stream: torch.Tensor) -> torch.Tensor:
        """The stream after a block's attention: what its second norm reads."""
        return self._seen_in_block(chunk, layer, stream, "ln2.hook_in")

    def _feed(self, layer: int, middle: torch.Tensor) -> torch.Tensor:
        """The stream after a block's MLP."""
        return middle + mlp_output(self._blocks[layer], middle)

    def _seen_in_block(self, chunk: _Chunk, layer: int, stream: torch.Tensor, point: str) -> torch.Tensor:
        """What passes a hook point of the block, which is left there."""
        seen = []

        def leave(activation: torch.Tensor, hook: Any) -> None:
            seen.append(activation)
            raise Enough

        with self.model.bridge.hooks(fwd_hooks=[(f"blocks.{layer}.{point}", leave)]), suppress(Enough):
            self._block(chunk, layer, stream)
        return seen[0]

    # --- what is clean is kept ---

    def _clean_stream(self, chunk: _Chunk, layer: int) -> torch.Tensor:
        """The clean residual stream that enters `layer`; beside the bottom one only the latest is kept."""
        below = max(at for at in chunk.streams if at <= layer)
        if below != layer:
            stream = self._through(chunk, chunk.streams[below], below, layer)
            chunk.streams = {0: chunk.streams[0], layer: stream}
        return chunk.streams[layer]

    def _clean_output(self, chunk: _Chunk, layer: int) -> torch.Tensor:
        """What `layer`'s W_O reads in the clean run, [rows, pos, heads x d_head]; only the latest layer's is kept."""
        if layer not in chunk.outputs:
            output = self._seen_in_block(chunk, layer, self._clean_stream(chunk, layer), POINTS["z"])
            chunk.outputs = {layer: output.flatten(2)}
        return chunk.outputs[layer]


def logit_difference(right: Ints, wrong: Ints) -> Metric:
    """Metric: logit of one named answer minus that of another, ids [reads] each."""

    def metric(logits: torch.Tensor, which: Ints) -> torch.Tensor:
        one, other = (torch.from_numpy(ids[which]).to(logits.device)[:, None] for ids in (right, wrong))
        return (logits.gather(-1, one) - logits.gather(-1, other))[:, 0]

    return metric


# --- many interventions ---


def sweep(
    bench: Bench,
    interventions: Iterable[Intervention],
    metrics: Mapping[str, Metric] | None = None,
    *,
    advance: Callable[[int], None] = lambda count: None,
) -> Iterator[tuple[Intervention, dict[str, Floats]]]:
    """Yield each intervention with its metrics at each read (by default the log-probability of the right token), from
    the lowest layer up; `advance` is told of each. What was yielded stays good when the loop is left or interrupted."""
    metrics = metrics or {"log_prob": bench.log_prob}
    for intervention in sorted(interventions, key=lambda one: one.first_layer):
        yield intervention, bench.measure(intervention, metrics)
        advance(1)


def greedy(
    bench: Bench,
    candidates: Sequence[Head],
    intervene: Callable[[Sequence[Head]], Intervention],
    *,
    most: int,
    advance: Callable[[int], None] = lambda count: None,
) -> Iterator[tuple[Head, Floats]]:
    """Yield the head to add next for the largest mean loss at the reads, at most `most` of them, with the loss at each
    read [reads] of all heads chosen so far together. `advance` is told of each intervention that was tried."""
    chosen: list[Head] = []
    while len(chosen) < min(most, len(candidates)):
        tried = {}
        for head in sorted(set(candidates) - set(chosen)):
            tried[head] = -bench.measure(intervene([*chosen, head]), {"log_prob": bench.log_prob})["log_prob"]
            advance(1)
        best = max(tried, key=lambda head: (tried[head].mean(), (-head[0], -head[1])))
        chosen.append(best)
        yield best, tried[best]
