"""What both analyses begin with and say of themselves: texts, rows at once, notes, provenance, an earlier run."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from math import isfinite
from typing import TYPE_CHECKING, NamedTuple

from common import UserError
from common.attention.batching import batch_size as rows_that_fit
from common.heads.sequences import Ints
from common.heads.survey import ROW_LENGTH
from common.results.tables import Screenful, shortened

if TYPE_CHECKING:
    from common.loading.models import Model

SCHEMA = 2  # of results.json; 2: `lead` became `score_advantage`, `forbid` became `knockout`, `arguments` came
PACKAGES = ("torch", "transformers", "transformer-lens", "numpy", "scikit-learn", "matplotlib")


class Note(NamedTuple):
    """Something to know while it runs; a `warning` is something that the results need to be read with."""

    text: str
    warning: bool = False


class Notes:
    """Gathers notes and passes each on at once."""

    def __init__(self, hear: Callable[[Note], None]):
        self.all: list[Note] = []
        self._hear = hear

    def say(self, text: str, warning: bool = False) -> None:
        self.all.append(Note(text, warning))
        self._hear(self.all[-1])

    def warn(self, text: str) -> None:
        self.say(text, warning=True)


def ignore(note: Note) -> None:
    """Hear a note and do nothing."""


@dataclass(frozen=True, repr=False)
class Provenance(Screenful):
    """What a reader needs to repeat an analysis.

    `fused_attention`: whether scores were read in blocks behind fused attention, or from the bridge's whole patterns;
    `wall_seconds`: of the analysis, without loading and drawing; `arguments`: what the function was called with.
    """

    schema: int
    seed: int
    versions: dict[str, str]
    model: dict[str, str]
    fused_attention: bool
    device: str
    dtype: str
    wall_seconds: float
    arguments: dict[str, object]

    @classmethod
    def of(cls, model: Model, seed: int, started: float, arguments: dict[str, object]) -> Provenance:
        """Of an analysis that `started` at that time.monotonic() and ends now."""
        return cls(
            schema=SCHEMA,
            seed=seed,
            versions={"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            model={"name": model.name, "source": model.source, "fingerprint": model.fingerprint},
            fused_attention=model.trunk is not None,
            device=str(model.device),
            dtype=str(model.bridge.W_U.dtype).removeprefix("torch."),
            wall_seconds=round(time.monotonic() - started, 2),
            arguments=arguments,
        )

    def summary(self) -> Iterable[str]:
        yield f"{self.model['name']} ({self.model['source']}), {self.dtype} on {self.device}, seed {self.seed}, "
        yield f"{self.wall_seconds:.0f} s; arguments: {self.arguments}"


def encode(model: Model, texts: Sequence[str], notes: Notes) -> list[tuple[str, Ints]]:
    """Each text with its ids. Texts of fewer than two tokens are left out with a warning.

    Raises UserError where a text is longer than the context, or where texts were given and none is left.
    """
    kept = []
    for number, text in enumerate(texts, start=1):
        tokens = model.encode(text)
        if len(tokens) > model.context:
            raise UserError(
                f"text {number} has {len(tokens)} tokens with BOS and {model.name} reads at most {model.context}: "
                "shorten it or split it"
            )
        if len(tokens) < 3:
            said = f"text {number} ({shortened(text)!r}) has {len(tokens) - 1} tokens, at least 2 are needed: left out"
            notes.warn(said)
            continue
        kept.append((text, tokens))
    if texts and not kept:
        raise UserError("no text to analyse: give at least one text of two tokens or more")
    return kept


def rows_at_once(model: Model, encoded: Sequence[tuple[str, Ints]], asked: int | None) -> int:
    """Rows per forward pass: as asked for, else as many as fit for the longest text and the battery's rows."""
    return asked or rows_that_fit(model, max([ROW_LENGTH, *(len(tokens) for _, tokens in encoded)]))


def resumable(effects: object, needed: Mapping[bool, set[str]]) -> bool:
    """Whether `effects` from an earlier results.json can be used again: a list of whole effects, with every metric that
    is `needed` of each head, where the key says whether it is a path's. People edit files, and disks lose the end."""
    if not isinstance(effects, list) or not all(_is_effect(one) for one in effects):
        return False
    measured: dict[tuple[str, str, object], set[str]] = {}
    for one in effects:
        measured.setdefault((one["name"], one["head"], one.get("sender")), set()).add(one["metric"])
    return all(needed[sender is not None] <= metrics for (_, _, sender), metrics in measured.items())


def _is_effect(one: object) -> bool:
    """Whether this has the keys and types of tables.EffectRow."""
    if not isinstance(one, dict) or not isinstance(one.get("sender", ""), str):
        return False
    words = all(isinstance(one.get(key), str) for key in ("name", "head", "metric"))
    control = one.get("control", "missing")
    return (
        words
        and all(_is_number(one.get(key)) for key in ("clean", "effect", "rows"))
        and _is_interval(one.get("interval"))
        and isinstance(one.get("note", 0), str | None)
        and (control is None or _is_control(control))
    )


def _is_control(control: object) -> bool:
    return (
        isinstance(control, dict)
        and _is_number(control.get("effect"))
        and _is_interval(control.get("interval"))
        and isinstance(control.get("heads"), list)
        and all(isinstance(head, str) for head in control["heads"])
    )


def _is_interval(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and isfinite(value)
