"""What both analyses share: how they begin (texts, rows at once, an earlier run), what they say on the way, and what
every result can do (table, figures, page, files)."""

from __future__ import annotations

import json
import logging
import platform
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jsonschema

from common import UserError
from common.attention import batches
from common.heads.statistics import Ints
from common.heads.tokens import ROW_LENGTH
from common.results import files, page, spec
from common.results.draw import draw, save
from common.results.tables import Screenful, shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from common.interventions.effects import Experiment
    from common.loading.model import Model

SCHEMA = 3  # of results.json; since 2, controls show each draw, one text has no interval
PACKAGES = ("torch", "transformers", "transformer-lens", "numpy", "scikit-learn", "matplotlib")


class Note(NamedTuple):
    """Something to know while it runs; a `warning` is something that the results need to be read with."""

    text: str
    warning: bool = False


# A run of minutes says what it leaves out when it does so; a notebook reads it in the result afterwards.
class Notes(list[Note]):
    """Keeps notes and passes each on at once."""

    def __init__(self, hear: Callable[[Note], None]):
        super().__init__()
        self._hear = hear

    def say(self, text: str, warning: bool = False) -> None:
        if any(note.text == text for note in self):  # each lot of rows would say it again
            return
        self.append(Note(text, warning))
        self._hear(self[-1])

    def warn(self, text: str) -> None:
        self.say(text, warning=True)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While it holds, what rooms below warn of by logging (fewer rows at once, as memory ran out) becomes notes."""
        # Those rooms return arrays; a note handed through each of them would make up most of their arguments.
        listener, source = _Listener(self), logging.getLogger(batches.__name__)
        source.addHandler(listener)
        try:
            yield
        finally:
            source.removeHandler(listener)


class _Listener(logging.Handler):
    def __init__(self, notes: Notes):
        super().__init__(logging.WARNING)
        self._notes = notes

    def emit(self, record: logging.LogRecord) -> None:
        self._notes.warn(record.getMessage())


def ignore(note: Note) -> None:
    """Hear a note and do nothing."""


@dataclass(frozen=True, repr=False)
class Provenance(Screenful):
    """What a reader needs to repeat an analysis.

    `fused_attention`: whether every layer ran a fused kernel, its scores read in blocks beside it; `wall_seconds`: of
    the analysis, without loading and drawing; `arguments`: those that were used, defaults and `auto` resolved.
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
            schema=SCHEMA, seed=seed,
            versions={"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            model={"name": model.name, "source": model.source, "fingerprint": model.fingerprint},
            fused_attention=not model.unfused_layers, device=str(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
            wall_seconds=round(time.monotonic() - started, 2), arguments=arguments,
        )  # fmt: skip

    def summary(self) -> Iterable[str]:
        yield f"{self.model['name']} ({self.model['source']}), {self.dtype} on {self.device}, {self.wall_seconds:.0f} s"
        yield f"arguments: {self.arguments}"


@dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class Analysis(Screenful, ABC):
    """A result: `model` is kept because figures and page read patterns from it; `notes`: what came up on the way;
    `missing`: what Ctrl-C kept from being measured (give as_json() as `earlier` to go on)."""

    model: Model
    provenance: Provenance
    notes: tuple[Note, ...]
    missing: tuple[str, ...]

    @property
    @abstractmethod
    def figures(self) -> list[str]:
        """The names that `figure` takes."""

    @abstractmethod
    def page(self) -> str:
        """report.html: one page of HTML with the figures in it, which needs no network."""

    @abstractmethod
    def rows(self) -> dict[str, dict[str, object]]:
        """By the name of a head ("5.1"), its row of `table`."""

    @abstractmethod
    def content(self, written: Sequence[str]) -> dict[str, object]:
        """What is special to the analysis in results.json."""

    @abstractmethod
    def specified(self, names: Sequence[str]) -> Iterator[tuple[str, spec.Figure]]:
        """What these of `figures` show, each with its name, in any order."""

    def warnings(self) -> list[str]:
        """What the results need to be read with, a sentence each."""
        return [f"Note: {note.text}" for note in self.notes if note.warning]

    def table(self) -> DataFrame:
        """One row per head, indexed by its name ("5.1")."""
        from pandas import DataFrame

        return DataFrame.from_dict(self.rows(), orient="index")

    def figure(self, name: str) -> Figure:
        """Draw one of `figures`. Raises UserError for another name."""
        if name not in self.figures:
            raise UserError(f"no figure {name!r}: there are {', '.join(self.figures)}")
        return draw(dict(self.specified([name]))[name])

    def as_json(self, written: Sequence[str] = (), argv: Sequence[str] = ()) -> dict[str, object]:
        """What results.json holds, by the JSON schema beside this module. `written`: the names of the files beside it;
        `argv`: the command of a script."""
        command = {"argv": argv} if argv else {}  # from Python there is no command to repeat
        return files.jsonable(
            {**asdict(self.provenance), **command, "notes": [note._asdict() for note in self.notes],
             **self.content(written), "files": written}
        )  # fmt: skip

    def write(
        self, folder: str | Path, write_more: Callable[[Path], None], pictures: bool, argv: Sequence[str]
    ) -> list[str]:
        """Write results.json, what `write_more` writes and, with `pictures`, PNGs and report.html; the files' names."""
        with files.output_folder(Path(folder)) as staging:
            write_more(staging)  # tables first: a full disk is met before minutes of drawing
            if pictures:
                for name, figure in self.specified(self.figures):
                    save(figure, staging / f"{name}.png")
                page.save_page(self.page(), staging)
            return files.write_results(staging, lambda written: self.as_json(written, argv))


def encode(model: Model, texts: Sequence[str], notes: Notes) -> list[tuple[int, str, Ints]]:
    """Each text with its number, from 1, and its ids. Texts of fewer than two tokens are left out with a warning; the
    others keep their numbers.

    Raises UserError for a model that is none, for a text that is no string or is longer than the context, and where
    texts were given and none is left.
    """
    if not hasattr(model, "door"):
        raise UserError(f'{model!r} is no model: load it first, as in load("mini")')
    for said in model.notes:
        notes.warn(said)
    kept = []
    for number, text in enumerate([texts] if isinstance(texts, str) else texts, start=1):
        if not isinstance(text, str):
            raise UserError(f"text {number} is {text!r}: a text is a string in quotes")
        tokens = model.encode(text)
        if len(tokens) > model.context:
            raise UserError(
                f"text {number} has {len(tokens)} tokens with BOS and {model.name} reads at most {model.context}: "
                "shorten it or split it"
            )
        if len(tokens) >= 3:  # BOS and two tokens: one cannot come again
            kept.append((number, text, tokens))
            continue
        few = f"has {len(tokens) - 1} tokens, at least 2 are needed: left out"
        notes.warn(f"text {number} ({shortened(text)!r}) {few}")
    if texts and not kept:
        raise UserError("no text to analyse: give at least one text of two tokens or more")
    return kept


def rows_at_once(model: Model, encoded: Sequence[tuple[int, str, Ints]], asked: int | None) -> int:
    """Rows per forward pass: as asked for, else as many as fit for the longest text and the battery's rows."""
    # The battery's rows go through the same model, and are often longer than the texts.
    return asked or batches.batch_size(model, max([ROW_LENGTH, *(len(tokens) for *_, tokens in encoded)]))


def go_on_from(
    earlier: object, part: str, plan: Experiment, metrics: Mapping[bool, int], notes: Notes
) -> Mapping[str, Any] | None:
    """The `part` of an earlier results.json, "ablation" or "experiments" with its `effects`, where it can be used again
    by `plan`: everything that could change a number is the same. None where there is none, and where there is one that
    is of no use: `notes` say why.

    `earlier`: what a file held, taken for nothing: people edit files, and disks fill up. `metrics`: how many there are
    of each intervention; the key says whether it is a path's.
    """
    if earlier is None or isinstance(earlier, Mapping) and earlier.get(part) is None:
        return None
    found = earlier.get(part) if isinstance(earlier, Mapping) else None
    settings = found.get("settings") if isinstance(found, Mapping) else None
    if not isinstance(earlier, Mapping) or not isinstance(found, Mapping) or not isinstance(settings, Mapping):
        notes.warn(f"the earlier results.json is malformed: it is ignored, the {part} measured anew")
        return None
    wanted = files.jsonable(plan.settings)
    if changed := sorted(key for key in {*wanted, *settings} if wanted.get(key) != settings.get(key)):
        notes.say(f"the earlier run had another {', '.join(changed)}: {part} measured anew")
        return None
    if part == "experiments":
        found = {**found, "effects": earlier.get("interventions")}
    if wrong := _malformed(found, part, metrics):
        notes.warn(f"the earlier results.json is malformed ({wrong}): it is ignored, the {part} measured anew")
        return None
    unknown = {_made(one) for one in found["effects"] if None in (one["effect"], *one["interval"])}
    effects = [one for one in found["effects"] if _made(one) not in unknown]  # all metrics of an intervention, or none
    if effects:
        notes.say(f"{part}: {len(effects)} effects taken from the earlier run, which had the same settings")
    return {**found, "effects": effects}


def _made(one: Mapping[str, Any]) -> tuple[object, ...]:
    """Which intervention an effect is of."""
    return one["name"], *one["heads"], one.get("sender")


def _malformed(found: Mapping[str, Any], part: str, metrics: Mapping[bool, int]) -> str | None:
    """What is wrong with a part of results.json by its published schema, or None."""
    which = "induction" if part == "ablation" else "qk"
    schema = json.loads(Path(__file__).with_name(f"{which}.schema.json").read_text(encoding="utf-8"))
    form = schema["properties"][part]
    if part == "experiments":
        (one,) = (each for each in form["anyOf"] if each["type"] == "object")
        form = {**one, "required": [*one["required"], "effects"],
                "properties": {**one["properties"], "effects": schema["properties"]["interventions"]}}  # fmt: skip
    for error in jsonschema.Draft202012Validator({**form, "$defs": schema["$defs"]}).iter_errors(found):
        return f"{error.json_path}: {error.message[:80]}"
    if len({(*_made(one), one["metric"]) for one in found["effects"]}) < len(found["effects"]):
        return "an effect stands there twice"
    counted = Counter(map(_made, found["effects"]))
    if any(count != metrics.get(sender is not None) for (*_, sender), count in counted.items()):
        return "an intervention has not all of its metrics"
    return None
