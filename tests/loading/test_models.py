"""Loading: what can be had is loaded, what cannot is refused in one line that helps."""

from __future__ import annotations

import json
import shutil
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from common import UserError
from common.loading import models


def test_a_folder_loads_with_what_the_scripts_need(random_gpt2, random_gpt2_folder):
    assert (random_gpt2.name, random_gpt2.n_layers, random_gpt2.n_heads) == ("random-gpt2", 3, 4)
    assert random_gpt2.context == 64
    assert str(random_gpt2_folder) in random_gpt2.source
    assert len(random_gpt2.fingerprint) == 64


def test_special_tokens_are_not_ordinary_and_stay_text_in_a_text(random_gpt2):
    assert random_gpt2.bos not in random_gpt2.ordinary()
    assert random_gpt2.bos not in random_gpt2.encode("<|endoftext|>")[1:]


def test_any_text_encodes_and_comes_back(mini):
    for text in ("the cat sat", "é😀שלום", "a\x00b\t\n", "$x_1$ \\frac"):
        assert mini.tokenizer.decode(mini.encode(text)[1:]) == text


def test_white_space_is_made_visible():
    assert models.visible(" a\n\t\x00") == "·a⏎→\\x00"


def test_patterns_come_layer_by_layer_and_leave_no_hook(random_gpt2):
    seen = []
    tokens = np.array([[0, 5, 6, 7]])
    models.read_patterns(random_gpt2, tokens, lambda layer, pattern: seen.append((layer, tuple(pattern.shape))))
    assert seen == [(layer, (1, 4, 4, 4)) for layer in range(3)]
    assert not any(point.fwd_hooks for point in random_gpt2.bridge.hook_dict.values())


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty hub cache and no network: what is not in it cannot be had."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put_in_cache(cache, folder, repository: str) -> None:
    """Lay `folder` out as the hub's client does."""
    place = cache / f"models--{repository}"
    snapshot = place / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)


def test_gpt2_without_network_and_cache_says_what_to_do(cache):
    started = time.monotonic()
    with pytest.raises(UserError, match="--model mini.*HF_HOME"):
        models.load("gpt2")
    assert time.monotonic() - started < 5 + models.PATIENCE


def test_auto_without_network_and_cache_is_mini_and_says_so(cache):
    model = models.load("auto")
    assert model.name == "mini"
    assert "neither in the cache" in model.source


def test_auto_with_gpt2_in_the_cache_is_gpt2(cache, random_gpt2_folder):
    put_in_cache(cache, random_gpt2_folder, "gpt2")
    model = models.load("auto")
    assert model.name == "gpt2"
    assert "cache" in model.source


def test_an_old_alias_finds_the_same_cache(cache, random_gpt2_folder):
    put_in_cache(cache, random_gpt2_folder, "gpt2")
    assert models.load("gpt2-small").n_layers == 3


def test_gpt2_in_the_cache_as_a_pickle_only_is_not_taken_for_there(cache, random_gpt2_folder):
    put_in_cache(cache, random_gpt2_folder, "gpt2")
    weights = next(cache.rglob("model.safetensors"))
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(UserError, match="--model mini"):
        models.load("gpt2")


@pytest.fixture
def copied(tmp_path, random_gpt2_folder):
    return shutil.copytree(random_gpt2_folder, tmp_path / "copy")


def test_an_unknown_name_is_one_line(cache):
    with pytest.raises(UserError, match="no-such-model"):
        models.load("no-such-model")


def test_a_file_is_no_model(copied):
    with pytest.raises(UserError, match="is a file"):
        models.load(str(copied / "config.json"))


def test_an_empty_folder_is_no_model(tmp_path):
    with pytest.raises(UserError, match="no config.json"):
        models.load(str(tmp_path))


def test_a_folder_without_weights_is_refused(copied):
    (copied / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no .* weights"):
        models.load(str(copied))


def test_pickled_weights_are_refused_with_the_reason(copied):
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(UserError, match="runs code when it is opened"):
        models.load(str(copied))


def test_truncated_weights_are_refused(copied):
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(UserError, match="do not load"):
        models.load(str(copied))


def test_nan_weights_fail_the_self_check(copied):
    weights = load_file(copied / "model.safetensors")
    weights["transformer.h.1.attn.c_attn.weight"][:] = torch.nan
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="layer 1.*NaN"):
        models.load(str(copied))


def test_a_model_without_attention_is_refused(copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "model_type": "no-such-type", "architectures": ["X"]}))
    with pytest.raises(UserError, match="do not load"):
        models.load(str(copied))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda pattern: pattern.fill_(0.25), "future"),
        (lambda pattern: pattern.mul_(0.9), "sum to 1"),
        (lambda pattern: pattern.fill_(torch.nan), "NaN"),
    ],
)
def test_the_self_check_names_what_is_wrong_with_a_pattern(spoil, reason):
    causal = torch.softmax(torch.full((4, 4), -torch.inf).triu(1), dim=-1)[None, None]
    assert models._complaint(causal.clone()) is None
    assert reason in models._complaint(spoil(causal.clone()))


def test_an_unusable_device_is_said():
    with pytest.raises(UserError, match="--device nonsense"):
        models.load("mini", device="nonsense")
