"""Small models with random weights of the architectures that the project must read, saved as folders.

Every parameter is drawn afresh, biases and norm weights too, and large enough that attention is far from uniform: a
map that leaves out a bias, a norm weight or the scale is then visibly wrong. Grouped queries, partial rotation and a
sliding window shorter than the texts are set wherever the architecture has them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

LAYERS, HEADS, KEY_HEADS, D_MODEL, D_HEAD = 3, 4, 2, 32, 8
WINDOW = 5  # keys a query of a sliding-window layer sees
CONTEXT = 64


def _gpt2(**shared: Any) -> Any:
    return transformers.GPT2Config(n_positions=CONTEXT, n_embd=D_MODEL, n_layer=LAYERS, n_head=HEADS, **shared)


def _neox(**shared: Any) -> Any:
    return transformers.GPTNeoXConfig(
        hidden_size=D_MODEL, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=64,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
        max_position_embeddings=CONTEXT, **shared,
    )  # fmt: skip


def _modern(config: type) -> Callable[..., Any]:
    """Rotation, grouped queries, RMS norm and a gated MLP, as Llama has them."""

    def build(**shared: Any) -> Any:
        return config(
            hidden_size=D_MODEL, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS,
            head_dim=D_HEAD, intermediate_size=64, max_position_embeddings=CONTEXT, **shared,
        )  # fmt: skip

    return build


def _gemma(config: type, **own: Any) -> Callable[..., Any]:
    """A sliding window in every other layer, and a scale that is not 1/sqrt(d_head)."""

    def build(**shared: Any) -> Any:
        types = ["sliding_attention", "full_attention", "sliding_attention"]
        return _modern(config)(sliding_window=WINDOW, layer_types=types, query_pre_attn_scalar=5, **own, **shared)

    return build


def _opt(**shared: Any) -> Any:
    return transformers.OPTConfig(
        hidden_size=D_MODEL, word_embed_proj_dim=D_MODEL, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        ffn_dim=64, max_position_embeddings=CONTEXT, pad_token_id=1, **shared,
    )  # fmt: skip


def _bloom(**shared: Any) -> Any:
    return transformers.BloomConfig(hidden_size=D_MODEL, n_layer=LAYERS, n_head=HEADS, seq_length=CONTEXT, **shared)


def _phi(**shared: Any) -> Any:
    return transformers.PhiConfig(
        hidden_size=D_MODEL, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=64,
        max_position_embeddings=CONTEXT, **shared,
    )  # fmt: skip


def _gptj(**shared: Any) -> Any:
    return transformers.GPTJConfig(
        n_embd=D_MODEL, n_layer=LAYERS, n_head=HEADS, n_positions=CONTEXT, rotary_dim=4, **shared
    )


CONFIGS: dict[str, Callable[..., Any]] = {
    "gpt2": _gpt2,
    "neox": _neox,
    "llama": _modern(transformers.LlamaConfig),
    "qwen3": _modern(transformers.Qwen3Config),
    "gemma2": _gemma(transformers.Gemma2Config, attn_logit_softcapping=2.0),
    "gemma3": _gemma(transformers.Gemma3TextConfig),
    "opt": _opt,
    "bloom": _bloom,
}
FURTHER: dict[str, Callable[..., Any]] = {
    "gemma": _modern(transformers.GemmaConfig),
    "mistral": _modern(transformers.MistralConfig),
    "phi": _phi,
    "gptj": _gptj,
}


def save(architecture: str, folder: Path, tokenizer: Any, *, seed: int = 0) -> Path:
    """Save a random model of `architecture` (a key of `CONFIGS` or `FURTHER`) and the tokenizer in `folder`.

    Returns the folder.
    """
    bos = tokenizer.bos_token_id
    config = (CONFIGS | FURTHER)[architecture](vocab_size=len(tokenizer), bos_token_id=bos, eos_token_id=bos)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_induction(folder: Path, tokenizer: Any, sender: int, receiver: int, *, seed: int = 0) -> Path:
    """Save a GPT-2 of 2 layers × 2 heads whose weights are set by hand, and the tokenizer; returns the folder.

    The residual stream has three rooms: the token, the position, and what head 0.`sender` copies there of the token
    before. Head 1.`receiver` matches its own token with that room: it is an induction head. All else is 0.
    """
    room, d_head = 128, 160  # two heads of 160 make a residual stream of 320: two rooms of 128 and one of 64
    token, position, copied = slice(0, room), slice(room, room + CONTEXT), slice(room + CONTEXT, 2 * d_head)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=CONTEXT, n_embd=2 * d_head, n_inner=4, n_layer=2, n_head=2,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    first, second = (block.attn for block in model.transformer.h)
    embeddings = torch.randn(len(tokenizer), room, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.fill_(1.0 if ".ln_" in key and key.endswith("weight") else 0.0)
        model.transformer.wte.weight[:, token] = embeddings / embeddings.norm(dim=-1, keepdim=True)
        model.transformer.wpe.weight[:, position] = torch.eye(CONTEXT)
        query, key, value = (slice(2 * d_head * part + sender * d_head, None) for part in range(3))
        first.c_attn.weight[position, query][:, :CONTEXT] = torch.eye(CONTEXT)
        first.c_attn.weight[position, key][:, :CONTEXT] = torch.eye(CONTEXT).roll(1, dims=1)
        first.c_attn.weight[token, value][:, :room] = 0.08 * torch.eye(room)  # what the norm has blown up, undone
        first.c_proj.weight[sender * d_head : sender * d_head + room, copied] = torch.eye(room)
        query, key = (slice(2 * d_head * part + receiver * d_head, None) for part in range(2))
        second.c_attn.weight[token, query][:, :room] = 2.0 * torch.eye(room)
        second.c_attn.weight[copied, key][:, :room] = torch.eye(room)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
