"""Find the folder that holds a model: the bundled `mini`, a folder of the user's, one converted from a GGUF file, or a
named model in the local Hugging Face cache, downloaded first where it is missing and the hub answers within `PATIENCE`
seconds.
"""

from __future__ import annotations

import difflib
import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

from common import UserError
from common.loading import gguf
from common.loading.escapes import escaped, first_line

MINI = Path(__file__).resolve().parents[2] / "models" / "mini"
GPT2 = "gpt2"
PATIENCE = 4.0  # seconds that the hub has to answer before we call it out of reach
WANTED = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model")
UNWANTED = ("onnx/*", "*/*", "consolidated*")


def find_folder(name: str, say: Callable[[str], None]) -> tuple[Path, str, str]:
    """The folder that holds the model, the name to show, and a sentence on where it came from."""
    if name == "mini":
        return MINI, "mini", "bundled with this project"
    if name == "auto":
        return _auto()
    if os.path.isdir(name):
        return Path(name), _shown(Path(name).resolve().name), escaped(f"folder {name}")
    if os.path.exists(name) and gguf.is_gguf(Path(name)):
        return gguf.folder_of(Path(name), say), _shown(Path(name).stem), escaped(f"GGUF file {name}")
    if os.path.exists(name):
        raise UserError(
            f"{name} is a file: --model takes a model name, a folder in Hugging Face format, or a GGUF file"
        )
    if name.startswith(("/", "./", "../", "~")):
        raise UserError(f"there is no folder {name}: give a folder in Hugging Face format, or use --model mini")
    return _from_hub(name)


def _shown(name: str) -> str:
    """A folder's name as results and output folders can bear it."""
    return escaped(name).replace("\\", "_") if not name.isprintable() else name or "model"


class _NotHad(UserError):
    """A named model cannot be had: `reason` says why, in a clause without a remedy; the message has both."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


def _auto() -> tuple[Path, str, str]:
    """GPT-2 small where it can be had within `PATIENCE` seconds, else `mini`, with the reason."""
    try:
        folder, shown, source = _from_hub(GPT2)
        return folder, shown, f"{source}, chosen by --model auto"
    except _NotHad as error:
        return MINI, "mini", f"bundled with this project; --model auto could not have GPT-2 small: {error.reason}"


class _Patterns(TypedDict):
    """Which files of a repository are downloaded."""

    allow_patterns: list[str]
    ignore_patterns: list[str]


def _from_hub(name: str) -> tuple[Path, str, str]:
    """A model of the hub: from the local cache where it is whole, else downloaded; UserError where neither works."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    from transformer_lens.tools.model_registry.registry_io import resolve_model_alias

    repository = resolve_model_alias(name) or name
    wanted = _Patterns(allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED))
    cached = "it is not in the local Hugging Face cache"
    try:
        folder = Path(snapshot_download(repository, local_files_only=True, **wanted))
        if has_weights(folder):
            return folder, name, "local Hugging Face cache"
        cached = "its copy in the local Hugging Face cache has no safetensors weights, or not all of them"
    except HFValidationError:
        raise UserError(
            f"'{name}' is neither a folder nor a model name{_nearest(name)}; --model mini is bundled"
        ) from None
    except LocalEntryNotFoundError:
        pass
    _ask_hub(repository, name, cached)
    try:
        return Path(snapshot_download(repository, **wanted)), name, "downloaded from the Hugging Face hub"
    except Exception as error:
        reason = f"downloading it failed ({_why(error)})"
        raise _NotHad(
            f"downloading '{name}' failed ({_why(error)}); --model mini needs no network", f"{cached}, and {reason}"
        ) from error


def _why(error: BaseException) -> str:
    """What went wrong, in a clause."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "no space left on the disk of the cache, which HF_HOME names" if full else escaped(first_line(error))


def _ask_hub(repository: str, name: str, cached: str) -> None:
    """Return if the hub has the model; raise UserError if it has not, or does not answer in time. `cached`: why the
    cache does not do."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    answer: list[Exception | None] = []

    def ask() -> None:
        try:
            HfApi().model_info(repository, timeout=PATIENCE)
            answer.append(None)
        except Exception as error:
            answer.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PATIENCE)
    problem = answer[0] if answer else TimeoutError(f"no answer within {PATIENCE:.0f} seconds")
    if problem is None:
        return
    if isinstance(problem, GatedRepoError):
        login = f"'{name}' asks for a login: run `hf auth login` first, or use --model mini"
        raise _NotHad(login, f"{cached}, and the hub asks for a login (`hf auth login`)")
    if isinstance(problem, RepositoryNotFoundError):
        raise _NotHad(
            f"the hub has no model '{name}'{_nearest(name)}; --model mini is bundled", f"{cached}, nor is it on the hub"
        )
    offline = isinstance(problem, OfflineModeIsEnabled)
    why = "HF_HUB_OFFLINE is set" if offline else _why(problem)
    raise _NotHad(
        f"'{name}' is no folder, {cached}, and the hub cannot be reached ({why})"
        f"{_nearest(name)}: use --model mini, or run `hf download {repository}` where there is a network and copy the "
        "cache folder over (HF_HOME names it)",
        f"{cached}, and the hub cannot be reached ({why})",
    )


def _nearest(name: str) -> str:
    """` (did you mean …?)` with the known model names most like `name`; empty for a known name or one like none."""
    from transformer_lens.tools.model_registry import registry_io

    short = [alias for aliases in registry_io.load_model_aliases().values() for alias in aliases]
    known = [GPT2, "mini", "auto", *short, *registry_io.load_model_aliases()]
    known += [entry["model_id"] for entry in registry_io.load_supported_models_raw()["models"]]
    by_lower = {name.lower(): name for name in reversed(known)}
    near = difflib.get_close_matches(name.lower()[:100], by_lower, n=3, cutoff=0.75)
    if not near or name in known:
        return ""
    return f" (did you mean {' or '.join(by_lower[one] for one in near)}?)"


def has_weights(folder: Path) -> bool:
    """Whether every safetensors file that the folder's index names is there."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return all((folder / name).exists() for name in names)
    return any(folder.glob("*.safetensors"))
