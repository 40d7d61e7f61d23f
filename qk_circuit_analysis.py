#!/usr/bin/env python3
"""Show what the queries of one layer look for, in maps checked against the model, and which of its parts make them.

    python qk_circuit_analysis.py --model mini                      # the layer of its strongest induction head
    python qk_circuit_analysis.py --model mini --text "a b c a b"   # your text
    python qk_circuit_analysis.py --layer 5 --head 1 --export       # any head; q and k as safetensors files

Query and key of every head of the layer meet on the texts below (or --text, --sequences-file); a map that does not
reproduce the model's own attention stops the run. The scores of one head are then split into query source × key
source, its weights are compared with those of earlier heads, and its parts and the paths into it are taken away to see
what they do. Writes PNGs, results.json and terms.csv to outputs/<model>/qk_circuit_analysis, tables to stdout.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from common import cli

if TYPE_CHECKING:  # what loads torch is imported where it is used: --help stays quick
    from common.results import QKAnalysis

# Edit me: the texts to look at, and the layer ("auto": the layer of the strongest induction head; or a number).
sequences = [
    "the cat sat on the mat",
    "the cat sat the cat sat",
    "the quick brown fox jumps over the lazy dog",
    "the quick brown fox jumps the quick brown fox jumps",
]
layer: int | str = "auto"

PROGRAM = "qk_circuit_analysis"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; the exit code: 0, 2 for what a user can mend, 130 for Ctrl-C."""
    parser = cli.shared_parser(__doc__ or "")
    add = parser.add_argument
    add(
        "--layer",
        type=cli.number_or("auto"),
        metavar="N|auto",
        help="layer, from 0; auto: that of the strongest induction head (default: `layer` in the script)",
    )
    head = "head drawn large and decomposed, from 0; auto: the strongest induction head of the layer (default auto)"
    add("--head", type=cli.number_or("all", "auto"), default="auto", metavar="N|all|auto", help=head)
    add("--export", action="store_true", help="also write q and k of the layer, a safetensors file per text")
    help_ = "replace the heads' parts and walk the paths into one, and measure (default: where it takes under a minute)"
    add("--interventions", action=argparse.BooleanOptionalAction, help=help_)
    return cli.run(analyse, parser.parse_args(argv), PROGRAM)


def analyse(args: argparse.Namespace) -> None:
    """Analyse the layer, save what was found, print it."""
    texts = cli.chosen_texts(args, sequences)
    model = cli.load_model(args)
    from common.results import analyse_qk, files

    out = cli.output_path(args, model, PROGRAM)
    found = analyse_qk(
        model, texts, layer if args.layer is None else args.layer, head=args.head, threshold=args.threshold,
        interventions=args.interventions, seed=args.seed, batch_size=args.batch_size, earlier=files.prepare(out),
        progress=cli.progress, hear=cli.hear,
    )  # fmt: skip
    written = found.save(out, pictures=not args.no_plots, export=args.export, argv=sys.argv)
    print_summary(found)
    cli.tell(f"Written to {out}: {', '.join(written)}")
    cli.say_missing(found.missing)


def print_summary(found: QKAnalysis) -> None:
    """The largest terms on the richest text, the self-check, the composed pair, interventions on the leading head."""
    from common.results import tables

    for sentence, split, removed in found.decomposed():
        cli.tell(sentence)
        terms = [[query, key, f"{value:.2f}"] for query, key, value in split.top(tables.TERMS)]
        cli.print_table("", tables.TERM_COLUMNS, terms)
        if removed:
            cli.tell(removed)
    cli.tell("\n".join(found.checks()))
    if lines := tables.part_lines(found.effects, found.leading):
        cli.tell(tables.part_sentence(found.effects, found.leading))
        cli.print_table("", tables.PART_COLUMNS, lines)
    if paths := tables.path_sentence(found.effects):
        cli.tell(paths)


if __name__ == "__main__":
    sys.exit(main())
