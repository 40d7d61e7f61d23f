"""Which way of detecting induction heads is right, and how often? Measured on models whose answer is known.

    python -m benchmarks.detection                      # about 5 minutes on 2 CPU cores
    python -m benchmarks.detection --models 40 --random 48

Prints a table, writes it with every single decision to outputs/benchmark_detection/results.json.

1. Models. Hand-built ones (tests/handbuilt.py), whose heads are known by construction; `mini`, against its labels.json;
   negative controls, in which nothing is induction: randomly initialised models, and the checkpoint of `mini` from
   before induction formed. The two later checkpoints have seen a quarter of the vocabulary, and what their heads do to
   the loss on all of it lies at the edge of the rule for labels: they are listed beside labels by intervention
   (common/interventions/causal_labels.py) and not counted.
2. Rows. Of 32, 64, 128 and 256 tokens, by token id. Every seed starts at `FIRST_SEED`; nothing else draws from there.
3. Methods, each of which says for every head whether it is an induction head:
   - dynamic: what induction_head_detection.py does by default;
   - fixed T: prefix matching on the same rows is at least T, the habit of the field;
   - detect_head T: `transformer_lens.head_detector.detect_head` for "induction_head", mean over rows [BOS] R R, at
     least T. As it comes, a perfect head scores about 0.5, since half of the queries have nothing to find; and with
     `exclude_bos=True` (no BOS T), which takes attention to BOS out of the denominator.
4. Truth. An induction head attends to the tokens after earlier copies and raises them. A method that reads attention
   alone cannot know whether a head raises, lowers or ignores what it attends to, so a second truth, "on targets",
   counts every head that attends there; it is known for hand-built models only.
5. Agreement. Precision, recall and F1 per model and row length, then the mean over both (macro); F1 of all decisions
   pooled; on the negative controls, false positives per 1,000 decisions. Nothing to find and nothing found is 1.0.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from transformer_lens.head_detector import detect_head
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers.utils import logging as transformers_logging

from common import UserError, cli
from common.attention.head import Head
from common.heads import labels
from common.heads.statistics import Floats, Ints
from common.heads.survey import survey
from common.heads.tokens import SHORTEST
from common.interventions.causal_labels import measure_causal_effects
from common.loading import Model, load
from common.loading.find import MINI
from common.results import report
from tests import handbuilt

if TYPE_CHECKING:
    from transformer_lens import ActivationCache
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerBase

Bools = NDArray[np.bool_]

PROGRAM = "benchmark_detection"
FIRST_SEED = 1_000_000
LENGTHS = (32, 64, 128, 256)
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
LIBRARY_ROWS = 8  # rows [BOS] R R for detect_head
SHAPES = ((2, 4, 64), (4, 8, 64), (6, 12, 96), (12, 12, 96))  # layers, heads, width of random models
BEFORE, FORMING = ("step-0100",), ("step-0300", "step-0600")
OURS = "dynamic"


@dataclass(frozen=True)
class Subject:
    """What is known of a model: its induction heads, and where known all heads that attend to the targets.

    `group`: hand-built, mini, forming (checkpoints in which induction forms) or negative; `kinds`: what each head does,
    for hand-built models.
    """

    name: str
    group: str
    induction: frozenset[Head]
    on_targets: frozenset[Head] | None = None
    kinds: dict[Head, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Decision:
    """Heads that a method takes for induction heads, and those it says attend to the targets, both [layers, heads]."""

    induction: Bools
    on_targets: Bools


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit code as for the scripts."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=cli.positive, default=20, help="hand-built models (default 20)")
    parser.add_argument("--random", type=cli.positive, default=8, help="randomly initialised models (default 8)")
    parser.add_argument(
        "--lengths", type=cli.positive, nargs="+", default=LENGTHS, help="tokens per row (default 32 64 128 256)"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs") / PROGRAM, metavar="DIR", help="output folder")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return cli.run(benchmark, parser.parse_args(argv), PROGRAM)


def benchmark(args: argparse.Namespace) -> None:
    """Every method on every model at every row length; the summary to stdout and to a file."""
    started = time.monotonic()
    for length in args.lengths:
        if not SHORTEST <= length < handbuilt.CONTEXT:
            raise UserError(f"--lengths {length}: hand-built models need rows of {SHORTEST} to {handbuilt.CONTEXT - 1}")
    judged: list[Judged] = []
    total = args.models + args.random + len(BEFORE) + len(FORMING) + 1
    with report.output_folder(args.out) as folder:
        for number, (subject, model) in enumerate(subjects(args.models, args.random), start=1):
            for length in args.lengths:
                judged += judge(subject, model, length, seed=FIRST_SEED + number)
            report.say(f"{number}/{total} {subject.name}, {time.monotonic() - started:.0f} s")
        summaries = summarise(judged)
        results = {
            "argv": sys.argv,
            "first_seed": FIRST_SEED,
            "wall_seconds": round(time.monotonic() - started, 1),
            "summary": summaries,
            "decisions": [each.entry() for each in judged],
            "files": ["results.json"],
        }
        report.write_json(folder / "results.json", results)
    print_summary(summaries)
    print_forming(judged)
    print(f"Every decision: {args.out / 'results.json'}")


# --- models ---


def subjects(n_handbuilt: int, n_random: int) -> Iterator[tuple[Subject, Model]]:
    """The models, one at a time."""
    transformers_logging.disable_progress_bar()  # of every file that is saved
    tokenizer = AutoTokenizer.from_pretrained(MINI)
    for number in range(n_handbuilt):
        yield hand_built(FIRST_SEED + number, tokenizer)
    mini = load("mini")
    known = labels.read_labels(MINI / "labels.json", mini.n_layers, mini.n_heads)
    yield Subject("mini", "mini", known.heads), mini
    for step in (*BEFORE, *FORMING):
        model = load(str(MINI.with_name("mini-checkpoints") / step))
        induction = frozenset() if step in BEFORE else measure_causal_effects(model).labels().heads
        yield Subject(f"mini {step}", "negative" if step in BEFORE else "forming", induction), model
    for number in range(n_random):
        yield random_model(number, tokenizer)


def hand_built(seed: int, tokenizer: PreTrainedTokenizerBase) -> tuple[Subject, Model]:
    """A model whose heads are known by construction."""
    built = handbuilt.build(seed, vocabulary=len(tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        model = load(str(handbuilt.save(built, Path(folder), tokenizer)))
    subject = Subject(
        f"hand-built {seed}",
        "hand-built",
        induction=frozenset(Head.at(*place) for place in built.heads("induction")),
        on_targets=frozenset(Head.at(*place) for place in built.heads(*handbuilt.ON_TARGETS)),
        kinds={Head.at(*place): role.kind for place, role in built.roles.items()},
    )
    return subject, model


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
    return Subject(f"random {number}: {layers} x {heads}, spread {spread}", "negative", frozenset()), model


# --- methods ---


def decisions(model: Model, length: int, seed: int) -> dict[str, Decision]:
    """What each method says of each head. Ours is that of induction_head_detection.py with its defaults."""
    found = survey(model, seed=seed, batch_size=8, length=length).found
    said = {OURS: Decision(found.induction, found.attends)}
    plain, without_bos = library_scores(model, length, seed)
    for method, score in {"fixed": found.score, "detect_head": plain, "no BOS": without_bos}.items():
        said |= {f"{method} {limit}": Decision(score >= limit, score >= limit) for limit in THRESHOLDS}
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


@dataclass(frozen=True)
class Judged:
    """One method on one model at one row length."""

    method: str
    subject: Subject
    length: int
    decision: Decision

    @property
    def induction(self) -> Agreement:
        return Agreement.of(self.decision.induction, self.subject.induction)

    @property
    def on_targets(self) -> Agreement:
        return Agreement.of(self.decision.on_targets, self.subject.on_targets or frozenset())

    def entry(self) -> dict[str, object]:
        """For results.json: counts, and every head that was got wrong, with its kind where it is known."""
        said = heads_of(self.decision.induction)
        kinds, truth = self.subject.kinds, self.subject.induction
        return {
            "method": self.method,
            "model": self.subject.name,
            "group": self.subject.group,
            "length": self.length,
            "heads": self.decision.induction.size,
            **vars(self.induction),
            "false": [f"{head} {kinds.get(head, '')}".strip() for head in sorted(said - truth)],
            "missed_heads": [f"{head} {kinds.get(head, '')}".strip() for head in sorted(truth - said)],
        }


def judge(subject: Subject, model: Model, length: int, seed: int) -> list[Judged]:
    """Every method on one model at one row length."""
    said = decisions(model, length, seed)
    return [Judged(method, subject, length, decision) for method, decision in said.items()]


class Summary(TypedDict):
    """How one method did; what the numbers are means over, step 5 above says."""

    method: str
    precision: float
    recall: float
    f1: float
    by_length: dict[int, float]
    f1_pooled: float
    f1_on_targets: float
    f1_mini: float
    false_per_1000: float
    negative_decisions: int


def summarise(judged: Sequence[Judged]) -> list[Summary]:
    """One entry per method, in the order in which they were asked."""
    methods = dict.fromkeys(each.method for each in judged)
    return [summary(method, [each for each in judged if each.method == method]) for method in methods]


def summary(method: str, judged: Sequence[Judged]) -> Summary:
    """Means over models and row lengths; `by_length` means over models; see step 5 above."""
    built = [each for each in judged if each.subject.group == "hand-built"]
    mini = [each for each in judged if each.subject.group == "mini"]
    negative = [each for each in judged if each.subject.group == "negative"]
    lengths = dict.fromkeys(each.length for each in judged)
    false, asked = (
        sum(each.induction.wrong for each in negative),
        sum(each.decision.induction.size for each in negative),
    )
    return {
        "method": method,
        "precision": mean(each.induction.precision for each in built),
        "recall": mean(each.induction.recall for each in built),
        "f1": mean(each.induction.f1 for each in built),
        "by_length": {length: mean(each.induction.f1 for each in built if each.length == length) for length in lengths},
        "f1_pooled": sum((each.induction for each in built), Agreement(0, 0, 0)).f1,
        "f1_on_targets": mean(each.on_targets.f1 for each in built),
        "f1_mini": mean(each.induction.f1 for each in mini),
        "false_per_1000": 1000 * false / asked,
        "negative_decisions": asked,
    }


def mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def print_summary(summaries: Sequence[Summary]) -> None:
    """The table for people."""
    lengths = list(summaries[0]["by_length"])
    columns = ["method", "prec", "rec", "F1", *map(str, lengths), "pool", "targ", "mini", "false"]
    rows = [
        [
            entry["method"],
            *(f"{value:.2f}" for value in (entry["precision"], entry["recall"], entry["f1"])),
            *(f"{value:.2f}" for value in entry["by_length"].values()),
            *(f"{value:.2f}" for value in (entry["f1_pooled"], entry["f1_on_targets"], entry["f1_mini"])),
            f"{entry['false_per_1000']:.1f}",
        ]
        for entry in summaries
    ]
    report.print_table("Finding induction heads: precision, recall, F1 on hand-built models", columns, rows)
    print(
        f"{', '.join(map(str, lengths))}: F1 at that row length. pool: F1 of all decisions together.\n"
        "targ: F1 for heads that attend to the targets, whatever they write. mini: F1 on the bundled model.\n"
        "false: false positives per 1,000 decisions on models without induction "
        f"({summaries[0]['negative_decisions']} decisions)."
    )


def print_forming(judged: Sequence[Judged]) -> None:
    """What our detection finds in the checkpoints in which induction forms, beside the labels by intervention."""
    ours_there = [each for each in judged if each.subject.group == "forming" and each.method == OURS]
    rows = [
        [each.subject.name, str(each.length), listed(heads_of(each.decision.induction)), listed(each.subject.induction)]
        for each in ours_there
    ]
    columns = ["checkpoint", "row length", f"found ({OURS})", "by intervention"]
    report.print_table("While induction forms (not counted above)", columns, rows)


def heads_of(said: Bools) -> set[Head]:
    return {Head.at(*place) for place in np.argwhere(said)}


def listed(heads: Iterable[Head]) -> str:
    return " ".join(str(head) for head in sorted(heads)) or "none"


if __name__ == "__main__":
    sys.exit(main())
