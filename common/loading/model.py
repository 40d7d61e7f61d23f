"""A loaded model: what it is called, how large it is, and how it is run, read and edited."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common import UserError
from common.attention.call import Call, Edit
from common.attention.door import Door, Reader
from common.attention.head import ONLY_STACK, Place
from common.loading.escapes import escaped
from common.loading.families import Parts, dtype_of

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerBase

TokenIds = NDArray[np.int64]
Point = tuple[int, str]  # a layer, and one of the places below where its activations can be read

# Points in the residual stream, as (part of a `Layer`, which side of it); those of attention are in common/attention.
STREAM_POINTS = {
    "resid_pre": ("block", "input"),  # what a layer reads
    "resid_mid": ("mlp_in", "input"),  # the stream after attention, in layers whose MLP reads it
    "resid_post": ("block", "output"),
    "projected": ("projection", "output"),  # what all heads of a layer write, with the output bias
    "attn_out": ("attention_out", "output"),  # the same behind the norm that some families have there
    "mlp_out": ("mlp_out", "output"),
}


@dataclass(frozen=True, repr=False)
class Model:
    """A loaded model. `name` is what results call it, `source` where it came from, `fingerprint` a hash of its weights
    and configuration; `context` is the longest row it takes, BOS included; `bos` the id every row starts with;
    `labels_file` the labels.json that it ships, if it does; `weights` the SHA-256 of each weights file, by name;
    `notes` what a reader of its results must know of how it was loaded; `unfused_layers` how many layers do what no
    fused kernel knows. `door` runs it, `parts` are its layers, `bridge` is
    TransformerLens' own view of the same weights, the witness of the self-check. `refused`: what its family does not
    allow, and why."""

    door: Door
    parts: Parts
    bridge: TransformerBridge
    tokenizer: PreTrainedTokenizerBase
    name: str
    source: str
    fingerprint: str
    context: int
    bos: int
    labels_file: Path | None = None
    weights: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    unfused_layers: int = 0
    refused: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        sizes = f"{self.n_layers} layers of {self.n_heads} heads, {self.context} tokens, {self.d_vocab} words"
        return f"Model({self.name}: {sizes}; {self.source}; weights {self.fingerprint[:12]})"

    @property
    def n_layers(self) -> int:
        return self.bridge.cfg.n_layers

    @property
    def n_heads(self) -> int:
        return self.bridge.cfg.n_heads

    @property
    def d_model(self) -> int:
        return self.bridge.cfg.d_model

    @property
    def d_vocab(self) -> int:
        return self.bridge.cfg.d_vocab

    @property
    def device(self) -> torch.device:
        return next(self.door.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return dtype_of(self.door.network)

    # --- texts ---

    def encode(self, text: str) -> TokenIds:
        """BOS and the token ids of `text`, [pos]; special tokens written out in the text stay text.

        Raises UserError for a text that is no Unicode, as arguments in another encoding than UTF-8 come in.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"the text {text[:40]!r} is not UTF-8 (character {error.start}): give it as UTF-8"
            ) from None
        if not text:
            return np.array([self.bos], dtype=np.int64)
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        return np.array([self.bos, *ids], dtype=np.int64)

    def ordinary(self) -> TokenIds:
        """Ids of the tokens that are not special, ascending."""
        special = set(self.tokenizer.all_special_ids) | set(getattr(self.tokenizer, "added_tokens_decoder", {}))
        size = min(len(self.tokenizer), self.d_vocab)
        return np.array([token for token in range(size) if token not in special], dtype=np.int64)

    def strings(self, tokens: TokenIds) -> list[str]:
        """Each token of a row as a reader should see it: BOS by name, spaces and line ends made visible."""
        return ["BOS" if token == self.bos else visible(self.tokenizer.decode([int(token)])) for token in tokens]

    # --- runs ---

    def logits(
        self,
        tokens: TokenIds,
        edits: Sequence[Edit] = (),
        *,
        rows: slice = slice(None),
        at: tuple[TokenIds, TokenIds] | None = None,
        start: tuple[int, Tensor] | None = None,
    ) -> Tensor:
        """Logits [rows, pos, d_vocab] of [rows, pos] ids under `edits`, or [n, d_vocab] `at` (row, position) [n] each.

        `rows`: which rows of those that the edits were made for these are. `start`: a layer and the stream
        [rows, pos, d_model] that enters it; the layers below are not run.
        """
        self._allow(edits, start)
        places = None if at is None else (self._ids(at[0]), self._ids(at[1]))
        with torch.no_grad():
            found = self.door.run(
                self._inputs(tokens), edits=edits, rows=rows, start=self._start(start), predictions=places
            )
        assert found is not None  # it was not asked to leave
        return found

    def read(
        self,
        tokens: TokenIds,
        reader: Callable[[int, Call], None],
        layers: Sequence[int] | None = None,
        edits: Sequence[Edit] = (),
        *,
        rows: slice = slice(None),
        start: tuple[int, Tensor] | None = None,
    ) -> None:
        """Run [rows, pos] ids and show the attention of every layer, or of some, to `reader(layer, call)`.

        The run is left in the last of them: what follows (its output, the unembedding) is not needed.
        """
        self._allow(edits, start)
        wanted = range(self.n_layers) if layers is None else layers
        readers = {Place(ONLY_STACK, layer): partial(reader, layer) for layer in wanted}
        below = [edit for edit in edits if edit.head.layer <= max(wanted)]  # the others would never be reached
        begin = self._start(start)
        with torch.no_grad():
            self.door.run(self._inputs(tokens), edits=below, rows=rows, readers=readers, last=max(readers), start=begin)

    def record(
        self,
        tokens: TokenIds,
        wanted: set[Point],
        edits: Sequence[Edit] = (),
        *,
        rows: slice = slice(None),
        start: tuple[int, Tensor] | None = None,
        taps: Sequence[tuple[nn.Module, str, Callable[[Tensor], Tensor | None]]] = (),
    ) -> dict[Point, Tensor]:
        """The activations of one run over [rows, pos] ids, left after the last layer that is wanted.

        A point is (layer, name): one of `STREAM_POINTS` [rows, pos, d_model]; `q`, `k`, `v`, `z` [rows, pos, head,
        d_head], keys and values given to every query head that shares them; `pattern`, `scores` [rows, head, query,
        key]. `taps`: as `Door.run` takes them. Raises UserError for a point that the architecture does not have.
        """
        self._allow(edits, start)
        found: dict[Point, Tensor] = {}
        readers: dict[Place, Reader] = {}
        watched = list(taps)
        for layer in {layer for layer, _ in wanted}:
            asked = {name for of, name in wanted if of == layer}
            if inside := asked - STREAM_POINTS.keys():
                readers[Place(ONLY_STACK, layer)] = partial(_keep_attention, found, layer, inside)
            for name in asked & STREAM_POINTS.keys():
                keep = partial(_keep_stream, found, (layer, name), tokens.shape)
                watched.append((*self._point(layer, name), keep))
        with torch.no_grad():
            self.door.run(
                self._inputs(tokens), edits=edits, rows=rows, readers=readers, taps=watched, start=self._start(start),
                last=self._behind(wanted),
            )  # fmt: skip
        return found

    def _point(self, layer: int, name: str) -> tuple[nn.Module, str]:
        part, side = STREAM_POINTS[name]
        module = getattr(self.parts.layers[layer], part)
        if module is None or (name == "resid_mid" and not self.parts.layers[layer].sequential):
            raise UserError(f"'{self.name}' has no {name} in layer {layer}: its architecture has no such place")
        return module, side

    def _behind(self, wanted: set[Point]) -> Place | nn.Module:
        """Where a run may be left once all wanted points were seen."""
        last = max(layer for layer, _ in wanted)
        names = {name for layer, name in wanted if layer == last}
        if names == {"resid_pre"}:
            return self.parts.layers[last].attention
        if not names & STREAM_POINTS.keys() - {"resid_pre"}:
            return Place(ONLY_STACK, last)
        above = self.parts.layers[last + 1 :]
        return above[0].block if above else self.parts.final_norm

    def _start(self, start: tuple[int, Tensor] | None) -> tuple[Sequence[nn.Module], Tensor] | None:
        return None if start is None else ([layer.block for layer in self.parts.layers[: start[0] + 1]], start[1])

    def _allow(self, edits: Sequence[Edit], start: tuple[int, Tensor] | None) -> None:
        """Raise UserError for edits that this model does not allow, or in layers that a run does not pass through."""
        if edits and "edits" in self.refused:
            raise UserError(self.refused["edits"])
        if start and (below := [edit.head for edit in edits if edit.head.layer < start[0]]):
            raise UserError(f"an edit of {below[0]} changes nothing in a run that starts at layer {start[0]}")

    def _inputs(self, tokens: TokenIds) -> dict[str, Tensor]:
        return {"input_ids": self._ids(tokens)}

    def _ids(self, tokens: TokenIds) -> Tensor:
        return torch.from_numpy(tokens).to(self.device)


def _keep(found: dict[Point, Tensor], point: Point, value: Tensor) -> None:
    found[point] = value.detach().clone()


def _keep_stream(found: dict[Point, Tensor], point: Point, shape: tuple[int, ...], value: Tensor) -> None:
    _keep(found, point, value.reshape(*shape, -1))  # OPT lays all rows of a batch end to end before its MLP


def _keep_attention(found: dict[Point, Tensor], layer: int, names: set[str], call: Call) -> None:
    """What a layer's attention shows, under the edits of the run."""
    makers: dict[str, Callable[[], Tensor]] = {
        "q": lambda: call.queries().transpose(1, 2),
        "k": lambda: call.keys().transpose(1, 2),
        "v": lambda: call.values().transpose(1, 2),
        "z": lambda: call.output,
        "pattern": lambda: call.pattern().to(call.q.dtype),
        "scores": lambda: torch.stack([call.scores_of(head) for head in range(call.n_heads)], 1),
    }
    for name in names:
        _keep(found, (layer, name), makers[name]())


def visible(token: str) -> str:
    """A token with its spaces, line ends and other unprintable characters made visible."""
    return escaped(token.replace(" ", "·").replace("\n", "⏎").replace("\t", "→"))
