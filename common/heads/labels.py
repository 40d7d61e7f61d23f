"""Ground truth: which heads are induction heads, according to whom. A label never comes from the score it judges.

A label file is JSON: `{"source": "how they were made", "induction_heads": ["5.1", "6.9"]}`; whatever else it holds is
ignored.
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

if TYPE_CHECKING:
    from common.loading.models import Model

PUBLISHED = Path(__file__).resolve().parents[2] / "models" / "published"


@dataclass(frozen=True)
class Labels:
    """Which heads are induction heads according to `source`, as (layer, head)."""

    heads: frozenset[tuple[int, int]]
    source: str

    def mask(self, shape: tuple[int, ...]) -> NDArray[np.bool_]:
        """Which heads are labelled, as an array of `shape` [layers, heads]."""
        labelled = np.zeros(shape, dtype=bool)
        for head in self.heads:
            labelled[head] = True
        return labelled


def choose(wanted: str | None, model: Model, measure: Callable[[], Labels]) -> Labels | None:
    """The labels that `--labels` asks for: `published`, `causal`, `none`, or a file.

    By default (None) the model's own labels.json, else the published table where it knows the model, else none.
    `measure` makes causal labels. Raises UserError for a table or a file that is not there or not right.
    """
    if wanted == "none":
        return None
    if wanted == "causal":
        return measure()
    if wanted == "published":
        path = published(model)
        if path is None:
            known = ", ".join(sorted(file.stem for file in PUBLISHED.glob("*.json")))
            raise UserError(f"no published labels for {model.name} (there are some for: {known}); try --labels causal")
        return read(path, model.n_layers, model.n_heads)
    file = Path(wanted) if wanted else model.labels_file or published(model)
    return read(file, model.n_layers, model.n_heads) if file else None


def published(model: Model) -> Path | None:
    """The table that knows a model of this name, shape and vocabulary; None where none does."""
    for path in sorted(PUBLISHED.glob("*.json")):
        known = json.loads(path.read_text(encoding="utf-8"))["model"]
        shape = known["layers"], known["heads"], known["vocabulary"]
        if model.name in known["names"] and shape == (model.n_layers, model.n_heads, model.bridge.cfg.d_vocab):
            return path
    return None


def read(path: Path, n_layers: int, n_heads: int) -> Labels:
    """Labels from a JSON file. Raises UserError for a file that is none, or that names a head the model has not."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read labels {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"labels {path} are not JSON: {error}") from None
    names = content.get("induction_heads") if isinstance(content, dict) else None
    if not isinstance(names, list):
        raise UserError(f'labels {path} need a list "induction_heads", such as ["5.1", "6.9"]')
    heads = frozenset(_head(name, path, n_layers, n_heads) for name in names)
    return Labels(heads, str(content.get("source", path)))


def _head(name: Any, path: Path, n_layers: int, n_heads: int) -> tuple[int, int]:
    layer, dot, head = name.partition(".") if isinstance(name, str) else ("", "", "")
    if not (dot and _is_number(layer) and _is_number(head)):
        raise UserError(f'labels {path}: {name!r} is no head; write layer.head, such as "5.1"')
    if int(layer) >= n_layers or int(head) >= n_heads:
        raise UserError(f"labels {path}: no head {name} in a model of {n_layers} layers with {n_heads} heads each")
    return int(layer), int(head)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 6
