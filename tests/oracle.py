"""A slow, obvious reference for interventions: transformers alone, attention written out head by head, row by row.

Any causal model that takes an attention function of ours will do (GPT-2, Llama, GPT-NeoX, OPT, Gemma 2). `Changes` says
what to change. It computes in float64 and imports nothing of the project's own attention: what both get wrong in the
same way would otherwise be right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import AttentionInterface, AutoModelForCausalLM

ARCHITECTURES = ("gpt2", "llama", "neox", "opt")

Change = Callable[[int, int, int, torch.Tensor], torch.Tensor]


def same(layer: int, head: int, row: int, value: torch.Tensor) -> torch.Tensor:
    return value


def of(heads: Iterable[tuple[int, ...]], change: Change) -> Change:
    """`change(layer, head, row, value)` for the `heads` alone, each (layer, head) or (stack, layer, head)."""
    places = {tuple(head[-2:]) for head in heads}
    return lambda layer, head, row, value: change(layer, head, row, value) if (layer, head) in places else value


@dataclass
class Changes:
    """Per part, a function of (layer, head, row, value) that gives the value to use. `seen` keeps every value used, by
    (part, layer, head, row). Queries and keys are those after rotation; scores are -inf where a query may not see."""

    q: Change = same
    k: Change = same
    v: Change = same
    scores: Change = same
    pattern: Change = same
    z: Change = same
    seen: dict[tuple[str, int, int, int], torch.Tensor] = field(default_factory=dict)

    def use(self, part: str, layer: int, head: int, row: int, value: torch.Tensor) -> torch.Tensor:
        self.seen[part, layer, head, row] = getattr(self, part)(layer, head, row, value)
        return self.seen[part, layer, head, row]


CURRENT = [Changes()]


def slow_attention(module, query, key, value, attention_mask, scaling=None, softcap=None, sliding_window=None, **_):
    """[batch, head, pos, d_head] in, [batch, pos, head, d_head] out."""
    changes, layer = CURRENT[-1], module.layer_idx
    batch, heads, length, width = query.shape
    shared = heads // key.shape[1]
    scale = 1 / math.sqrt(width) if scaling is None else scaling
    back = torch.arange(length)[:, None] - torch.arange(length)
    hidden = (back < 0) | (back >= (sliding_window or length))
    out = torch.zeros(batch, length, heads, width, dtype=value.dtype)
    for row in range(batch):
        for head in range(heads):
            q = changes.use("q", layer, head, row, query[row, head])
            k = changes.use("k", layer, head, row, key[row, head // shared])
            v = changes.use("v", layer, head, row, value[row, head // shared])
            scores = q @ k.T * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            scores = changes.use("scores", layer, head, row, scores.masked_fill(hidden, -math.inf))
            seen = (scores > -math.inf).any(-1, keepdim=True)  # softmax of nothing is NaN: here it is no attention
            pattern = torch.where(seen, scores.where(seen, 0.0).softmax(-1), 0.0)
            pattern = changes.use("pattern", layer, head, row, pattern)
            out[row, :, head] = changes.use("z", layer, head, row, pattern @ v)
    return out, None


AttentionInterface.register("slow", slow_attention)


class Oracle:
    """Transformers alone on a model folder, in float64."""

    def __init__(self, folder: Path):
        self.model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="slow").double().eval()

    def logits(self, tokens: np.ndarray, changes: Changes | None = None) -> torch.Tensor:
        """[rows, pos, d_vocab] with the changes made."""
        CURRENT.append(changes or Changes())
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
    def _backbone(self):
        return getattr(self.model.base_model, "decoder", self.model.base_model)

    @property
    def final_norm(self):
        names = ("ln_f", "norm", "final_layer_norm")
        return next(getattr(self._backbone, name) for name in names if hasattr(self._backbone, name))

    def read_out(self, stream: torch.Tensor) -> torch.Tensor:
        """Logits of a final residual stream."""
        with torch.no_grad():
            return self.model.get_output_embeddings()(self.final_norm(stream))

    @property
    def layers(self):
        return self._backbone.h if hasattr(self._backbone, "h") else self._backbone.layers

    def output_weights(self, layer: int, head: int, width: int) -> torch.Tensor:
        """Rows of W_O that a head's output meets, [d_head, d_model]."""
        block = self.layers[layer]
        if hasattr(block, "attn"):  # GPT-2 keeps [in, out]
            rows = block.attn.c_proj.weight
        elif hasattr(block, "attention"):
            rows = block.attention.dense.weight.T
        else:
            own = block.self_attn
            rows = (own.o_proj if hasattr(own, "o_proj") else own.out_proj).weight.T
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
        """Every clean q, k, v, scores, pattern and z, by (part, layer, head, row)."""
        changes = Changes()
        self.logits(tokens, changes)
        return changes.seen

    def written(self, tokens: np.ndarray, head: tuple[int, ...]) -> torch.Tensor:
        """What a head adds to the residual stream of its clean run, [rows, pos, d_model]."""
        layer, number = head[-2:]
        seen = self.record(tokens)
        output = torch.stack([seen["z", layer, number, row] for row in range(len(tokens))])
        return output @ self.output_weights(layer, number, output.shape[-1])


def traces(model) -> list[tuple[str, int, bool]]:
    """What a run could leave behind in the modules of a loaded model: hooks, and a `forward` put over the class's."""
    return [
        (name, len(module._forward_hooks) + len(module._forward_pre_hooks), "forward" in vars(module))
        for name, module in model.door.network.named_modules()
    ]


CLOSE = 1e-5  # of the largest logit: some dozen roundings of float32


def assert_near(found: torch.Tensor, expected: torch.Tensor, close: float = CLOSE) -> None:
    """Whether logits are those of the reference, up to rounding."""
    allowed = close * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found.double(), expected.double(), atol=allowed, rtol=0.0)


def check(
    model, oracle, tokens: np.ndarray, intervention, changes: Changes, *, least: float = 1e-3, close: float = CLOSE
) -> None:
    """The intervention gives the reference's logits, acts, works on part of the rows, and leaves nothing behind."""
    clean, before = model.logits(tokens), traces(model)
    changed = model.logits(tokens, intervention.edits)
    assert_near(changed, oracle.logits(tokens, changes), close)
    assert (changed - clean).abs().max() > least
    part = model.logits(tokens[1:3], intervention.edits, rows=slice(1, 3))
    assert_near(part, changed[1:3], close)
    assert traces(model) == before
    with torch.no_grad():  # nor does a run that does not go through the door meet the edits of the last that did
        outside = model.door.network(input_ids=torch.from_numpy(tokens), use_cache=False).logits
    assert torch.equal(outside, clean)
    assert torch.equal(model.logits(tokens), clean)
