"""A slow, obvious reference for interventions: transformers alone, attention written out head by head, row by row.

Any causal model that takes an attention function of ours will do (GPT-2, Llama, GPT-NeoX). `Edits` says what to change.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import AttentionInterface, AutoModelForCausalLM

from common.heads.tokens import TokenBatch
from common.interventions import interventions
from common.interventions.edits import Recordings
from common.loading import models

ARCHITECTURES = ("gpt2", "llama", "neox")

Change = Callable[[int, int, int, torch.Tensor], torch.Tensor]


def same(layer: int, head: int, row: int, value: torch.Tensor) -> torch.Tensor:
    return value


@dataclass
class Edits:
    """Per part, a function of (layer, head, row, clean value) that gives the value to use. `seen` keeps every value
    used, by (part, layer, head, row). Queries and keys are those after rotation."""

    q: Change = same
    k: Change = same
    v: Change = same
    pattern: Change = same
    z: Change = same
    seen: dict[tuple[str, int, int, int], torch.Tensor] = field(default_factory=dict)

    def use(self, part: str, layer: int, head: int, row: int, value: torch.Tensor) -> torch.Tensor:
        self.seen[part, layer, head, row] = getattr(self, part)(layer, head, row, value)
        return self.seen[part, layer, head, row]


CURRENT = [Edits()]


def slow_attention(module, query, key, value, attention_mask, **kwargs):
    """[batch, head, pos, d_head] in, [batch, pos, head, d_head] out."""
    edits, layer = CURRENT[-1], module.layer_idx
    batch, heads, length, width = query.shape
    shared = heads // key.shape[1]
    out = torch.zeros(batch, length, heads, width)
    for row in range(batch):
        for head in range(heads):
            q = edits.use("q", layer, head, row, query[row, head])
            k = edits.use("k", layer, head, row, key[row, head // shared])
            v = edits.use("v", layer, head, row, value[row, head // shared])
            scores = q @ k.T / math.sqrt(width)
            ahead = torch.ones(length, length).triu(1).bool()
            pattern = edits.use("pattern", layer, head, row, scores.masked_fill(ahead, -math.inf).softmax(-1))
            out[row, :, head] = edits.use("z", layer, head, row, pattern @ v)
    return out, None


AttentionInterface.register("slow", slow_attention)


class Oracle:
    """Transformers alone on a model folder."""

    def __init__(self, folder: Path):
        self.model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="slow").eval()

    def logits(self, tokens: np.ndarray, edits: Edits | None = None) -> torch.Tensor:
        """[rows, pos, d_vocab] with the edits made."""
        CURRENT.append(edits or Edits())
        try:
            with torch.no_grad():
                return self.model(torch.from_numpy(tokens), use_cache=False).logits
        finally:
            CURRENT.pop()

    def final_stream(self, tokens: np.ndarray) -> torch.Tensor:
        """What the final norm reads, [rows, pos, d_model]."""
        seen = []
        handle = self.final_norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            self.logits(tokens)
        finally:
            handle.remove()
        return seen[0]

    @property
    def final_norm(self):
        backbone = self.model.base_model
        return next(getattr(backbone, at) for at in ("ln_f", "norm", "final_layer_norm") if hasattr(backbone, at))

    def read_out(self, stream: torch.Tensor) -> torch.Tensor:
        """Logits of a final residual stream."""
        with torch.no_grad():
            return self.model.get_output_embeddings()(self.final_norm(stream))

    @property
    def layers(self):
        backbone = self.model.base_model
        return backbone.h if hasattr(backbone, "h") else backbone.layers

    def output_weights(self, layer: int, head: int, width: int) -> torch.Tensor:
        """Rows of W_O that a head's output meets, [d_head, d_model]."""
        block = self.layers[layer]
        if hasattr(block, "attn"):  # GPT-2 keeps [in, out]
            rows = block.attn.c_proj.weight
        else:
            rows = (block.self_attn.o_proj if hasattr(block, "self_attn") else block.attention.dense).weight.T
        return rows[head * width : (head + 1) * width].detach()

    def record_shifted(self, tokens: np.ndarray, layer: int, change: torch.Tensor):
        """As `record`, with `change` [rows, pos, d_model] added to the residual stream that `layer` reads."""

        def shift(module, args, kwargs):
            if args:
                return (args[0] + change, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + change}

        handle = self.layers[layer].register_forward_pre_hook(shift, with_kwargs=True)
        try:
            return self.record(tokens)
        finally:
            handle.remove()

    def record(self, tokens: np.ndarray) -> dict[tuple[str, int, int, int], torch.Tensor]:
        """Every clean q, k, v, pattern and z, by (part, layer, head, row)."""
        edits = Edits()
        self.logits(tokens, edits)
        return edits.seen


def bridge_logits(model: models.Model, tokens: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return model.bridge.original_model(torch.from_numpy(tokens), use_cache=False).logits


def assert_no_hooks(model) -> None:
    assert not any(point.fwd_hooks for point in model.bridge.hook_dict.values())


def recorded(model, batch: TokenBatch) -> Recordings:
    return Recordings(model, batch.tokens, batch_size=2)


def every_kind(model, drawn, paths: bool = True):
    """One intervention of each kind on a late head."""
    clean, control = recorded(model, drawn.repeats), recorded(model, drawn.controls)
    classes = interventions.position_classes(drawn.repeats)
    head = [(1, 2)]
    yield interventions.zero(head)
    yield interventions.mean(head, control, classes, classes)
    yield interventions.resample(head, control, seed=0)
    yield interventions.uniform(head)
    yield interventions.pattern_from(head, control)
    yield interventions.forbid(head, drawn.repeats.cells["prefix_matching"])
    for part in "qkv":
        yield interventions.input_from(head, part, clean, control)
        if not paths:
            continue
        yield interventions.path(interventions.zero([(0, 0)]), head, part, clean)
        yield interventions.without_source([(0, 0)], head, part, clean)
