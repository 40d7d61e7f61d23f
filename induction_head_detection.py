#!/usr/bin/env python3
"""Find the induction heads of a language model, check them against ground truth, draw what they do on your texts.

    python induction_head_detection.py                                  # GPT-2 small if it can be had, else mini
    python induction_head_detection.py --model mini --text "a b c a b"  # bundled model, no network, your text
    python induction_head_detection.py --model ./my-gpt2 --threshold 0.4

Two questions, one run. Which heads of this model are induction heads? (Rows of random tokens with a repeat in them,
against control rows without it; each head has its own threshold.) What do those heads do on my sequences? (The list
below, or --text, or --sequences-file.) Writes PNGs, results.json and heads.csv to the folder
outputs/<model>/induction_head_detection, a table to stdout.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from common import cli

if TYPE_CHECKING:  # what loads torch is imported where it is used: --help stays quick
    from common.results import InductionHeads

# Edit me: the texts to look at.
sequences = [
    "the cat sat on the mat",
    "the cat sat the cat sat",
    "the quick brown fox jumps over the lazy dog",
    "the quick brown fox jumps the quick brown fox jumps",
]

PROGRAM = "induction_head_detection"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; the exit code: 0, 2 for what a user can mend, 130 for Ctrl-C."""
    parser = cli.shared_parser(__doc__ or "")
    parser.add_argument(
        "--labels",
        metavar="FILE|NAME|published|causal|none",
        help="what to evaluate against: a JSON file, a published set by name (gpt2, gpt2-ioi, pythia-160m, pythia-1b), "
        "published (the set for exactly these weights), labels measured now by intervention, or none (default: the "
        "model's own labels.json, else published where there is a set for its weights)",
    )
    parser.add_argument(
        "--ablate",
        action=argparse.BooleanOptionalAction,
        help="take the induction heads away and measure what the model loses (default: where it takes under a minute)",
    )
    return cli.run(detect, parser.parse_args(argv), PROGRAM)


def detect(args: argparse.Namespace) -> None:
    """Find the heads, save what was found, print it."""
    texts = cli.chosen_texts(args, sequences)
    model = cli.load_model(args)
    from common.results import files, find_induction_heads

    out = cli.output_path(args, model, PROGRAM)
    found = find_induction_heads(
        model, texts, threshold=args.threshold, labels=args.labels, ablate=args.ablate, seed=args.seed,
        batch_size=args.batch_size, earlier=files.prepare(out), progress=cli.progress, hear=cli.hear,
    )  # fmt: skip
    written = found.save(out, pictures=not args.no_plots, argv=sys.argv)
    print_summary(found)
    cli.tell(f"Written to {out}: {', '.join(written)}")
    cli.say_missing(found.missing)


def print_summary(found: InductionHeads) -> None:
    """The heads that attend to their targets, then what was found in sentences."""
    from common.results import tables

    title = f"Heads of {found.model.name} that attend to the tokens after earlier copies"
    cli.print_table(title, tables.HEAD_COLUMNS, tables.head_lines(found.heads))
    for sentence in found.sentences():
        cli.tell(sentence)


if __name__ == "__main__":
    sys.exit(main())
