"""A model in one GGUF file loads as a folder does, once converted and then from the cache."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch

import induction_head_detection as script
from common import UserError
from common.loading import gguf, load

LAYERS, HEADS, WIDTH, INNER = 1, 2, 64, 64  # rows of 32 numbers and more, as the format wants them


@pytest.fixture
def written(tmp_path, tokenizer, monkeypatch):
    """A random Llama with the bundled vocabulary, written by the package itself, and an empty cache."""
    writing = pytest.importorskip("gguf", reason="the package gguf is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "tiny llama.gguf"
    writer = writing.GGUFWriter(str(path), "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([1] * len(vocabulary))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.bos_token_id)
    random = np.random.default_rng(0)
    tensors = {"token_embd": (len(vocabulary), WIDTH), "output": (len(vocabulary), WIDTH)}
    tensors |= {f"blk.0.attn_{part}": (WIDTH, WIDTH) for part in ("q", "k", "v", "output")}
    tensors |= {f"blk.0.ffn_{part}": (INNER, WIDTH) for part in ("gate", "up")} | {"blk.0.ffn_down": (WIDTH, INNER)}
    tensors |= dict.fromkeys(("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"), (WIDTH,))
    for name, shape in tensors.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(np.float32) * 0.3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_converted_once_and_then_read_from_the_cache(written, tokenizer, monkeypatch, tmp_path, capfd):
    said = []
    first = load(str(written), say=said.append)
    assert (first.name, first.n_layers, first.n_heads, first.context) == ("tiny llama", LAYERS, HEADS, 64)
    assert "MB" in said[0] and str(tmp_path / "cache") in said[0] and len(said) == 1
    digest = hashlib.sha256(written.read_bytes()).hexdigest()
    assert (gguf.cache_folder() / digest[:32] / gguf.DIGEST).read_text().strip() == digest
    monkeypatch.setattr(gguf, "_read", lambda path: pytest.fail("converted again"))
    again = load(str(written), say=said.append)
    assert len(said) == 1 and again.fingerprint == first.fingerprint
    tokens = first.encode("the cat sat the cat sat")
    assert tokens.tolist()[1:] == tokenizer("the cat sat the cat sat", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = [model.logits(tokens[None]) for model in (first, again)]
    assert torch.equal(*logits)
    assert "Converting" not in capfd.readouterr().err
    arguments = ["--model", str(written), "--no-plots", "--out", str(tmp_path / "o"), "--text", "a b a b"]
    assert script.main(arguments) == 0


def test_another_file_has_another_fingerprint(written):
    first = load(str(written)).fingerprint
    content = bytearray(written.read_bytes())
    content[-8:-4] = np.float32(0.25).tobytes()
    written.write_bytes(content)
    assert load(str(written)).fingerprint != first


def test_a_damaged_file_is_one_line_and_leaves_nothing(written):
    written.write_bytes(written.read_bytes()[:3000])
    with pytest.raises(UserError, match="cannot read the GGUF file"):
        load(str(written))
    assert not list(gguf.cache_folder().iterdir())


def test_without_the_package_the_way_to_it_is_said(tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + b"\x00" * 20)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install gguf"):
        load(str(tmp_path / "m.gguf"))
