"""Write the files of a run whole or not at all, and read what the run before left.

1. A run writes into a hidden folder beside the output folder, `.NAME.part`, and holds the lock `.NAME.lock`.
2. When every file is there, the hidden folder is renamed to `.NAME.ready`. From here on the new result counts: if the
   run is killed, the next one finishes step 3 before it begins.
3. The old results.json is taken away first, then old files that the new run did not write are deleted, then the new
   files move one by one, results.json last. So whenever a run is killed, the output folder holds the complete old
   result, or no results.json, or the complete new result. A new output folder appears in one rename.

Files that no run listed in its results.json belong to the user and stay.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from common import UserError

RESULTS = "results.json"
OLD = ".old"  # what the old results.json is called inside `.NAME.ready` while files move
PROBE = ".writable"
LOCK_PATIENCE = 300.0  # seconds to wait for another run that is writing its pictures to the same folder


@contextmanager
def output_folder(final: Path) -> Iterator[Path]:
    """Yield an empty folder to write a run into, its results.json included; when the block ends well, they move to
    `final`. What an earlier run listed as its `files` and this run did not write is deleted. Raises UserError where
    nothing can be written."""
    with _held(final) as (place, hidden):
        staging, ready = Path(f"{hidden}part"), Path(f"{hidden}ready")
        try:
            staging.mkdir()
            yield staging
            if not place.exists():
                staging.rename(place)
                return
            for name in os.listdir(staging):
                if (place / name).is_dir():
                    raise IsADirectoryError(errno.EISDIR, f"{name} is a folder there")
            staging.rename(ready)
            _move(ready, place)
        except OSError as error:
            raise UserError(f"writing to {final} failed: {_reason(error)}") from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def prepare(final: Path) -> object:
    """What results.json in `final` holds, None where there is none, and its text where that is no JSON; after what a
    killed run left is finished or removed.

    Called before the long work: raises UserError where nothing can be written to `final`.
    """
    with _held(final) as (place, _):
        if not (place / RESULTS).is_file():
            return None
        text = ""
        try:
            text = (place / RESULTS).read_text(encoding="utf-8", errors="replace")
            content: object = json.loads(text)
        except (OSError, ValueError, RecursionError):
            return text
        return text if content is None else content


@contextmanager
def _held(final: Path) -> Iterator[tuple[Path, str]]:
    """Lock `final` and clean up; yields its real path and how the paths of its hidden files begin."""
    with ExitStack() as held:
        try:
            place = Path(os.path.realpath(final))  # a link stays a link: what it leads to is written
            name = os.fsencode(place.name)  # names may have 255 bytes, and ours add some
            short = place.name if len(name) <= 200 else hashlib.sha256(name).hexdigest()[:16]
            hidden = f"{_beside(place)}{os.sep}.{short}."
            held.enter_context(FileLock(f"{hidden}lock", timeout=LOCK_PATIENCE))
            held.callback(_forget, Path(f"{hidden}lock"))
            if Path(f"{hidden}ready", RESULTS).exists():
                _move(Path(f"{hidden}ready"), place)
            for ending in ("part", "ready"):  # nobody else writes these while the lock is ours
                shutil.rmtree(f"{hidden}{ending}", ignore_errors=True)
        except Timeout:
            raise UserError(f"another run is writing to {final}: wait for it, or choose another --out") from None
        except (OSError, ValueError) as error:
            raise UserError(f"cannot write to {final}: {_reason(error)}; choose another folder with --out") from None
        yield place, hidden


def _forget(lock: Path) -> None:
    with suppress(OSError):  # Windows does not delete an open file; FileLock copes with a deleted one elsewhere
        lock.unlink()


def _beside(place: Path) -> Path:
    """Where hidden files go: beside `place`, or in it where the parent is another disk or not ours. Raises OSError if
    neither can be written."""
    beside = place.parent
    if place.exists():
        same_disk = beside.stat().st_dev == place.stat().st_dev  # os.replace works within one disk only
        beside = beside if same_disk and os.access(beside, os.W_OK) else place
    else:
        beside.mkdir(parents=True, exist_ok=True)
    for folder in {beside, place if place.exists() else beside}:
        # Try it: os.access does not know of read-only disks, and FileLock waits where a file cannot be made. Always
        # under the same name, so that the next run removes what a killed one left.
        (folder / PROBE).mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # another run tries the same
            (folder / PROBE).rmdir()
    return beside


def _move(ready: Path, place: Path) -> None:
    """Step 3 of the module; goes on from wherever an earlier attempt was stopped."""
    place.mkdir(exist_ok=True)
    if (place / RESULTS).exists():
        os.replace(place / RESULTS, ready / OLD)
    left = {path.name for path in ready.iterdir()} - {OLD}
    new = left | _files(ready / RESULTS)  # an earlier attempt may have moved some
    for name in _files(ready / OLD) - new:
        if (place / name).is_file():
            (place / name).unlink()
    for name in sorted(left, key=lambda name: name == RESULTS):
        os.replace(ready / name, place / name)
    shutil.rmtree(ready, ignore_errors=True)


def _files(results: Path) -> set[str]:
    """The names that a results.json lists as its `files`; never one that leads out of the folder."""
    listed = _content_of(results).get("files")
    names = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    return {name for name in names if name == os.path.basename(name) and name not in ("", ".", "..")}


def _content_of(results: Path) -> dict[str, object]:
    try:
        content = json.loads(results.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _reason(error: Exception) -> str:
    """What the system says went wrong, without its number."""
    return getattr(error, "strerror", None) or str(error)


def jsonable(value: object) -> Any:
    """`value` as JSON knows it: dicts, lists, strings, numbers (6 significant digits), booleans. NaN becomes None."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [jsonable(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write `content` as JSON; NaN and infinities become null, NumPy values plain ones."""
    text = json.dumps(jsonable(content), indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(f"{text}\n", encoding="utf-8")


def write_results(folder: Path, content: Callable[[list[str]], Mapping[str, object]]) -> list[str]:
    """Write the last file of a run, results.json, with what `content` makes of the names of all files; these names."""
    names = sorted([*os.listdir(folder), RESULTS])
    write_json(folder / RESULTS, content(names))
    return names


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """One line per row; the columns are the keys of the first row."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: jsonable(value) for key, value in row.items()} for row in rows)
