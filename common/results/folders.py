"""Write the files of a run whole or not at all: at every moment the output folder holds an old result or a new one.

1. A run writes into a hidden folder beside the output folder, `.<name>.<random>.part`, and holds a lock on it.
2. When all files are there, the other files of the output folder (notes of the user's) are linked into the hidden
   folder, and the two folders trade places in one step of the file system (renameat2 on Linux, renamex_np on macOS).
   Where there is no output folder yet, the hidden one takes its name, in one step too.
3. Where that cannot be (other systems, an output folder that is a mount point, holds subfolders, or that somebody works
   in), the hidden folder is renamed to `.<name>.<random>.ready` and its files move one by one, results.json taken away
   first and put in place last. What a kill leaves undone of that, the next run finishes before it begins.
4. A run begins by deleting what killed runs left: hidden folders whose lock nobody holds.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import UserError

RESULTS = "results.json"
AWAY = ".old"  # what results.json of the old run is called while files move
AT_FDCWD, EXCHANGE, SWAP = -100, 2, 2  # of <fcntl.h>, <linux/fs.h> and <sys/stdio.h> of macOS


@contextmanager
def output_folder(final: Path) -> Iterator[Path]:
    """Yield an empty folder to write a run into; when the block ends well, its files are those of `final`.

    What an earlier run left there and this one did not write anew (its results.json lists its `files`) goes; other
    files stay. Raises UserError where nothing can be written there, before any work is done.
    """
    try:
        place = Path(os.path.realpath(final))  # what a link leads to, not the link
        beside = _beside(place)
        _tidy(place, beside)
        staging = beside / f"{_hidden(place)}{secrets.token_hex(4)}.part"
        staging.mkdir()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write to {final}: {reason(error)}; choose another folder with --out") from None
    lock = _lock(staging)
    try:
        yield staging
        _commit(staging, place)
    except OSError as error:
        raise UserError(f"writing to {final} failed: {reason(error)}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def earlier_results(folder: Path) -> dict[str, Any]:
    """The results.json that an earlier run left in `folder`; empty where there is none."""
    return _read(folder / RESULTS)


def reason(error: Exception) -> str:
    """What the system says went wrong, without its number."""
    return getattr(error, "strerror", None) or str(error)


def exchange(one: Path, other: Path) -> bool:
    """Let two folders trade names in one step; False where the system cannot, and then nothing has changed."""
    names = os.fsencode(one), os.fsencode(other)
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "renameat2"):
        return library.renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], EXCHANGE) == 0
    if sys.platform == "darwin" and hasattr(library := ctypes.CDLL(None), "renamex_np"):
        return library.renamex_np(*names, SWAP) == 0
    return False


def _hidden(final: Path) -> str:
    """What the names of hidden folders for `final` begin with; short, because names must not be long."""
    name = os.fsencode(final.name)
    return f".{final.name}." if len(name) <= 200 else f".{hashlib.sha256(name).hexdigest()[:16]}."


def _beside(final: Path) -> Path:
    """Where to put the hidden folder: beside `final`, or in it where its parent is another disk or not ours.

    Raises OSError where nothing can be written.
    """
    if not final.exists():
        final.parent.mkdir(parents=True, exist_ok=True)
        return final.parent
    probe = final / f".{secrets.token_hex(4)}.part"
    probe.mkdir()
    probe.rmdir()
    same_disk = final.parent.stat().st_dev == final.stat().st_dev
    return final.parent if same_disk and os.access(final.parent, os.W_OK) else final


def _tidy(final: Path, beside: Path) -> None:
    """Finish what a killed run had begun to move into `final`, and delete what others never finished."""
    for left in beside.iterdir():
        if not left.name.startswith(_hidden(final)) or left.suffix not in (".part", ".ready"):
            continue
        lock = _lock(left)
        if lock is None:  # of a run that goes on, or gone by now
            continue
        try:
            if left.suffix == ".ready":
                _move(left, final)
            shutil.rmtree(left, ignore_errors=True)
        finally:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """A lock on the folder that ends with this process; None where another one holds it or there are no such locks."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return handle
    except OSError:
        os.close(handle)
        return None


def _commit(staging: Path, final: Path) -> None:
    """Put the finished run in its place."""
    if not final.exists():
        staging.rename(final)
        return
    old = _files_of(final, final / RESULTS)
    others = [path for path in final.iterdir() if path.name not in old and path != staging]
    if _may_trade(final, staging, others) and _trade(staging, final, others):
        return
    ready = staging.rename(staging.with_suffix(".ready"))
    _move(ready, final)
    shutil.rmtree(ready, ignore_errors=True)


def _trade(staging: Path, final: Path, others: list[Path]) -> bool:
    """Give the finished run the name of `final`, with the `others` of its files beside; False where that cannot be."""
    shutil.copymode(final, staging)
    linked = [path for path in others if not (staging / path.name).exists()]
    for path in linked:
        _link(path, staging / path.name)
    if exchange(staging, final):
        return True
    for path in linked:
        (staging / path.name).unlink()
    return False


def _may_trade(final: Path, staging: Path, others: list[Path]) -> bool:
    """Whether another folder may take the place of `final`: nothing in it but plain files, and nobody working in it."""
    return (
        staging.parent == final.parent
        and all(path.is_file() and not path.is_symlink() for path in others)
        and not Path.cwd().is_relative_to(final)
        and not os.path.ismount(final)
    )


def _link(path: Path, copy: Path) -> None:
    """The same file under another name, or a copy where the file system has no links."""
    try:
        os.link(path, copy)
    except OSError:
        shutil.copy2(path, copy)


def _move(ready: Path, final: Path) -> None:
    """Move the files of a finished run into `final` one by one; can be done again from wherever it was stopped."""
    final.mkdir(exist_ok=True)
    new = {path.name for path in ready.iterdir() if path.name != AWAY}
    for name in new:
        if (final / name).is_dir():
            raise IsADirectoryError(errno.EISDIR, f"{name} is a folder there")
    if RESULTS in new and (final / RESULTS).exists():
        (final / RESULTS).replace(ready / AWAY)
    moved = _files_of(final, ready / RESULTS)  # by an earlier attempt
    for name in _files_of(final, ready / AWAY) - new - moved:
        (final / name).unlink()
    for name in sorted(new, key=lambda name: name == RESULTS):
        os.replace(ready / name, final / name)


def _files_of(folder: Path, results: Path) -> set[str]:
    """The files in `folder` that are those of a run, by its `results`."""
    listed = _read(results).get("files")
    names = {name for name in listed if isinstance(name, str)} if isinstance(listed, list) else set()
    return {path.name for path in folder.iterdir() if path.name in names and path.is_file()}


def _read(results: Path) -> dict[str, Any]:
    try:
        content = json.loads(results.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
