"""Small random models, made from configs and saved as folders, and the bundled model; nothing needs a network."""

from __future__ import annotations

import functools
import os

os.environ["HF_HUB_OFFLINE"] = "1"

from jaxtyping import install_import_hook

install_import_hook("common.attention.call", "beartype.beartype")  # shapes are checked in tests alone

from pathlib import Path

import pytest
import torch
from hypothesis import settings
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from common.heads.tokens import Battery, battery
from common.loading import Model, load
from common.loading.find import MINI

torch.set_num_threads(1)  # the models are tiny: two threads wait for each other longer than they work
settings.register_profile("project", deadline=None, derandomize=True)  # timing never decides a test
settings.load_profile("project")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(MINI)


@pytest.fixture(scope="session")
def random_gpt2_folder(tmp_path_factory, tokenizer) -> Path:
    """A randomly initialised GPT-2 of 3 layers and 4 heads, with the bundled model's tokenizer."""
    return save_random_gpt2(tmp_path_factory.mktemp("models") / "random-gpt2", tokenizer)


@pytest.fixture(scope="session")
def random_gpt2(random_gpt2_folder) -> Model:
    return load(str(random_gpt2_folder))


@pytest.fixture(scope="session")
def hand_built(tmp_path_factory, tokenizer):
    """A function from a seed, or from roles, to a hand-built model and itself loaded as a user's model is."""
    from tests import handbuilt

    @functools.cache
    def of_seed(seed: int):
        return loaded(handbuilt.build(seed, vocabulary=len(tokenizer)))

    def loaded(built):
        return built, load(str(handbuilt.save(built, tmp_path_factory.mktemp("handbuilt"), tokenizer)))

    def make(what):
        if isinstance(what, int):
            return of_seed(what)
        return loaded(handbuilt.assemble(what, vocabulary=len(tokenizer), seed=0))

    return make


@pytest.fixture(scope="session")
def mini() -> Model:
    return load("mini")


@pytest.fixture(scope="session")
def folders(tmp_path_factory, tokenizer, random_gpt2_folder) -> dict[str, Path]:
    """Random models of 4 heads: GPT-2, a Llama with 2 key heads, a GPT-NeoX with parallel blocks."""
    shared = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.3,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.bos_token_id,
    }  # fmt: skip
    torch.manual_seed(0)
    built = {
        "llama": LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **shared)),
        "neox": GPTNeoXForCausalLM(GPTNeoXConfig(**shared)),
    }
    found = {"gpt2": random_gpt2_folder}
    for name, model in built.items():
        found[name] = tmp_path_factory.mktemp("models") / f"random-{name}"
        roughen(model).save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found


@pytest.fixture(scope="session")
def loaded(folders) -> dict[str, Model]:
    return {name: load(str(folder)) for name, folder in folders.items()}


@pytest.fixture(scope="session")
def oracles(folders):
    """An `Oracle` of each of the folders' models."""
    from tests.oracle import Oracle

    return {name: Oracle(folder) for name, folder in folders.items()}


@pytest.fixture(scope="session")
def gemma(tmp_path_factory, tokenizer) -> Model:
    """A random Gemma 2, which norms what its heads write before adding it, and caps its logits."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, intermediate_size=48, initializer_range=0.3, final_logit_softcapping=2.0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "random-gemma"
    roughen(Gemma2ForCausalLM(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load(str(folder))


@pytest.fixture(scope="session")
def drawn(random_gpt2) -> Battery:
    """Three short rows with a repeat, and their controls."""
    return battery(random_gpt2.ordinary(), random_gpt2.bos, rows=3, length=14, seed=1)


def save_random_gpt2(folder: Path, tokenizer, *, layers: int = 3, heads: int = 4, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=layers, n_head=heads, initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    roughen(GPT2LMHeadModel(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def roughen(model: torch.nn.Module) -> torch.nn.Module:
    """Move biases and norm weights off the 0 and 1 they start at: what is 0 or 1 cannot be forgotten visibly."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model
