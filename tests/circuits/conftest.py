"""Random models of every architecture, made and loaded when they are first asked for."""

from __future__ import annotations

import functools

import pytest

from common.loading import Model, load
from tests import architectures


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory, tokenizer):
    """A function from an architecture to the folder of a random model of it."""
    root = tmp_path_factory.mktemp("architectures")

    @functools.cache
    def folder(name: str):
        return architectures.save(name, root / f"random-{name}", tokenizer)

    return folder


@pytest.fixture(scope="session")
def model_of(folder_of):
    """A function from an architecture to a random model of it."""

    @functools.cache
    def model(name: str) -> Model:
        return load(str(folder_of(name)))

    return model


@pytest.fixture
def planted(tmp_path, tokenizer) -> Model:
    """Induction set by hand: 0.1 copies the token before, 1.0 looks for it."""
    return load(str(architectures.save_induction(tmp_path / "set", tokenizer, 1, 0)))
