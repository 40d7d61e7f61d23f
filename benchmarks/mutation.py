"""Change the code in one place at a time and see whether a test fails: how much the tests notice.

    pip install -r benchmarks/requirements-mutation.txt
    python -m benchmarks.mutation                          # all five modules, about an hour on one core
    python -m benchmarks.mutation --module tokens          # one module
    python -m benchmarks.mutation --module tokens --again  # after new tests: only what survived

1. Mutants come from cosmic-ray's operators: a number one higher or lower, another comparison, `not` before a
   condition, True for False, a loop without rounds, no decorator, one other operator for each binary one (`OTHER`).
   One is added: a number with a fraction a fifth lower and a quarter higher (`Nudge`), since 0.05 + 1 is found easily.
2. Not counted: annotations, `if TYPE_CHECKING`, docstrings, and the text of messages, none of which changes a result.
   Numbers that are worked out inside a message do count. What does not compile is no mutant.
3. One process imports torch and all else that is not this project's, forks for every mutant, and the child imports the
   mutated source in place of the file, which stays as it is. It runs the module's tests, fastest first, up to the first
   that fails. A child that takes `PATIENCE` times the processor time of the unchanged code and 10 s more has timed out,
   which counts as killed.
4. What survives is listed with the reason that benchmarks/mutation_reasons.json gives for it, written by a person.

Writes benchmarks/results/mutation.json and prints a table. Linux or macOS: it forks.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import gc
import hashlib
import importlib
import importlib.util
import json
import os
import re
import resource
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import parso
import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator, operator_names
from jaxtyping import install_import_hook

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "mutation.json"
REASONS = ROOT / "benchmarks" / "mutation_reasons.json"
PATIENCE = 4
# What fails need not be made shorter.
PHASES = hypothesis.Phase.explicit, hypothesis.Phase.generate
hypothesis.settings.register_profile("mutation", deadline=None, derandomize=True, phases=PHASES)
PYTEST = ["-x", "-q", "--tb=no", "--assert=plain", "-p", "no:cacheprovider", "--hypothesis-profile=mutation"]

HEADS = "tests/heads/test_"
TESTS = {  # per module, the tests that are about it, fastest first
    "common.heads.tokens": [
        HEADS + "tokens.py",
        HEADS + "small_vocabularies.py",
        HEADS + "texts.py",
        HEADS + "survey.py::test_rows_have_128_tokens_or_as_many_as_the_model_reads",
    ],  # fmt: skip
    "common.heads.scores": [
        HEADS + "scores.py",
        HEADS + "scores_fast.py",
        HEADS + "survey.py::test_lots_of_rows_are_the_rows_of_one_battery",
    ],  # fmt: skip
    "common.heads.statistics": [HEADS + "statistics.py"],
    "common.heads.detection": [HEADS + "detection.py"],
    "common.interventions.effects": [
        "tests/results/test_induction.py::test_an_ablation_of_up_to_a_minute_is_made_unasked",
        "tests/interventions/test_effects.py",
    ],
}
SLOW = "not 4096 and not hand_built_heads"  # a test in a process of its own, and whole surveys
OTHER = {"Add": "Sub", "Sub": "Add", "Mul": "Div", "Div": "Mul", "FloorDiv": "Mul", "Mod": "Mul", "Pow": "Mul",
         "BitOr": "BitAnd", "BitAnd": "BitOr", "BitXor": "BitOr", "LShift": "RShift", "RShift": "LShift"}  # fmt: skip


class Nudge(Operator):
    """A number with a fraction, a fifth lower and a quarter higher."""

    def mutation_positions(self, node):
        if isinstance(node, parso.python.tree.Number) and isinstance(ast.literal_eval(node.value), float):
            yield from [(node.start_pos, node.end_pos)] * 2

    def mutate(self, node, index):
        return parso.python.tree.Number(f" {ast.literal_eval(node.value) * (0.8, 1.25)[index]}", node.start_pos)

    @classmethod
    def examples(cls):
        return ()


def operators() -> Iterator[Operator]:
    for name in operator_names():
        kind, *pair = name.split("/")[1].split("_")
        if kind == "ReplaceBinaryOperator" and OTHER[pair[0]] != pair[1]:
            continue
        if kind == "ReplaceComparisonOperator" and len({"Is", "IsNot"} & set(pair)) == 1:
            continue
        if kind == "ReplaceUnaryOperator" and pair[0] != "Delete":
            continue  # +x is x, and not x of an array is an error
        if not kind.startswith("Variable"):
            yield get_operator(name)()
    yield Nudge()


@dataclass(frozen=True)
class Mutant:
    """A module's `source` with a change in one `line`, counted from 1. `change` names it wherever the line moves to."""

    line: int
    change: str
    source: str


def bare(source: str) -> str | None:
    """What the source does, whatever its annotations say, or None if it does not compile."""
    try:
        # The bare * before keyword arguments is no multiplication.
        tree = ast.parse(source.replace(", /,", ", *,").replace("if not TYPE_CHECKING", "if TYPE_CHECKING"))
        compile(source, "mutant", "exec")
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        for part in {"annotation", "returns"} & set(node._fields):
            setattr(node, part, None)
    return ast.dump(tree)


def mutants_of(source: str) -> list[Mutant]:
    """Every mutant, in the order of its lines."""
    found, seen, changes = [], {None, bare(source)}, Counter()
    places = list(ast_nodes(get_ast(source)))
    for operator in operators():
        for occurrence in range(sum(len(list(operator.mutation_positions(node))) for node in places)):
            mutated = mutate_code(source, operator, occurrence)
            if (does := bare(mutated)) not in seen:
                seen.add(does)
                found.append((*changed_line(source.splitlines(), mutated.splitlines()), mutated))
    mutants = []
    for line, change, mutated in sorted(found):
        changes[change] += 1
        mutants.append(Mutant(line, change + f" ({changes[change]})" * (changes[change] > 1), mutated))
    return mutants


def changed_line(old: list[str], new: list[str]) -> tuple[int, str]:
    """Which line the change is in, from 1, and what it was and is, without comments."""
    line = next((at for at, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1]), len(new))
    shown = [re.sub(r"  #.*", "", text[line].strip()) for text in (old, new)]
    change = re.sub(r"(?<=[(\[]) | (?= )", "", shown[1]) if len(old) == len(new) else "(without)"
    return line + 1, f"{shown[0]}  →  {change}"


# --- running the tests of a mutant ---


class Mutated(importlib.machinery.SourceFileLoader):
    """Finds `module` and gives it `source` in place of its file."""

    def __init__(self, module: str, source: str):
        super().__init__(module, str(ROOT / f"{module.replace('.', '/')}.py"))
        self.source = source

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, fullname):
        return compile(self.source, self.path, "exec", dont_inherit=True)


def run(module: str, source: str, seconds: float | None = None) -> tuple[str, float, list[str]]:
    """Run a module's tests on `source` in a child: "survived", "killed" or "timed out", the child's processor seconds,
    and which modules that are none of this project's it has imported."""
    read, write = os.pipe()
    if not (child := os.fork()):
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            if seconds:  # both signals end the process
                signal.setitimer(signal.ITIMER_PROF, seconds)
                signal.alarm(int(20 * seconds))  # asleep, it takes no processor time
                resource.setrlimit(resource.RLIMIT_DATA, (12 << 30, 12 << 30))
            sys.meta_path.insert(0, Mutated(module, source))
            code = pytest.main([*PYTEST, "-k", SLOW, *TESTS[module]])
            foreign = {name for name in sys.modules if name.split(".")[0] not in ("common", "tests", "benchmarks")}
            os.write(write, json.dumps([int(code), sorted(foreign - set(sys.builtin_module_names))]).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    _, status, used = os.wait4(child, 0)
    code, foreign = json.loads(said) if said else (1, [])  # nothing is said by a child that has crashed
    timed_out = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGALRM)
    return "timed out" if timed_out else "killed" if code else "survived", used.ru_utime + used.ru_stime, foreign


def measure(module: str, known: dict | None) -> dict[str, object]:
    """The outcome of every mutant of a module; where they are `known` of the same source, only of the survivors."""
    source = Path(ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    digest = hashlib.sha256(source.encode()).hexdigest()
    only = {each["change"] for each in known["survivors"]} if known and known["source_sha256"] == digest else None
    outcome, _, foreign = run(module, source)
    if outcome != "survived":
        raise SystemExit(f"the tests of {module} fail as it is: {' '.join(TESTS[module])}")
    for name in foreign:
        with contextlib.suppress(Exception):  # some names are of modules that were made, not imported
            importlib.import_module(name)
    install_import_hook("common.attention.call", "beartype.beartype")  # as tests/conftest.py does
    importlib.import_module("common.loading.loader")  # a room below all of these modules: no mutant changes it
    gc.freeze()
    _, seconds, _ = run(module, source)
    outcomes, survivors, mutants = Counter(), [], mutants_of(source)
    reasons = json.loads(REASONS.read_text(encoding="utf-8")).get(module, {})
    print(f"{module}: {len(mutants)} mutants, {seconds:.1f} s of processor time where all tests pass", file=sys.stderr)
    for mutant in mutants:
        run_it = only is None or mutant.change in only
        outcome = run(module, mutant.source, PATIENCE * seconds + 10)[0] if run_it else "killed"
        outcomes[outcome] += 1
        if outcome == "survived":
            survivors.append({"line": mutant.line, "change": mutant.change, "reason": reasons.get(mutant.change)})
            print(f"{module}:{mutant.line}: {mutant.change}", file=sys.stderr)
    killed = outcomes["killed"] + outcomes["timed out"]
    return {
        "source_sha256": digest, "tests": TESTS[module], "mutants": len(mutants), "killed": killed,
        "timed_out": outcomes["timed out"], "killed_percent": round(100 * killed / len(mutants), 1),
        "survivors": survivors,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    short = [module.split(".")[-1] for module in TESTS]
    parser.add_argument("--module", choices=short, action="append", help="a module; repeat for more (default: all)")
    parser.add_argument("--again", action="store_true", help="where the module is unchanged: only what survived")
    args = parser.parse_args(argv)
    os.chdir(ROOT)
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for module in TESTS:
        if module.split(".")[-1] in (args.module or short):
            results[module] = measure(module, results.get(module) if args.again else None)
            RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{'module':32}{'mutants':>8}{'killed':>8}{'timed out':>11}{'survivors':>11}{'killed %':>10}")
    for module, found in results.items():
        numbers = (found[key] for key in ("mutants", "killed", "timed_out"))
        print(f"{module:32}{'{:8}{:8}{:11}'.format(*numbers)}{len(found['survivors']):11}{found['killed_percent']:10}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
