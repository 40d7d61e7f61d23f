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


def _gpt_neo(**shared: Any) -> Any:
    return transformers.GPTNeoConfig(
        hidden_size=D_MODEL, num_layers=LAYERS, num_heads=HEADS, intermediate_size=64, window_size=WINDOW,
        attention_types=[[["global", "local", "global"], 1]], max_position_embeddings=CONTEXT, **shared,
    )  # fmt: skip


def _mpt(**shared: Any) -> Any:
    return transformers.MptConfig(
        d_model=D_MODEL, n_heads=HEADS, n_layers=LAYERS, max_seq_len=CONTEXT, expansion_ratio=2, **shared
    )


def _falcon(**own: Any) -> Callable[..., Any]:
    def build(**shared: Any) -> Any:
        return transformers.FalconConfig(
            hidden_size=D_MODEL, num_hidden_layers=LAYERS, num_attention_heads=HEADS, max_position_embeddings=CONTEXT,
            **own, **shared,
        )  # fmt: skip

    return build


def _gpt_oss(**shared: Any) -> Any:
    return _modern(transformers.GptOssConfig)(
        num_local_experts=2, num_experts_per_tok=1, sliding_window=WINDOW, pad_token_id=0, **shared
    )


def _cohere(**shared: Any) -> Any:
    return _modern(transformers.CohereConfig)(pad_token_id=0, **shared)


# Families with ways of their own: local windows, ALiBi, one key head for all, attention sinks.
AT_THE_DOOR: dict[str, Callable[..., Any]] = {
    "gptneo": _gpt_neo,
    "mpt": _mpt,
    "falcon-rotary": _falcon(alibi=False, multi_query=True, new_decoder_architecture=False),
    "falcon-new": _falcon(alibi=False, num_kv_heads=KEY_HEADS, new_decoder_architecture=True),
    "stablelm": _modern(transformers.StableLmConfig),
    "cohere": _cohere,
    "gpt-oss": _gpt_oss,
}
CAUSAL = CONFIGS | FURTHER | AT_THE_DOOR
# transformers' own eager attention adds Falcon's ALiBi twice, its fused one once: no eager pattern is to agree with.
ODD = {"falcon-alibi": _falcon(alibi=True, multi_query=False)}


def build(architecture: str, vocabulary: int, *, bos: int = 0, seed: int = 0) -> Any:
    """A random causal model of `architecture`, a key of `CAUSAL` or `ODD`, with eager attention."""
    config = (CAUSAL | ODD)[architecture](vocab_size=vocabulary, bos_token_id=bos, eos_token_id=bos)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return _drawn(model, seed)


def _drawn(model: Any, seed: int, size: float = 0.25) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model.eval()


# Encoder and decoder: 2 and 3 layers of 4 heads in T5, 2 and 2 elsewhere.
_SHARED = {"d_model": D_MODEL, "decoder_start_token_id": 0}
_BART = {
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": CONTEXT, **_SHARED,
}  # fmt: skip
_T5 = {
    "d_kv": D_HEAD, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 3, "num_heads": HEADS,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, **_SHARED,
}  # fmt: skip
ENCODER_DECODER: dict[str, tuple[str, Callable[..., Any], dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", transformers.T5Config, _T5),
    "t5-gated": (
        "T5ForConditionalGeneration", transformers.T5Config,
        {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "bart": ("BartForConditionalGeneration", transformers.BartConfig, {**_BART, "forced_eos_token_id": None}),
    "marian": ("MarianMTModel", transformers.MarianConfig, {**_BART, "pad_token_id": 0}),
}  # fmt: skip


def build_encoder_decoder(architecture: str, vocabulary: int, *, seed: int = 0) -> Any:
    """A random model of `architecture`, a key of `ENCODER_DECODER`, with eager attention."""
    kind, config_type, options = ENCODER_DECODER[architecture]
    config = config_type(vocab_size=vocabulary, **options)
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, kind)(config)
    return _drawn(model, seed, size=0.15)  # T5 does not divide its scores: with more, rounding alone would be 1e-5


IMAGE_TOKEN, IMAGE_GRID, PATCH = 5, (1, 8, 8), 4


def build_qwen_vl(vocabulary: int, *, seed: int = 0) -> Any:
    """A random Qwen2.5-VL of 2 layers in each stack; the first of its vision layers sees windows of the image alone."""
    text = {
        "vocab_size": vocabulary, "hidden_size": D_MODEL, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS, "max_position_embeddings": 2 * CONTEXT,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": D_MODEL, "num_heads": HEADS, "intermediate_size": 64, "out_hidden_size": D_MODEL,
        "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16,
        "fullatt_block_indexes": [1], "in_channels": 3,
    }  # fmt: skip
    special = {"image_token_id": IMAGE_TOKEN, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **special)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        kind = transformers.Qwen2_5_VLForConditionalGeneration
        model = kind._from_config(config, attn_implementation="eager")
    return _drawn(model, seed)


def save(architecture: str, folder: Path, tokenizer: Any, *, seed: int = 0) -> Path:
    """Save a random model of `architecture` (a key of `CAUSAL`) and the tokenizer in `folder`.

    Returns the folder.
    """
    model = build(architecture, len(tokenizer), bos=tokenizer.bos_token_id, seed=seed)
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
