"""What both scripts do at the terminal: flags, texts to analyse, exit codes, and all that is printed.

Results go to stdout (`tell`, `print_table`), everything else to stderr (`say`, `warn`, `detail`, `progress`). Imports
nothing heavy, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import io
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from common import UserError
from common.loading.escapes import escaped

if TYPE_CHECKING:
    from common.loading.model import Model
    from common.results.analysis import Note

LOG = logging.getLogger("induction_heads")  # its level is what --quiet and --verbose set
WIDTH = 100  # columns of a table where stdout is no terminal
OUT_OF_MEMORY = re.compile("out of memory|not enough memory|can't allocate memory")  # as torch says it
INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line on stderr, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {escaped(message)}{self._nearest(message)} (--help lists the options)\n")

    def _nearest(self, message: str) -> str:
        """`; did you mean --…?` where the complaint is of a flag that nearly exists."""
        if not message.startswith("unrecognized arguments:"):
            return ""
        flag = next((word.partition("=")[0] for word in message.split() if word.startswith("-")), "")
        near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
        return f"; did you mean {near[0]}?" if near else ""


def shared_parser(description: str) -> Parser:
    """The flags that both scripts take."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    what = parser.add_argument_group("what to analyse")
    name = (
        "a TransformerLens model name, a Hugging Face folder, a GGUF file, mini (bundled, offline), or auto: GPT-2 "
        "small where it can be had, else mini (default auto)"
    )
    what.add_argument("--model", default="auto", metavar="NAME|FOLDER|FILE", help=name)
    texts = what.add_mutually_exclusive_group()
    texts.add_argument("--text", action="append", metavar="TEXT", help="a text to analyse; repeat for more")
    texts.add_argument("--sequences-file", type=Path, metavar="FILE", help="a UTF-8 file with one text per line")
    add = parser.add_argument_group("how").add_argument
    add("--device", default="cpu", help="torch device: cpu, cuda, mps (default cpu)")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="weights (default float32)")
    add("--seed", type=whole_number, default=0, metavar="N", help="seed of the random rows (default 0)")
    rows = "rows per forward pass; auto: as many as help and fit into the free memory (default auto)"
    add("--batch-size", type=row_count, default="auto", metavar="auto|ROWS", help=rows)
    least = "each head its own threshold from its control cells, or one number for all, 0 to 1 (default dynamic)"
    add("--threshold", type=threshold, default="dynamic", metavar="dynamic|NUMBER", help=least)
    out = parser.add_argument_group("what to write")
    out.add_argument("--out", type=Path, metavar="DIR", help="output folder (default outputs/<model>/<script>)")
    out.add_argument("--no-plots", action="store_true", help="numbers only, no pictures")
    talk = parser.add_mutually_exclusive_group()
    level = partial(talk.add_argument, action="store_const", dest="level", default=logging.INFO)
    level("--quiet", const=logging.WARNING, help="say nothing while it runs but warnings; the result still comes")
    level("--verbose", const=logging.DEBUG, help="say more while it runs")
    parser.add_argument("--trust-remote-code", action="store_true", help="let the model's own Python code run")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error, and what is worth a look")
    return parser


def whole_number(text: str, least: int = 0) -> int:
    """A whole number from `least` to 2**63 - 1; raises argparse.ArgumentTypeError otherwise."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number") from None
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"'{text}' is not between 0 and 2**63 - 1")
    if number < least:
        raise argparse.ArgumentTypeError(f"'{text}' is less than {least}")
    return number


def positive(text: str) -> int:
    """A whole number of at least 1; raises argparse.ArgumentTypeError otherwise."""
    return whole_number(text, least=1)


def row_count(text: str) -> int | None:
    """`auto` (None: chosen when the model is there) or a number of rows; argparse.ArgumentTypeError otherwise."""
    return None if text == "auto" else positive(text)


def number_or(*words: str) -> Callable[[str], int | str]:
    """A parser of whole numbers and of these words; it raises argparse.ArgumentTypeError for anything else."""

    def parse(text: str) -> int | str:
        if text in words:
            return text
        if not text.isdecimal():
            raise argparse.ArgumentTypeError(f"'{text}' is neither a whole number nor {' nor '.join(words)}")
        return whole_number(text)

    return parse


def threshold(text: str) -> float | None:
    """`dynamic` (None: each head its own threshold) or a fixed number in [0, 1] for every head."""
    if text == "dynamic":
        return None
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is neither 'dynamic' nor a number such as 0.4") from None
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1, as attention is")
    return number


def chosen_texts(args: argparse.Namespace, default: Sequence[str]) -> list[str]:
    """The texts of `--text` or `--sequences-file`, else the script's own list.

    Raises UserError for a file that is missing or not UTF-8, and where there is no text.
    """
    if args.text is not None:
        return list(args.text)
    texts = list(default)
    if args.sequences_file is not None:
        try:
            texts = [line for line in args.sequences_file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise UserError(f"{args.sequences_file} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
        except OSError as error:
            raise UserError(f"cannot read {args.sequences_file}: {error.strerror}") from None
    if not texts:
        raise UserError("no text to analyse: give at least one text of two tokens or more")
    return texts


def load_model(args: argparse.Namespace) -> Model:
    """The model that `--model` names, said before and after. Raises UserError as loading does."""
    say(f"loading --model {args.model} …")
    from common.loading.loader import load

    options = {"device": args.device, "dtype": args.dtype, "trust_remote_code": args.trust_remote_code}
    model = load(args.model, **options, say=say)
    say(f"model: {model.name} ({model.source}), {model.n_layers} layers of {model.n_heads} heads")
    detail(f"it reads {model.context} tokens, BOS {model.bos} included; fingerprint {model.fingerprint}")
    return model


def output_path(args: argparse.Namespace, model: Model, program: str) -> Path:
    """The folder of `--out`, by default outputs/<model>/<script>."""
    return args.out or Path("outputs") / model.name / program


def say_missing(missing: Sequence[str]) -> None:
    """Stop as Ctrl-C does where an interrupted run has written what it has and `missing` names the rest."""
    if missing:
        raise KeyboardInterrupt(f"not measured: {', '.join(missing)}; the rest is written, run again to go on")


def say(message: str, level: int = logging.INFO) -> None:
    """One line for the person who waits, on stderr; not with --quiet."""
    if LOG.isEnabledFor(level):
        sys.stderr.write(escaped(message) + "\n")
        sys.stderr.flush()  # minutes may pass before the next line


def warn(message: str) -> None:
    """One line on stderr that the results need to be read with; with --quiet too."""
    say(f"warning: {message}", logging.WARNING)


def detail(message: str) -> None:
    """One line on stderr with --verbose."""
    say(message, logging.DEBUG)


def hear(note: Note) -> None:
    """Pass on what an analysis notes on its way."""
    (warn if note.warning else say)(note.text)


def tell(message: str) -> None:
    """A line of the result, on stdout."""
    sys.stdout.write(escaped(message, keep="\n") + "\n")


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr with the time left; yields advance(count). Drawn only where stderr is a terminal, and not with
    --quiet."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("left"))
    console = Console(stderr=True)
    shown = console.is_terminal and LOG.isEnabledFor(logging.INFO)
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.update(task, advance=count)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout, at most `WIDTH` columns wide; numbers are right-aligned."""
    table = Table(title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.title = escaped(title)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(escaped(cell) for cell in row))
    width = None if sys.stdout.isatty() else WIDTH
    Console(width=width, highlight=False, markup=False, emoji=False).print(table)


def run(work: Callable[[argparse.Namespace], None], args: argparse.Namespace, program: str) -> int:
    """Do the work; 0, or the exit code of what went wrong after one line on stderr."""
    if args.debug:
        logging.basicConfig(format="%(message)s")
        logging.getLogger("common").setLevel(logging.INFO)
    LOG.setLevel(getattr(args, "level", logging.INFO))  # the benchmarks have no such flag
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that knows few characters gets escapes for the others
            stream.reconfigure(errors="backslashreplace")

    def failed(message: str) -> int:
        if args.debug:
            traceback.print_exc()
        sys.stderr.write(f"{program}: {escaped(' '.join(message.split()))}\n")
        return 2

    try:
        for name, value in vars(args).items():
            # Of an option given as `--option=--` argparse makes an empty list.
            if isinstance(value, list) and (not value or [] in value):
                raise UserError(f"'--' is no value for --{name.replace('_', '-')}")
        work(args)
        sys.stdout.flush()
        return 0
    except UserError as error:
        return failed(str(error))
    except KeyboardInterrupt as stop:
        sys.stderr.write(f"{program}: stopped; {str(stop) or 'nothing was written'}\n")
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the table has read enough; the files are written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error))):
            raise
        return failed("out of memory: a smaller --batch-size or shorter texts need less")
