"""The two analyses and what they return: tables, figures, a page, files. Nothing here asks the user or prints.

    found = find_induction_heads(model, ["the cat sat the cat sat"])
    analysed = analyse_qk(model, ["the cat sat the cat sat"], layer="auto")

Names are loaded when they are first used: torch takes seconds to import, and `--help` does not need it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from common.results.induction import InductionHeads as InductionHeads
    from common.results.induction import find_induction_heads as find_induction_heads
    from common.results.qk import QKAnalysis as QKAnalysis
    from common.results.qk import analyse_qk as analyse_qk

PUBLIC = {"InductionHeads": "induction", "find_induction_heads": "induction", "QKAnalysis": "qk", "analyse_qk": "qk"}


def __getattr__(name: str) -> object:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *PUBLIC]
