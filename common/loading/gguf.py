"""Models in one GGUF file, as llama.cpp uses them, turned into a folder in Hugging Face format.

1. Take the SHA-256 of the file; a folder of that name in the user's cache is the model, converted before.
2. Otherwise read the file with transformers' own reader, which needs the package `gguf`: quantized weights become
   float32, so the folder is larger than the file.
3. Write the folder under another name and rename it, so that a stopped conversion leaves nothing that looks whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import secrets
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common import UserError

DIGEST = "gguf.sha256"  # in the folder: of which file it is


def is_gguf(path: Path) -> bool:
    """Whether the file begins as GGUF files do."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def cache_folder() -> Path:
    """Where converted models are kept: below XDG_CACHE_HOME, else below ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "induction-heads" / "gguf"


def folder_of(path: Path, say: Callable[[str], None]) -> Path:
    """The folder with the weights and tokenizer of the GGUF file, converted now where it was not before.

    `say` is told what a conversion costs. Raises UserError where the file cannot be read or the folder not be written.
    """
    try:
        digest = sha256(path)
        kept = cache_folder() / digest[:32]
        if (kept / DIGEST).exists():
            return kept
        if find_spec("gguf") is None:
            raise UserError(
                f"reading {path} needs the package gguf: pip install gguf, or use a folder with safetensors"
            )
        size = path.stat().st_size / 1e6
        say(f"converting {path} ({size:.0f} MB) to float32, once; kept in {kept} for the next time")
        return _convert(path, kept, digest)
    except OSError as error:
        raise UserError(f"converting {path} failed: {error.strerror or error}") from error


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _convert(path: Path, kept: Path, digest: str) -> Path:
    kept.parent.mkdir(parents=True, exist_ok=True)
    staging = kept.parent / f".{kept.name}.{secrets.token_hex(4)}"
    try:
        model, tokenizer = _read_gguf(path)
        staging.mkdir()
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        (staging / DIGEST).write_text(digest + "\n", encoding="utf-8")
        if not kept.exists():
            staging.rename(kept)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return kept


def _read_gguf(path: Path) -> tuple[Any, Any]:
    """Weights in float32 and tokenizer of a GGUF file; UserError where transformers cannot read it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **options)
        with contextlib.redirect_stderr(io.StringIO()):  # a bar for every tensor
            model, loaded = AutoModelForCausalLM.from_pretrained(
                path.parent, dtype=torch.float32, output_loading_info=True, **options
            )
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"transformers cannot read the GGUF file {path}: {lines[0][:200]}") from error
    if loaded["missing_keys"]:
        raise UserError(f"the GGUF file {path} lacks weights, such as {sorted(loaded['missing_keys'])[0]}")
    model.config.architectures = [type(model).__name__]
    model.hf_quantizer = None  # the weights are plain float32 now, and can be saved as such
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer
