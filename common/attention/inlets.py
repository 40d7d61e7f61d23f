"""Families whose attention transformers does not let be exchanged, led to the one door all the same.

These compute attention inside their own modules. What is replaced is as little as can be: in GPT-Neo the method that
attends, in Falcon the call of torch's fused kernel, in Bloom and MPT, which offer no such seam, the module's forward.
The self-check at load compares each of them with TransformerLens' own patterns, as it does every other family.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Attend = Callable[..., Tensor]  # takes the arguments of a `Call`, gives [batch, query, head, d_head]
Attended = tuple[Tensor, None]  # what an attention module gives: its output, and no weights


def lead_to(network: nn.Module, attend: Attend) -> bool:
    """Lead the attention of `network` to `attend`, for good. False where no module of it is of these families."""
    found = [(module, INLETS[kind]) for module in network.modules() if (kind := type(module).__name__) in INLETS]
    for module, inlet in found:
        inlet(module, attend)
    return bool(found)


def _gpt_neo(module: Any, attend: Attend) -> None:
    def attended(self: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Attended:
        length = query.shape[2]
        visible = self.bias[:, :, :length, :length]  # local layers have a window in it
        if mask is not None:  # padding; its numbers are the lowest of their type where a query may not see
            visible = visible & (mask > torch.finfo(mask.dtype).min / 2)
        # GPT-Neo does not divide by the root of d_head: its weights make up for it.
        return attend(self, query, key, value, visible, scale=1.0).transpose(1, 2), None

    module._attn = MethodType(attended, module)


def _bloom(module: Any, attend: Attend) -> None:
    def forward(
        self: Any, stream: Tensor, residual: Tensor, alibi: Tensor, attention_mask: Tensor, **others: object
    ) -> Attended:
        query, key, value = self._reshape(self.query_key_value(stream))
        given = {"scale": self.inv_norm_factor, "bias": alibi.view(len(stream), self.num_heads, 1, -1), "causal": True}
        output = attend(self, query, key, value, attention_mask, **given)
        return self.dense(output.flatten(2)) + residual, None  # Bloom adds the stream to it here

    module.forward = MethodType(forward, module)


def _mpt(module: Any, attend: Attend) -> None:
    def forward(
        self: Any, stream: Tensor, position_bias: Tensor, cache: object = None, attention_mask: Tensor | None = None
    ) -> Attended:
        mixed = self.Wqkv(stream)
        if self.clip_qkv:
            mixed = mixed.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        query, key, value = (part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in mixed.chunk(3, dim=2))
        # MPT's mask is true where a query may NOT see; its bias is made for the longest text and read from its end.
        visible = None if attention_mask is None else ~attention_mask.bool()
        bias = position_bias[None, :, -1:, -key.shape[2] :]
        output = attend(self, query, key, value, visible, scale=self.softmax_scale, causal=True, bias=bias)
        return self.out_proj(output.flatten(2)), None

    module.forward = MethodType(forward, module)


class _FusedKernel(TorchFunctionMode):
    """While it holds, torch's fused attention is `attend`."""

    def __init__(self, module: nn.Module, attend: Attend):
        super().__init__()
        self._module, self._attend = module, attend

    def __torch_function__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> object:
        given = kwargs or {}
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **given)
        output = self._attend(self._module, *args[:3], given["attn_mask"], causal=given["is_causal"])
        return output.transpose(1, 2)  # torch lets the mode rest while this function runs


def _falcon(module: Any, attend: Attend) -> None:
    own = module.forward
    # All modules share one configuration. Without this Falcon attends in steps of its own and calls no kernel.
    module.config._attn_implementation = "sdpa"

    def forward(self: nn.Module, *args: object, **kwargs: object) -> object:
        with _FusedKernel(self, attend):
            return own(*args, **kwargs)

    module.forward = MethodType(forward, module)


INLETS: dict[str, Callable[[nn.Module, Attend], None]] = {
    "GPTNeoSelfAttention": _gpt_neo,
    "BloomAttention": _bloom,
    "MptAttention": _mpt,
    "FalconAttention": _falcon,
}
