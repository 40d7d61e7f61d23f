"""What the tests of interventions share: further families, and a model whose attention lies on single keys."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import GPT2LMHeadModel

from common.loading import Model, load
from tests import architectures
from tests.oracle import Oracle

FURTHER = ("opt", "gemma2")  # OPT scales its queries itself; Gemma 2 has a window, a soft-cap and norms after attention

LOUDER = 16  # makes a softmax all but sure of one key, and keeps its rounding within what the self-check allows


@pytest.fixture(scope="session")
def further(tmp_path_factory, tokenizer) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("further")
    return {name: architectures.save(name, root / f"random-{name}", tokenizer) for name in FURTHER}


@pytest.fixture(scope="session")
def loaded(loaded, further, random_gpt2_folder):
    half = load(str(random_gpt2_folder), dtype="bfloat16")
    return {**loaded, **{name: load(str(folder)) for name, folder in further.items()}, "16 bits": half}


@pytest.fixture(scope="session")
def oracles(oracles, further):
    return {**oracles, **{name: Oracle(folder) for name, folder in further.items()}}


class Saturated(NamedTuple):
    """A model whose layer 1 is all but sure of a single key in some queries, and its reference."""

    model: Model
    oracle: Oracle


@pytest.fixture(scope="session")
def saturated(tmp_path_factory, tokenizer, random_gpt2_folder) -> Saturated:
    """The random GPT-2 with the queries of layer 1 `LOUDER` times as long."""
    network = GPT2LMHeadModel.from_pretrained(random_gpt2_folder)
    projection = network.transformer.h[1].attn.c_attn
    with torch.no_grad():
        projection.weight[:, :32] *= LOUDER
        projection.bias[:32] *= LOUDER
    folder = tmp_path_factory.mktemp("models") / "saturated"
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Saturated(load(str(folder)), Oracle(folder))
