"""What each constant of the decision does, on models that judge nothing else.

    python -m benchmarks.calibration                    # about 10 minutes on 2 CPU cores
    python -m benchmarks.calibration --models 5 --out /tmp/quick.json

Prints a table per constant of common/heads/detection.py and common/heads/survey.py and writes them to
benchmarks/results/calibration.json. The constants in use were chosen here. benchmarks.detection and the other judges
use other models.

1. Models. Hand-built ones and decoys as in benchmarks.detection, from other seeds (`FIRST_SEED`); `mini` and its three
   checkpoints against causal labels; more by `--model FOLDER`, against nothing.
2. One constant at a time is set to other values, all others stay. Shown: F1 over hand-built models (macro), recall of
   the weakest heads, false positives per 1,000 heads on decoys.
3. The least effect is also a question of size: how large is the effect of heads that attend to nothing of interest, and
   how much of what all heads together do is left out by a cut?
4. The null of the threshold is put to laws it does not expect, with the spread taken from control rows alone and from
   both kinds of rows.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from scipy.special import stdtrit

from benchmarks.detection import RESULTS, WEAKEST, WORDS, Agreement, hand_built, mean
from common import cli
from common.heads import detection
from common.heads.attribution import attribute, exact_effect
from common.heads.detection import Detection, detect
from common.heads.scores import score
from common.heads.statistics import Floats, RowSums
from common.heads.survey import EFFECT_ROWS, LOT, for_effects, notable
from common.heads.tokens import battery
from common.interventions.causal_labels import measure_causal_effects
from common.loading import Model, load
from common.loading.find import MINI
from common.results import files
from tests import handbuilt

PROGRAM = "benchmark_calibration"
FIRST_SEED = 3_000_000
ROWS = 64  # measured; the grids take the first so many of them, and effects on as many of the first lot as is said
LENGTH = 128
WEAK = 0.05  # attention of the heads whose recall is shown by themselves

GRIDS: dict[str, tuple[float, ...]] = {
    "LEAST_LIFT": (0.001, 0.005, 0.01, 0.02, 0.05, 0.1),
    "LEAST_EFFECT": (0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    "NOTABLE": (0.01, 0.02, 0.05, 0.1),
    "FALSE_POSITIVES": (0.2, 0.05, 0.01, 0.001),
    "MOST": (0.3, 0.4, 0.5, 0.6, 0.7),
}
LAWS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], Floats]] = {
    "normal": lambda rng, size: rng.normal(size=size),
    "t, 3 degrees": lambda rng, size: rng.standard_t(3, size),
    "lognormal": lambda rng, size: rng.lognormal(size=size),
    "1 row in 20": lambda rng, size: (rng.random(size) < 0.05).astype(float),
}


@dataclass(frozen=True)
class Measured:
    """The evidence on one model: `repeats`, `controls` by head type, `total` effects [effect rows, layers, heads]; what
    each head is, if it is `built`; which heads are induction heads, [layers, heads], if that is `known`."""

    name: str
    repeats: dict[str, RowSums]
    controls: dict[str, RowSums]
    total: Floats
    built: handbuilt.HandBuilt | None = None
    known: np.ndarray | None = None
    decoys: bool = False

    def first(self, rows: int, effect_rows: int) -> Measured:
        """The evidence of the first rows alone."""
        repeats, controls = (
            {kind: RowSums(sums.sums[:rows], sums.counts[:rows]) for kind, sums in sides.items()}
            for sides in (self.repeats, self.controls)
        )
        # They stand from the nearest repeat to the farthest: fewer of them in equal steps, too.
        return replace(self, repeats=repeats, controls=controls, total=self.total[:: len(self.total) // effect_rows])

    def decide(self) -> Detection:
        return detect(self.repeats, self.controls, self.total)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the calibration; exit code as for the scripts."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", type=cli.positive, default=30, help="hand-built models, as many decoys (default 30)"
    )
    parser.add_argument("--model", action="append", metavar="FOLDER", help="a trained model; repeat for more")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "calibration.json", metavar="FILE",
        help="where the results are written (default benchmarks/results/calibration.json)",
    )  # fmt: skip
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return cli.run(calibrate, parser.parse_args(argv), PROGRAM)


def calibrate(args: argparse.Namespace) -> None:
    """Measure the models once, then every constant on them."""
    started = time.monotonic()
    planted, trained = list(planted_models(args.models)), list(trained_models(args.model or []))
    cli.say(f"measured {len(planted) + len(trained)} models, {time.monotonic() - started:.0f} s")
    usual = [one.first(LOT, EFFECT_ROWS) for one in planted]
    results: dict[str, Any] = {
        "command": "python -m benchmarks.calibration",
        "arguments": {"models": args.models, "model": [Path(name).name for name in args.model or []]},
        "first_seed": FIRST_SEED,
        "in_use": {name: getattr(detection, name) for name in GRIDS},
        "constants": {name: [at_value(name, value, usual) for value in grid] for name, grid in GRIDS.items()},
        "without_spread": [without_spread(lift, usual) for lift in GRIDS["LEAST_LIFT"]],
        "rows": [at_rows(rows, effects, planted) for rows, effects in ((4, 2), (8, 4), (16, 8), (32, 16), (64, 16))],
        "trained": [sizes_of_effects(one) for one in trained],
        "null": [null_rate(law) for law in LAWS],
        "wall_seconds": round(time.monotonic() - started, 1),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(args.out, results)
    print_results(results)
    print(f"Written to {args.out}")


# --- evidence ---


def planted_models(count: int) -> Iterator[Measured]:
    """Hand-built models with induction heads, and as many without."""
    for number in range(count):
        seed, words = FIRST_SEED + number, WORDS[number % len(WORDS)]
        for decoys in (False, True):
            built = (
                handbuilt.decoys(seed, vocabulary=words + 1)
                if decoys
                else handbuilt.build(seed, vocabulary=words + 1, weakest=WEAKEST)
            )
            subject, model = hand_built(str(seed), "calibration", built, words)
            known = np.zeros((model.n_layers, model.n_heads), dtype=bool)
            for head in subject.induction:
                known[head.place] = True
            yield replace(evidence(model, str(seed)), built=built, known=known, decoys=decoys)


def trained_models(folders: Sequence[str]) -> Iterator[Measured]:
    """`mini`, its checkpoints, and the models in `folders`."""
    steps = [str(MINI.with_name("mini-checkpoints") / step) for step in ("step-0100", "step-0300", "step-0600")]
    for name in ("mini", *steps):
        model = load(name)
        known = measure_causal_effects(model).labels().mask((model.n_layers, model.n_heads))
        yield replace(evidence(model, Path(name).name), known=known)
    for folder in folders:
        yield evidence(load(folder), Path(folder).name)


def evidence(model: Model, name: str) -> Measured:
    """Scores on `ROWS` rows and as many controls, effects on `EFFECT_ROWS` of the first lot, as the survey does it:
    to first order, and exact for heads that attend notably."""
    drawn = battery(model.ordinary(), model.bos, rows=ROWS, length=min(LENGTH, model.context), seed=FIRST_SEED)
    repeats, controls = (score(model, rows, batch_size=8).sums for rows in (drawn.repeats, drawn.controls))
    rows = for_effects(drawn.repeats.rows(0, LOT))
    total = attribute(model, rows, batch_size=8).total
    found = Measured(name, repeats, controls, total)
    heads = notable(found.first(LOT, EFFECT_ROWS).decide())
    for head, values in zip(heads, exact_effect(model, rows, heads, batch_size=8).T, strict=True):
        total[:, head.layer, head.head] = values
    return found


# --- one constant at a time ---


@contextmanager
def changed(**constants: object) -> Iterator[None]:
    """Constants of the decision set to other values."""
    with ExitStack() as stack:
        for name, value in constants.items():
            stack.enter_context(mock.patch.object(detection, name, value))
        yield


def at_value(name: str, value: float, planted: Sequence[Measured]) -> dict[str, Any]:
    with changed(**{name: value}):
        return {"value": value, **agreement_on(planted)}


def without_spread(lift: float, planted: Sequence[Measured]) -> dict[str, Any]:
    """The least lift alone: what the part of the threshold that follows the spread adds."""
    with changed(LEAST_LIFT=lift, deviations=lambda *sizes: 0.0):
        return {"value": lift, **agreement_on(planted)}


def at_rows(rows: int, effect_rows: int, planted: Sequence[Measured]) -> dict[str, Any]:
    """Agreement with fewer or more rows, and the share of verdicts that are surer than 0.95."""
    fewer = [one.first(rows, effect_rows) for one in planted]
    sure = mean(float((one.decide().confidence >= 0.95).mean()) for one in fewer)
    return {"value": rows, "effect_rows": effect_rows, **agreement_on(fewer), "sure": sure}


def agreement_on(planted: Sequence[Measured]) -> dict[str, Any]:
    """F1 (macro), recall of heads with at most `WEAK` of their attention on the targets, false positives on decoys, and
    the share of all heads whose verdict is the one their kind deserves."""
    f1, weak, named, false, heads = [], [], [], 0, 0
    for one in planted:
        found = one.decide()
        assert one.built is not None and one.known is not None
        named += [bool(found.verdict[place] == role.verdict) for place, role in one.built.roles.items()]
        if one.decoys:
            false, heads = false + int(found.induction.sum()), heads + one.known.size
            continue
        right = int((found.induction & one.known).sum())
        f1.append(Agreement(right, int(found.induction.sum()) - right, int(one.known.sum()) - right).f1)
        roles = one.built.roles.items()
        weak += [found.induction[place] for place, role in roles if one.known[place] and role.strength <= WEAK]
    return {"f1": mean(f1), "recall_weak": mean(weak), "false_per_1000": 1000 * false / heads, "named": mean(named)}


# --- the size of effects, and the law of the null ---


def sizes_of_effects(one: Measured) -> dict[str, Any]:
    """By cut of the effect: heads found, F1 against causal labels, and which share of what all heads that attend do
    together the found ones do. `noise`: the largest effect of a head that does not attend."""
    found, total = one.decide(), one.total.mean(0)
    looks = found.score >= found.threshold
    positive = np.where(looks, np.maximum(total, 0.0), 0.0)
    cuts = []
    for cut in GRIDS["LEAST_EFFECT"]:
        said = looks & (total >= cut)
        entry = {"value": cut, "heads": int(said.sum()), "share": float(positive[said].sum() / (positive.sum() or 1.0))}
        if one.known is not None:
            right = int((said & one.known).sum())
            entry["f1"] = Agreement(right, int(said.sum()) - right, int(one.known.sum()) - right).f1
        cuts.append(entry)
    idle = np.abs(total[~looks])
    return {
        "model": one.name, "layers": total.shape[0], "heads": total.size, "noise": float(idle.max(initial=0.0)),
        "looking": int(looks.sum()), "named_attends_only": int((found.verdict == "attends-only").sum()), "cuts": cuts,
    }  # fmt: skip


def null_rate(law: str, models: int = 4000, heads: int = 12, rows: int = 32) -> dict[str, Any]:
    """Share of models of heads that ignore the repeat in which one passes, by what the spread is taken from."""
    on, off = LAWS[law](np.random.default_rng(FIRST_SEED), (2, models, rows, heads))
    lift, level = on.mean(1) - off.mean(1), 1 - detection.FALSE_POSITIVES / heads
    error = np.sqrt(2 / rows)
    alone = off.std(1, ddof=1) * stdtrit(rows - 1, level)
    pooled = np.sqrt((on.var(1, ddof=1) + off.var(1, ddof=1)) / 2) * stdtrit(2 * rows - 2, level)
    return {
        "law": law,
        "control_rows": float((lift > alone * error).any(1).mean()),
        "both": float((lift > pooled * error).any(1).mean()),
    }


# --- tables ---


def print_results(results: dict[str, Any]) -> None:
    """Every table; * marks the value in use."""
    columns = ["value", "F1", f"recall <={WEAK}", "false/1000", "right verdict"]
    for name, entries in results["constants"].items():
        cli.print_table(name, columns, [line(entry, results["in_use"][name]) for entry in entries])
    cli.print_table(
        "LEAST_LIFT where the threshold ignores the spread", columns, [line(one) for one in results["without_spread"]]
    )
    rows = [[*line(one, 32), str(one["effect_rows"]), f"{one['sure']:.3f}"] for one in results["rows"]]
    cli.print_table("Rows of each kind", [*columns, "effect rows", "surer than 0.95"], rows)
    for one in results["trained"]:
        rows = [
            [str(cut["value"]), str(cut["heads"]), f"{cut['share']:.3f}", f"{cut['f1']:.2f}" if "f1" in cut else ""]
            for cut in one["cuts"]
        ]
        title = f"Least effect on {one['model']}, {one['layers']} layers; largest of heads that do not attend"
        cli.print_table(f"{title}: {one['noise']:.3f} nats", ["nats", "heads", "share of all", "F1"], rows)
    rows = [[one["law"], f"{one['control_rows']:.4f}", f"{one['both']:.4f}"] for one in results["null"]]
    cli.print_table("Models without induction in which a head passes", ["null", "control rows", "both kinds"], rows)


def line(entry: dict[str, Any], in_use: float | None = None) -> list[str]:
    mark = " *" if entry["value"] == in_use else ""
    scores = (f"{entry[kind]:.3f}" for kind in ("f1", "recall_weak"))
    return [f"{entry['value']}{mark}", *scores, f"{entry['false_per_1000']:.1f}", f"{entry['named']:.3f}"]


if __name__ == "__main__":
    sys.exit(main())
