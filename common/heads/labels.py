"""Ground truth: which heads are induction heads, according to whom. A label never comes from the score it judges.

A label file is JSON; only `induction_heads` must be there:

    {"kind": "attention", "source": "who says so", "measured": "what was measured", "induction_heads": ["5.1", "6.9"]}

`kind` says what a label rests on, and so what it can be held against:

construction    the head's algorithm was chosen before the model was built
causal          a change made at the head's attention to its targets alone, and what that does to loss or logits
ablation        the heads were switched off, together or alone, and what the model lost was measured
path patching   activations were replaced along the paths between heads, in one task
attention       where the heads look on repeated tokens: says nothing of what they do, so it is compared with the heads
                that attend to their targets, never with the verdict `induction`, which needs an effect
unknown         a file that does not say

Two more keys are optional. `uncertain_heads`: heads that the source names with less support; they count neither way.
`complete`: false where the source says nothing of the heads outside the list (it studied one task); then there is a
recall and no precision. Whatever else the file holds is ignored.

Published sets lie in models/published. One is applied unasked only to the weights it was published for: its file holds
the SHA-256 of these weights as the hub lists it. Names and shapes prove nothing: a fine-tuned model shares both.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from common import UserError
from common.attention.head import Head

if TYPE_CHECKING:
    from common.loading.model import Model

# Published tables lie beside the models, not in the code: adding one needs no change here.
PUBLISHED = Path(__file__).resolve().parents[2] / "models" / "published"
UNKNOWN = "unknown"
# Kind: what such labels are called, and what they say. The best supported come first.
KINDS = {
    "construction": ("labels by construction", "each head's algorithm was chosen beforehand"),
    "causal": ("causal labels", "they say what attention to the targets does"),
    "ablation": ("ablation labels", "they say what the model loses without these heads, not by which of their parts"),
    "path patching": ("path-patching labels", "they say through which paths these heads act, in one task"),
    "attention": ("attention-based labels", "they say where heads look, not what they do"),
    UNKNOWN: ("own labels, kind not said", 'a "kind" in the file says what they rest on'),
}
REMEDY = 'it should look like {"source": "who says so", "kind": "causal", "induction_heads": ["5.1", "6.9"]}'


@dataclass(frozen=True)
class Labels:
    """Which `heads` are induction heads according to `source`.

    `kind`: one of `KINDS`; `measured`: what was measured, in words, "" where the file does not say; `uncertain`: heads
    that count neither as right nor as wrong; `complete`: whether every head outside the list is labelled as none.
    """

    heads: frozenset[Head]
    source: str
    kind: str = UNKNOWN
    measured: str = ""
    uncertain: frozenset[Head] = frozenset()
    complete: bool = True

    def mask(self, shape: tuple[int, ...]) -> NDArray[np.bool_]:
        """Which heads are labelled, as an array of `shape` [layers, heads]."""
        return _mask_of(self.heads, shape)

    def counted(self, shape: tuple[int, ...]) -> NDArray[np.bool_]:
        """Which heads are compared at all, as an array of `shape` [layers, heads]."""
        return ~_mask_of(self.uncertain, shape)

    def called(self) -> str:
        """What such labels are called, and what they say."""
        name, says = KINDS[self.kind]
        return f"{name} ({says})"

    def about(self) -> str:
        """Where the labels come from and what was measured, for a reader."""
        return f"{self.source}; measured: {self.measured}" if self.measured else self.source


def _mask_of(heads: frozenset[Head], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    found = np.zeros(shape, dtype=bool)
    for head in heads:
        found[head.place] = True
    return found


def choose_labels(
    wanted: str | None,
    model: Model,
    measure_labels: Callable[[], Labels],
    say: Callable[[str], None] = lambda said: None,
) -> Labels | None:
    """The labels that `--labels` asks for: `published`, `causal`, `none`, the name of a published set, or a file.

    None, the default, means the model's own labels.json, else the set published for its weights, else no labels. Of
    several published sets the one that labels every head is taken, of these the best supported kind; `say` is told of
    the others, and of a set that was published for other weights. `measure_labels` makes causal labels. Raises
    UserError if nothing is published for these weights, or if the file cannot be read as labels (see `read_labels`).
    """
    if wanted == "none":
        return None
    if wanted == "causal":
        return measure_labels()
    if wanted and wanted != "published":
        path = _named(wanted)
        _say_of_other_weights(path, model, say)
        return read_labels(path, model.n_layers, model.n_heads)
    if wanted is None and model.labels_file:
        return read_labels(model.labels_file, model.n_layers, model.n_heads)
    known = _published(model)
    if not known and wanted:
        raise UserError(
            f"no labels were published for the weights of {model.name} (there are sets named {_names()}, and --labels "
            "NAME takes one for another model of its shape); try --labels causal"
        )
    if others := ", ".join(f"--labels {path.stem}" for path in known[1:]):
        say(f"labels: {known[0].stem}, the published set that labels every head; there are also {others}")
    return read_labels(known[0], model.n_layers, model.n_heads) if known else None


def _names() -> str:
    return ", ".join(sorted(path.stem for path in PUBLISHED.glob("*.json")))


def _named(wanted: str) -> Path:
    """The file of that name, else the published set."""
    published = PUBLISHED / f"{wanted}.json"
    return published if wanted in _names().split(", ") and not Path(wanted).is_file() else Path(wanted)


def _published(model: Model) -> list[Path]:
    """The sets published for exactly these weights, the one to take first; see `choose_labels`."""
    kinds, found = list(KINDS), []
    for path in sorted(PUBLISHED.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        of = content["model"]
        # The number of heads stands in the configuration, which the hash of the weights does not cover.
        if _hashes(content) == model.weights and (of["layers"], of["heads"]) == (model.n_layers, model.n_heads):
            found.append((not content.get("complete", True), kinds.index(content["kind"]), path))
    return [path for *_, path in sorted(found)]


def _hashes(content: dict[str, Any]) -> tuple[str, ...]:
    """SHA-256 of each weights file that a set was published for; (None,), which fits no model, where none is known."""
    return tuple(content.get("model", {}).get("weights_sha256", [None]))


def _say_of_other_weights(path: Path, model: Model, say: Callable[[str], None]) -> None:
    """Say it where a published set is asked for by name on weights that it is not known to be for."""
    if path.resolve().parent == PUBLISHED:
        content = json.loads(path.read_text(encoding="utf-8"))
        if _hashes(content) != model.weights:
            say(f"labels {path.stem} were published for {content['model']['name']}; whether these are its weights is "
                "not known")  # fmt: skip


def read_labels(path: Path, n_layers: int, n_heads: int) -> Labels:
    """Labels from a JSON file. Raises UserError if the file is missing, is not valid JSON, has no list
    "induction_heads", has a `kind` that is none of `KINDS`, could prove nothing wrong, or names a head that does not
    exist in a model of `n_layers` layers with `n_heads` heads each."""
    content = _content(path)
    kind = content.get("kind", UNKNOWN)
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(f"labels {path}: {kind!r} is no kind of labels; write one of {', '.join(KINDS)}")
    named = {
        key: _named_heads(path, content.get(key, []), n_layers, n_heads)
        for key in ("induction_heads", "uncertain_heads")
    }
    complete = content.get("complete", True)
    if not isinstance(complete, bool):
        raise UserError(f'labels {path}: "complete" is {complete!r}; write true or false, without quotes')
    if not complete and not named["induction_heads"]:
        raise UserError(f'labels {path}: no head is named and "complete" is false, so they say nothing: name one')
    if len(named["uncertain_heads"] | named["induction_heads"]) == n_layers * n_heads != len(named["induction_heads"]):
        raise UserError(f"labels {path}: every head that is no induction head is uncertain, so nothing can be wrong")
    return Labels(
        named["induction_heads"], str(content.get("source", path)), kind, str(content.get("measured", "")),
        named["uncertain_heads"] - named["induction_heads"], complete,
    )  # fmt: skip


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot read labels {path}: {error.strerror}; --labels takes a JSON file, a published set ({_names()}), "
            "published, causal or none"
        ) from None
    except (ValueError, RecursionError) as error:  # deeply nested brackets end in a RecursionError
        raise UserError(f"labels {path} are not JSON ({error}): {REMEDY}") from None
    if not (isinstance(content, dict) and isinstance(content.get("induction_heads"), list)):
        raise UserError(f'labels {path} need a list "induction_heads": {REMEDY}')
    return content


def _named_heads(path: Path, names: object, n_layers: int, n_heads: int) -> frozenset[Head]:
    heads = set()
    if not isinstance(names, list):
        raise UserError(f'labels {path}: "uncertain_heads" must be a list such as ["5.1", "6.9"]')
    for name in names:
        try:
            head = Head.parse(name)
        except UserError as error:
            raise UserError(f"labels {path}: {error}") from None
        # Labels are for causal models, which have one stack and so no name for it.
        if head.stack or head.layer >= n_layers or head.head >= n_heads:
            raise UserError(
                f"labels {path}: no head {name} in a model of {n_layers} layers with {n_heads} heads each, both "
                "counted from 0; are they another model's labels?"
            )
        heads.add(head)
    return frozenset(heads)
