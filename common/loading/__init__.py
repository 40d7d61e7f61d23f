"""A name becomes a model: `load("mini")`. What may be touched here: where models are found, how they are read, what
their architectures call their parts, and what is checked before anything is believed.

`load` and `Model` are imported when they are first asked for: they need torch, and the command line must not wait.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from common.loading.loader import load as load
    from common.loading.model import Model as Model

_HOMES = {"load": "common.loading.loader", "Model": "common.loading.model"}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(_HOMES[name]), name)
