"""Families whose attention transformers does not let be exchanged, led to the one door all the same.

These compute attention inside their own modules. What is replaced is as little as can be: in GPT-Neo the method that
attends, in Falcon the call of torch's fused kernel, in Bloom and MPT, which offer no such seam, the module's forward.
The self-check at load compares each of them with TransformerLens' own patterns, as it does every other family.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from common.attention.call import Call

Attend = Callable[[Call], Tensor]


class _GPTNeoAttention(Protocol):
    bias: Tensor  # [1, 1, pos, pos]: true where a query may see a key; local layers have a window in it


class _BloomAttention(Protocol):
    num_heads: int
    head_dim: int
    inv_norm_factor: float
    query_key_value: nn.Module
    dense: nn.Module
    _reshape: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


class _Config(Protocol):
    _attn_implementation: str


class _Configured(Protocol):
    config: _Config


class _MptAttention(Protocol):
    n_heads: int
    head_dim: int
    softmax_scale: float
    clip_qkv: float | None
    Wqkv: nn.Module
    out_proj: nn.Module


def lead_to(network: nn.Module, attend: Attend) -> bool:
    """Lead the attention of `network` to `attend`, for good. False where no module of it is of these families."""
    inlets = [(module, INLETS[kind]) for module in network.modules() if (kind := type(module).__name__) in INLETS]
    for module, inlet in inlets:
        inlet(module, attend)
    return bool(inlets)


def _gpt_neo(module: nn.Module, attend: Attend) -> None:
    def attended(
        self: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        length = query.shape[2]
        visible = cast(_GPTNeoAttention, self).bias[:, :, :length, :length]
        if mask is not None:  # padding; its numbers are the lowest of their type where a query may not see
            visible = visible & (mask > torch.finfo(mask.dtype).min / 2)
        # GPT-Neo does not divide by the root of d_head: its weights make up for it.
        return attend(Call(self, query, key, value, visible, scale=1.0)).transpose(1, 2), None

    module._attn = MethodType(attended, module)  # type: ignore[assignment]


def _bloom(module: nn.Module, attend: Attend) -> None:
    def forward(
        self: nn.Module, hidden_states: Tensor, residual: Tensor, alibi: Tensor, attention_mask: Tensor | None,
        **others: object,
    ) -> tuple[Tensor, None]:  # fmt: skip
        own = cast(_BloomAttention, self)
        query, key, value = own._reshape(own.query_key_value(hidden_states))
        bias = alibi.view(len(hidden_states), own.num_heads, 1, -1)
        call = Call(self, query, key, value, attention_mask, scale=own.inv_norm_factor, causal=True, bias=bias)
        return own.dense(attend(call).flatten(2)) + residual, None  # Bloom adds the stream to it here

    module.forward = MethodType(forward, module)


def _mpt(module: nn.Module, attend: Attend) -> None:
    def forward(
        self: nn.Module, hidden_states: Tensor, position_bias: Tensor, cache: object = None,
        attention_mask: Tensor | None = None, **others: object,
    ) -> tuple[Tensor, None]:  # fmt: skip
        own = cast(_MptAttention, self)
        mixed = own.Wqkv(hidden_states)
        if own.clip_qkv:
            mixed = mixed.clamp(min=-own.clip_qkv, max=own.clip_qkv)
        query, key, value = (part.unflatten(-1, (own.n_heads, -1)).transpose(1, 2) for part in mixed.chunk(3, dim=2))
        # MPT's mask is true where a query may NOT see; its bias is made for the longest text and read from its end.
        visible = None if attention_mask is None else ~attention_mask.bool()
        bias = position_bias[None, :, -1:, -key.shape[2] :]
        call = Call(self, query, key, value, visible, scale=own.softmax_scale, causal=True, bias=bias)
        return own.out_proj(attend(call).flatten(2)), None

    module.forward = MethodType(forward, module)


class _FusedKernel(TorchFunctionMode):
    """While it holds, torch's fused attention is `attend`."""

    def __init__(self, module: nn.Module, attend: Attend):
        super().__init__()
        self._module, self._attend = module, attend

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: tuple[Tensor, ...] = (),
        kwargs: dict[str, Tensor] | None = None,
    ) -> object:  # fmt: skip
        given = kwargs or {}
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **given)
        query, key, value = args[:3]
        call = Call(self._module, query, key, value, given["attn_mask"], causal=bool(given["is_causal"]))
        return self._attend(call).transpose(1, 2)  # torch lets the mode rest while this function runs


def _falcon(module: nn.Module, attend: Attend) -> None:
    own = module.forward
    # All modules share one configuration. Without this Falcon attends in steps of its own and calls no kernel.
    cast(_Configured, module).config._attn_implementation = "sdpa"

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
