"""Turn what Tracr compiled (compile.py) into a GPT-2 folder that loads like any other.

Tracr's transformer has no LayerNorm, no biases, ReLU in its MLPs and scores divided by the root of its own key size.
GPT-2 has a LayerNorm before every block and cannot do without. So:

1. Stream. Each of Tracr's residual directions takes two places, one with the value and one with its negative, so that
   every vector has mean 0. What is read is half their difference: a mean that rounding leaves behind cancels.
2. Norm. One more such pair holds `CONSTANT` everywhere. It is so large that LayerNorm divides all vectors by the same
   number, up to a few parts in ten million, and weights are multiplied by that number where they read.
3. Heads. Tracr's query, key, value and output weights as they are, padded with zeros to GPT-2's head size; the query is
   multiplied by root(head size / Tracr's key size), so that scores are Tracr's own. Heads that Tracr left empty stay
   empty: they attend to all alike and write nothing.
4. BOS. Tracr's place 0 has no position, and its BOS token is no value of any sequence: both are rows of the
   embeddings, which are taken over.
5. Output. Tracr takes the largest of the values that are put out. Here `LOGIT` times each is the logit of the token
   that it stands for. Values that are no tokens get ids of their own behind the vocabulary: the model can predict them
   and no text holds them. A number is the logit of the token that it is about, or else of one such id.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

Floats = NDArray[np.float64]
Entry = dict[str, Any]  # of a program, from programs.json

COMPILED = Path(__file__).parent / "compiled"
BOS, PAD = "compiler_bos", "compiler_pad"
CONSTANT = 4096.0
LOGIT = 10.0  # nats per unit of output: what Tracr puts out, a one-hot vector, becomes a prediction with little doubt
EPSILON = 1e-5  # of LayerNorm


@dataclass(frozen=True)
class Compiled:
    """A program as Tracr compiled it: its `entry` in programs.json, its weight `matrices` in the order of compile.py,
    and what Tracr's own run gave on some `tokens` [rows, pos]: `patterns` [rows, layers, heads, query, key], `output`
    [rows, pos, values]. `labels`: what each direction of the residual stream stands for."""

    entry: Entry
    matrices: list[Floats]
    tokens: NDArray[np.int64]
    patterns: Floats
    output: Floats
    labels: list[str]

    @property
    def output_directions(self) -> list[int]:
        """Where in the residual stream the output lies."""
        name, values = self.entry["output"], self.entry["output_values"]
        wanted = [f"{name}:{value}" for value in values] or [name]
        return [self.labels.index(label) for label in wanted]

    @property
    def output_ids(self) -> list[int]:
        """The token ids whose logits the output is."""
        known, values = self.entry["token_values"], self.entry["output_values"]
        if self.entry["output_is"] == "tokens":
            return [known.index(value) for value in values]
        if self.entry["number_of"] is not None:
            return [known.index(str(self.entry["number_of"]))]
        return [len(known) + number for number in range(max(1, len(values)))]


def read_programs(folder: Path = COMPILED) -> Entry:
    """What compile.py wrote about all programs and the `versions` it ran with."""
    return json.loads((folder / "programs.json").read_text(encoding="utf-8"))


def read_compiled(entry: Entry, folder: Path = COMPILED) -> Compiled:
    """The arrays of one program that Tracr did compile."""
    with np.load(folder / f"{entry['name']}.npz") as stored:
        arrays = dict(stored)
    sizes = arrays["shapes"].prod(1)
    flat = np.zeros(sizes.sum())
    flat[np.cumsum(arrays["steps"])] = arrays["values"]
    pieces = np.split(flat, np.cumsum(sizes)[:-1])
    matrices = [piece.reshape(shape) for piece, shape in zip(pieces, arrays["shapes"], strict=True)]
    patterns, output = (arrays[name].astype(np.float64) for name in ("patterns", "output"))
    return Compiled(entry, matrices, arrays["tokens"].astype(np.int64), patterns, output, arrays["labels"].tolist())


def convert(compiled: Compiled) -> GPT2LMHeadModel:
    """A GPT-2 that computes what Tracr's model computes."""
    token, place, *layers = compiled.matrices
    n_heads, d_head = compiled.entry["heads_per_layer"], _head_size(compiled)
    stream = _Stream(token.shape[1], n_heads * d_head)
    model = _empty(compiled, n_heads * d_head, len(place))
    no_token = np.zeros((model.config.vocab_size - len(token), token.shape[1]))  # ids that stand for values
    _fill(model.transformer.wte.weight, stream.written(np.vstack([token, no_token])))
    _fill(model.transformer.wpe.weight, stream.written(place) + stream.constant())
    for number, block in enumerate(model.transformer.h):
        query, key, value, out, inwards, outwards = layers[6 * number : 6 * number + 6]
        sharper = math.sqrt(d_head / compiled.entry["key_size"])
        reading = [_by_head(matrix, n_heads, d_head) for matrix in (sharper * query, key, value)]
        _fill(block.attn.c_attn.weight, np.hstack([stream.read(matrix) for matrix in reading]))
        _fill(block.attn.c_proj.weight, stream.written(_by_head(out.T, n_heads, d_head).T))
        _fill(block.mlp.c_fc.weight, stream.read(inwards))
        _fill(block.mlp.c_proj.weight, stream.written(outwards))
    unembedding = np.zeros((token.shape[1], model.config.vocab_size))
    unembedding[compiled.output_directions, compiled.output_ids] = LOGIT
    _fill(model.lm_head.weight, stream.read(unembedding).T)
    return model.eval()


def save_converted(compiled: Compiled, folder: Path) -> Path:
    """Write the GPT-2 and a tokenizer of the words `t0`, `t1` and so on, as a folder that loads."""
    convert(compiled).save_pretrained(folder)
    values = compiled.entry["token_values"]
    special = {BOS: "<bos>", PAD: "<pad>"}
    words = {special.get(value, f"t{value}"): number for number, value in enumerate(values)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", pad_token="<pad>").save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class _Stream:
    """Tracr's residual stream of `directions` numbers in one of `d_model` numbers that LayerNorm leaves as it is."""

    directions: int
    d_model: int

    def written(self, matrix: Floats) -> Floats:
        """[..., directions] as it is added to the stream, [..., d_model]."""
        wide = np.pad(matrix, ((0, 0), (0, self.d_model // 2 - self.directions)))
        return np.hstack([wide, -wide])

    def read(self, matrix: Floats) -> Floats:
        """What reads [directions, n] from Tracr's stream, as it reads from behind LayerNorm, [d_model, n]."""
        divided_by = math.sqrt(2 * CONSTANT**2 / self.d_model + EPSILON)
        return divided_by / 2 * self.written(matrix.T).T

    def constant(self) -> Floats:
        """What every place adds, [1, d_model]."""
        half = CONSTANT * np.eye(1, self.d_model // 2, self.directions)
        return np.hstack([half, -half])


def _head_size(compiled: Compiled) -> int:
    """The least even head size that holds Tracr's keys and makes the stream wide enough."""
    needed = 2 * (len(compiled.labels) + 1)
    size = max(compiled.entry["key_size"], -(-needed // compiled.entry["heads_per_layer"]))
    return size + size % 2


def _by_head(matrix: Floats, n_heads: int, d_head: int) -> Floats:
    """[n, heads * key size]: each head's columns padded with zeros to `d_head`."""
    heads = np.split(matrix, n_heads, axis=1)
    return np.hstack([np.pad(head, ((0, 0), (0, d_head - head.shape[1]))) for head in heads])


def _empty(compiled: Compiled, d_model: int, places: int) -> GPT2LMHeadModel:
    """A GPT-2 of the right shape with all weights and biases 0, but for LayerNorm, which has weight 1."""
    entry = compiled.entry
    vocabulary = max(len(entry["token_values"]), 1 + max(compiled.output_ids))
    bos = entry["token_values"].index(BOS)
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=places, n_embd=d_model, n_layer=entry["layers"],
        n_head=entry["heads_per_layer"], n_inner=entry["hidden"], activation_function="relu",
        layer_norm_epsilon=EPSILON, tie_word_embeddings=False, bos_token_id=bos, eos_token_id=bos,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if ".ln_" in name and name.endswith("weight") else 0.0)
    return model


def _fill(parameter: torch.nn.Parameter, values: Floats) -> None:
    if parameter.shape != values.shape:
        raise ValueError(f"weights of shape {values.shape} do not fit {tuple(parameter.shape)}")
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(values))
