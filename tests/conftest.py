"""Small random models, made from configs and saved as folders, and the bundled model; nothing needs a network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from common import models

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(models.MINI)


@pytest.fixture(scope="session")
def random_gpt2_folder(tmp_path_factory, tokenizer) -> Path:
    """A randomly initialised GPT-2 of 3 layers and 4 heads, with the bundled model's tokenizer."""
    return save_random_gpt2(tmp_path_factory.mktemp("models") / "random-gpt2", tokenizer)


@pytest.fixture(scope="session")
def random_gpt2(random_gpt2_folder) -> models.Model:
    return models.load(str(random_gpt2_folder))


@pytest.fixture(scope="session")
def mini() -> models.Model:
    return models.load("mini")


def save_random_gpt2(folder: Path, tokenizer, *, layers: int = 3, heads: int = 4, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=layers, n_head=heads, initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
