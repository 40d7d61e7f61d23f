"""Which way of detecting induction heads is right, and how often? Measured on models whose answer is known.

    python -m benchmarks.detection                      # about 15 minutes on 2 CPU cores
    python -m benchmarks.detection --models 4 --decoys 2 --random 2 --out /tmp/quick.json

Prints three tables and writes them, with every head that our detection got wrong, to benchmarks/results/detection.json.

1. Models. Hand-built ones (tests/handbuilt.py), whose heads are known by construction: vocabularies of 24 to 4,096
   words, induction heads that pay 0.02 to 0.99 of their attention to the targets and the rest to BOS. `mini`, against
   its labels.json. Models without induction: hand-built decoys, all of which copy what they attend to (one token of the
   vocabulary, a fixed distance, what is near, everything); random weights as initialised and ten times as large; the
   checkpoint of `mini` from before induction formed. The two later checkpoints lie at the edge of the rule for labels:
   they are listed beside labels by intervention (common/interventions/causal_labels.py) and not counted.
2. Rows. Of 32, 64, 128 and 256 tokens, by token id, or as many as the vocabulary has without repeating one. Every seed
   starts at `FIRST_SEED`; nothing else draws from there, and no constant was chosen on it (benchmarks/calibration.py).
3. Methods, each of which says of every head whether it looks at the targets:
   - dynamic: the threshold of induction_head_detection.py, from each head's own null;
   - fixed T: prefix matching on the same rows is at least T, the habit of the field;
   - detect_head T: `transformer_lens.head_detector.detect_head` for "induction_head", mean over rows [BOS] R R, at
     least T. As it comes, a perfect head scores about 0.5, since half of the queries have nothing to find; and with
     `exclude_bos=True` (no BOS T), which takes attention to BOS out of the denominator.
   Each stands by itself, and with the same effect rule: the head must also raise the correct token's logit by
   `LEAST_EFFECT`. So a reader sees what the threshold does and what the effect rule does.
4. Truth. An induction head attends to the tokens after earlier copies and raises them. Methods that read attention
   alone cannot know the second half: "targ" is their F1 where every head that attends to the targets counts.
5. Agreement. Precision, recall and F1 per model and row length, then the mean over both (macro); F1 of all decisions
   pooled; on models without induction, false positives per 1,000 decisions. Nothing to find and nothing found is 1.0.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformer_lens.head_detector import detect_head
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers.utils import logging as transformers_logging

from common import UserError, cli
from common.attention.head import Head
from common.heads import labels
from common.heads.detection import LEAST_EFFECT, Detection
from common.heads.statistics import Floats, Ints
from common.heads.survey import survey
from common.heads.tokens import SHORTEST
from common.interventions.causal_labels import measure_causal_effects
from common.loading import Model, load
from common.loading.find import MINI
from common.results import files
from tests import handbuilt

if TYPE_CHECKING:
    from transformer_lens import ActivationCache
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerBase

Bools = NDArray[np.bool_]

PROGRAM = "benchmark_detection"
RESULTS = Path(__file__).with_name("results")  # committed: the README quotes them
FIRST_SEED = 1_000_000
LENGTHS = (32, 64, 128, 256)
WORDS = (24, 48, 100, 512, 4096)  # vocabularies of hand-built models, in turn
WEAKEST = 0.02  # attention that a planted head pays to its targets, at the least
STRENGTHS = (0.05, 0.1, 0.2, 0.4, 1.0)  # upper ends of the groups in which recall is shown
THRESHOLDS = (0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
USUAL = 0.4  # what the field uses
LIBRARY_ROWS = 8  # rows [BOS] R R for detect_head
SHAPES = ((2, 4, 64), (4, 8, 64), (6, 12, 96), (12, 12, 96))  # layers, heads, width of random models
BEFORE, FORMING = ("step-0100",), ("step-0300", "step-0600")
OURS = "dynamic"
NEGATIVE = ("decoys", "random", "before")  # groups of models without induction


@dataclass(frozen=True)
class Subject:
    """What is known of a model: its induction heads, and where known all heads that attend to the targets.

    `group`: hand-built, mini, forming (checkpoints in which induction forms) or one of `NEGATIVE`; `words`: size of the
    vocabulary; `roles`: what each head does, for hand-built models.
    """

    name: str
    group: str
    words: int
    induction: frozenset[Head]
    on_targets: frozenset[Head] = frozenset()
    roles: Mapping[Head, handbuilt.Role] = field(default_factory=dict)

    def said(self, head: Head) -> str:
        """The head with its kind and strength, where they are known."""
        role = self.roles.get(head)
        return f"{head} {role.kind} {role.strength:.2f}" if role else str(head)


@dataclass(frozen=True)
class Said:
    """What one method says on one model at one row length: the heads it takes, [layers, heads].

    `ruled`: whether the effect rule was applied to them.
    """

    method: str
    ruled: bool
    subject: Subject
    length: int
    heads: Bools

    @property
    def agreement(self) -> Agreement:
        return Agreement.of(self.heads, self.subject.induction)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit code as for the scripts."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=cli.positive, default=40, help="hand-built models (default 40)")
    parser.add_argument("--decoys", type=cli.positive, default=20, help="hand-built models of decoys (default 20)")
    parser.add_argument("--random", type=cli.positive, default=16, help="randomly initialised models (default 16)")
    parser.add_argument(
        "--lengths", type=cli.positive, nargs="+", default=LENGTHS, help="tokens per row (default 32 64 128 256)"
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "detection.json", metavar="FILE",
        help="where the results are written (default benchmarks/results/detection.json)",
    )  # fmt: skip
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return cli.run(benchmark, parser.parse_args(argv), PROGRAM)


def benchmark(args: argparse.Namespace) -> None:
    """Every method on every model at every row length; the tables to stdout and to a file."""
    started = time.monotonic()
    for length in args.lengths:
        if not SHORTEST <= length < handbuilt.CONTEXT:
            raise UserError(f"--lengths {length}: hand-built models need rows of {SHORTEST} to {handbuilt.CONTEXT - 1}")
    said: list[Said] = []
    total = args.models + args.decoys + args.random + len(BEFORE) + len(FORMING) + 1
    for number, (subject, model) in enumerate(subjects(args.models, args.decoys, args.random), start=1):
        for length in sorted({min(length, subject.words + 1) for length in args.lengths}):
            said += ask(subject, model, length, seed=FIRST_SEED + number)
        cli.say(f"{number}/{total} {subject.name}, {time.monotonic() - started:.0f} s")
    results = {
        "command": "python -m benchmarks.detection",
        "arguments": {name: vars(args)[name] for name in ("models", "decoys", "random", "lengths")},
        "first_seed": FIRST_SEED,
        "wall_seconds": round(time.monotonic() - started, 1),
        "summary": summarise(said),
        "wrong": [one for each in said if each.method == OURS and each.ruled for one in mistakes(each)],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(args.out, results)
    print_tables(results["summary"])
    print_forming(said)
    print(f"Written to {args.out}")


# --- models ---


def subjects(n_handbuilt: int, n_decoys: int, n_random: int) -> Iterator[tuple[Subject, Model]]:
    """The models, one at a time."""
    transformers_logging.disable_progress_bar()  # of every file that is saved
    for number in range(n_handbuilt):
        words = WORDS[number % len(WORDS)]
        built = handbuilt.build(FIRST_SEED + number, vocabulary=words + 1, weakest=WEAKEST)
        yield hand_built(f"hand-built {FIRST_SEED + number}", "hand-built", built, words)
    for number in range(n_decoys):
        words = WORDS[number % len(WORDS)]
        built = handbuilt.decoys(FIRST_SEED + number, vocabulary=words + 1)
        yield hand_built(f"decoys {FIRST_SEED + number}", "decoys", built, words)
    mini = load("mini")
    known = labels.read_labels(MINI / "labels.json", mini.n_layers, mini.n_heads)
    yield Subject("mini", "mini", len(mini.ordinary()), known.heads), mini
    for step in (*BEFORE, *FORMING):
        model = load(str(MINI.with_name("mini-checkpoints") / step))
        induction = frozenset() if step in BEFORE else measure_causal_effects(model).labels().heads
        yield Subject(f"mini {step}", "before" if step in BEFORE else "forming", len(mini.ordinary()), induction), model
    tokenizer = AutoTokenizer.from_pretrained(MINI)
    for number in range(n_random):
        yield random_model(number, tokenizer)


def hand_built(name: str, group: str, built: handbuilt.HandBuilt, words: int) -> tuple[Subject, Model]:
    """A model whose heads are known by construction."""
    with tempfile.TemporaryDirectory() as folder:
        model = load(str(handbuilt.save(built, Path(folder), handbuilt.word_tokenizer(words))))
    roles = {Head.at(*place): role for place, role in built.roles.items()}
    of_kind = {
        kinds: frozenset(head for head, role in roles.items() if role.kind in kinds)
        for kinds in (("induction",), handbuilt.ON_TARGETS)
    }
    return Subject(name, group, words, *of_kind.values(), roles=roles), model


def random_model(number: int, tokenizer: PreTrainedTokenizerBase) -> tuple[Subject, Model]:
    """A GPT-2 as it is initialised, or with weights ten times as large, whose heads are far from uniform."""
    layers, heads, width = SHAPES[number % len(SHAPES)]
    spread = (0.02, 0.2)[number // len(SHAPES) % 2]
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=handbuilt.CONTEXT, n_embd=width, n_layer=layers, n_head=heads,
        initializer_range=spread, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    torch.manual_seed(FIRST_SEED + number)
    with tempfile.TemporaryDirectory() as folder:
        GPT2LMHeadModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model = load(folder)
    name = f"random {number}: {layers} x {heads}, spread {spread}"
    return Subject(name, "random", len(model.ordinary()), frozenset()), model


# --- methods ---


def ask(subject: Subject, model: Model, length: int, seed: int) -> list[Said]:
    """Every method on one model at one row length, by itself and with the effect rule."""
    surveyed = survey(model, seed=seed, batch_size=8, length=length)
    raises = surveyed.evidence.effect.mean(0) >= LEAST_EFFECT
    return [
        Said(method, ruled, subject, length, looks & raises if ruled else looks)
        for method, looks in looking(surveyed.found, model, length, seed).items()
        for ruled in (False, True)
    ]


def looking(found: Detection, model: Model, length: int, seed: int) -> dict[str, Bools]:
    """Which heads look at the targets, by each method. Ours is that of induction_head_detection.py."""
    said = {OURS: found.score >= found.threshold}
    plain, without_bos = library_scores(model, length, seed)
    for method, score in {"fixed": found.score, "detect_head": plain, "no BOS": without_bos}.items():
        said |= {f"{method} {limit}": score >= limit for limit in THRESHOLDS}
    return said


class GivenTokens:
    """A model as `detect_head` wants it, which takes text: here a "text" is a row of token ids, kept as it is.

    A decoded row would not always encode to the same tokens. Keeps the patterns alone, all that `detect_head` reads.
    """

    def __init__(self, bridge: TransformerBridge) -> None:
        self.bridge, self.cfg = bridge, bridge.cfg

    def to_tokens(self, row: Ints) -> torch.Tensor:
        return torch.from_numpy(row)[None]

    def cache(self, row: Ints) -> ActivationCache:
        def is_pattern(point: str) -> bool:
            return point.endswith("attn.hook_pattern")

        with torch.inference_mode():
            return self.bridge.run_with_cache(self.to_tokens(row), remove_batch_dim=True, names_filter=is_pattern)[1]


def library_scores(model: Model, length: int, seed: int) -> tuple[Floats, Floats]:
    """`detect_head` for induction heads as it comes and without BOS, means over rows [BOS] R R, [layers, heads].

    The rows have `length` tokens, or one less where that is what BOS and a segment said twice can have.
    """
    given = GivenTokens(model.bridge)
    plain, without_bos = [], []
    for row in said_twice(model, length, seed):
        cache = given.cache(row)
        plain.append(detect_head(given, row, "induction_head", cache=cache).numpy())
        without_bos.append(detect_head(given, row, "induction_head", cache=cache, exclude_bos=True).numpy())
    return np.mean(plain, axis=0, dtype=np.float64), np.mean(without_bos, axis=0, dtype=np.float64)


def said_twice(model: Model, length: int, seed: int) -> list[Ints]:
    """`LIBRARY_ROWS` rows of BOS and a random segment twice."""
    rng = np.random.default_rng([seed, length])
    segments = [rng.choice(model.ordinary(), size=(length - 1) // 2, replace=False) for _ in range(LIBRARY_ROWS)]
    return [np.concatenate([[model.bos], segment, segment]) for segment in segments]


# --- agreement ---


@dataclass(frozen=True)
class Agreement:
    """Right and wrong decisions on some heads. Undefined cases are decided as in common.heads.metrics.evaluate."""

    right: int
    wrong: int
    missed: int

    @classmethod
    def of(cls, said: Bools, truth: frozenset[Head]) -> Agreement:
        heads = heads_of(said)
        return cls(len(heads & truth), len(heads - truth), len(truth - heads))

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(self.right + other.right, self.wrong + other.wrong, self.missed + other.missed)

    @property
    def precision(self) -> float:
        return self._share(self.right + self.wrong)

    @property
    def recall(self) -> float:
        return self._share(self.right + self.missed)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        return self._share(self.right + (self.wrong + self.missed) / 2)

    def _share(self, of: float) -> float:
        if not self.right + self.wrong + self.missed:
            return 1.0
        return self.right / of if of else 0.0


def mistakes(each: Said) -> list[dict[str, object]]:
    """The heads that were got wrong, one entry for a model and row length that has any."""
    found, truth = heads_of(each.heads), each.subject.induction
    if found == truth or each.subject.group == "forming":
        return []
    false, missed = ([each.subject.said(head) for head in sorted(some)] for some in (found - truth, truth - found))
    return [{"model": each.subject.name, "words": each.subject.words, "length": each.length,
             "false": false, "missed": missed}]  # fmt: skip


def summarise(said: Sequence[Said]) -> list[dict[str, Any]]:
    """One entry per method, without and with the effect rule, in the order in which they were asked."""
    kinds = dict.fromkeys((each.method, each.ruled) for each in said)
    return [summary([each for each in said if (each.method, each.ruled) == kind]) for kind in kinds]


def summary(said: Sequence[Said]) -> dict[str, Any]:
    """How one method did; what the numbers are means over, step 5 above says."""
    built = [each for each in said if each.subject.group == "hand-built"]

    def f1_by(what: Callable[[Said], int]) -> dict[int, float]:
        groups = sorted({what(each) for each in built})
        return {group: mean(each.agreement.f1 for each in built if what(each) == group) for group in groups}

    negative = {group: [each for each in said if each.subject.group == group] for group in NEGATIVE}
    return {
        "method": said[0].method,
        "effect_rule": said[0].ruled,
        **{kind: mean(getattr(each.agreement, kind) for each in built) for kind in ("precision", "recall", "f1")},
        "f1_pooled": sum((each.agreement for each in built), Agreement(0, 0, 0)).f1,
        "f1_on_targets": mean(Agreement.of(each.heads, each.subject.on_targets).f1 for each in built),
        "f1_mini": mean(each.agreement.f1 for each in said if each.subject.group == "mini"),
        "f1_by_length": f1_by(lambda each: each.length),
        "f1_by_vocabulary": f1_by(lambda each: each.subject.words),
        "recall_by_strength": recall_by_strength(built),
        "false_per_1000": {group: 1000 * rate(some) for group, some in negative.items()},
        "decisions": {group: sum(each.heads.size for each in some) for group, some in negative.items()},
    }


def recall_by_strength(built: Sequence[Said]) -> dict[float, float]:
    """Share of the planted induction heads found, by the upper end of their group in `STRENGTHS`."""
    planted = [(head, each) for each in built for head in each.subject.induction]
    found: dict[float, list[bool]] = {end: [] for end in STRENGTHS}
    for head, each in planted:
        end = next(end for end in STRENGTHS if each.subject.roles[head].strength <= end)
        found[end].append(bool(each.heads[head.place]))
    return {end: mean(values) for end, values in found.items() if values}


def rate(said: Sequence[Said]) -> float:
    """Share of the decisions that say induction."""
    return sum(int(each.heads.sum()) for each in said) / max(1, sum(each.heads.size for each in said))


def mean(values: Iterable[float]) -> float:
    """NaN of nothing."""
    known = list(values)
    return float(np.mean(known)) if known else float("nan")


# --- tables ---


def print_tables(summaries: Sequence[dict[str, Any]]) -> None:
    """F1 at every threshold, then the methods at their best and at the usual threshold."""
    by_kind = {(entry["method"], entry["effect_rule"]): entry for entry in summaries}
    methods = ("fixed", "detect_head", "no BOS")
    rows = [["dynamic", *(f"{by_kind[OURS, ruled]['f1']:.3f}" for ruled in (False, True)), "", "", "", ""]]
    for limit in THRESHOLDS:
        kinds = [(f"{method} {limit}", ruled) for method in methods for ruled in (False, True)]
        rows.append([str(limit), *(f"{by_kind[kind]['f1']:.3f}" for kind in kinds)])
    columns = ["threshold", *(name for method in methods for name in (method, "+ effect"))]
    cli.print_table("F1 on hand-built models at each threshold, without and with the effect rule", columns, rows)
    print_chosen(chosen(summaries))


def chosen(summaries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours, and each other method at its best threshold and at the usual one, without and with the effect rule."""
    kept = [entry for entry in summaries if entry["method"] == OURS]
    for method in ("fixed", "detect_head", "no BOS"):
        for ruled in (False, True):
            its = [one for one in summaries if one["method"].startswith(method) and one["effect_rule"] == ruled]
            usual = next(one for one in its if one["method"] == f"{method} {USUAL}")
            best = max(its, key=lambda one: one["f1"])
            kept += [best] if best is usual else [best, usual]
    return kept


def print_chosen(entries: Sequence[dict[str, Any]]) -> None:
    """Agreement and false positives, then recall by strength and F1 by vocabulary."""
    names = [entry["method"] + (" + effect" if entry["effect_rule"] else "") for entry in entries]
    scores = ("precision", "recall", "f1", "f1_on_targets", "f1_mini")
    rows = [
        [name, *(f"{entry[kind]:.3f}" for kind in scores), *(f"{entry['false_per_1000'][at]:.1f}" for at in NEGATIVE)]
        for name, entry in zip(names, entries, strict=True)
    ]
    columns = ["method", "prec", "rec", "F1", "targ", "mini", *NEGATIVE]
    cli.print_table("Each method at its best threshold and at the usual one", columns, rows)
    decisions = ", ".join(f"{count} on {group}" for group, count in entries[0]["decisions"].items())
    print(
        "targ: F1 for heads that attend to the targets, whatever they write. mini: F1 on the bundled model.\n"
        f"{', '.join(NEGATIVE)}: false positives per 1,000 decisions on models without induction ({decisions})."
    )
    strengths, words = list(entries[0]["recall_by_strength"]), list(entries[0]["f1_by_vocabulary"])
    rows = [
        [
            name,
            *(f"{entry['recall_by_strength'][end]:.2f}" for end in strengths),
            *(f"{entry['f1_by_vocabulary'][size]:.2f}" for size in words),
        ]
        for name, entry in zip(names, entries, strict=True)
    ]
    columns = ["method", *(f"<={end}" for end in strengths), *(f"{size} w" for size in words)]
    cli.print_table(f"Recall by attention to the targets, from {WEAKEST}; F1 by words", columns, rows)


def print_forming(said: Sequence[Said]) -> None:
    """What our detection finds in the checkpoints in which induction forms, beside the labels by intervention."""
    ours_there = [each for each in said if each.subject.group == "forming" and each.method == OURS and each.ruled]
    rows = [
        [each.subject.name, str(each.length), listed(heads_of(each.heads)), listed(each.subject.induction)]
        for each in ours_there
    ]
    columns = ["checkpoint", "row length", "found", "by intervention"]
    cli.print_table("While induction forms (not counted above)", columns, rows)


def heads_of(said: Bools) -> set[Head]:
    return {Head.at(*place) for place in np.argwhere(said)}


def listed(heads: Iterable[Head]) -> str:
    return " ".join(str(head) for head in sorted(heads)) or "none"


if __name__ == "__main__":
    sys.exit(main())
