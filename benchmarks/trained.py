"""Is the detector right about models that were trained, not built? Judged by attention knockout, head by head.

    python -m training.train_judges && python -m benchmarks.trained outputs/judges/*
    python -m benchmarks.trained SmolLM2-135M-Instruct.Q4_1.gguf --others 40 --out benchmarks/results/smollm2.json

Prints a table and writes all it rests on to benchmarks/results/trained.json. What the judge has measured of a model is
kept in benchmarks/results/references, row by row: it takes an hour for SmolLM2, and does not depend on the detector.

1. Detector. What induction_head_detection.py does by default: random rows with a repeat, 32 at first.
2. Judge. `benchmarks.knockout_reference`, which imports nothing of the detector: other rows, other code. A head is an
   induction head if knocking out its target cells alone raises the loss at repeats by 0.05 nats or more and the 95 %
   interval lies above 0.
3. Agreement. Precision, recall and F1 per model; their mean over the models in which induction formed (macro), and of
   all decisions together (pooled). Intervals, 95 %: rows of both sides drawn again 1,000 times. Models in which nothing
   is induction count false positives.
4. Rank. Spearman correlation, over the heads of a model, of the detector's total effect with the knock-out. Most heads
   do nothing, and the order among those is noise: the claim is over heads whose knock-out has an interval without 0, or
   that pass the detector's threshold; the same over all heads, and with the score, stands beside it. `ceiling` is the
   correlation of the knock-out with itself, even rows against odd ones: heads that do the same have no order to find.
5. Cut. F1 again with labels cut at other least effects, and beside it the F1 of fixed thresholds on the same scores,
   with and without the detector's rule that the total effect be at least 0.05 nats.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr
from scipy.stats import t as student

from benchmarks import knockout_reference
from common import cli
from common.heads.detection import LEAST_EFFECT
from common.heads.survey import Survey, survey
from common.loading import Model, load
from common.results import files

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]

PROGRAM = "benchmark_trained"
RESULTS = Path(__file__).with_name("results") / "trained.json"
REFERENCES = RESULTS.with_name("references")
CUTS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # nats
FIXED = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
RESAMPLES = 1000
FEWEST = 3  # heads that a rank correlation is taken over


@dataclass(frozen=True)
class Verdicts:
    """What both sides say of a model's heads; arrays are [layers, heads] unless stated.

    `detected` and `resampled` [resamples, layers, heads], `score`, `control`, `threshold`, `effect`, `attends`: the
    detector's. `alone`, `others_out`: the judge's effects, [rows, layers, heads], in nats; NaN where not measured.
    """

    name: str
    facts: Mapping[str, object]
    detected: Bools
    resampled: Bools
    score: Floats
    control: Floats
    threshold: Floats
    effect: Floats
    attends: Bools
    verdict: NDArray[np.str_]
    alone: Floats
    others_out: Floats
    joint: Sequence[float]

    @cached_property
    def drawn(self) -> Floats:
        """The judge's rows drawn again, [RESAMPLES, rows]: how often each counts."""
        rows = len(self.alone)
        return np.random.default_rng(rows).multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES).astype(float)

    def needed(self, least: float = knockout_reference.LEAST) -> Bools:
        """The judge's labels, with the effect cut at `least` nats."""
        return labelled(np.ones((1, len(self.alone))), self.alone, least)[0]

    @cached_property
    def needed_again(self) -> Bools:
        """The labels as the judge's rows are drawn again, [RESAMPLES, layers, heads]."""
        return labelled(self.drawn, self.alone, knockout_reference.LEAST)

    def real(self) -> Bools:
        """Heads about which there is something to say (step 4 above)."""
        mean, half = mean_and_half(np.ones((1, len(self.alone))), self.alone)
        return (np.abs(mean[0]) > half[0]) | self.attends

    def for_ranks(self) -> tuple[Floats, Floats, Floats, Bools]:
        """Total effect, score, knock-out per row and `real`, with all heads along the last axis."""
        parts = self.effect, self.score, self.alone, self.real()
        return tuple(part.reshape(*part.shape[:-2], -1) for part in parts)


def mean_and_half(weights: Floats, values: Floats) -> tuple[Floats, Floats]:
    """Means over rows of `values` [rows, ...] with each row counted `weights` [n, rows] times, and half of their 95 %
    intervals by Student's t, each [n, ...]."""
    rows = len(values)
    mean = np.tensordot(weights, values, 1) / rows
    spread = np.maximum(np.tensordot(weights, values**2, 1) / rows - mean**2, 0) * rows / (rows - 1)
    return mean, student.ppf(0.975, rows - 1) * np.sqrt(spread / rows)


def labelled(weights: Floats, values: Floats, least: float) -> Bools:
    """Where the mean is at least `least` and its interval lies above 0, [n, ...]."""
    mean, half = mean_and_half(weights, values)
    return (mean >= least) & (mean > half)


# --- asking both sides ---


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit code as for the scripts."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="FOLDER|FILE.gguf", help="models to judge the detector on")
    parser.add_argument("--rows", type=cli.positive, default=32, help="rows that the judge draws (default 32)")
    parser.add_argument(
        "--others", type=int, metavar="N", help="measure with the others out only the N largest effects (default: all)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE", help="the JSON file to write")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return cli.run(benchmark, parser.parse_args(argv), PROGRAM)


def benchmark(args: argparse.Namespace) -> None:
    found = []
    for path in map(Path, args.models):
        cli.say(f"{path.name}: the detector")
        model = load(str(path))
        surveyed = survey(model, seed=0, batch_size=8)
        cli.say(f"{path.name}: the judge")
        kept = REFERENCES / f"{path.name}.json"
        reference = knockout_reference.measure_into(kept, path, rows=args.rows, others=args.others, say=cli.detail)
        found.append(both_sides(path, model, surveyed, reference))
    others = "" if args.others is None else f"--others {args.others} "
    names = " ".join(Path(name).name for name in args.models)  # without the folders of one machine
    result: dict[str, Any] = {"command": f"python -m benchmarks.trained {names} {others}--rows {args.rows}"}
    result |= {"summary": summary(found), "models": [entry(each) for each in found]}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(files.jsonable(result), indent=1) + "\n", encoding="utf-8")
    print_result(result)


def both_sides(path: Path, model: Model, surveyed: Survey, reference: Mapping[str, Any]) -> Verdicts:
    """The detector's answers about the model beside the judge's."""
    found, shape = surveyed.found, (model.n_layers, model.n_heads)
    recipe = path / "training.json"
    trained = json.loads(recipe.read_text(encoding="utf-8")) if recipe.exists() else {}
    facts = {
        "family": model.bridge.cfg.architecture, "layers": shape[0], "heads": shape[1],
        "vocabulary": len(model.ordinary()), "formed": trained.get("formed"), "training": trained.get("judge"),
        "detector_rows": surveyed.rows, "row_length": surveyed.length, "judge": reference["setting"],
    }  # fmt: skip
    return Verdicts(
        path.name, facts, found.induction, found.resampled, found.score, found.control, found.threshold,
        surveyed.evidence.effect.mean(0), found.attends, found.verdict,
        alone=on_grid(reference["alone"], shape), others_out=on_grid(reference["others_out"], shape),
        joint=reference["joint"],
    )  # fmt: skip


def on_grid(effects: Mapping[str, Sequence[float]], shape: tuple[int, int]) -> Floats:
    """[rows, layers, heads] of the effects per row by head's name; NaN for heads that are missing."""
    rows = len(next(iter(effects.values())))
    grid = np.full((rows, *shape), np.nan)
    for name, values in effects.items():
        layer, head = map(int, name.split("."))
        grid[:, layer, head] = values
    return grid


# --- agreement ---


def counts(said: Bools, truth: Bools) -> NDArray[np.int64]:
    """Right, wrong and missed heads, [3, ...] for [..., layers, heads]."""
    return np.stack([(said & truth).sum((-2, -1)), (said & ~truth).sum((-2, -1)), (~said & truth).sum((-2, -1))])


def shares(counted: NDArray[np.int64]) -> Floats:
    """Precision, recall and F1, [3, ...], of right, wrong and missed [3, ...]; nothing to find and nothing found is 1,
    any other share of nothing 0."""
    right, wrong, missed = counted
    found = np.stack([
        right / np.maximum(right + wrong, 1), right / np.maximum(right + missed, 1),
        2 * right / np.maximum(2 * right + wrong + missed, 1),
    ])  # fmt: skip
    return np.where(counted.sum(0) == 0, 1.0, found)


def with_intervals(value: Floats, again: Floats) -> dict[str, list[float]]:
    """Precision, recall and F1 [3], each with the ends of its interval, from [3, RESAMPLES] of them."""
    low, high = np.quantile(again, [0.025, 0.975], axis=1)
    names = ("precision", "recall", "f1")
    return {name: [round(float(x), 4) for x in each] for name, *each in zip(names, value, low, high, strict=True)}


def rank(signal: Floats, knockout: Floats, chosen: Bools) -> float | None:
    """Spearman correlation over the chosen heads; None if they are fewer than `FEWEST` or all alike."""
    if chosen.sum() < FEWEST or np.ptp(signal[chosen]) == 0 or np.ptp(knockout[chosen]) == 0:
        return None
    return round(float(spearmanr(signal[chosen], knockout[chosen]).statistic), 4)


def ranks(effect: Floats, score: Floats, alone: Floats, real: Bools) -> dict[str, float | int | None]:
    """Every rank agreement of step 4 above, over all heads given; `alone` is [rows, heads], the rest [heads]."""
    every, knockout = np.ones_like(real), alone.mean(0)
    return {
        "heads": int(real.sum()),
        "effect": rank(effect, knockout, real),
        "score": rank(score, knockout, real),
        "ceiling": rank(alone[0::2].mean(0), alone[1::2].mean(0), real),
        "effect_all": rank(effect, knockout, every),
        "score_all": rank(score, knockout, every),
    }


def fixed_f1(each: Verdicts, threshold: float, effect_rule: bool) -> float:
    """F1 of one threshold for all heads."""
    said = (each.score >= threshold) & ((each.effect >= LEAST_EFFECT) | (not effect_rule))
    return float(shares(counts(said, each.needed()))[2])


def summary(found: Sequence[Verdicts]) -> dict[str, Any]:
    """Over the models with something to find: macro and pooled agreement; over the rest: false positives."""
    positive = [each for each in found if each.needed().any()]
    negative = [each for each in found if not each.needed().any()]
    result: dict[str, Any] = {
        "false_positives": {each.name: int(each.detected.sum()) for each in negative},
        "decisions_on_negatives": sum(each.detected.size for each in negative),
    }
    if positive:
        result |= {
            "models": len(positive),
            "heads": sum(each.detected.size for each in positive),
            "needed": sum(int(each.needed().sum()) for each in positive),
            **agreement(positive),
            **rank_agreement(positive),
            **other_cuts(positive),
        }
    return result


def agreement(found: Sequence[Verdicts]) -> dict[str, Any]:
    """Precision, recall and F1 with intervals: the mean over models, and of all decisions together."""
    counted = [counts(each.detected, each.needed()) for each in found]
    again = [counts(each.resampled, each.needed_again) for each in found]
    macro = np.mean([shares(each) for each in counted], 0), np.mean([shares(each) for each in again], 0)
    pooled = shares(np.sum(counted, 0)), shares(np.sum(again, 0))
    return {"macro": with_intervals(*macro), "pooled": with_intervals(*pooled)}


def rank_agreement(found: Sequence[Verdicts]) -> dict[str, Any]:
    """The mean over models that have enough heads, and over the heads of all models together."""
    parts = [each.for_ranks() for each in found]
    own = [ranks(*part) for part in parts]
    together = [np.concatenate(column, axis=-1) for column in zip(*parts, strict=True)]
    kinds = ("effect", "score", "ceiling", "effect_all", "score_all")
    macro = {kind: mean(each[kind] for each in own if each[kind] is not None) for kind in kinds}
    return {"rank_macro": macro, "rank_pooled": ranks(*together)}


def other_cuts(found: Sequence[Verdicts]) -> dict[str, dict[str, float | None]]:
    """Macro F1 with labels cut elsewhere, and of fixed thresholds on the same scores."""
    cut = {str(least): mean(shares(counts(each.detected, each.needed(least)))[2] for each in found) for least in CUTS}
    plain, ruled = (
        {str(fix): mean(fixed_f1(each, fix, rule) for each in found) for fix in FIXED} for rule in (False, True)
    )
    return {"f1_by_cut": cut, "fixed": plain, "fixed_with_effect_rule": ruled}


def mean(values: Iterable[float]) -> float | None:
    given = list(values)
    return round(float(np.mean(given)), 4) if given else None


# --- what is written and printed ---


def entry(each: Verdicts) -> dict[str, Any]:
    """One model in the JSON file."""
    needed = each.needed()
    value, again = shares(counts(each.detected, needed)), shares(counts(each.resampled, each.needed_again))
    names = {place: f"{place[0]}.{place[1]}" for place in np.ndindex(needed.shape)}
    return {
        "model": each.name, **each.facts,
        "agreement": with_intervals(value, again),
        "rank": ranks(*each.for_ranks()),
        "joint": interval(np.array(each.joint)),
        "needed": [names[place] for place in names if needed[place]],
        "detected": [names[place] for place in names if each.detected[place]],
        "disagreements": [names[place] for place in names if needed[place] != each.detected[place]],
        "by_head": {names[place]: of_head(each, place) for place in names},
    }  # fmt: skip


def of_head(each: Verdicts, place: tuple[int, ...]) -> dict[str, Any]:
    """All that both sides say of one head; effects in nats."""
    return {
        "verdict": str(each.verdict[place]),
        "score": round(float(each.score[place]), 4),
        "control": round(float(each.control[place]), 4),
        "threshold": round(float(each.threshold[place]), 4),
        "total_effect": round(float(each.effect[place]), 4),
        "knockout": interval(each.alone[(slice(None), *place)]),
        "knockout_others_out": interval(each.others_out[(slice(None), *place)]),
    }


def interval(per_row: Floats) -> list[float] | None:
    """Mean and the ends of its interval; None if it was not measured."""
    if np.isnan(per_row).any():
        return None
    return [round(value, 4) for value in knockout_reference.with_interval(per_row)]


def print_result(result: Mapping[str, Any]) -> None:
    """The table for people, then the heads on which both sides disagree."""
    columns = ["model", "family", "shape", "words", "formed", "needed", "found", "prec", "rec", "F1", "95 %", "rank"]
    cli.print_table("The detector against attention knockout", columns, [line(each) for each in result["models"]])
    rows = [
        [each["model"], name, str(head["verdict"]), *(f"{head[key]:.3f}" for key in ("score", "control", "threshold")),
         f"{head['total_effect']:+.3f}", *(spelled(head[key]) for key in ("knockout", "knockout_others_out"))]
        for each in result["models"] for name in each["disagreements"] for head in [each["by_head"][name]]
    ]  # fmt: skip
    columns = ["model", "head", "verdict", "score", "null", "thresh.", "effect", "knockout", "others out"]
    cli.print_table("Heads on which they disagree", columns, rows)
    print(json.dumps(result["summary"], indent=1))


def line(each: Mapping[str, Any]) -> list[str]:
    """One model in the printed table."""
    precision, recall, f1 = (each["agreement"][name] for name in ("precision", "recall", "f1"))
    formed = {True: "yes", False: "no", None: "-"}[each["formed"]]
    ranked = "-" if each["rank"]["effect"] is None else f"{each['rank']['effect']:.2f}"
    return [
        each["model"][:12], each["family"].removesuffix("ForCausalLM")[:10], f"{each['layers']}x{each['heads']}",
        str(each["vocabulary"]), formed, str(len(each["needed"])), str(len(each["detected"])),
        f"{precision[0]:.2f}", f"{recall[0]:.2f}", f"{f1[0]:.2f}", f"{f1[1]:.2f}-{f1[2]:.2f}", ranked,
    ]  # fmt: skip


def spelled(numbers: Sequence[float] | None) -> str:
    return "-" if numbers is None else "{:+.3f} ({:+.3f} to {:+.3f})".format(*numbers)


if __name__ == "__main__":
    sys.exit(main())
