"""Load a model, and check that what is read of it is its attention.

1. Find its folder (common/loading/find.py).
2. Load weights (safetensors only, and none missing) and tokenizer from that folder.
3. Open the door (common/attention/door.py) on the Hugging Face model, and wrap the same weights in a TransformerBridge.
4. Compare the two (common/loading/check.py): TransformerLens is the independent witness.

One path for all models: `mini` is loaded by exactly the code that loads GPT-2.
"""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common import UserError
from common.attention.door import Door
from common.loading import gguf
from common.loading.check import checked
from common.loading.escapes import first_line
from common.loading.families import parts_of
from common.loading.find import find_folder, has_weights
from common.loading.model import Model

# What stands for BOS where the tokenizer names none, in this order, and why.
STAND_INS = {
    "eos": "as TransformerLens does",
    "cls": "the token that encoders start a text with; it names no EOS token either",
    "pad": "the one special token left: whether the model ever read it is not known",
}

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load(
    name: str,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda message: None,
) -> Model:
    """Load `name`: `mini`, `auto`, a folder, a GGUF file, or a TransformerLens model name.

    `say` is told of what takes long.
    Raises UserError with one line that says what was wrong and what to do: nothing there, no network and no cache,
    a folder that holds no model, weights that are not safetensors, an architecture whose attention cannot be read, or a
    model that fails the self-check.
    """
    _quiet()
    folder, shown, source = find_folder(name, say)
    _check_folder(folder, shown)
    _check_device(device)
    network, tokenizer = _read(folder, shown, getattr(torch, dtype), trust_remote_code)
    bos, notes = _bos(tokenizer, shown)  # before the bridge, which silently names a BOS token where there is none
    network = network.to(device).eval().requires_grad_(False)
    door = Door(network)  # before the bridge puts modules of its own into the network
    bridge = _wrap(folder, shown, network, tokenizer)
    try:
        parts = parts_of(bridge, door.network)
    except (AttributeError, KeyError, StopIteration) as error:
        raise UserError(f"'{shown}' names its parts as no family known here does ({first_line(error)})") from error
    fingerprint, weights = _fingerprint(folder)
    model = Model(
        door=door,
        parts=parts,
        bridge=bridge,
        tokenizer=tokenizer,
        name=shown,
        source=source,
        fingerprint=fingerprint,
        context=bridge.cfg.n_ctx,
        bos=bos,
        weights=weights,
        notes=tuple(notes),
        labels_file=folder / "labels.json" if (folder / "labels.json").exists() else None,
    )
    return checked(model)


def _check_folder(folder: Path, shown: str) -> None:
    """Raise UserError unless the folder holds a configuration and safetensors weights."""
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} is no model folder: it has no config.json")
    if has_weights(folder):
        return
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"'{shown}' has its weights in {pickles[0]}, which runs code when it is opened: convert it to safetensors "
            "(load it with transformers where you trust it, then save_pretrained)"
        )
    raise UserError(f"{folder} has a config.json but no (or not all) model.safetensors weights")


def _check_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {device} cannot be used here ({first_line(error)}); --device cpu always can"
        ) from None


def _read(
    folder: Path, shown: str, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Weights and tokenizer from a local folder; UserError with the reason where they do not load."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise UserError(f"the tokenizer of '{shown}' does not load: {first_line(error)}") from error
    try:
        network, loaded = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", use_safetensors=True, output_loading_info=True,
            local_files_only=True, trust_remote_code=trust_remote_code,
        )  # fmt: skip
    except Exception as error:
        raise UserError(f"the weights of '{shown}' do not load: {first_line(error)}") from error
    if loaded["missing_keys"]:  # transformers would draw them at random
        missing = sorted(loaded["missing_keys"])
        raise UserError(f"the weights of '{shown}' are not all there: {len(missing)} are missing, such as {missing[0]}")
    return network, tokenizer


def _wrap(folder: Path, shown: str, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> TransformerBridge:
    from transformer_lens.model_bridge import TransformerBridge

    try:  # named by its folder: a name that is an old alias of another model would bring a warning
        return TransformerBridge.boot_transformers(str(folder), hf_model=network, tokenizer=tokenizer)
    except Exception as error:
        raise UserError(f"TransformerLens cannot wrap '{shown}': {first_line(error)}") from error


def _bos(tokenizer: PreTrainedTokenizerBase, shown: str) -> tuple[int, list[str]]:
    """The id that starts every row: BOS, else the first of `STAND_INS` that there is, and then a note that says so.

    Raises UserError for a tokenizer that has none of them: an ordinary token in BOS's place would take part in repeats.
    """
    if tokenizer.bos_token_id is not None:
        return int(tokenizer.bos_token_id), []
    for name, why in STAND_INS.items():
        token = getattr(tokenizer, f"{name}_token_id", None)
        if token is not None:
            text = getattr(tokenizer, f"{name}_token", "")
            said = f"the tokenizer of {shown} names no BOS token: every row starts with its {name.upper()} token"
            return int(token), [f"{said} {text!r} ({token}) in its place, {why}"]
    raise UserError(
        f"the tokenizer of '{shown}' has no BOS token and none that could stand for it (EOS, CLS, PAD), but every row "
        'must start with one: name it in tokenizer_config.json, as in "bos_token": "<|endoftext|>"'
    )


def _fingerprint(folder: Path) -> tuple[str, tuple[str, ...]]:
    """SHA-256 over config.json, the weights by name, and what tells of which GGUF file they were made; and that of each
    weights file alone, as the hub lists it."""
    whole, alone = hashlib.sha256(), []
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors")), *folder.glob(gguf.DIGEST)]:
        own = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                whole.update(block)
                own.update(block)
        if path.suffix == ".safetensors":
            alone.append(own.hexdigest())
    return whole.hexdigest(), tuple(alone)


def _quiet() -> None:
    """Silence what other packages say and a user can do nothing about."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="transformers|transformer_lens|huggingface_hub|torch")
