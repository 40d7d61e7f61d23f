"""What tests of loading share: an empty hub cache, a model that may be spoiled, a loaded model of any family."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from common.loading import Model, load
from tests import architectures


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty hub cache and no network: what is not in it cannot be had."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put_in_cache(cache: Path, folder: Path, repository: str) -> Path:
    """Lay `folder` out as the hub's client does; returns where the files are."""
    place = cache / f"models--{repository}"
    snapshot = place / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)
    return snapshot


@pytest.fixture
def copied(tmp_path, random_gpt2_folder) -> Path:
    """A folder of the random GPT-2 that a test may spoil."""
    return shutil.copytree(random_gpt2_folder, tmp_path / "copy")


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory, tokenizer) -> Callable[[str], Path]:
    """From a family to the folder of a random model of it."""
    return functools.cache(
        lambda family: architectures.save(family, tmp_path_factory.mktemp("any") / family, tokenizer)
    )


@pytest.fixture(scope="session")
def of_family(family_folder) -> Callable[[str], Model]:
    """From a family to a random model of it, loaded once."""
    return functools.cache(lambda family: load(str(family_folder(family))))
