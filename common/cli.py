"""What both scripts do at the terminal: flags, texts to analyse, exit codes.

Imports nothing heavy, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Never

from common import report
from common.errors import UserError

if TYPE_CHECKING:
    from common.models import Model
    from common.sequences import Ints

INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line on stderr, with exit code 2."""

    def error(self, message: str) -> Never:
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def shared_parser(description: str) -> Parser:
    """The flags that both scripts take."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    what = parser.add_argument_group("what to analyse")
    what.add_argument(
        "--model",
        default="auto",
        metavar="NAME|FOLDER",
        help="a TransformerLens model name, a Hugging Face folder, mini (bundled, offline), "
        "or auto: GPT-2 small where it can be had, else mini (default auto)",
    )
    texts = what.add_mutually_exclusive_group()
    texts.add_argument("--text", action="append", metavar="TEXT", help="a text to analyse; repeat for more")
    texts.add_argument("--sequences-file", type=Path, metavar="FILE", help="a UTF-8 file with one text per line")
    how = parser.add_argument_group("how")
    how.add_argument("--device", default="cpu", help="torch device: cpu, cuda, mps (default cpu)")
    how.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="weights (default float32)"
    )
    how.add_argument("--seed", type=whole_number, default=0, metavar="N", help="seed of the random rows (default 0)")
    how.add_argument(
        "--batch-size",
        type=rows_at_once,
        default="auto",
        metavar="auto|ROWS",
        help="rows per forward pass; auto: as many as help and fit into the free memory (default auto)",
    )
    how.add_argument(
        "--threshold",
        type=threshold,
        default="dynamic",
        metavar="dynamic|NUMBER",
        help="each head its own threshold from its control cells, or one number for all, 0 to 1 (default dynamic)",
    )
    out = parser.add_argument_group("what to write")
    out.add_argument("--out", type=Path, metavar="DIR", help="output folder (default outputs/<model>/<script>)")
    out.add_argument("--no-plots", action="store_true", help="numbers only, no pictures")
    parser.add_argument("--trust-remote-code", action="store_true", help="let the model's own Python code run")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error, and what is worth a look")
    return parser


def positive(text: str) -> int:
    """A whole number of at least 1; raises argparse.ArgumentTypeError otherwise."""
    number = whole_number(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is less than 1")
    return number


def whole_number(text: str) -> int:
    """A whole number from 0 to 2**63 - 1; raises argparse.ArgumentTypeError otherwise."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number") from None
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"'{text}' is not between 0 and 2**63 - 1")
    return number


def rows_at_once(text: str) -> int | None:
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

    Raises UserError for a file that is missing or not UTF-8.
    """
    if args.text is not None:
        return list(args.text)
    if args.sequences_file is None:
        return list(default)
    try:
        lines = args.sequences_file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{args.sequences_file} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"cannot read {args.sequences_file}: {error.strerror}") from None
    return [line for line in lines if line.strip()]


def encode(model: Model, texts: Sequence[str]) -> list[tuple[str, Ints]]:
    """Each text with its ids. Texts of fewer than two tokens are left out with a warning.

    Raises UserError where a text is longer than the context, or where no text is left.
    """
    kept = []
    for number, text in enumerate(texts, start=1):
        tokens = model.encode(text)
        if len(tokens) > model.context:
            raise UserError(
                f"text {number} has {len(tokens)} tokens with BOS and {model.name} reads at most {model.context}: "
                "shorten it or split it"
            )
        if len(tokens) < 3:
            report.say(
                f"warning: text {number} ({text!r}) has {len(tokens) - 1} tokens, at least 2 are needed: left out"
            )
            continue
        kept.append((text, tokens))
    if not kept:
        raise UserError("no text to analyse: give at least one text of two tokens or more")
    return kept


def choose_batch_size(args: argparse.Namespace, model: Model, encoded: Sequence[tuple[str, Ints]]) -> None:
    """Fill in `--batch-size auto`, for the longest of the texts and of the battery's rows."""
    from common import batching
    from common.survey import ROW_LENGTH

    if args.batch_size is None:
        longest = max(ROW_LENGTH, *(len(tokens) for _, tokens in encoded))
        args.batch_size = batching.batch_size(model, longest)


def shortened(text: str, most: int = 70) -> str:
    """A text on one line, at most `most` characters of it, for a title."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def say_missing(missing: Sequence[str]) -> None:
    """Stop as Ctrl-C does where an interrupted run has written what it has and `missing` names the rest."""
    if missing:
        raise KeyboardInterrupt(f"not measured: {', '.join(missing)}; the rest is written, run again to go on")


def run(work: Callable[[argparse.Namespace], None], args: argparse.Namespace, program: str) -> int:
    """Do the work; 0, or the exit code of what went wrong after one line on stderr."""
    if args.debug:
        logging.basicConfig(format="%(message)s")
        logging.getLogger("common").setLevel(logging.INFO)
    try:
        work(args)
        return 0
    except UserError as error:
        if args.debug:
            traceback.print_exc()
        sys.stderr.write(f"{program}: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt as stop:
        sys.stderr.write(f"{program}: stopped; {stop or 'nothing was written'}\n")
        return INTERRUPTED
