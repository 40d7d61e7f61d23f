"""Put what the benchmarks and the scripts gave into README.md and docs/evidence.md.

    python -m benchmarks.readme            # from the results that are committed
    python -m benchmarks.readme --runs     # run the commands of the README again first

A page holds blocks between `<!-- NAME -->` and `<!-- /NAME -->`. Each is written by the function of that name below
from `benchmarks/results/*.json`; what the scripts print on `mini` is kept in runs.json there. A test fails when a page
and the results part, and another when a page quotes a number outside of the blocks that is no constant of the code.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.detection import RESULTS, chosen
from benchmarks.scoring import MEBIBYTE, Point, is_reference
from common.heads.survey import LOT
from common.results import files

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "evidence.md")
BLOCK = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- /\2 -->)", re.DOTALL)
RUNS = {
    "run_induction": "python induction_head_detection.py --model mini",
    "run_circuits": "python qk_circuit_analysis.py --model mini --interventions",
    "run_example": (
        'python qk_circuit_analysis.py --model mini --text "Lily saw a big red bird and Lily saw a big red cat"'
        " --no-interventions --no-plots --out outputs/example"
    ),
}
TRACR = {  # rows of the table, and what they are called
    "dynamic": "**ours**",
    "fixed 0.1": "fixed 0.1",
    "fixed 0.1 with effect": "fixed 0.1, same effect rule",
    "fixed 0.4": "fixed 0.4",
    "fixed 0.4 with effect": "fixed 0.4, same effect rule",
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", action="store_true", help="run the commands of the README again")
    if parser.parse_args(argv).runs:
        files.write_json(RESULTS / "runs.json", {command: printed(command) for command in RUNS.values()})
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


def printed(command: str) -> str:
    """What a command of the README prints on stdout."""
    done = subprocess.run(
        [sys.executable, *shlex.split(command)[1:]], cwd=ROOT, env={**os.environ, "COLUMNS": "100"}, check=True,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return "\n".join(line.rstrip() for line in done.stdout.strip("\n").splitlines())


def filled(text: str) -> str:
    """The text with every block written anew. Raises KeyError for a block that has no function here."""
    return BLOCK.sub(lambda block: f"{block[1]}{BLOCKS[block[2]]()}\n{block[3]}", text)


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def of(found: Sequence[float]) -> str:
    """A number with its interval."""
    value, low, high = found
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


# --- the scripts on mini ---


def run(name: str) -> str:
    command = RUNS[name]
    lines = [part for line in read("runs")[command].splitlines() for part in textwrap.wrap(line, 110) or [""]]
    return f"`{command}` prints\n\n```\n" + "\n".join(lines) + "\n```"


# --- who is right ---


def judges() -> str:
    """One line per judge: how right ours is, and fixed thresholds."""
    built = read("detection")["summary"]
    ours = next(f1_of(one) for one in built if one["method"] == "dynamic" and one["effect_rule"])
    usual = next(f1_of(one) for one in built if one["method"] == "fixed 0.4" and not one["effect_rule"])
    best = max(f1_of(one) for one in built if one["method"].startswith("fixed") and one["effect_rule"])
    rows = [["hand-built, known by construction", *map(two, (ours, best, usual)), "`python -m benchmarks.detection`"]]
    compiled = {method: f1_from(found) for method, found in read("tracr")["totals"]["induction"].items()}
    best = max(f1 for method, f1 in compiled.items() if method.endswith("with effect"))
    numbers = compiled["dynamic"], best, compiled["fixed 0.4"]
    rows.append(["compiled by Tracr, known by construction", *map(two, numbers), "`python -m benchmarks.tracr`"])
    for name, what in (("trained", "small models trained here"), ("smollm2", "SmolLM2-135M")):
        found = read(name)["summary"]
        numbers = max(found["fixed_with_effect_rule"].values()), found["fixed"]["0.4"]
        ours = of(found["macro"]["f1"])
        rows.append([f"{what}, by attention knockout", ours, *map(two, numbers), "`python -m benchmarks.trained`"])
    columns = ["truth", "F1, ours", "best fixed threshold, our effect rule", "fixed 0.4, the usual", "measured by"]
    return table(columns, rows)


def two(number: float) -> str:
    return f"{number:.2f}"


def f1_of(entry: dict[str, Any]) -> float:
    return float(entry["f1"])


def f1_from(found: dict[str, Any]) -> float:
    return float(2 * found["right"] / (2 * found["right"] + found["wrong"] + found["missed"]))


def detection() -> str:
    """Each method at its best threshold and at the usual one, on hand-built models."""
    content = read("detection")
    rows = []
    for entry in chosen(content["summary"]):
        scores = [f"{entry[kind]:.2f}" for kind in ("precision", "recall", "f1", "f1_on_targets")]
        false = [f"{entry['false_per_1000'][group]:.0f}" for group in ("decoys", "random")]
        weak = f"{entry['recall_by_strength']['0.05']:.2f}"
        words = f"{entry['f1_by_vocabulary']['24']:.2f}"
        rows.append([named(entry), "yes" if entry["effect_rule"] else "no", *scores, weak, words, *false])
    columns = ["method", "effect rule", "precision", "recall", "F1", "F1 on targets", "recall of weak heads",
               "F1, 24 words", "false on decoys", "on random heads"]  # fmt: skip
    asked, decisions = content["arguments"], content["summary"][0]["decisions"]
    said = (
        f"{asked['models']} hand-built models and {asked['decoys']} of decoys; rows of up to "
        f"{', '.join(map(str, asked['lengths']))} tokens. False positives are per 1,000 decisions, of "
        f"{decisions['decoys']:,} on decoys and {decisions['random']:,} on random models."
    )
    return f"{table(columns, rows)}\n\n{said}"


def named(entry: dict[str, Any]) -> str:
    return "**ours**" if entry["method"] == "dynamic" else f"`{entry['method']}`"


def thresholds() -> str:
    """F1 of every fixed threshold, without and with the effect rule."""
    by_kind = {(one["method"], one["effect_rule"]): one["f1"] for one in read("detection")["summary"]}
    limits = [method.split()[-1] for method, ruled in by_kind if method.startswith("fixed") and ruled]
    kinds = ("fixed", "detect_head", "no BOS")
    rows = [
        [limit, *(f"{by_kind[f'{kind} {limit}', ruled]:.2f}" for kind in kinds for ruled in (False, True))]
        for limit in limits
    ]
    ours = [f"{by_kind['dynamic', ruled]:.2f}" for ruled in (False, True)]
    columns = ["threshold", *(f"{kind}{more}" for kind in kinds for more in ("", " + effect"))]
    return f"{table(columns, rows)}\n\nOurs: {ours[0]} by its threshold alone, {ours[1]} with the effect rule."


def tracr() -> str:
    """What is said of the heads of compiled programs."""
    content = read("tracr")
    totals, programs = content["totals"]["induction"], content["programs"]
    rows = [
        [name, *(f"{totals[key][kind]}" for kind in ("right", "wrong", "missed")),
         *(f"{totals[key][kind]:.2f}" for kind in ("precision", "recall"))]
        for key, name in TRACR.items()
    ]  # fmt: skip
    reached = [one["reached"] for one in programs]
    wrong = ", ".join(f"`{one['name']}`" for one in programs if one["reached"] == "judged" and disagreement(one))
    stopped = [f"`{one['name']}`: {one['reached']} ({one['why']})" for one in programs if one["reached"] != "judged"]
    said = (
        f"{reached.count('judged')} of {len(programs)} programs became folders that load and do what Tracr's own model "
        f"does. Wrong verdicts on: {wrong or 'none'}. Not all the way: {'; '.join(stopped)}."
    )
    return f"{table(['method', 'right', 'wrong', 'missed', 'precision', 'recall'], rows)}\n\n{said}"


def disagreement(program: dict[str, Any]) -> bool:
    """Whether a verdict of ours on one of its heads is wrong."""
    found = program["agreement"]["induction"]
    return bool(found["wrong"] or found["missed"])


def trained() -> str:
    """The detector against attention knockout on models trained here."""
    content = read("trained")
    rows = [
        [one["model"], one["family"].removesuffix("LMHeadModel").removesuffix("ForCausalLM"),
         f"{one['layers']} x {one['heads']}", str(one["vocabulary"]), "yes" if one["formed"] else "no",
         str(len(one["needed"])), str(len(one["detected"])), of(one["agreement"]["f1"]),
         "" if one["rank"]["effect"] is None else f"{one['rank']['effect']:.2f}", ", ".join(one["disagreements"])]
        for one in content["models"]
    ]  # fmt: skip
    columns = ["model", "family", "layers x heads", "words", "formed", "needed", "found", "F1", "rank", "disagree"]
    return f"{table(columns, rows)}\n\n{agreement(content['summary'])}"


def smollm2() -> str:
    """The same on SmolLM2-135M, with every head on which both sides disagree."""
    content = read("smollm2")
    (model,) = content["models"]
    rows = [
        [name, head["verdict"], f"{head['score']:.3f}", f"{head['threshold']:.3f}", f"{head['total_effect']:+.3f}",
         "{:+.3f} ({:+.3f} to {:+.3f})".format(*head["knockout"])]
        for name in model["disagreements"] for head in [model["by_head"][name]]
    ]  # fmt: skip
    heads = table(["head", "verdict", "score", "threshold", "total effect, nats", "knockout, nats"], rows)
    every = model["layers"] * model["heads"]
    found = f"{len(model['needed'])} of {every} heads are needed, {len(model['detected'])} are found."
    return f"{found} {agreement(content['summary'])}\n\n{heads}"


def agreement(found: dict[str, Any]) -> str:
    """Precision, recall, F1 and rank agreement in words."""
    numbers = "; ".join(f"{kind} {of(found['pooled'][kind])}" for kind in ("precision", "recall", "f1"))
    ranks = found["rank_pooled"]
    fixed = max(found["fixed"].values()), max(found["fixed_with_effect_rule"].values())
    said = (
        f"All heads together: {numbers}. Rank agreement of the total effect with the knockout over the "
        f"{ranks['heads']} heads that have one: {ranks['effect']:.2f}"
    )
    if ranks["ceiling"] is not None:
        said += f" (of the knockout with itself, even rows against odd ones: {ranks['ceiling']:.2f})"
    said += f"; over all heads, of which most do nothing: {ranks['effect_all']:.2f}"
    cuts = ", ".join(f"{two(f1)} at {cut}" for cut, f1 in found["f1_by_cut"].items() if cut in ("0.02", "0.1"))
    said += f". F1 with the judge's cut elsewhere: {cuts} nats"
    said += f". Best fixed threshold: F1 {fixed[0]:.2f}, with our effect rule {fixed[1]:.2f}."
    if found["decisions_on_negatives"]:
        false = sum(found["false_positives"].values())
        said += f" On models in which no head is needed: {false} false of {found['decisions_on_negatives']} decisions."
    return said


# --- what is stated ---


def intervals() -> str:
    """Coverage of the intervals, in per cent."""
    cells = {(one["distribution"], one["rows"]): one["methods"] for one in read("intervals")["cells"]}
    rows_in_use = sorted({rows for _, rows in cells})
    rows = [
        [data, *(", ".join(f"{100 * cells[data, n][method]['coverage']:.1f}" for n in rows_in_use)
                 for method in ("skew-t", "t", "BCa", "percentile")),
         ", ".join(f"{cells[data, 8][method]['width']:.2f}" for method in ("skew-t", "t"))]
        for data in dict.fromkeys(data for data, _ in cells)
    ]  # fmt: skip
    columns = ["data", f"ours, % at {', '.join(map(str, rows_in_use))} rows", "Student's t", "BCa", "percentile",
               "median width at 8 rows, ours and t"]  # fmt: skip
    return table(columns, rows)


def constants() -> str:
    """What every constant of the decision does when it is set otherwise."""
    content, rows = read("calibration"), []

    def add(name: str, entry: dict[str, Any], used: object) -> None:
        value = f"**{entry['value']}**" if entry["value"] == used else f"{entry['value']}"
        numbers = f"{entry['f1']:.3f}", two(entry["recall_weak"]), f"{entry['false_per_1000']:.1f}"
        rows.append([name, value, *numbers, f"{entry['named']:.3f}"])

    for name, entries in content["constants"].items():
        for entry in entries:
            add(f"`{name}`", entry, content["in_use"][name])
    for entry in content["without_spread"]:
        add("`LEAST_LIFT`, spread ignored", entry, None)
    for entry in content["rows"]:
        add(f"rows, effects on {entry['effect_rows']} of them", entry, LOT)
    columns = ["constant", "value", "F1", "recall of weak heads", "false per 1,000 on decoys", "right verdict"]
    return table(columns, rows)


def effects() -> str:
    """How large effects are in models of several depths, and what a cut leaves out."""
    trained = read("calibration")["trained"]
    cuts = [str(cut["value"]) for cut in trained[0]["cuts"]]
    rows = [
        [one["model"], str(one["layers"]), str(one["looking"]), f"{one['noise']:.3f}",
         *(f"{cut['heads']} ({100 * cut['share']:.0f} %)" for cut in one["cuts"])]
        for one in trained
    ]  # fmt: skip
    columns = ["model", "layers", "heads above their threshold", "largest effect of the others, nats",
               *(f"≥ {cut}" for cut in cuts)]  # fmt: skip
    return table(columns, rows)


def null() -> str:
    """How often a model without induction has a head that passes."""
    rows = [
        [one["law"], *(f"{100 * one[kind]:.1f} %" for kind in ("control_rows", "both"))]
        for one in read("calibration")["null"]
    ]
    return table(["null", "spread of control rows alone", "of both kinds of rows (in use)"], rows)


def mutation() -> str:
    """Whether the tests notice a changed line."""
    rows = [
        [f"`{module}`", str(one["mutants"]), str(one["killed"] + one["timed_out"]), f"{one['killed_percent']:.1f} %"]
        for module, one in read("mutation").items()
    ]
    return table(["module", "mutants", "noticed", "share"], rows)


def point_of(entry: dict[str, Any]) -> Point:
    return Point(**{name: value for name, value in entry.items() if name != "seconds"})


def speed() -> str:
    """Scoring beside its peers, on a model of GPT-2 small's size."""
    here = [one for one in read("scoring")["points"] if is_reference(point_of(one), "GPT-2 small size")]
    base = next(one["seconds"] for one in here if one["way"] == "base model")
    rows = [
        [one["way"], f"{one['seconds']:.2f}", f"{one['seconds'] / base:.2f}", f"{one['peak'] / MEBIBYTE:,.0f}"]
        for one in here
    ]
    return table(["way", "seconds", "x base model", "peak MiB"], rows)


WRITTEN = (judges, detection, thresholds, tracr, trained, smollm2, intervals, constants, effects, null, mutation, speed)
BLOCKS: dict[str, Callable[[], str]] = {
    **{function.__name__: function for function in WRITTEN},
    **{name: partial(run, name) for name in RUNS},
}

if __name__ == "__main__":
    main()
