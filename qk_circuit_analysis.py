#!/usr/bin/env python3
"""Show what the queries of one layer look for, in maps checked against the model, and which of its parts make them.

    python qk_circuit_analysis.py --model mini                                # the layer of its strongest induction head
    python qk_circuit_analysis.py --model mini --text "one two three one two" # your text
    python qk_circuit_analysis.py --layer 5 --head 1 --export                 # any head; q and k as a safetensors file

Query and key of every head of the layer meet on the texts below (or --text, --sequences-file); a map that does not
reproduce the model's own attention stops the run. The scores of one head are then split into query source × key
source, and its weights are compared with those of earlier heads. Writes PNGs, results.json and terms.csv to
outputs/<model>/qk_circuit_analysis, the largest terms to stdout.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import cli, report
from common.detection import Detection, by_score, detect, name
from common.errors import UserError
from common.sequences import Floats, Ints, TokenBatch

if TYPE_CHECKING:  # what loads torch or matplotlib is imported where it is used: --help stays quick
    from common.circuits import Composition
    from common.models import Model
    from common.qk import Decomposition, Interaction

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
FALLBACK_CELLS = 3  # cells decomposed on a text that has no induction cell: those with most attention
DISTANCES = (1, 4, 16)  # between query and key, where the weights' score depends on it


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; the exit code: 0, 2 for what a user can mend, 130 for Ctrl-C."""
    parser = cli.shared_parser(__doc__ or "")
    add = parser.add_argument
    add("--layer", type=cli.number_or("auto"), metavar="N|auto", help="layer, from 0 (default: `layer` in the script)")
    add(
        "--head",
        type=cli.number_or("all", "auto"),
        default="auto",
        metavar="N|all|auto",
        help="head drawn large and decomposed, from 0; auto: the strongest induction head of the layer (default auto)",
    )
    add("--export", action="store_true", help="also write q and k of the layer to qk.safetensors")
    add("--threshold", type=cli.threshold, default="dynamic", metavar="dynamic|NUMBER", help="of an induction head")
    return cli.run(analyse_layer, parser.parse_args(argv), PROGRAM)


def analyse_layer(args: argparse.Namespace) -> None:
    """Load, choose the layer, let its queries and keys meet on the texts, decompose, compare weights, report."""
    started = time.monotonic()
    texts = cli.chosen_texts(args, sequences)
    report.say(f"loading --model {args.model} …")
    from common import circuits, models

    model = models.load(args.model, device=args.device, dtype=args.dtype, trust_remote_code=args.trust_remote_code)
    report.say(f"model: {model.name} ({model.source}), {model.n_layers} layers of {model.n_heads} heads")
    refuse_what_is_not_there(model, args)
    encoded = cli.encode(model, texts)
    out = args.out or Path("outputs") / model.name / PROGRAM
    with report.output_folder(out) as folder:
        found, previous_token = measure_heads(model, args)
        at, heads, reason = choose_heads(found, args)
        report.say(f"layer {at}: {reason}")
        composition = circuits.compose(model, at, seed=args.seed)
        pair = strongest_pair(composition, found, previous_token, heads)
        looked = [look(folder, model, found, (at, heads), args, n, *text) for n, text in enumerate(encoded, start=1)]
        main_text = max(looked, key=lambda entry: len(entry["cells"]))
        directions = weigh(folder, model, (at, heads[0]), pair, args, main_text, encoded[main_text["number"] - 1][1])
        if composition is not None and not args.no_plots:
            draw_composition(folder, model, composition, pair)
        decomposed = [record for entry in looked for record in entry.pop("decomposed")]
        rows = [{"text": one["text"], "head": one["head"], **term} for one in decomposed for term in one["terms"]]
        if rows:
            report.write_csv(folder / "terms.csv", rows)
        results = {
            **report.provenance(args, model, started),
            "layer": at,
            "chosen": reason,
            "heads": head_table(found, previous_token, at),
            "check": {"max_abs_error": max(entry["check"]["max_abs_error"] for entry in looked)},
            "sequences": looked,
            "decomposition": decomposed,
            "composition": composition_record(composition, pair),
            "directions": directions,
            "interventions": [],
            "files": sorted([*(path.name for path in folder.iterdir()), "results.json"]),
        }
        report.write_json(folder / "results.json", results)
    print_summary(results, main_text["number"], out)


def refuse_what_is_not_there(model: Model, args: argparse.Namespace) -> None:
    """UserError for a layer or head that the model has not."""
    from common import qk

    args.layer = layer if args.layer is None else args.layer
    if args.layer != "auto":
        qk.attention_of(model, args.layer)
    if isinstance(args.head, int) and args.head >= model.n_heads:
        raise UserError(f"{model.name} has no head {args.head} in a layer: its heads are 0 to {model.n_heads - 1}")


def measure_heads(model: Model, args: argparse.Namespace) -> tuple[Detection, Floats]:
    """Which heads are induction heads, and how much each attends to the previous token, [layer, head]."""
    from common import scores

    with report.progress("scoring heads", 2 * scores.ROWS) as advance:
        repeats, controls = scores.score_battery(model, seed=args.seed, batch_size=args.batch_size, advance=advance)
    null = controls.mean("prefix_matching"), controls.std("prefix_matching")
    found = detect(repeats.mean("prefix_matching"), *null, threshold=args.threshold)
    return found, controls.mean("previous_token")


def choose_heads(found: Detection, args: argparse.Namespace) -> tuple[int, list[int], str]:
    """The layer, its heads to show large, and why these: the strongest induction head, else the likest to one."""
    inside = [head for head in [*found.ranked(), *by_score(found.score)] if args.layer in ("auto", head[0])]
    at, strongest = inside[0]
    kind = (
        "the strongest induction head" if found.induction[inside[0]] else "no induction head; highest prefix matching"
    )
    reason = f"{kind}: {name(at, strongest)}, prefix matching {found.score[at, strongest]:.2f}"
    heads = {"all": list(range(found.score.shape[1])), "auto": [strongest]}.get(args.head, [args.head])
    return at, heads, reason if args.head == "auto" else f"--head {args.head}; {reason}"


def strongest_pair(
    composition: Composition | None, found: Detection, previous_token: Floats, heads: Sequence[int]
) -> tuple[tuple[int, int], int] | None:
    """The earlier previous-token head and the head of the layer that K-compose most, as ((layer, head), head).

    Previous-token heads pay most of their attention there (half or more; if none does, the one that pays most counts).
    Of the layer count its induction heads, or if it has none the chosen ones.
    """
    if composition is None:
        return None
    senders = [head for head in composition.senders if previous_token[head] >= 0.5]
    senders = senders or [max(composition.senders, key=lambda head: previous_token[head])]
    induction = [head for at, head in found.ranked() if at == composition.layer]
    return composition.strongest("K", senders, induction or heads)


def look(
    folder: Path, model: Model, found: Detection, chosen: tuple[int, list[int]], args: argparse.Namespace, number: int,
    text: str, tokens: Ints,
) -> dict[str, Any]:  # fmt: skip
    """One text: how the layer's queries and keys meet, checked and drawn, and what the chosen heads' scores are made of."""
    from common import qk

    at, heads = chosen
    induction = TokenBatch.of([tokens], pad=model.bos).cells["prefix_matching"]
    cells = list(zip(induction.query.tolist(), induction.key.tolist(), strict=True))
    met = qk.interact(model, tokens[None], at)
    split = {head: decompose(model, tokens, met, head, cells) for head in heads}
    strings = model.strings(tokens)
    if args.export:
        qk.export(met, tokens, folder / f"qk_{number:02d}.safetensors")
    files = []
    if not args.no_plots:
        from common import plots, qk_plots

        order = [head for layer_, head in by_score(found.score) if layer_ == at][:GRID]
        title = f"{model.name}, text {number}: {cli.shortened(text)}"
        for stem, figure in qk_plots.text_figures(met, split, sorted(order), strings, cells, title):
            files.append(f"{stem}_{number:02d}.png")
            plots.save(figure, folder / files[-1])
    return {
        "number": number,
        "text": text,
        "tokens": strings,
        "cells": cells,
        "check": {**vars(met.check), "max_abs_error": met.check.max_abs_error},
        "maps": files,
        "decomposed": [decomposition_record(number, name(at, head), one, bool(cells)) for head, one in split.items()],
    }


def decompose(
    model: Model, tokens: Ints, met: Interaction, head: int, cells: list[tuple[int, int]]
) -> Decomposition | str:
    """What the score of the text's induction cells (else of its largest ones) is made of, or why that is not shown."""
    from common import qk

    cells = cells or qk.largest_cells(met.pattern[0, head], FALLBACK_CELLS)
    try:
        return qk.decompose(model, qk.parts(model, tokens, (met.layer, head), met.rules), met, head, cells)
    except UserError as error:
        report.say(f"warning: {error}")
        return str(error)


def decomposition_record(number: int, head: str, found: Decomposition | str, induction: bool) -> dict[str, Any]:
    """One decomposition as results.json and terms.csv hold it."""
    record: dict[str, Any] = {"text": number, "head": head}
    if isinstance(found, str):
        return {**record, "refused": found, "terms": []}
    parts = [{"query": query, "key": key, "value": value} for query, key, value in found.top(TERMS)]
    which = "induction cells" if induction else "cells with most attention"
    sums = {"score": found.score, "lead": found.lead, "relative_error": found.error}
    return {**record, "cells": found.cells, "cells_are": which, **sums, "sources": found.sources, "terms": parts}


def head_table(found: Detection, previous_token: Floats, at: int) -> list[dict[str, Any]]:
    """One row per head of the layer, and the previous-token scores of the heads before it are in `composition`."""
    return [
        {
            "layer": at,
            "head": head,
            "prefix_matching": found.score[at, head],
            "induction": found.induction[at, head],
            "previous_token": previous_token[at, head],
        }
        for head in range(found.score.shape[1])
    ]


def weigh(
    folder: Path, model: Model, head: tuple[int, int], pair: Any, args: argparse.Namespace, text: dict[str, Any],
    tokens: Ints,
) -> list[dict[str, Any]]:  # fmt: skip
    """The circuits that the head's weights make of the tokens of one text, drawn; its singular directions as records."""
    from common import circuits

    found = circuits.head_circuits(model, head, pair and pair[0], tokens, distances=DISTANCES)
    strings = model.strings(found.tokens)
    if not args.no_plots:
        from common import plots, qk_plots

        title = f"Weights of head {name(*head)} of {model.name}, tokens of text {text['number']}"
        plots.save(qk_plots.circuit_figure(found, strings, len(tokens), title), folder / f"circuits_{name(*head)}.png")
    return [
        {"share": one.share, "query": sorted(zip(strings, one.query, strict=True), key=lambda along: -abs(along[1]))[:4],
         "key": sorted(zip(strings, one.key, strict=True), key=lambda along: -abs(along[1]))[:4]}
        for one in found.directions
    ]  # fmt: skip


def draw_composition(folder: Path, model: Model, composition: Composition, pair: Any) -> None:
    from common import plots, qk_plots

    title = f"{model.name}: what the heads of layer {composition.layer} read of what earlier heads write"
    plots.save(qk_plots.composition_figure(composition, pair, title), folder / "composition.png")


def composition_record(composition: Composition | None, pair: Any) -> dict[str, Any] | None:
    """The strongest previous-token → induction pair, and the strongest pair of each way, with what chance gives."""
    if composition is None:
        return None
    every = range(composition.z["Q"].shape[1])
    best = {way: composition.strongest(way, composition.senders, every) for way in composition.z}
    return {
        "z_limit": composition.limit,
        "previous_token_to_induction": composition.describe("K", pair),
        "strongest": {way: composition.describe(way, found) for way, found in best.items()},
    }


def print_summary(results: dict[str, Any], text: int, out: Path) -> None:
    """The largest terms on the text with most induction cells, the self-check, the composed pair, the files."""
    for one in (one for one in results["decomposition"] if one["text"] == text and one["terms"]):
        rows = [[term["query"], term["key"], f"{term['value']:.2f}"] for term in one["terms"]]
        title = f"Head {one['head']} on text {text}, mean over {len(one['cells'])} {one['cells_are']}: lead {one['lead']:.2f}"
        report.print_table(title, ["query source", "key source", "part of the lead"], rows)
    print(f"Our scores reproduce the model's: largest error {results['check']['max_abs_error']:.1e}")
    pair = results["composition"] and results["composition"]["previous_token_to_induction"]
    if pair:
        limit = results["composition"]["z_limit"]
        print(f"K-composition {pair['writes']} → {pair['reads']}: {pair['score']:.3f}, at random {pair['baseline']:.3f}, "
              f"z = {pair['z']:.1f} (above {limit:.1f} counts)")  # fmt: skip
    print(f"Written to {out}: {', '.join(results['files'])}")


if __name__ == "__main__":
    sys.exit(main())
