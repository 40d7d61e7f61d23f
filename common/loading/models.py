"""Load a model so that TransformerLens can hook it, and check that what it shows is attention.

1. Find the folder: the bundled `mini`, a folder of the user's, one converted from a GGUF file (common/gguf.py), or a
   named model in the local Hugging Face cache, downloaded first where it is missing and the hub answers within
   `PATIENCE` seconds.
2. Load weights (safetensors only, and none missing) and tokenizer from that folder, and wrap them in a
   TransformerBridge.
3. Run one tiny forward pass: every layer must show a pattern whose rows sum to 1 and which never attends ahead.
4. Compare it with what the same weights show through fused attention (common/trunk.py): where the two agree, scores are
   read that way, at the cost of the trunk alone; where not, from the bridge.

One path for all models: `mini` is loaded by exactly the code that loads GPT-2.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import os
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from common import UserError
from common.attention import trunk
from common.attention.trunk import Trunk
from common.loading import gguf
from common.loading.escapes import escaped

MINI = Path(__file__).resolve().parents[2] / "models" / "mini"
GPT2 = "gpt2"
PATIENCE = 4.0  # seconds that the hub has to answer before we call it out of reach
WANTED = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model")
AGREES, AGREES_HALF = 1e-5, 5e-2  # largest difference between two ways to a pattern, in float32 and in 16 bits
UNWANTED = ("onnx/*", "*/*", "consolidated*")


@dataclass(frozen=True)
class Model:
    """A loaded model. `name` is what results call it, `source` where it came from, `fingerprint` a hash of its weights
    and configuration; `context` is the longest row it takes, BOS included; `bos` the id every row starts with;
    `labels_file` the labels.json that it ships, if it does; `trunk` the same weights behind fused attention, where that
    shows the bridge's patterns."""

    bridge: Any
    tokenizer: Any
    name: str
    source: str
    fingerprint: str
    n_layers: int
    n_heads: int
    context: int
    bos: int
    labels_file: Path | None = None
    trunk: Trunk | None = None

    @property
    def device(self) -> torch.device:
        return torch.device(self.bridge.cfg.device)

    def encode(self, text: str) -> NDArray[np.int64]:
        """BOS and the token ids of `text`, [pos]; special tokens written out in the text stay text.

        Raises UserError for a text that is no Unicode, as arguments in another encoding than UTF-8 come in.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"the text {text[:40]!r} is not UTF-8 (character {error.start}): give it as UTF-8"
            ) from None
        if not text:
            return np.array([self.bos], dtype=np.int64)
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        return np.array([self.bos, *ids], dtype=np.int64)

    def ordinary(self) -> NDArray[np.int64]:
        """Ids of the tokens that are not special, ascending."""
        special = set(self.tokenizer.all_special_ids) | set(getattr(self.tokenizer, "added_tokens_decoder", {}))
        size = min(len(self.tokenizer), self.bridge.cfg.d_vocab)
        return np.array([token for token in range(size) if token not in special], dtype=np.int64)

    def strings(self, tokens: NDArray[np.int64]) -> list[str]:
        """Each token of a row as a reader should see it: BOS by name, spaces and line ends made visible."""
        return ["BOS" if token == self.bos else visible(self.tokenizer.decode([int(token)])) for token in tokens]


def visible(token: str) -> str:
    """A token with its spaces, line ends and other unprintable characters made visible."""
    return escaped(token.replace(" ", "·").replace("\n", "⏎").replace("\t", "→"))


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
    a folder that holds no model, weights that are not safetensors, an architecture TransformerLens cannot wrap, or a
    model that fails the self-check.
    """
    _quiet()
    folder, shown, source = _find(name, say)
    _check_folder(folder, shown)
    _check_device(device)
    hf_model, tokenizer = _read(folder, shown, getattr(torch, dtype), trust_remote_code)
    hf_model = hf_model.to(device).eval().requires_grad_(False)
    taken = trunk.take(hf_model)
    bridge = _wrap(folder, shown, hf_model, tokenizer)
    model = Model(
        bridge=bridge,
        tokenizer=tokenizer,
        name=shown,
        source=source,
        fingerprint=_fingerprint(folder),
        n_layers=bridge.cfg.n_layers,
        n_heads=bridge.cfg.n_heads,
        context=bridge.cfg.n_ctx,
        bos=_bos(tokenizer),
        labels_file=folder / "labels.json" if (folder / "labels.json").exists() else None,
        trunk=taken,
    )
    return _self_checked(model)


class _Seen(Exception):
    """Raised in the last hook that is needed, to leave the forward pass there."""


def read_patterns(model: Model, tokens: NDArray[np.int64], read_one: Callable[[int, torch.Tensor], None]) -> None:
    """Run [batch, pos] token ids; hand each layer's pattern, [batch, head, query, key], to `read_one(layer, pattern)`.

    Leaves the forward pass after the last layer's pattern. Layers that never show one are not handed on.
    """
    names = {layer: f"blocks.{layer}.attn.hook_pattern" for layer in range(model.n_layers)}
    shown = {name: partial(read_one, layer) for layer, name in names.items() if name in model.bridge.hook_dict}
    if shown:
        read(model, tokens, shown, last=list(shown)[-1])


def read(
    model: Model, tokens: NDArray[np.int64], readers: Mapping[str, Callable[[torch.Tensor], None]], last: str
) -> None:
    """Run [batch, pos] token ids and hand what each named hook point shows to its reader.

    Leaves the forward pass after the hook point `last`. What never shows is not handed on.
    """

    def hook(reader: Callable[[torch.Tensor], None]) -> Callable[[torch.Tensor, Any], None]:
        return lambda shown, hook: reader(shown)

    watch(model, tokens, [(name, hook(reader)) for name, reader in readers.items()], until=last)


def watch(
    model: Model,
    tokens: NDArray[np.int64],
    hooks: Sequence[tuple[str, Callable[[torch.Tensor, Any], torch.Tensor | None]]],
    *,
    until: str,
) -> None:
    """Run [batch, pos] token ids with `hooks`, as (hook point, function), and leave the forward pass after `until`.

    A function gets the value and the hook point; a tensor that it returns takes the value's place.
    """

    def leave(value: torch.Tensor, hook: Any) -> None:
        raise _Seen

    inputs = torch.from_numpy(tokens).to(model.bridge.cfg.device)
    try:
        with torch.inference_mode(), model.bridge.hooks(fwd_hooks=[*hooks, (until, leave)]):
            model.bridge.original_model(inputs, use_cache=False)
    except _Seen:
        pass


# --- finding the folder ---


def _find(name: str, say: Callable[[str], None]) -> tuple[Path, str, str]:
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
    return _named(name)


def _shown(name: str) -> str:
    """A folder's name as results and output folders can bear it."""
    return escaped(name).replace("\\", "_") if not name.isprintable() else name or "model"


def _auto() -> tuple[Path, str, str]:
    """GPT-2 small where it can be had within `PATIENCE` seconds, else `mini`, with the reason."""
    try:
        folder, shown, source = _named(GPT2)
        return folder, shown, f"{source}, chosen by --model auto"
    except UserError:
        return (
            MINI,
            "mini",
            "bundled with this project; --model auto found GPT-2 small neither in the cache nor on the hub",
        )


def _named(name: str) -> tuple[Path, str, str]:
    """A model of the hub: from the local cache where it is whole, else downloaded; UserError where neither works."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    from transformer_lens.tools.model_registry.registry_io import resolve_model_alias

    repository = resolve_model_alias(name) or name
    wanted: dict[str, Any] = {"allow_patterns": list(WANTED), "ignore_patterns": list(UNWANTED)}
    try:
        folder = Path(snapshot_download(repository, local_files_only=True, **wanted))
        if _has_weights(folder):
            return folder, name, "local Hugging Face cache"
    except HFValidationError:
        raise UserError(
            f"'{name}' is neither a folder nor a model name{_nearest(name)}; --model mini is bundled"
        ) from None
    except LocalEntryNotFoundError:
        pass
    _ask_hub(repository, name)
    try:
        return Path(snapshot_download(repository, **wanted)), name, "downloaded from the Hugging Face hub"
    except Exception as error:
        raise UserError(f"downloading '{name}' failed ({_first_line(error)}); --model mini needs no network") from error


def _ask_hub(repository: str, name: str) -> None:
    """Return if the hub has the model; raise UserError if it has not, or does not answer in time."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

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
    problem = answer[0] if answer else TimeoutError()
    if problem is None:
        return
    if isinstance(problem, GatedRepoError):
        raise UserError(f"'{name}' asks for a login: run `hf auth login` first, or use --model mini")
    if isinstance(problem, RepositoryNotFoundError):
        raise UserError(f"the hub has no model '{name}'{_nearest(name)}; --model mini is bundled")
    raise UserError(
        f"'{name}' is no folder and not in the local Hugging Face cache, and the hub cannot be reached"
        f"{_nearest(name)}: use --model mini, or run `hf download {repository}` where there is a network and copy the "
        "cache folder over (HF_HOME names it)"
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


def _has_weights(folder: Path) -> bool:
    """Whether every safetensors file that the folder's index names is there."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return all((folder / name).exists() for name in names)
    return any(folder.glob("*.safetensors"))


# --- reading it ---


def _check_folder(folder: Path, shown: str) -> None:
    """Raise UserError unless the folder holds a configuration and safetensors weights."""
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} is no model folder: it has no config.json")
    if _has_weights(folder):
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
            f"--device {device} cannot be used here ({_first_line(error)}); --device cpu always can"
        ) from None


def _read(folder: Path, shown: str, dtype: torch.dtype, trust_remote_code: bool) -> tuple[Any, Any]:
    """Weights and tokenizer from a local folder; UserError with the reason where they do not load."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:
        raise UserError(f"the tokenizer of '{shown}' does not load: {_first_line(error)}") from error
    try:
        weights = {"dtype": dtype, "attn_implementation": "eager", "use_safetensors": True, "output_loading_info": True}
        hf_model, loaded = AutoModelForCausalLM.from_pretrained(folder, **weights, **options)
    except Exception as error:
        raise UserError(f"the weights of '{shown}' do not load: {_first_line(error)}") from error
    if loaded["missing_keys"]:  # transformers would draw them at random
        missing = sorted(loaded["missing_keys"])
        raise UserError(f"the weights of '{shown}' are not all there: {len(missing)} are missing, such as {missing[0]}")
    return hf_model, tokenizer


def _wrap(folder: Path, shown: str, hf_model: Any, tokenizer: Any) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    try:  # named by its folder: a name that is an old alias of another model would bring a warning
        return TransformerBridge.boot_transformers(str(folder), hf_model=hf_model, tokenizer=tokenizer)
    except Exception as error:
        raise UserError(f"TransformerLens cannot wrap '{shown}': {_first_line(error)}") from error


def _bos(tokenizer: Any) -> int:
    """The id that starts every row: BOS, else EOS as TransformerLens does, else 0."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def _fingerprint(folder: Path) -> str:
    """SHA-256 over config.json, the weights by name, and what tells of which GGUF file they were made."""
    digest = hashlib.sha256()
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors")), *folder.glob(gguf.DIGEST)]:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _self_checked(model: Model) -> Model:
    """The model, without its trunk where that shows other patterns than the bridge.

    Raises UserError unless every layer shows a causal pattern whose rows sum to 1, and all weights and the logits are
    finite.
    """
    ordinary = model.ordinary()
    tokens = np.concatenate([[model.bos], ordinary[np.linspace(0, len(ordinary) - 1, 7).astype(int)]])
    tokens = tokens[None, : model.context]
    shown: dict[int, torch.Tensor] = {}
    read_patterns(model, tokens, lambda layer, pattern: shown.__setitem__(layer, pattern))
    missing = [layer for layer in range(model.n_layers) if layer not in shown]
    if missing:
        raise UserError(f"'{model.name}' shows no attention pattern in layer {missing[0]}: its heads cannot be scored")
    for layer, pattern in shown.items():
        if complaint := _complaint(pattern):
            raise UserError(f"'{model.name}' fails the self-check in layer {layer}: {complaint}")
    _check_finite(model, tokens)
    return model if _trunk_agrees(model, tokens, shown) else replace(model, trunk=None)


def _check_finite(model: Model, tokens: NDArray[np.int64]) -> None:
    """Raise UserError unless all weights, and the logits of [batch, pos] ids, are finite."""
    weights = model.bridge.original_model.named_parameters()
    damaged = next((name for name, weight in weights if not torch.isfinite(weight).all()), None)
    if damaged:
        damaged = damaged.replace("_original_component.", "")  # as the file calls it
        raise UserError(f"'{model.name}' fails the self-check: its weights {damaged} are NaN or infinite")
    with torch.inference_mode():
        inputs = torch.from_numpy(tokens).to(model.device)
        logits = model.bridge.original_model(inputs, use_cache=False).logits
    if not torch.isfinite(logits).all():
        raise UserError(f"'{model.name}' fails the self-check: its logits are NaN or infinite")


def _trunk_agrees(model: Model, tokens: NDArray[np.int64], patterns: dict[int, torch.Tensor]) -> bool:
    """Whether the trunk shows these patterns of the bridge's."""
    if model.trunk is None:
        return False
    largest = trunk.disagreement(model.trunk, torch.from_numpy(tokens).to(model.device), patterns)
    logging.getLogger(__name__).info("fused attention differs from the bridge's patterns by %.1e at most", largest)
    return largest <= (AGREES if patterns[0].dtype == torch.float32 else AGREES_HALF)


def _complaint(pattern: torch.Tensor) -> str | None:
    """What is wrong with a pattern [batch, head, query, key], or None."""
    values = pattern.double()
    if not torch.isfinite(values).all():
        return "the attention pattern holds NaN or infinite values (damaged weights, or a dtype too small)"
    tolerance = 1e-4 if pattern.dtype == torch.float32 else 2e-2
    if torch.triu(values, diagonal=1).abs().max() > tolerance:
        return "queries attend to the future, so this is no causal language model"
    if (values.sum(-1) - 1).abs().max() > tolerance:
        return "rows of the attention pattern do not sum to 1"
    return None


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]


def _quiet() -> None:
    """Silence what other packages say and a user can do nothing about."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="transformers|transformer_lens|huggingface_hub|torch")
