"""Does detection find the induction heads that a foreign compiler built? Models compiled by Tracr from RASP programs.

    python -m benchmarks.tracr                          # about 2 minutes on 2 CPU cores; needs no Tracr
    python -m benchmarks.tracr --only induction-8 copies --out /tmp/some.json

Prints a table and writes every head to benchmarks/results/tracr.json.

1. Compile. benchmarks/tracr/compile.py ran in Tracr's own environment and left the arrays in benchmarks/tracr/compiled,
   with the truth about each head, taken from Tracr's labels and checked by RASP's own interpreter.
2. Convert. benchmarks/tracr/convert.py makes a GPT-2 folder of them, and `load` takes it as it takes a user's.
3. Check. On the rows that Tracr ran itself, a row with a repeat and a random row of the full context, the loaded
   model's patterns and outputs must be Tracr's up to `TOLERANCE`; what is further off is "not converted" and is judged
   no more.
4. Judge. The same survey as in induction_head_detection.py, with its defaults. Two truths: "attends", the selector
   selects the tokens after earlier copies of the current token, however it does it; "induction", it attends to them and
   what it fetches is the token that the program puts out. The second is a truth about the program: how many nats a head
   adds is decided by `LOGIT` in convert.py, and effects are proportional to it; "holds from" is the least `LOGIT`
   at which each head that raises or lowers the right token would still do so by the least effect that counts.
   Beside them stands what happens when the head may not attend to its targets (knockout: the rise of the loss at
   repeats), so that a reader sees whether a wrong verdict or a wrong truth is to blame.
5. Agreement. Right, wrong and missed heads of all programs together, beside fixed thresholds on the same rows. Heads
   that Tracr left empty (`"selector": "none"`) count: they attend to all alike.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging as transformers_logging

from benchmarks.tracr import convert
from common import UserError, cli
from common.heads.detection import LEAST_EFFECT
from common.heads.scores import patterns
from common.heads.statistics import Floats
from common.heads.survey import Survey, survey
from common.interventions.causal_labels import measure_causal_effects
from common.loading import Model, load
from common.results import files

PROGRAM = "benchmark_tracr"
RESULTS = Path(__file__).resolve().parents[1] / "results" / "tracr.json"
SEED = 3_000_000
TOLERANCE = 1e-4  # of attention, and of output, where 1 is a token that is put out
FIXED = (0.05, 0.1, 0.2, 0.4)  # thresholds on prefix matching, for comparison, with the same effect rule and without
TRUTHS = ("attends", "induction")
Outcome = dict[str, Any]  # of a program, or of one of its heads, as results.json holds it


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit code as for the scripts."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these programs alone (default: all)")
    parser.add_argument("--compiled", type=Path, default=convert.COMPILED, metavar="DIR", help="what compile.py wrote")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, metavar="FILE",
        help="where the results are written (default benchmarks/results/tracr.json)",
    )  # fmt: skip
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return cli.run(benchmark, parser.parse_args(argv), PROGRAM)


def benchmark(args: argparse.Namespace) -> None:
    """Every program; the table to stdout, everything to a file."""
    started = time.monotonic()
    transformers_logging.disable_progress_bar()  # of every file that is saved
    document = convert.read_programs(args.compiled)
    entries = document["programs"]
    if unknown := set(args.only or ()) - {entry["name"] for entry in entries}:
        raise UserError(f"--only {' '.join(sorted(unknown))}: programs.json has no such program")
    outcomes = []
    for entry in entries:
        if args.only is None or entry["name"] in args.only:
            outcomes.append(outcome(entry, args.compiled))
            cli.say(f"{entry['name']}, {time.monotonic() - started:.0f} s")
    totals = {truth: totals_of(outcomes, truth) for truth in TRUTHS}
    results = {
        "command": "python -m benchmarks.tracr",
        "versions": document["versions"], "seed": SEED, "tolerance": TOLERANCE,
        "nats_per_unit_of_output": convert.LOGIT, "wall_seconds": round(time.monotonic() - started, 1),
        "totals": totals, "programs": outcomes,
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(args.out, results)
    print_outcomes(outcomes)
    print_totals(totals)
    print(f"Written to {args.out}")


def outcome(entry: convert.Entry, folder: Path) -> Outcome:
    """How far one program got, and if it got all the way, what is said of its heads."""
    about = {name: entry[name] for name in ("name", "about", "vocabulary", "context", "exactness")}
    if "refused" in entry:
        return about | {"reached": "not compiled", "why": entry["refused"]}
    compiled = convert.read_compiled(entry, folder)
    try:
        model = loaded(compiled)
    except UserError as error:
        return about | {"reached": "converted", "why": f"it does not load: {error}"}
    about["errors"] = errors = conversion_errors(compiled, model)
    if max(errors["pattern"], errors["output"]) > TOLERANCE:
        return about | {"reached": "loaded", "why": f"it differs from Tracr's own run by more than {TOLERANCE}"}
    try:
        surveyed, knockout = survey(model, seed=SEED, batch_size=8), measure_causal_effects(model).needed.mean(0)
    except UserError as error:
        return about | {"reached": "loaded", "why": f"it cannot be surveyed: {error}"}
    heads = list(judged(entry, surveyed, knockout))
    told = {"row_length": surveyed.length, "rows": surveyed.rows, "holds_from": holds_from(heads)}
    told["agreement"] = {truth: counts(heads, truth) for truth in TRUTHS}
    return about | {"reached": "judged", "predicted": entry["predicted"], **told, "heads": heads}


def loaded(compiled: convert.Compiled) -> Model:
    """The converted model, loaded as a user's is."""
    with tempfile.TemporaryDirectory() as folder:
        return load(str(convert.save_converted(compiled, Path(folder) / compiled.entry["name"])))


def conversion_errors(compiled: convert.Compiled, model: Model) -> dict[str, float]:
    """Largest differences from Tracr's own run: of `pattern`, of `output`, and the share of places whose largest output
    is `another` one. Place 0 puts out nothing, and Tracr leaves its output open."""
    wanted = [(layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]
    ours = np.array([patterns(model, row, wanted) for row in compiled.tokens])
    logits = model.logits(compiled.tokens).double().numpy()[:, 1:, compiled.output_ids] / convert.LOGIT
    theirs = compiled.output[:, 1:]
    clear = np.ptp(np.sort(theirs, -1)[..., -2:], axis=-1) > TOLERANCE  # of equal outputs either may be the larger
    return {
        "pattern": float(np.abs(ours.reshape(compiled.patterns.shape) - compiled.patterns).max()),
        "output": float(np.abs(logits - theirs).max()),
        "another": float((logits.argmax(-1) != theirs.argmax(-1))[clear].mean()) if clear.any() else 0.0,
    }


def judged(entry: convert.Entry, surveyed: Survey, knockout: Floats) -> Iterator[Outcome]:
    """What is true of each head, what was found, and the rise of the loss in nats under attention knockout."""
    found = surveyed.found
    measured = {
        "score": found.score,
        "control": found.control,
        "threshold": found.threshold,
        "effect": surveyed.evidence.effect.mean(0),
        "knockout": knockout,
        "confidence": found.confidence,
    }
    for head in entry["heads"]:
        at = head["layer"], head["head"]
        numbers = {name: float(values[at]) for name, values in measured.items()}
        said = {"attends": bool(found.attends[at]), "induction": bool(found.induction[at])}
        yield head | numbers | {"verdict": str(found.verdict[at]), "said": said}


def holds_from(heads: Sequence[Outcome]) -> float | None:
    """The least `LOGIT` at which no induction or suppression head would become attends-only; None if there is none."""
    moved = [abs(head["effect"]) for head in heads if head["said"]["attends"] and abs(head["effect"]) >= LEAST_EFFECT]
    return convert.LOGIT * LEAST_EFFECT / min(moved) if moved else None


# --- agreement ---


def says(head: Outcome, truth: str, method: str) -> bool:
    """Whether a method says of a head that a truth holds. Methods: "dynamic"; "fixed T", prefix matching of at least T;
    "fixed T with effect", which asks for the least effect of the dynamic one too."""
    if method == "dynamic":
        return head["said"][truth]
    raises = "effect" not in method or head["effect"] >= LEAST_EFFECT
    return raises and head["score"] >= float(method.split()[1])


def counts(heads: Sequence[Outcome], truth: str, method: str = "dynamic") -> dict[str, float]:
    """Heads that are right, wrong and missed, with precision and recall; 1 where there is nothing to be wrong about."""
    pairs = [(bool(head[truth]), says(head, truth, method)) for head in heads]
    right, wrong, missed = map(pairs.count, ((True, True), (False, True), (True, False)))
    precision = right / (right + wrong) if right + wrong else float(not missed)
    recall = right / (right + missed) if right + missed else float(not wrong)
    rates = {"precision": precision, "recall": recall}
    return {"heads": len(pairs), "right": right, "wrong": wrong, "missed": missed, **rates}


def totals_of(outcomes: Sequence[Outcome], truth: str) -> dict[str, dict[str, float]]:
    """Per method, the counts over the heads of all programs that got all the way."""
    heads = [head for each in outcomes for head in each.get("heads", ())]
    fixed = [f"fixed {limit}" for limit in FIXED]
    if truth == "induction":
        fixed += [f"{method} with effect" for method in fixed]
    return {method: counts(heads, truth, method) for method in ("dynamic", *fixed)}


def print_outcomes(outcomes: Sequence[Outcome]) -> None:
    """A line per program, and below it every head that was got wrong and every program that did not get all the way."""
    columns = ["program", "vocab", "context", "heads", "error", "attends", "found", "induction", "found"]
    rows, remarks = [], []
    for each in outcomes:
        heads = each.get("heads", ())
        error = f"{max(each['errors']['pattern'], each['errors']['output']):.0e}" if "errors" in each else ""
        lists = [(f"{head['layer']}.{head['head']}", head) for head in heads]
        cells = []
        for truth in TRUTHS:
            cells.append(" ".join(name for name, head in lists if head[truth]) or "none")
            cells.append(" ".join(name for name, head in lists if head["said"][truth]) or "none")
            remarks += [remark(each, name, head, truth) for name, head in lists if head[truth] != head["said"][truth]]
        if not heads:
            cells = [each["reached"]] + [""] * 3
            remarks.append(f"{each['name']}: {each['reached']}; {each['why']}")
        rows.append([each["name"], str(each["vocabulary"]), str(each["context"]), str(len(heads) or ""), error, *cells])
    cli.print_table("Models that Tracr compiled: true heads, and what was found", columns, rows)
    for line in remarks:
        print(line)


def remark(each: Outcome, name: str, head: Outcome, truth: str) -> str:
    """One wrong decision in a line."""
    numbers = ", ".join(f"{number} {head[number]:.2f}" for number in ("score", "threshold", "effect", "knockout"))
    what = f"{truth} is {head[truth]}, verdict {head['verdict']} with confidence {head['confidence']:.2f}"
    return f"{each['name']} {name} ({head['selector']}): {what}; {numbers}"


def print_totals(totals: dict[str, dict[str, dict[str, float]]]) -> None:
    """Precision and recall over all heads, per truth and method."""
    columns = ["truth", "method", "heads", "right", "wrong", "missed", "precision", "recall"]
    rows = [
        [truth, method, *(f"{count[name]:.2f}" if name in columns[6:] else str(count[name]) for name in columns[2:])]
        for truth, methods in totals.items()
        for method, count in methods.items()
    ]
    cli.print_table("All heads together", columns, rows)


if __name__ == "__main__":
    sys.exit(main())
