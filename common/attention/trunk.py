"""The trunk of a model with fused attention, whose patterns show in blocks of queries and never stand whole in memory.

1. Take the Hugging Face model that TransformerLens wraps once more: the same weights, modules of its own, no logits.
2. Give it an attention function of ours. Transformers calls it with the queries and keys that make the scores (after
   rotation and norms), the mask and the scale, in every architecture that has its attention function exchanged
   (`transformers.AttentionInterface`).
3. In each layer compute the pattern of some queries at a time, softmax(q k^T scale) over all the keys they see, hand it
   on and let it go. Then attend with the fused kernel, which keeps no pattern (FlashAttention: Dao et al. 2022,
   arXiv 2205.14135).
4. Leave the forward pass in the last layer, when its pattern has been shown.

Where an architecture does more to its scores (soft caps, sinks, position biases), or its attention cannot be exchanged,
the comparison with TransformerLens' own patterns fails when the model is loaded, and patterns are read from there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

ATTENTION = "patterns_in_blocks"  # the name that transformers knows our attention function by
BLOCK = 1 << 19  # numbers of a pattern that stand in memory at once, unless one query has more; stays in a CPU's cache
BLOCK_GPU = 1 << 25  # the same on a GPU, which small blocks would leave idle
FURTHER = ("softcap", "s_aux", "position_bias")  # arguments by which transformers asks for more than q k^T

# layer, first query, pattern [batch, head, queries, keys]: keys reach from 0 to the last query of the block
BlockReader = Callable[[int, int, torch.Tensor], None]


class _Seen(Exception):
    """Raised when the last layer's pattern has been shown, to leave the forward pass there."""


@dataclass(frozen=True)
class Trunk:
    """A model without its unembedding, whose attention is ours."""

    model: Any
    n_layers: int

    def read(self, tokens: torch.Tensor, read_block: BlockReader) -> None:
        """Run [batch, pos] ids; hand every layer's pattern to `read_block`, some queries at a time, in order."""
        with torch.inference_mode(), suppress(_Seen):
            self.model(tokens, use_cache=False, read_block=read_block, last_layer=self.n_layers - 1)


def take(hf_model: Any) -> Trunk | None:
    """The trunk of a Hugging Face model, sharing its weights; None where transformers will not exchange its attention.

    To be taken before TransformerLens wraps the model, which puts modules of its own into it.
    """
    _register()
    shared = {id(tensor): tensor for tensor in chain(hf_model.parameters(), hf_model.buffers())}
    try:
        model = copy.deepcopy(hf_model, shared).base_model
        model.set_attn_implementation(ATTENTION)
    except Exception:  # a model's own code may be anything, and the bridge shows its patterns in any case
        return None
    return Trunk(model, hf_model.config.get_text_config().num_hidden_layers)


def disagreement(trunk: Trunk, tokens: torch.Tensor, patterns: dict[int, torch.Tensor]) -> float:
    """Largest difference between the trunk's patterns on [batch, pos] ids and the given ones, by layer.

    Infinite where the trunk cannot be run or leaves a layer out.
    """
    shown: dict[int, list[torch.Tensor]] = {}

    def keep(layer: int, start: int, block: torch.Tensor) -> None:
        behind = tokens.shape[1] - block.shape[-1]
        shown.setdefault(layer, []).append(torch.nn.functional.pad(block, (0, behind)))

    try:
        trunk.read(tokens, keep)
        wholes = {layer: torch.cat(blocks, dim=2) for layer, blocks in shown.items()}
        return float(np.max([(wholes[layer] - pattern).abs().max().item() for layer, pattern in patterns.items()]))
    except Exception:  # what other packages' models raise here cannot be known; any of it means: not this way
        return float("inf")


def blocks(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the causal pattern some queries at a time: the first query and [batch, head, queries, keys] in float32.

    `query`: [batch, head, pos, d_head]; `key`: [batch, key head, pos, d_head], each shared by as many query heads;
    `mask`: [batch or 1, 1, pos, pos], true where a query may attend, or None where it may to all before it and itself.
    """
    batch, heads, length, width = query.shape
    most = BLOCK if query.device.type == "cpu" else BLOCK_GPU
    at_once = max(1, most // (batch * heads * length))
    query, key = query.float() * scale, key.float().transpose(-1, -2)
    for start in range(0, length, at_once):
        stop = min(start + at_once, length)
        grouped = query[:, :, start:stop].reshape(batch, key.shape[1], -1, width)
        scores = (grouped @ key[..., :stop]).view(batch, heads, stop - start, stop)
        scores.masked_fill_(_hidden(mask, start, stop, scores), -torch.inf)
        yield start, scores.softmax(-1)


def _hidden(mask: torch.Tensor | None, start: int, stop: int, scores: torch.Tensor) -> torch.Tensor:
    """True where queries `start` to `stop` - 1 may not attend, to broadcast over [batch, head, queries, keys]."""
    if mask is not None:
        return ~mask[..., start:stop, :stop]
    places = torch.arange(stop, device=scores.device)
    return places > places[start:, None]


def _register() -> None:
    """Make our attention function known to transformers, with the masks of its fused one."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    read_block: BlockReader,
    last_layer: int,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Show the pattern in blocks, then attend: the signature is that of transformers' attention functions."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if any(options.get(name) is not None for name in FURTHER):
        raise NotImplementedError("the scores of this model are more than queries times keys")
    layer: Any = module.layer_idx
    for start, block in blocks(query, key, attention_mask, scaling or query.shape[-1] ** -0.5):
        read_block(layer, start, block)
    if layer == last_layer:
        raise _Seen
    kept = value.dtype
    if value.device.type == "cpu":  # the fused kernel there is coarse in 16 bits: three times the error in the scores
        query, key, value = query.float(), key.float(), value.float()
    attended, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    return attended.to(kept), None
