"""The house is what its map says: which rooms there are, who imports whom, and that importing changes nothing.

Reads the source of `common/` and of the two scripts; imports inside functions count, those for type checking alone do
not. A script stands above all rooms.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import ROOT

# The map, lowest first: a room imports only from rooms to its left, and from itself.
ROOMS = ("common", "attention", "loading", "heads", "circuits", "interventions", "results", "cli", "scripts")
SCRIPTS = ("induction_head_detection.py", "qk_circuit_analysis.py")
LONGEST_CHAIN = 7
MOST_ANY = 40
SAME_NAME_TWICE = {  # top-level name: why two modules may both define it
    "__getattr__": "Python asks a package for its late names by this name",
    "main": "every program has one, and it is always called by its module's name",
}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    first, *others = module.split(".")
    return "scripts" if first != "common" else others[0] if others else "common"


PATHS = {module_of(path): path for path in [*(ROOT / name for name in SCRIPTS), *sorted(ROOT.glob("common/**/*.py"))]}


def for_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def modules_imported(source: str, known: set[str]) -> set[str]:
    """The modules among `known` that this source imports, at its top or in a function."""
    found = set()
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if for_type_checking(node):
            waiting += node.orelse
            continue
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are written out in full"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in whole}  # a module, or a name in one
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        waiting += ast.iter_child_nodes(node)
    return found & known


@cache
def imports() -> dict[str, set[str]]:
    sources = {module: path.read_text(encoding="utf-8") for module, path in PATHS.items()}
    return {module: modules_imported(source, set(PATHS)) - {module} for module, source in sources.items()}


def longest_chain(graph: dict[str, set[str]]) -> list[str]:
    """The longest path of imports. Fails if there is a circle."""
    best: dict[str, list[str]] = {}

    def walk(module: str, above: tuple[str, ...]) -> list[str]:
        assert module not in above, f"a circle: {' -> '.join([*above[above.index(module) :], module])}"
        if module not in best:
            below = [walk(other, (*above, module)) for other in sorted(graph.get(module, ()))]
            best[module] = [module, *max(below, key=len, default=[])]
        return best[module]

    return max((walk(module, ()) for module in sorted(graph)), key=len)


def wrong_arrows(graph: dict[str, set[str]], order: tuple[str, ...]) -> list[str]:
    """Imports from a room that does not stand before the importing one in `order`."""
    height = {room: place for place, room in enumerate(order)}
    return [
        f"{module} -> {other}"
        for module, others in sorted(graph.items())
        for other in sorted(others)
        if room_of(module) != room_of(other) and height[room_of(other)] > height[room_of(module)]
    ]


def map_in_the_readme(readme: str) -> dict[str, set[str]]:
    """From each room that the block under "Where things are" names, in order, to the modules it names there.

    A line begins with `common/ROOM/`, `common/cli.py` or `common/__init__.py`; indented lines go on with the room.
    """
    block = readme.split("## Where things are", 1)[1].split("```", 2)[1]
    rooms: dict[str, set[str]] = {}
    room = None
    for line in block.splitlines():
        if not line.startswith(" "):
            start = re.match(r"common/(?:(\w+)/|(\w+)\.py)", line)
            room = start and (start[1] or start[2]).replace("__init__", "common")
            line = line[start.end() :] if start else line
            if room:
                rooms.setdefault(room, set())
        if room:
            rooms[room] |= set(re.findall(r"\b(\w+)\.py\b", line))
    return rooms


def top_level_names(source: str) -> set[str]:
    """What a module defines at its top: functions, classes, constants, types; private ones too."""
    found: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)}
    return found


def uses_of_any(source: str) -> int:
    return sum(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(ast.parse(source)))


# --- the house ---


def test_common_shows_at_most_eight_entries_and_they_are_the_rooms():
    shown = {path.stem for path in (ROOT / "common").iterdir() if path.name != "__pycache__"}
    assert len(shown) <= 8
    assert shown == {"__init__", *ROOMS} - {"common", "scripts"}


def test_a_room_imports_only_from_rooms_below_it():
    assert wrong_arrows(imports(), ROOMS) == []


def test_no_module_imports_itself_by_way_of_others():
    longest_chain(imports())


def test_chains_of_imports_are_short():
    chain = longest_chain({module: others for module, others in imports().items() if room_of(module) != "scripts"})
    assert len(chain) <= LONGEST_CHAIN, " -> ".join(chain)


def test_the_readme_names_every_module_in_its_room():
    shown = map_in_the_readme((ROOT / "README.md").read_text(encoding="utf-8"))
    modules: dict[str, set[str]] = defaultdict(set)
    for module in PATHS:
        if room_of(module) != "scripts":
            modules[room_of(module)] |= {module.split(".")[2]} if module.count(".") == 2 else set()
    assert shown == modules
    lowest_first, highest_first = (*shown, "scripts"), (*reversed(shown), "scripts")
    assert wrong_arrows(imports(), lowest_first) == [] or wrong_arrows(imports(), highest_first) == []


def test_one_name_means_one_thing():
    modules = defaultdict(list)
    for module, path in PATHS.items():
        if room_of(module) != "scripts":
            for name in top_level_names(path.read_text(encoding="utf-8")):
                modules[name].append(module)
    twice = {name: where for name, where in modules.items() if len(where) > 1 and name not in SAME_NAME_TWICE}
    assert twice == {}


def test_few_types_are_left_open():
    counted = {module: uses_of_any(path.read_text(encoding="utf-8")) for module, path in PATHS.items()}
    assert sum(counted.values()) <= MOST_ANY, {module: count for module, count in counted.items() if count}


WATCH_IMPORTS = """
import importlib, os, socket, sys

opened = []
socket.socket.connect = lambda self, *address: opened.append(address)
import matplotlib, torch  # before the first look, so that what they set themselves is not held against a module

def state():
    # Read past RcParams.__getitem__, which chooses a backend when it is asked for one.
    settings = {name: repr(value) for name, value in dict.items(matplotlib.rcParams)}
    environment, threads = dict(os.environ), torch.get_num_threads()
    return {"rcParams": settings, "threads": threads, "environment": environment, "sockets": len(opened)}

before = state()
for module in sys.argv[1:]:
    importlib.import_module(module)
    now = state()
    for what in now:
        if now[what] != before[what]:
            print(f"importing {module} changed {what}")
    before = now
"""


def changes_on_import(*modules: str) -> str:
    """What importing the modules, one after the other in a fresh interpreter, changed."""
    command = [sys.executable, "-c", WATCH_IMPORTS, *modules]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_changes_nothing():
    assert changes_on_import(*PATHS) == ""


# --- the tests above see what they look for ---


def test_imports_are_found_wherever_they_stand_but_for_type_checking():
    source = """
from typing import TYPE_CHECKING
import common.cli
from common.heads import scores, missing
if TYPE_CHECKING:
    from common.loading import models
else:
    from common import UserError
def f():
    from common.heads.tokens import battery
"""
    known = {"common", "common.cli", "common.heads", "common.heads.scores", "common.heads.tokens", "common.loading"}
    assert modules_imported(source, known) == known - {"common.loading"}


def test_a_chain_is_measured_and_a_circle_is_seen():
    assert longest_chain({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == ["a", "b", "c"]
    with pytest.raises(AssertionError, match="a circle: b -> c -> b"):
        longest_chain({"a": {"b"}, "b": {"c"}, "c": {"b"}})


def test_an_arrow_upwards_is_seen():
    graph = {"common.heads.scores": {"common.loading.models", "common.cli"}, "script": {"common.cli"}}
    assert wrong_arrows(graph, ROOMS) == ["common.heads.scores -> common.cli"]


def test_the_readmes_map_is_read_room_by_room():
    readme = """# x
## Where things are
```
script.py            a script, see common/cli.py
common/__init__.py   the error
common/heads/        tokens.py (rows) · scores.py
                     labels.py
common/cli.py        flags
tests/               slow oracles in oracle.py
```
"""
    expected = {"common": set(), "heads": {"tokens", "scores", "labels"}, "cli": set()}
    assert map_in_the_readme(readme) == expected
    assert list(map_in_the_readme(readme)) == list(expected)


def test_names_and_open_types_are_counted():
    source = """
from typing import Any
A, B = 1, 2
C: Any = 3
class _F:
    g: list[Any]
def h():
    i = 1
"""
    assert top_level_names(source) == {"A", "B", "C", "_F", "h"}
    assert uses_of_any(source) == 2


def test_a_change_on_import_is_seen(tmp_path, monkeypatch):
    meddling = {
        "backend": ("import matplotlib; matplotlib.use('svg')", "rcParams"),
        "style": ("import matplotlib; matplotlib.rcParams['figure.dpi'] = 7", "rcParams"),
        "threads": ("import torch; torch.set_num_threads(torch.get_num_threads() + 1)", "threads"),
        "variable": ("import os; os.environ['SOME_NAME'] = 'x'", "environment"),
        "network": ("import socket; socket.socket().connect(('127.0.0.1', 9))", "sockets"),
        "nothing": ("", None),
    }
    for name, (change, _) in meddling.items():
        (tmp_path / f"sets_{name}.py").write_text(change)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    expected = "".join(f"importing sets_{name} changed {what}\n" for name, (_, what) in meddling.items() if what)
    assert changes_on_import(*(f"sets_{name}" for name in meddling)) == expected
