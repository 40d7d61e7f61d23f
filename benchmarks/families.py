"""Which families can be read, mapped, decomposed and intervened on? Small random models of each, one line per family.

    python -m benchmarks.families            # a table, about two minutes on 2 cores; needs no network

Each model is loaded as a user's is. "heads": the first script gives verdicts; "direct": direct effects and OV copying
too; "maps": the scores of a layer are reproduced; "parts": they are split by source, and the parts sum to them;
"paths": a head's path into a later key can be cut. A dash: refused; the reason is printed below the table.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from common import UserError
from common.attention.head import Head
from common.circuits.decomposition import decompose
from common.circuits.maps import interact
from common.heads.attribution import why_no_direct_path
from common.heads.survey import survey
from common.interventions.edits import Recordings, zero
from common.interventions.paths import path
from common.loading import Model, load
from common.loading.find import MINI
from tests import architectures

TEXT = "the cat sat the cat sat"


def heads(model: Model) -> None:
    survey(model, seed=0, batch_size=32, length=32)


def direct(model: Model) -> None:
    if reason := why_no_direct_path(model):
        raise UserError(reason)


def maps(model: Model) -> None:
    interact(model, model.encode(TEXT)[None], 1)


def parts(model: Model) -> None:
    tokens = model.encode(TEXT)
    decompose(model, tokens, interact(model, tokens[None], 1), [0], [])


def paths(model: Model) -> None:
    clean = Recordings(model, np.stack([model.encode(TEXT)] * 2))
    path(zero([Head.at(0, 0)]), [Head.at(1, 0)], "k", clean)


ASKED: tuple[Callable[[Model], None], ...] = (heads, direct, maps, parts, paths)


def main() -> int:
    transformers_logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(MINI)
    table = Table("family", *(asked.__name__ for asked in ASKED))
    refusals = []
    for family in architectures.CAUSAL:
        with tempfile.TemporaryDirectory() as folder:
            found, reasons = ask(architectures.save(family, Path(folder) / family, tokenizer))
        table.add_row(family, *found)
        refusals += [f"{family}, {reason}" for reason in reasons]
    Console(width=100).print(table)
    print("\n".join(refusals))
    return 0


def ask(folder: Path) -> tuple[list[str], list[str]]:
    """yes or a dash for each of `ASKED`, and the reasons of the dashes."""
    try:
        model = load(str(folder))
    except UserError as error:
        return ["–"] * len(ASKED), [f"load: {error}"]
    found, reasons = [], []
    for asked in ASKED:
        try:
            asked(model)
            found.append("yes")
        except UserError as error:
            found.append("–")
            reasons.append(f"{asked.__name__}: {error}")
    return found, reasons


if __name__ == "__main__":
    sys.exit(main())
