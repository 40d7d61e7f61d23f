"""Ground truth: which heads are induction heads, according to whom. A label never comes from the score it judges.

A label file is JSON: `{"source": "how they were made", "induction_heads": ["5.1", "6.9"]}`; whatever else it holds is
ignored.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from common import UserError
from common.attention.head import Head

if TYPE_CHECKING:
    from common.loading.model import Model

# Published tables lie beside the models, not in the code: adding one needs no change here.
PUBLISHED = Path(__file__).resolve().parents[2] / "models" / "published"


@dataclass(frozen=True)
class Labels:
    """Which `heads` are induction heads according to `source`."""

    heads: frozenset[Head]
    source: str

    def mask(self, shape: tuple[int, ...]) -> NDArray[np.bool_]:
        """Which heads are labelled, as an array of `shape` [layers, heads]."""
        labelled = np.zeros(shape, dtype=bool)
        for head in self.heads:
            labelled[head.place] = True
        return labelled


def choose_labels(wanted: str | None, model: Model, measure_labels: Callable[[], Labels]) -> Labels | None:
    """The labels that `--labels` asks for: `published`, `causal`, `none`, or a file.

    None, the default, means the model's own labels.json, else the published table if it knows the model, else no
    labels. `measure_labels` makes causal labels. Raises UserError if no published table knows the model, or if the file
    cannot be read as labels (see `read_labels`).
    """
    if wanted == "none":
        return None
    if wanted == "causal":
        return measure_labels()
    if wanted == "published":
        path = _published(model)
        if path is None:
            known = ", ".join(sorted(file.stem for file in PUBLISHED.glob("*.json")))
            raise UserError(f"no published labels for {model.name} (there are some for: {known}); try --labels causal")
    else:
        path = Path(wanted) if wanted else model.labels_file or _published(model)
    return read_labels(path, model.n_layers, model.n_heads) if path else None


def _published(model: Model) -> Path | None:
    """The published table that knows a model of this name, shape and vocabulary, or None."""
    for path in sorted(PUBLISHED.glob("*.json")):
        known = json.loads(path.read_text(encoding="utf-8"))["model"]
        # A name alone proves nothing: any folder can be called gpt2.
        shape = known["layers"], known["heads"], known["vocabulary"]
        if model.name in known["names"] and shape == (model.n_layers, model.n_heads, model.bridge.cfg.d_vocab):
            return path
    return None


def read_labels(path: Path, n_layers: int, n_heads: int) -> Labels:
    """Labels from a JSON file. Raises UserError if the file is missing, is not valid JSON, has no list
    "induction_heads", or names a head that does not exist in a model of `n_layers` layers with `n_heads` heads each."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read labels {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # deeply nested brackets end in a RecursionError
        raise UserError(f"labels {path} are not JSON: {error}") from None
    names = content.get("induction_heads") if isinstance(content, dict) else None
    if not isinstance(names, list):
        raise UserError(f'labels {path} need a list "induction_heads", such as ["5.1", "6.9"]')
    heads = set()
    for name in names:
        try:
            head = Head.parse(name)
        except UserError as error:
            raise UserError(f"labels {path}: {error}") from None
        # Labels are for causal models, which have one stack and so no name for it.
        if head.stack or head.layer >= n_layers or head.head >= n_heads:
            raise UserError(f"labels {path}: no head {name} in a model of {n_layers} layers with {n_heads} heads each")
        heads.add(head)
    return Labels(frozenset(heads), str(content.get("source", path)))
