"""Everything a run leaves behind: results.json, the CSV of the head table, the table on stdout, progress on stderr.

The files of a run appear together or not at all: common/folders.py says how.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from common.loading.escapes import escaped
from common.results.folders import earlier_results as earlier_results
from common.results.folders import output_folder as output_folder

SCHEMA = 1
WIDTH = 100
LOG = logging.getLogger("induction_heads")  # its level is what --quiet and --verbose set
PACKAGES = ("torch", "transformers", "transformer-lens", "numpy", "scikit-learn", "matplotlib")


def say(message: str, level: int = logging.INFO) -> None:
    """One line for the person who waits, on stderr; not with --quiet."""
    if LOG.isEnabledFor(level):
        sys.stderr.write(escaped(message) + "\n")
        sys.stderr.flush()


def warn(message: str) -> None:
    """One line on stderr that the results need to be read with; with --quiet too."""
    say(f"warning: {message}", logging.WARNING)


def detail(message: str) -> None:
    """One line on stderr with --verbose."""
    say(message, logging.DEBUG)


def tell(message: str) -> None:
    """A line of the result, on stdout."""
    sys.stdout.write(escaped(message, keep="\n") + "\n")


@contextmanager
def progress(what: str, total: int) -> Iterator[Any]:
    """A bar on stderr with the time left; yields advance(count). Drawn only where stderr is a terminal, and not with
    --quiet."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("left"))
    console = Console(stderr=True)
    options: dict[str, Any] = {
        "console": console,
        "transient": True,
        "disable": not (console.is_terminal and LOG.isEnabledFor(logging.INFO)),
    }
    with Progress(*columns, TimeRemainingColumn(), **options) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.update(task, advance=count)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as JSON; NaN and infinities become null, NumPy values plain ones."""
    path.write_text(json.dumps(plain(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def plain(value: Any) -> Any:
    """`value` as JSON knows it: dicts, lists, strings, numbers (6 significant digits), booleans, None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(item) for item in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def provenance(args: Any, model: Any, started: float) -> dict[str, Any]:
    """What a reader needs to repeat the run: schema, argv, seed, versions, model, device, wall time in seconds.

    `fused_attention`: whether scores were read in blocks behind fused attention, or from the bridge's whole patterns.
    """
    return {
        "schema": SCHEMA,
        "argv": sys.argv,
        "seed": args.seed,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "model": {"name": model.name, "source": model.source, "fingerprint": model.fingerprint},
        "fused_attention": model.trunk is not None,
        "device": args.device,
        "dtype": args.dtype,
        "wall_seconds": round(time.monotonic() - started, 2),
    }


def write_csv(path: Path, heads: Sequence[dict[str, Any]]) -> None:
    """One line per head; the columns are the keys of the first, an interval takes two: `_low` and `_high`."""
    text = io.StringIO()
    flat = [_flat(head) for head in heads]
    writer = csv.DictWriter(text, fieldnames=list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    path.write_text(text.getvalue(), encoding="utf-8")


def _flat(head: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for key, value in head.items():
        if key.endswith("_interval"):
            row |= dict(zip((f"{key[:-9]}_low", f"{key[:-9]}_high"), plain(value), strict=True))
        else:
            row[key] = plain(value)
    return row


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout, at most `WIDTH` columns wide; numbers are right-aligned."""
    table = Table(title=escaped(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(escaped(cell) for cell in row))
    console().print(table)


def console() -> Console:
    """Where results are printed: stdout, `WIDTH` columns when it is no terminal."""
    terminal = sys.stdout.isatty()
    return Console(width=None if terminal else WIDTH, highlight=False, markup=False, emoji=False)
