#!/usr/bin/env python3
"""Find the induction heads of a language model, check them against ground truth, draw what they do on your texts.

    python induction_head_detection.py                                  # GPT-2 small if it can be had, else mini
    python induction_head_detection.py --model mini --text "a b c a b"  # bundled model, no network, your text
    python induction_head_detection.py --model ./my-gpt2 --threshold 0.4

Two questions, one run. Which heads of this model are induction heads? (Rows of random tokens with a repeat in them,
against control rows without it; each head has its own threshold.) What do those heads do on my sequences? (The list
below, or --text, or --sequences-file.) Writes PNGs, results.json and heads.csv to outputs/<model>/, a table to stdout.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import cli, report
from common.detection import Detection, detect, name
from common.sequences import HEAD_TYPES, Ints, TokenBatch

if TYPE_CHECKING:  # what loads torch, scikit-learn or matplotlib is imported where it is used: --help stays quick
    from common.metrics import Labels, Metrics
    from common.models import Model
    from common.scores import HeadScores

# Edit me: the texts to look at.
sequences = [
    "the cat sat on the mat",
    "the cat sat the cat sat",
    "the quick brown fox jumps over the lazy dog",
    "the quick brown fox jumps the quick brown fox jumps",
]

PROGRAM = "induction_head_detection"
HEADS_DRAWN = 4  # heads drawn per text


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; the exit code: 0, 2 for what a user can mend, 130 for Ctrl-C."""
    parser = cli.shared_parser(__doc__ or "")
    parser.add_argument(
        "--threshold",
        type=cli.threshold,
        default="dynamic",
        metavar="dynamic|NUMBER",
        help="each head its own threshold from its control cells, or one number for all, 0 to 1 (default dynamic)",
    )
    parser.add_argument(
        "--labels", type=Path, metavar="FILE", help="JSON labels to evaluate against (default: the model's labels.json)"
    )
    return cli.run(find_induction_heads, parser.parse_args(argv), PROGRAM)


def find_induction_heads(args: argparse.Namespace) -> None:
    """Load, score, decide, evaluate, look at the texts, report."""
    started = time.monotonic()
    texts = cli.chosen_texts(args, sequences)
    report.say(f"loading --model {args.model} …")
    from common import models, scores

    model = models.load(args.model, device=args.device, dtype=args.dtype, trust_remote_code=args.trust_remote_code)
    report.say(f"model: {model.name} ({model.source}), {model.n_layers} layers of {model.n_heads} heads")
    encoded = cli.encode(model, texts)
    labels = choose_labels(model, args.labels)
    out = args.out or Path("outputs") / model.name / PROGRAM
    with report.output_folder(out) as folder:
        with report.progress("scoring heads", 2 * scores.ROWS) as advance:
            options = {"seed": args.seed, "batch_size": args.batch_size}
            repeats, controls = scores.score_battery(model, **options, advance=advance)
        found = decide(repeats, controls, args.threshold)
        quality = evaluate(found, labels)
        per_text = [analyse_text(model, text, tokens, found) for text, tokens in encoded]
        heads = head_table(repeats, found)
        report.write_csv(folder / "heads.csv", heads)
        if not args.no_plots:
            draw(folder, model, found, per_text)
        written = sorted([*(path.name for path in folder.iterdir()), "results.json"])
        results = {
            **report.provenance(args, model, started),
            "heads": heads,
            "induction_heads": [name(*head) for head in found.ranked()],
            "metrics": vars(quality) if quality else None,
            "sequences": [entry["results"] for entry in per_text],
            "files": written,
        }
        report.write_json(folder / "results.json", results)
    print_summary(model, found, quality, out, written)


def decide(repeats: HeadScores, controls: HeadScores, threshold: float | None) -> Detection:
    """Each head against its null: its prefix matching at the same cells of the control rows."""
    null = controls.mean("prefix_matching"), controls.std("prefix_matching")
    return detect(repeats.mean("prefix_matching"), *null, threshold=threshold)


def choose_labels(model: Model, labels_file: Path | None) -> Labels | None:
    """The user's labels, or those the model ships; None where there are none."""
    from common import metrics

    path = labels_file or model.labels_file
    return metrics.read_labels(path, model.n_layers, model.n_heads) if path else None


def evaluate(found: Detection, labels: Labels | None) -> Metrics | None:
    """Agreement with the labels, if there are any."""
    from common import metrics

    return metrics.evaluate(found.induction, found.score, labels) if labels else None


def analyse_text(model: Model, text: str, tokens: Ints, found: Detection) -> dict[str, Any]:
    """One text: its entry in results.json, its induction cells, and the panels to draw, as (title, pattern)."""
    from common import scores

    batch = TokenBatch.of([tokens], pad=model.bos)
    on_text = scores.score(model, batch, batch_size=1)
    score, cells = on_text.mean("prefix_matching"), batch.cells["prefix_matching"]
    heads = [
        {"layer": layer, "head": head, **{kind: on_text.mean(kind)[layer, head] for kind in HEAD_TYPES}}
        for layer in range(model.n_layers)
        for head in range(model.n_heads)
    ]
    strongest = sorted(found.ranked(), key=lambda head: -score[head] if len(cells.group_row) else 0)[:HEADS_DRAWN]
    layer = strongest[0][0] if strongest else model.n_layers - 1
    drawn = scores.patterns(model, tokens, [*strongest, (layer, None)])
    titles = [panel_title(head, float(score[head])) for head in strongest]
    titles.append(f"layer {layer}, mean over its {model.n_heads} heads")
    return {
        "results": {"text": text, "tokens": model.strings(tokens), "queries": len(cells.group_row), "heads": heads},
        "cells": list(zip(cells.query.tolist(), cells.key.tolist(), strict=True)),
        "panels": list(zip(titles, drawn, strict=True)),
    }


def panel_title(head: tuple[int, int], score: float) -> str:
    return f"head {name(*head)}, " + ("no token repeats here" if math.isnan(score) else f"prefix matching {score:.2f}")


def head_table(repeats: HeadScores, found: Detection) -> list[dict[str, Any]]:
    """One row per head: where it is, its scores on the battery, and the decision."""
    others = {kind: repeats.mean(kind) for kind in HEAD_TYPES if kind != "prefix_matching"}
    return [
        {
            "layer": layer,
            "head": head,
            "prefix_matching": found.score[layer, head],
            "control": found.control[layer, head],
            "threshold": found.threshold[layer, head],
            "induction": found.induction[layer, head],
            **{kind: values[layer, head] for kind, values in others.items()},
        }
        for layer in range(found.score.shape[0])
        for head in range(found.score.shape[1])
    ]


def draw(folder: Path, model: Model, found: Detection, per_text: Sequence[dict[str, Any]]) -> None:
    """The mosaic, every head against its threshold, and the strongest heads on each text."""
    from common import plots

    plots.save(plots.mosaic_figure(found, f"Induction heads of {model.name}"), folder / "mosaic.png")
    plots.save(
        plots.threshold_figure(found, f"{model.name}: each head against its own threshold"), folder / "thresholds.png"
    )
    for number, entry in enumerate(per_text, start=1):
        title = f"{model.name} on text {number}: {cli.shortened(entry['results']['text'])}"
        figure = plots.attention_grid(entry["panels"], entry["results"]["tokens"], entry["cells"], title)
        plots.save(figure, folder / f"attention_{number:02d}.png")


def print_summary(model: Model, found: Detection, quality: Metrics | None, out: Path, written: Sequence[str]) -> None:
    """The induction heads, ranked; the agreement with labels; where the files are."""
    rows = [
        [name(*head), f"{found.score[head]:.3f}", f"{found.control[head]:.3f}", f"{found.threshold[head]:.3f}"]
        for head in found.ranked()
    ]
    report.print_table(f"Induction heads of {model.name}", ["head", "prefix matching", "control", "threshold"], rows)
    if not rows:
        print("No head of this model is an induction head by this test.")
    if quality:
        print(
            f"Against labels ({quality.labels}): precision {quality.precision:.2f}, recall {quality.recall:.2f}, "
            f"F1 {quality.f1:.2f}"
        )
    print(f"Written to {out}: {', '.join(written)}")


if __name__ == "__main__":
    sys.exit(main())
