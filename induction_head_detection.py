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
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import UserError, cli
from common.results import report

if TYPE_CHECKING:  # what loads torch, scikit-learn or matplotlib is imported where it is used: --help stays quick
    from common.heads.labels import Labels
    from common.heads.metrics import Metrics
    from common.heads.statistics import Floats, Ints
    from common.heads.survey import Survey
    from common.heads.texts import TextScores
    from common.interventions.ablation import Ablation
    from common.loading.models import Model
    from common.results.spec import Figure

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
        "--labels",
        metavar="FILE|published|causal|none",
        help="what to evaluate against: a JSON file, the published table, labels measured now by intervention, or none "
        "(default: the model's own labels.json, else the published table where it knows the model)",
    )
    parser.add_argument(
        "--ablate",
        action=argparse.BooleanOptionalAction,
        help="take the induction heads away and measure what the model loses (default: where it takes under a minute)",
    )
    return cli.run(find_induction_heads, parser.parse_args(argv), PROGRAM)


def find_induction_heads(args: argparse.Namespace) -> None:
    """Load, score and decide, evaluate, look at the texts, report."""
    started = time.monotonic()
    texts = cli.chosen_texts(args, sequences)
    from common.heads.survey import copying, survey
    from common.heads.texts import score_text
    from common.results import tables

    model = cli.load(args)
    encoded = cli.encode(model, texts)
    cli.choose_batch_size(args, model, encoded)
    labels = choose_labels(model, args)
    out = args.out or Path("outputs") / model.name / PROGRAM
    options = {"seed": args.seed, "batch_size": args.batch_size, "threshold": args.threshold}
    with report.output_folder(out) as folder:
        measured = survey(model, **options, progress=report.progress)
        quality = evaluate(measured, labels)
        if measured.evidence.no_direct_path:
            report.warn(f"no direct effect and no copying: {measured.evidence.no_direct_path}")
        heads = tables.head_rows(measured, copying(model, measured))
        ablated = ablate(model, measured, args, out)
        tables.add_ablation(heads, ablated)
        on_texts = [(text, tokens, score_text(model, tokens, **options)) for text, tokens in encoded]
        report.write_csv(folder / "heads.csv", heads)
        if not args.no_plots:
            from common.results import draw

            figures = make_figures(model, measured, labels, on_texts, heads, ablated)
            for stem, figure in figures.items():
                draw.save(figure, folder / f"{stem}.png")
        results = {
            **report.provenance(args, model, started),
            "rows": measured.rows,
            "row_length": measured.length,
            "heads": heads,
            "induction_heads": [str(head) for head in measured.found.ranked()],
            "no_direct_path": measured.evidence.no_direct_path,
            "ablation": ablated.plain() if ablated else None,
            "metrics": vars(quality) if quality else None,
            "sequences": [
                tables.text_entry(measured.found, text, model.strings(tokens), on_text)
                for text, tokens, on_text in on_texts
            ],
        }
        if not args.no_plots:
            write_page(folder, model, results, ablated, on_texts, figures)
        results["files"] = sorted([*(path.name for path in folder.iterdir()), "results.json"])
        report.write_json(folder / "results.json", results)
    print_summary(results, measured, quality, ablated, out)
    if ablated:
        cli.say_missing(ablated.missing)


def choose_labels(model: Model, args: argparse.Namespace) -> Labels | None:
    """What to evaluate against, if anything; read before the long work, so that a wrong file is said at once."""
    from common.heads import labels
    from common.interventions import causal

    measure = partial(causal.measure, model, batch_size=args.batch_size, seed=args.seed, progress=report.progress)
    return labels.choose_labels(args.labels, model, lambda: measure().labels())


def evaluate(measured: Survey, labels: Labels | None) -> Metrics | None:
    """Agreement of the verdicts with the labels, if there are any."""
    from common.heads import metrics

    found = measured.found
    return metrics.evaluate(found.induction, found.score, found.resampled, labels) if labels else None


def ablate(model: Model, measured: Survey, args: argparse.Namespace, out: Path) -> Ablation | None:
    """What the model loses without its induction heads; None where there are none, or where it was left out."""
    from common.interventions import ablation

    if args.ablate is False or not measured.found.ranked():
        return None
    try:
        laboratory = ablation.Laboratory(model, measured.found, seed=args.seed, batch_size=args.batch_size)
    except UserError as error:
        report.warn(f"no ablation: {error}")
        return None
    if args.ablate is None and (seconds := laboratory.seconds()) > ablation.PATIENCE:
        report.say(f"ablation left out: it would take about {seconds / 60:.0f} minutes; --ablate does it")
        return None
    ablated = ablation.ablate(laboratory, report.earlier_results(out).get("ablation"), report.progress)
    for kind, why in ablated.impossible.items():
        report.warn(f"no ablation by '{kind}': {why}")
    return ablated


def make_figures(
    model: Model, measured: Survey, labels: Labels | None, on_texts: Sequence[Any], heads: Sequence[dict[str, Any]],
    ablated: Ablation | None,
) -> dict[str, Figure]:  # fmt: skip
    """Every picture by the stem of its file's name."""
    from common.results import figures_heads as made

    found, paid = measured.found, measured.evidence.repeats.budget()
    figures = {
        "mosaic": made.mosaic_figure(found, f"Induction heads of {model.name}"),
        "thresholds": made.threshold_figure(found, f"{model.name}: each head against its own threshold"),
        "budget": made.budget_figure(found, paid, f"{model.name}: where attention goes"),
        "effects": made.effect_figure(heads, f"{model.name}: looking like induction, and doing it"),
    }
    if labels and labels.heads:
        title = f"{model.name}: detection against labels"
        figures["precision_recall"] = made.precision_recall_figure(found, labels, title)
    if ablated and ablated.effects:
        figures["ablation"] = made.ablation_figure(ablated.effects, f"{model.name}: without its induction heads")
    for number, (text, tokens, on_text) in enumerate(on_texts, start=1):
        title = f"{model.name} on text {number}: {cli.shortened(text)}"
        panels, strings = text_panels(model, measured, tokens, on_text), model.strings(tokens)
        figures[f"attention_{number:02d}"] = made.token_figure("pattern", panels, strings, on_text.cells, title)
    return figures


def write_page(
    folder: Path, model: Model, results: dict[str, Any], ablated: Ablation | None, on_texts: Sequence[Any],
    figures: dict[str, Figure],
) -> None:  # fmt: skip
    """The pictures on one page, report.html, with every number on hovering and the patterns of every head."""
    from common.heads import scores
    from common.results import page, tables
    from common.results.figures_heads import drawn_places

    def on_page(number: int, text: str, tokens: Ints, on_text: TextScores) -> page.TextMaps:
        said = tables.text_line(number, results["sequences"][number - 1])
        places = drawn_places(len(tokens), on_text.cells)
        pattern = scores.every_pattern(model, tokens, places).reshape(-1, len(places), len(places))
        return page.TextMaps(text, model.strings(tokens), said, on_text.cells, places, {"pattern": pattern})

    said = [tables.verdict_sentence(results["heads"], ablated)]
    texts = (on_page(number, *one) for number, one in enumerate(on_texts, start=1))
    page.save(page.induction_page(results, said, texts, figures), folder)


def text_panels(model: Model, measured: Survey, tokens: Ints, on_text: TextScores) -> list[tuple[str, Floats]]:
    """What to draw of a text, as (title, pattern): its strongest induction heads, and the mean over a layer's heads."""
    from common.attention.head import Head
    from common.heads import scores
    from common.results import tables

    strongest = tables.ranked_on(measured.found, on_text)[:HEADS_DRAWN]
    layer = strongest[0][0] if strongest else model.n_layers - 1
    titles = []
    for head in strongest:
        said = "no token repeats here"
        if on_text.attention:
            score, threshold = on_text.attention.score[head], on_text.attention.threshold[head]
            said = f"prefix matching {score:.2f} (threshold {threshold:.2f})"
        titles.append(f"head {Head.at(*head)}, {said}")
    titles.append(f"layer {layer}, mean over its {model.n_heads} heads")
    return list(zip(titles, scores.patterns(model, tokens, [*strongest, (layer, None)]), strict=True))


def print_summary(
    results: dict[str, Any], measured: Survey, quality: Metrics | None, ablated: Ablation | None, out: Path
) -> None:
    """The heads that attend to their targets, what happens on the texts, agreement with labels, where the files are."""
    from common.results import tables

    heads = results["heads"]
    title = f"Heads of {results['model']['name']} that attend to the tokens after earlier copies"
    report.print_table(title, tables.HEAD_COLUMNS, tables.head_lines(heads))
    report.tell(tables.verdict_sentence(heads, ablated))
    report.tell(tables.other_heads(heads))
    if uncertain := tables.unsure(measured):
        report.tell(uncertain)
    for number, entry in enumerate(results["sequences"], start=1):
        report.tell(tables.text_line(number, entry))
    if quality:
        report.tell(f"Agreement with labels: {quality.sentence()}.\nLabels: {quality.labels}.")
    report.tell(f"Written to {out}: {', '.join(results['files'])}")


if __name__ == "__main__":
    sys.exit(main())
