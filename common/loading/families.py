"""What an architecture calls its parts: the one place that knows the names of blocks, norms, projections and MLPs.

TransformerLens has an adapter for every architecture it wraps, which maps its own names (`ln1`, `attn`, `mlp`) to those
of the Hugging Face modules. The names are read from there; the modules are those of the door's network, which is what
runs; the weights per head come from the bridge, which splits joint projections and knows which way they are stored.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common import UserError

if TYPE_CHECKING:  # TransformerLens takes seconds to import
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.generalized_components import AttentionBridge, BlockBridge, NormalizationBridge
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

Doubles = NDArray[np.float64]


# --- norms ---


@dataclass(frozen=True)
class Norm:
    """LayerNorm or RMSNorm as a linear map once its scale is given: x -> linear(x) / scale(x) + offset.

    `gain`, `offset`: [d_model], or [1] where the norm has none; `centred`: whether it takes the mean off first.
    """

    gain: Doubles
    offset: Doubles
    centred: bool
    eps: float

    @classmethod
    def of(cls, norm: NormalizationBridge) -> Norm:
        """From a normalization of the bridge."""
        module = norm.original_component
        weight, bias = (getattr(module, part, None) for part in ("weight", "bias"))
        # Gemma stores its weight less 1.
        gain = np.ones(1) if weight is None else plain(weight) + (1.0 if norm.uses_weight_offset else 0.0)
        offset = np.zeros(1) if bias is None else plain(bias)
        eps = getattr(module, "eps", getattr(module, "variance_epsilon", norm.config.eps))
        return cls(gain, offset, not norm.uses_rms_norm, float(eps))

    def centre(self, x: Doubles) -> Doubles:
        """x less its mean where the norm takes it off, [..., d_model]."""
        return x - x.mean(-1, keepdims=True) if self.centred else x

    def scale(self, x: Doubles) -> Doubles:
        """[..., 1]: what the norm divides x [..., d_model] by."""
        return np.sqrt((self.centre(x) ** 2).mean(-1, keepdims=True) + self.eps)

    def linear(self, x: Doubles) -> Doubles:
        """The part of the norm that is linear in x, before its division, [..., d_model]."""
        return self.centre(x) * self.gain


class _Unchanged(Norm):
    def scale(self, x: Doubles) -> Doubles:
        return np.ones(1)


# Where an architecture has no norm: linear(x) / scale(x) + offset is x.
UNCHANGED = _Unchanged(np.ones(1), np.zeros(1), centred=False, eps=0.0)


def plain(value: Tensor) -> Doubles:
    """A tensor as a float64 array on the CPU."""
    return value.detach().cpu().double().numpy()


# --- layers ---


@dataclass(frozen=True)
class Layer:
    """One layer of the network, in the field's names. A part that the architecture does not have is None.

    `attention_in` and `mlp_in` are the norms before attention and MLP, `attention_out` and `mlp_out` what writes last
    on the way to the residual stream (the norm behind, where there is one), `projection` reads the head outputs.
    `sequential`: the MLP reads the stream after attention; False where both read the same (parallel blocks).
    """

    block: nn.Module
    attention: nn.Module
    projection: nn.Module
    attention_in: nn.Module | None
    attention_out: nn.Module
    mlp_in: nn.Module | None
    mlp: nn.Module | None
    mlp_out: nn.Module | None
    sequential: bool
    bridged: BlockBridge

    @property
    def weights(self) -> AttentionBridge:
        """The weights of the heads: `W_Q` [head, d_model, d_head], `W_K`, `W_V` [key head, d_model, d_head], of which
        there are fewer where query heads share them, `W_O` [head, d_head, d_model]; biases `b_Q`, `b_K`, `b_V`
        [head, d_head] and `b_O` [d_model], or None."""
        return self.bridged.attn

    @property
    def norm(self) -> Norm | None:
        """The norm that attention reads through."""
        return Norm.of(self.bridged.ln1) if hasattr(self.bridged, "ln1") else None

    @property
    def norm_behind(self) -> Norm | None:
        """The norm that what attention wrote goes through before it is added to the stream."""
        return Norm.of(self.bridged.ln1_post) if hasattr(self.bridged, "ln1_post") else None

    def norms_of_heads(self) -> tuple[Norm | None, Norm | None]:
        """The norms of the heads' queries and of their keys, which some families have."""
        found = (getattr(self.weights, name, None) for name in ("q_norm", "k_norm"))
        query, key = (None if norm is None else Norm.of(norm) for norm in found)
        return query, key

    @property
    def has_lone_mlp(self) -> bool:
        """Whether an MLP with a norm reads the stream after attention and asks for nothing else (Bloom's is given the
        stream too, and adds to it itself)."""
        if self.mlp is None or self.mlp_in is None or not self.sequential:
            return False
        asked = inspect.signature(self.mlp.forward).parameters.values()
        return sum(one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD for one in asked) <= 1

    def mlp_of(self, middle: Tensor) -> Tensor:
        """What the MLP makes of the stream after attention [..., d_model]. Asks for `has_lone_mlp`."""
        made = cast(nn.Module, self.mlp)(cast(nn.Module, self.mlp_in)(middle))
        return made[0] if isinstance(made, tuple) else made


@dataclass(frozen=True)
class Parts:
    """The layers of a network, what stands before and behind them, and the weights of the unembedding.

    `positions`: the module that gives what is added to the embedding for positions, or None. `final_norm`: its module;
    `norm`: the same as a linear map.
    """

    layers: tuple[Layer, ...]
    positions: nn.Module | None
    final_norm: nn.Module
    norm: Norm
    unembedding: nn.Module


def parts_of(bridge: TransformerBridge, network: nn.Module) -> Parts:
    """The parts of the door's `network`, which has the modules of the model that the bridge wraps.

    Raises AttributeError or KeyError where the adapter's names are not those of the network.
    """
    names = bridge.adapter.component_mapping

    def named(name: str) -> nn.Module | None:
        known = names.get(name)
        return network.get_submodule(known.name) if known and known.name else None

    blocks = network.get_submodule(str(names["blocks"].name))
    layers = tuple(_layers(bridge, cast(Sequence[nn.Module], blocks)))
    final = cast(nn.Module, named("ln_final"))
    return Parts(layers, named("pos_embed"), final, Norm.of(bridge.ln_final), _unembedding(network))


def _layers(bridge: TransformerBridge, blocks: Sequence[nn.Module]) -> Iterator[Layer]:
    names: Mapping[str, GeneralizedComponent] = bridge.adapter.component_mapping["blocks"].submodules
    attention_names = names["attn"]
    for number, block in enumerate(blocks):

        def part(name: str, block: nn.Module = block) -> nn.Module | None:
            known = names.get(name)
            return block.get_submodule(known.name) if known and known.name else None

        if not hasattr(bridge.blocks[number], "attn"):
            raise UserError(f"layer {number} has no attention (a state-space or convolution layer?)")
        attention = cast(nn.Module, part("attn"))
        projection = attention.get_submodule(str(attention_names.submodules["o"].name))
        mlp = part("mlp")
        last = mlp
        if mlp is None or _adds_the_stream(mlp):  # OPT's MLP is no module of its own
            last = (mlp or block).get_submodule(str(names["mlp"].submodules["out"].name))
        yield Layer(
            block=block,
            attention=attention,
            projection=projection,
            attention_in=part("ln1"),
            attention_out=part("ln1_post") or (projection if _adds_the_stream(attention) else attention),
            mlp_in=part("ln2"),
            mlp=mlp,
            mlp_out=part("ln2_post") or last,
            sequential=f"blocks.{number}.hook_resid_mid" in bridge.hook_dict,
            bridged=bridge.blocks[number],
        )


def _adds_the_stream(module: nn.Module) -> bool:
    """Whether a module is given the residual stream and adds what it makes to it: Bloom's attention and MLP do."""
    return "residual" in inspect.signature(module.forward).parameters


def _unembedding(network: nn.Module) -> nn.Module:
    return cast(nn.Module, network.get_output_embeddings())  # type: ignore[operator]


def unembedding_weights(parts: Parts) -> tuple[Tensor, Tensor | None]:
    """[d_vocab, d_model] and the bias [d_vocab], or None."""
    return cast(Tensor, parts.unembedding.weight), cast("Tensor | None", getattr(parts.unembedding, "bias", None))


def dtype_of(network: nn.Module) -> torch.dtype:
    """What the network computes in."""
    return next(network.parameters()).dtype
