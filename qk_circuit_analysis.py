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
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import UserError, cli
from common.attention.head import Head
from common.heads.detection import Detection
from common.heads.statistics import Floats, Ints
from common.heads.tokens import TokenBatch
from common.results import report
from common.results.chosen import Chosen, choose

if TYPE_CHECKING:  # what loads torch or matplotlib is imported where it is used: --help stays quick
    from common.circuits.qk import Decomposition, Interaction
    from common.interventions.qk_interventions import Experiments
    from common.loading.models import Model
    from common.results.spec import Figure

# Edit me: the texts to look at, and the layer ("auto": the layer of the strongest induction head; or a number).
sequences = [
    "the cat sat on the mat",
    "the cat sat the cat sat",
    "the quick brown fox jumps over the lazy dog",
    "the quick brown fox jumps the quick brown fox jumps",
]
layer: int | str = "auto"

PROGRAM = "qk_circuit_analysis"
GRID = 16  # heads drawn side by side; of a layer with more, those with the highest prefix matching
TERMS = 8  # terms listed of each decomposition
DISTANCES = (1, 4, 16)  # between query and key, where the weights' score depends on it


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; the exit code: 0, 2 for what a user can mend, 130 for Ctrl-C."""
    parser = cli.shared_parser(__doc__ or "")
    add = parser.add_argument
    add("--layer", type=cli.number_or("auto"), metavar="N|auto", help="layer, from 0 (default: `layer` in the script)")
    head = "head drawn large and decomposed, from 0; auto: the strongest induction head of the layer (default auto)"
    add("--head", type=cli.number_or("all", "auto"), default="auto", metavar="N|all|auto", help=head)
    add("--export", action="store_true", help="also write q and k of the layer, a safetensors file per text")
    help_ = "replace the heads' parts and walk the paths into one, and measure (default: where it takes under a minute)"
    add("--interventions", action=argparse.BooleanOptionalAction, help=help_)
    return cli.run(analyse_layer, parser.parse_args(argv), PROGRAM)


def analyse_layer(args: argparse.Namespace) -> None:
    """Load, choose the layer, let its queries and keys meet on the texts, decompose, weigh, intervene, report."""
    started = time.monotonic()
    texts = cli.chosen_texts(args, sequences)
    from common.circuits import qk
    from common.results import qk_tables

    model = cli.load(args)
    args.layer = layer if args.layer is None else args.layer
    qk.check_exists(
        model, None if args.layer == "auto" else args.layer, None if args.head in ("auto", "all") else args.head
    )
    encoded = cli.encode(model, texts)
    cli.choose_batch_size(args, model, encoded)
    out = args.out or Path("outputs") / model.name / PROGRAM
    with report.output_folder(out) as folder:
        found, previous_token = measure_heads(model, args)
        chosen = choose(found, args.layer, args.head, drawn=GRID)
        report.say(f"layer {chosen.layer}: {chosen.reason}")
        looked = [look(folder, model, chosen, args, n, *text) for n, text in enumerate(encoded, start=1)]
        decomposed = [record for entry in looked for record in entry.pop("decomposed")]
        on_page = [entry.pop("on_page") for entry in looked]
        richest = max(looked, key=lambda entry: len(entry["cells"]))["number"]  # the text with most induction cells
        figures: dict[str, Figure] = {}  # of weights and interventions; those of a text are saved with the text
        weights = weigh(figures, model, chosen, previous_token, args, *encoded[richest - 1])
        experiments = intervene(figures, model, chosen, found, args, report.earlier_results(out))
        save_all(folder, figures)
        terms = [{"text": one["text"], "head": one["head"], **term} for one in decomposed for term in one["terms"]]
        if terms:
            report.write_csv(folder / "terms.csv", terms)
        measured = {"prefix_matching": found.score, "induction": found.induction, "previous_token": previous_token}
        results = {
            **report.provenance(args, model, started),
            "layer": chosen.layer,
            "chosen": chosen.reason,
            "heads": qk_tables.head_rows(chosen.layer, measured),
            "check": {"max_abs_error": max(entry["check"]["max_abs_error"] for entry in looked)},
            "sequences": looked,
            "decomposition": decomposed,
            **weights,
            "interventions": experiments.effects if experiments else [],
            "experiments": experiments.about() if experiments else None,
        }
        if not args.no_plots:
            from common.results import page, qk_tables

            said = qk_tables.sentences(results)
            page.save(page.qk_page(results, chosen.leading, said, on_page, figures), folder)
        results["files"] = sorted([*(path.name for path in folder.iterdir()), "results.json"])
        report.write_json(folder / "results.json", results)
    print_summary(results, richest, str(Head.at(chosen.layer, chosen.leading)), out)
    if experiments:
        cli.say_missing(experiments.missing)


def measure_heads(model: Model, args: argparse.Namespace) -> tuple[Detection, Floats]:
    """Which heads are induction heads, and how much each attends to the previous token, [layer, head]."""
    from common.heads.survey import survey

    options = {"seed": args.seed, "batch_size": args.batch_size, "threshold": args.threshold}
    measured = survey(model, **options, progress=report.progress)
    return measured.found, measured.evidence.controls.mean("previous_token")


def look(
    folder: Path, model: Model, chosen: Chosen, args: argparse.Namespace, number: int, text: str, tokens: Ints
) -> dict[str, Any]:
    """One text: how queries and keys of the layer meet, checked and drawn; what scores of chosen heads are made of."""
    from common.circuits import qk
    from common.interventions import qk_interventions

    induction = TokenBatch.of([tokens], pad=model.bos).cells["prefix_matching"]
    cells = sorted(zip(induction.query.tolist(), induction.key.tolist(), strict=True))
    met = qk.interact(model, tokens[None], chosen.layer)
    split = decompose(model, tokens, met, chosen.heads, cells)
    removed = {} if args.interventions is False else qk_interventions.removals(model, tokens, met, split)
    if args.export:
        qk.export(met, tokens, folder / f"qk_{number:02d}.safetensors")
    maps, on_page = [], None
    if not args.no_plots:
        from common.results import figures_circuits, page

        title, strings = f"{model.name}, text {number}: {cli.shortened(text)}", model.strings(tokens)
        maps = save_all(folder, figures_circuits.text_figures(met, split, chosen.grid, strings, cells, title, number))
        on_page = page.qk_text(met, split, text, strings, cells)
    records = {head: {"refused": one, "terms": []} if isinstance(one, str) else one.record(TERMS)
               for head, one in split.items()}  # fmt: skip
    return {
        "number": number,
        "text": text,
        "tokens": model.strings(tokens),
        "cells": cells,
        "check": {**vars(met.check), "max_abs_error": met.check.max_abs_error},
        "maps": maps,
        "on_page": on_page,
        "decomposed": [
            {"text": number, "head": str(Head.at(chosen.layer, head)), **one, "removal": removed.get(head)}
            for head, one in records.items()
        ],
    }


def save_all(folder: Path, figures: dict[str, Figure]) -> list[str]:
    """Write figures as PNG; the names of their files."""
    from common.results import draw

    for stem, figure in figures.items():
        draw.save(figure, folder / f"{stem}.png")
    return [f"{stem}.png" for stem in figures]


def decompose(
    model: Model, tokens: Ints, met: Interaction, heads: list[int], cells: list[tuple[int, int]]
) -> dict[int, Decomposition | str]:
    """What the mean score of the cells is made of, head by head, or why that cannot be said."""
    from common.circuits import qk

    try:
        return {**qk.decompose(model, tokens, met, heads, cells)}
    except UserError as error:
        report.warn(str(error))
        return {head: str(error) for head in heads}


def weigh(
    figures: dict[str, Figure], model: Model, chosen: Chosen, previous_token: Floats, args: argparse.Namespace,
    text: str, tokens: Ints,
) -> dict[str, Any]:  # fmt: skip
    """What the weights say: which earlier heads the layer reads, and what its leading head makes of a text."""
    from common.circuits import circuits

    at, head = chosen.layer, chosen.leading
    try:
        composition = circuits.compose(model, at, seed=args.seed)
        heads = chosen.induction or chosen.heads
        pair = composition.from_previous_token(previous_token, heads) if composition else None
        found = circuits.head_circuits(model, (at, head), pair and pair[0], tokens, distances=DISTANCES)
    except UserError as error:
        report.warn(str(error))
        return {"composition": None, "directions": []}
    strings = model.strings(found.tokens)
    if not args.no_plots:
        from common.results import figures_circuits

        title = f"{model.name}, tokens of: {cli.shortened(text)}"
        figures |= figures_circuits.weight_figures(found, composition, pair, strings, len(tokens), title)
    return {
        "composition": composition.record(pair) if composition and pair else None,
        "directions": [direction.record(strings, TERMS) for direction in found.directions],
    }


def intervene(
    figures: dict[str, Figure],
    model: Model,
    chosen: Chosen,
    found: Detection,
    args: argparse.Namespace,
    earlier: dict[str, Any],
) -> Experiments | None:
    """What the chosen heads' parts do, and the paths into the leading one; None where that was left out."""
    if args.interventions is False:
        return None
    from common.interventions import qk_interventions

    laboratory = qk_interventions.Laboratory(model, chosen, found, seed=args.seed, batch_size=args.batch_size)
    if args.interventions is None and (seconds := laboratory.seconds()) > qk_interventions.PATIENCE:
        report.say(f"interventions left out: they would take {seconds / 60:.0f} minutes; --interventions does them")
        return None
    done = qk_interventions.experiment(laboratory, earlier, report.progress)
    for reason in sorted(set(done.refused.values())):
        report.warn(reason)
    if not args.no_plots:
        from common.results import figures_circuits

        figures |= figures_circuits.intervention_figures(done.effects, model.name)
    return done


def print_summary(results: dict[str, Any], richest: int, leading: str, out: Path) -> None:
    """The largest terms on the richest text, the self-check, the composed pair, interventions on a head, the files."""
    from common.results import qk_tables

    for one in (one for one in results["decomposition"] if one["text"] == richest and one["terms"]):
        report.tell(qk_tables.lead_sentence(one))
        report.print_table("", qk_tables.TERM_COLUMNS, qk_tables.term_lines(one))
        if removed := qk_tables.removal_sentence(one):
            report.tell(removed)
    report.tell("\n".join(qk_tables.sentences(results)))
    if lines := qk_tables.part_lines(results["interventions"], leading):
        report.tell(qk_tables.part_sentence(results["interventions"], leading))
        report.print_table("", qk_tables.COLUMNS, lines)
    if walked := qk_tables.path_sentence(results["interventions"]):
        report.tell(walked)
    report.tell(f"Written to {out}: {', '.join(results['files'])}")


if __name__ == "__main__":
    sys.exit(main())
