"""Compile RASP programs with Tracr, and write what it made as plain arrays. Runs in Tracr's environment.

    python -m venv TRACR && TRACR/bin/pip install -r benchmarks/tracr/requirements.txt
    TRACR/bin/python benchmarks/tracr/compile.py            # 3 to 7 minutes; writes benchmarks/tracr/compiled

Tracr (Lindner et al. 2023, arXiv 2301.05062) turns a RASP program (Weiss et al. 2021, arXiv 2106.06981) into the
weights of a transformer, one selector to a head. Nobody here decides how a head does what its selector says. This file
imports nothing of the project; `python -m benchmarks.tracr` takes over from the arrays.

1. Programs. `PROGRAMS`: some with induction in several formulations, others with its near relatives, others with both.
   What a selector selects is its name: one that selects the tokens after earlier copies of the current token is called
   `induction`, or `induction-` and how it is done. `predicts` names the sequences whose token is what the program puts
   out: a head that attends to its targets and fills one of those raises the token that it attends to.
2. Compile. With causal attention and Tracr's own BOS. What Tracr refuses is written down with its reason.
3. Heads. A head is known by where it writes: Tracr gives each sequence of a program directions of its own in the
   residual stream, so the labels of the rows of W_O that are not zero name the sequence, and that names the selector.
4. Witness. RASP's own interpreter, which has no weights, runs the program on rows with a repeat and on rows without:
   the share of its selection that a selector puts on the targets must agree with its name. How often what the program
   puts out continues the repeat is written down (`predicted`), of the interpreter and of the compiled model.
5. Reference. What the compiled model itself, run by Tracr, attends to and puts out on a row with a repeat and on a
   random row.

Writes one NAME.npz per program (weights as places and values, most are zero) and programs.json.
"""

from __future__ import annotations

import argparse
import json
import operator
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tracr.compiler import compiling
from tracr.compiler.assemble import AssembledTransformerModel
from tracr.rasp import causal_eval, rasp

COMPILED = Path(__file__).parent / "compiled"
BOS = "compiler_bos"
APPLIED = 4  # rows that the compiled model runs beside the interpreter
REFERENCE = 64  # tokens of a reference row at most: patterns take most of the room
DECIMALS = 6  # of the reference: what it is compared with is off by more
WITNESS_CELLS = 100_000  # of all selectors' rows together: the interpreter takes a second for as many
LEAST_SHARE = 0.05  # of a selection on the targets, above the control, in what is called induction; less elsewhere
tokens, indices = rasp.tokens, rasp.indices
Values = Callable[[Any, Any], bool]  # of a key and a query: tokens, places, or pairs of them


@dataclass(frozen=True)
class Program:
    """A RASP program over `vocabulary` tokens and `context` places, BOS not counted in either.

    `write(vocabulary)` gives the sequence that the program puts out. `predicts`: sequences whose token it puts out.
    `number_of`: the token that the number of a program that puts out a number is about; its logit is that number.
    `exactness`: how steep the steps of Tracr's MLPs of numbers are; 100 is Tracr's default, and multiplies rounding.
    """

    name: str
    about: str
    vocabulary: int
    context: int
    write: Callable[[int], rasp.SOp]
    predicts: tuple[str, ...] = ()
    number_of: int | None = None
    exactness: int = 100


# --- the programs ---


def select(kind: str, keys: rasp.SOp, queries: rasp.SOp, chosen: Values = operator.eq) -> rasp.Selector:
    """The keys that are `chosen` for a query. What has no value (the token before the first) selects nothing."""

    def predicate(key: object, query: object) -> bool:
        return key is not None and query is not None and chosen(key, query)

    return rasp.Select(keys, queries, predicate).named(kind)


def back(offset: int, sequence: rasp.SOp, name: str) -> rasp.SOp:
    """The value of `sequence` that stands `offset` places back."""
    kind = "previous" if offset == 1 else f"offset-{offset}"
    return rasp.Aggregate(select(kind, indices, indices, lambda k, q: k == q - offset), sequence).named(name)


def continuation(name: str = "continuation") -> rasp.SOp:
    """The token after earlier copies of this one: it is there where the token before it is this one."""
    return rasp.Aggregate(select("induction", back(1, tokens, "before"), tokens), tokens).named(name)


def earlier_copy() -> rasp.SOp:
    """Where the earlier copy of the current token stands. Needs tokens and places in pairs: Tracr has no `and`."""
    pair = rasp.SequenceMap(lambda token, place: (token, place), tokens, indices).named("token-and-place")
    earlier = select("copies", pair, pair, lambda k, q: k[0] == q[0] and k[1] < q[1])
    return rasp.Aggregate(earlier, indices).named("where")


def beside_copy(offset: int, kind: str, name: str) -> rasp.SOp:
    """The token that stands `offset` places after the earlier copy, found by its place."""
    return rasp.Aggregate(select(kind, indices, earlier_copy(), lambda k, q: k == q + offset), tokens).named(name)


def two_tokens(vocabulary: int) -> rasp.SOp:
    """As `continuation`, where the token before this one must match too."""
    before, second = back(1, tokens, "before"), back(2, tokens, "second-before")
    there = rasp.SequenceMap(lambda a, b: (a, b), before, second).named("two-there")
    here = rasp.SequenceMap(lambda a, b: (a, b), tokens, before).named("two-here")
    return rasp.Aggregate(select("induction-two-tokens", there, here), tokens).named("continuation")


def by_class(classes: int, kind: str) -> rasp.SOp:
    """The mean of the tokens after earlier tokens of the same class, of so many classes."""
    same = select(kind, back(1, tokens, "before"), tokens, lambda k, q: k % classes == q % classes)
    return rasp.Aggregate(same, tokens).named("continuation")


def fraction_after() -> rasp.SOp:
    """Of the tokens after earlier copies of this one, the share that is token 0: a mean over all matches."""
    after = select("induction", back(1, tokens, "before"), tokens)
    is_zero = rasp.numerical(rasp.Map(lambda token: token == 0, tokens)).named("is-zero")
    return rasp.numerical(rasp.Aggregate(after, is_zero, default=0)).named("fraction-after")


def fraction_so_far() -> rasp.SOp:
    """The share of token 0 in all that came so far."""
    is_zero = rasp.numerical(rasp.Map(lambda token: token == 0, tokens)).named("is-zero-at-all")
    all_before = select("all", indices, indices, operator.le)
    return rasp.numerical(rasp.Aggregate(all_before, is_zero, default=0)).named("fraction-so-far")


def less_after(vocabulary: int) -> rasp.SOp:
    """Token 0 the less, the more often it came after this one: what is attended to is lowered."""
    return rasp.numerical(rasp.LinearSequenceMap(fraction_so_far(), fraction_after(), 1, -1)).named("less-after")


def through_number(vocabulary: int) -> rasp.SOp:
    """`continuation` made a number, and the number made a token again: an MLP of steps stands in between."""
    number = rasp.numerical(rasp.Map(lambda token: token + 1, continuation())).named("number")
    # Unless told not to, RASP makes one map of two, and no number would be left.
    return rasp.categorical(rasp.Map(lambda value: value - 1, number, simplify=False)).named("token-again")


def moved(vocabulary: int) -> rasp.SOp:
    """`continuation`, carried to the output by a second head at the same place."""
    return rasp.Aggregate(select("itself", indices, indices), continuation()).named("moved")


def with_flags(sequence: rasp.SOp, flags: list[rasp.SOp], name: str) -> rasp.SOp:
    """`sequence`, where every one of `flags` has a value: so heads that decide nothing are compiled too."""
    for number, flag in enumerate(flags):
        sequence = rasp.SequenceMap(lambda token, flag: token, sequence, flag).named(f"{name}-{number}")
    return sequence


def flag(selector: rasp.Selector, vocabulary: int, name: str) -> rasp.SOp:
    """Whether the tokens selected are of the lower half of the vocabulary."""
    low = rasp.Map(lambda token: token < vocabulary // 2, tokens).named(f"low-{name}")
    return rasp.Aggregate(selector, low).named(name)


def among_decoys(vocabulary: int) -> rasp.SOp:
    """`continuation` beside heads that look at copies, three places back, at the first token and at all."""
    decoys = {
        "copies": select("copies-and-itself", tokens, tokens),
        "three": select("offset-3", indices, indices, lambda k, q: k == q - 3),
        "first": select("first", indices, indices, lambda k, q: k == 0),
        "all": select("all", indices, indices, lambda k, q: True),
    }
    flags = [flag(selector, vocabulary, name) for name, selector in decoys.items()]
    return with_flags(continuation(), flags, "among")


def late_decoys(vocabulary: int) -> rasp.SOp:
    """`continuation` beside heads of its own layer that read the same: one too far, before copies, two tokens back."""
    before = back(1, tokens, "before-too")
    second = back(2, tokens, "second")
    far = flag(select("one-too-far", second, tokens), vocabulary, "far")
    ahead = flag(select("before-copies", tokens, before), vocabulary, "ahead")
    alike = flag(select("same-before", before, before), vocabulary, "alike")
    either = rasp.SequenceMap(lambda a, b: a or b, far, ahead).named("either")
    both = rasp.SequenceMap(lambda a, b: a or b, either, alike).named("all-three")
    unseen = rasp.Map(lambda token: token, continuation()).named("seen")
    return rasp.SequenceMap(lambda token, flag: token, unseen, both).named("among")


def twice(vocabulary: int) -> rasp.SOp:
    """`continuation` in both formulations, put out where they agree."""
    by_place = beside_copy(1, "induction-by-place", "by-place")
    return rasp.SequenceMap(lambda a, b: a if a == b else None, continuation("by-content"), by_place).named("agreed")


def seen_twice(vocabulary: int) -> rasp.SOp:
    """Whether this token came before."""
    width = rasp.SelectorWidth(select("copies-and-itself", tokens, tokens)).named("count")
    return rasp.Map(lambda count: count > 1, width).named("seen-before")


def backwards(vocabulary: int) -> rasp.SOp:
    """The tokens so far in reverse order: with causal attention, the first token everywhere."""
    length = rasp.SelectorWidth(select("all", tokens, tokens, lambda k, q: True)).named("length")
    opposite = rasp.SequenceMap(lambda n, i: n - 1 - i, length, indices).named("opposite")
    return rasp.Aggregate(select("opposite-place", indices, opposite), tokens).named("backwards")


def sorted_tokens(vocabulary: int) -> rasp.SOp:
    """At each place the token whose rank among the tokens before it is that place."""
    rank = rasp.SelectorWidth(select("smaller", tokens, tokens, operator.lt)).named("rank")
    return rasp.Aggregate(select("rank-is-place", rank, indices), tokens).named("sorted")


def selectors_joined(vocabulary: int) -> rasp.SOp:
    """`earlier_copy` with RASP's own `and`, which RASP has and Tracr does not compile."""
    earlier = select("same", tokens, tokens) & select("earlier", indices, indices, operator.lt)
    where = rasp.Aggregate(earlier.named("copies"), indices).named("where")
    after = select("induction-by-place", indices, where, lambda k, q: k == q + 1)
    return rasp.Aggregate(after, tokens).named("continuation")


def mean_after(vocabulary: int) -> rasp.SOp:
    """The mean of the tokens after earlier copies, as numbers: RASP has it, Tracr takes the mean of 0 and 1 alone."""
    after = select("induction", back(1, tokens, "before"), tokens)
    number = rasp.numerical(rasp.Map(lambda token: token, tokens)).named("number")
    return rasp.numerical(rasp.Aggregate(after, number, default=0)).named("mean-after")


def copied(selector: rasp.Selector, name: str = "copied") -> rasp.SOp:
    return rasp.Aggregate(selector, tokens).named(name)


def shifted_on(vocabulary: int) -> rasp.SOp:
    """`continuation`, but the next token of the vocabulary is put out: right place, wrong token."""
    return rasp.Map(lambda token: (token + 1) % vocabulary, continuation()).named("shifted-on")


def written(sequence: rasp.SOp) -> Callable[[int], rasp.SOp]:
    """A program that is the same for every vocabulary."""
    return lambda vocabulary: sequence


CONTINUATION = ("continuation",)
PROGRAMS = [
    # Induction. A longer context makes Tracr's keys longer and its attention softer.
    *(
        Program(f"induction-{vocabulary}-{context}", "the token after earlier copies", vocabulary, context,
                written(continuation()), CONTINUATION)
        for vocabulary, context in ((8, 16), (24, 32), (64, 128), (32, 256), (32, 512), (32, 1024))
    ),
    Program("by-place", "the place of the copy, then the place after it", 12, 16,
            written(beside_copy(1, "induction-by-place", "continuation")), CONTINUATION),
    Program("two-tokens", "two tokens must match", 12, 32, two_tokens, CONTINUATION),
    *(
        Program(f"by-class-{classes}", "tokens of one class match: many matches", 24, 32,
                written(by_class(classes, "induction-by-class")), CONTINUATION)
        for classes in (6, 3, 2)
    ),
    Program("fraction-after", "a mean over all matches, a number", 16, 48,
            written(fraction_after()), ("fraction-after",), number_of=0),
    Program("twice", "induction in two ways that must agree", 8, 12, twice, ("by-content", "by-place")),
    Program("moved", "induction, moved by a later head", 32, 48, moved, CONTINUATION),
    Program("through-number", "induction, through an MLP of steps", 8, 16, through_number, CONTINUATION, exactness=10),
    Program("among-decoys", "induction, four decoys in its layer", 16, 32, among_decoys, CONTINUATION),
    Program("late-decoys", "induction, three decoys that read the same", 24, 32, late_decoys, CONTINUATION),
    # Attends as induction does, and does not raise the token that it sees.
    Program("shifted-on", "puts out the next token of the vocabulary", 24, 32, shifted_on),
    Program("less-after", "lowers what it sees", 16, 48, less_after, number_of=0),
    Program("flag-after", "puts out whether the token is low", 32, 48,
            lambda vocabulary: flag(select("induction", back(1, tokens, "before"), tokens), vocabulary, "flag-after")),
    # No induction.
    Program("before-place", "the place of the copy, then the place before it", 12, 16,
            written(beside_copy(-1, "before-copies", "copied"))),
    Program("one-too-far", "the second token after earlier copies", 24, 48,
            written(copied(select("one-too-far", back(2, tokens, "second-before"), tokens)))),
    Program("before-copies", "the token before earlier copies", 32, 48,
            written(copied(select("before-copies", tokens, back(1, tokens, "before"))))),
    Program("copies", "earlier copies and the token itself", 48, 64,
            written(copied(select("copies-and-itself", tokens, tokens)))),
    Program("seen-twice", "whether the token came before", 16, 24, seen_twice),
    Program("histogram", "how often the token came", 8, 16,
            written(rasp.SelectorWidth(select("copies-and-itself", tokens, tokens)).named("count"))),
    Program("previous", "the token before", 32, 64, written(back(1, tokens, "before"))),
    Program("offsets", "three places back, then seven more", 64, 64,
            written(back(7, back(3, tokens, "third"), "tenth"))),
    Program("first", "the first token", 32, 48,
            written(copied(select("first", indices, indices, lambda k, q: k == 0)))),
    Program("nothing", "nothing is selected, which leaves BOS", 16, 32,
            written(copied(select("nothing", tokens, tokens, lambda k, q: False)))),
    Program("fraction-so-far", "share of token 0 so far", 16, 32, written(fraction_so_far()), number_of=0),
    Program("backwards", "reverse", 8, 12, backwards, exactness=10),
    Program("sorted", "sort", 12, 12, sorted_tokens, exactness=10),
    # What does not get all the way.
    Program("sorted-exactly", "sort, with Tracr's steepest steps", 12, 12, sorted_tokens),
    Program("selectors-joined", "RASP's own `and` of two selectors", 12, 16, selectors_joined, CONTINUATION),
    Program("mean-after", "the mean of tokens as numbers over all matches", 8, 16, mean_after),
]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Compile the programs; 0 if every one that Tracr took says what its names say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=COMPILED, metavar="DIR", help="output folder (default %(default)s)")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="these programs alone; programs.json then holds no others"
    )
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    entries = []
    for program in PROGRAMS:
        if args.only is None or program.name in args.only:
            started = time.monotonic()
            entries.append(compiled(program, args.out))
            said = entries[-1].get("refused") or f"{len(entries[-1]['heads'])} heads"
            print(f"{program.name}: {said}, {time.monotonic() - started:.0f} s", file=sys.stderr)
    names = ("tracr-pypi", "jax", "jaxlib", "dm-haiku", "numpy")
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    head = json.dumps({name: version(name) for name in names})
    # A program to a line, so that changes can be read.
    document = f'{{"versions": {head},\n"programs": [\n{lines}\n]}}\n'
    (args.out / "programs.json").write_text(document, encoding="utf-8")
    return 0


def compiled(program: Program, folder: Path) -> dict[str, object]:
    """What programs.json says of a program; its arrays go to `folder`."""
    about = {
        "name": program.name, "about": program.about, "vocabulary": program.vocabulary, "context": program.context,
        "number_of": program.number_of, "exactness": program.exactness,
    }  # fmt: skip
    sink = program.write(program.vocabulary)
    try:
        model = compiling.compile_rasp_to_model(
            sink, set(range(program.vocabulary)), program.context, causal=True, mlp_exactness=program.exactness
        )
    except (NotImplementedError, TypeError, ValueError) as error:
        reason = re.sub(r" object at 0x\w+", "", f"{type(error).__name__}: {error}")
        return about | {"refused": f"Tracr does not compile it: {reason}"}
    shares, predicted = witness(program, sink)
    rows = reference_rows(program)
    arrays = weights(model) | reference(model, sink, rows)
    arrays["labels"] = np.array([plain_label(label) for label in model.residual_labels])
    np.savez_compressed(folder / f"{program.name}.npz", **arrays)
    config = model.model_config
    return about | {
        "program": sorted({spelled_out(each) for each in expressions(sink)}),
        "layers": config.num_layers,
        "heads_per_layer": config.num_heads,
        "key_size": config.key_size,
        "hidden": config.mlp_hidden_size,
        "token_values": [str(value) for value in model.input_encoder.encoding_map],
        "output": plain_label(sink.label),
        "output_is": output_is(program, model, sink),
        "output_values": [str(value) for value in output_values(model, sink)],
        "predicted": {"interpreter": predicted, "compiled": compiled_predicts(program, model)},
        "heads": [entry | {"selected_on_targets": shares[entry["selector"]]} for entry in heads(program, model, sink)],
    }


# --- what the heads are ---


def expressions(sink: rasp.RASPExpr) -> Iterator[rasp.RASPExpr]:
    """Every expression of a program, each once."""
    waiting, seen = [sink], set()
    while waiting:
        each = waiting.pop()
        if each.label not in seen:
            seen.add(each.label)
            waiting += each.children
            yield each


def spelled_out(each: rasp.RASPExpr) -> str:
    """`continuation = Aggregate(induction, tokens)`."""
    return f"{each.name} = {type(each).__name__}({', '.join(child.name for child in each.children)})"


def aggregates(sink: rasp.SOp) -> dict[str, rasp.RASPExpr]:
    """The expressions that become heads, by the name of the residual directions that they write to."""
    found = {each.label: each for each in expressions(sink) if isinstance(each, rasp.Aggregate)}
    widths = [each for each in expressions(sink) if isinstance(each, rasp.SelectorWidth)]
    return found | {f"{each.label}_selector_width_attn_output": each for each in widths}


def heads(program: Program, model: AssembledTransformerModel, sink: rasp.SOp) -> list[dict[str, object]]:
    """Which head is which selector, by the residual directions that its W_O writes to; heads that Tracr left empty have
    the selector "none"."""
    by_name = aggregates(sink)
    entries = []
    for layer in range(model.model_config.num_layers):
        out = np.asarray(model.params[f"transformer/layer_{layer}/attn/linear"]["w"])
        for head, rows in enumerate(np.split(out, model.model_config.num_heads)):
            names = {model.residual_labels[at].split(":")[0] for at in np.flatnonzero(rows.any(0))}
            if len(names) > 1:
                raise ValueError(f"head {layer}.{head} of {program.name} writes to {sorted(names)}")
            each = by_name.pop(names.pop()) if names else None
            selector, writes = (each.selector.name, each.name) if each else ("none", "nothing")
            attends = selector.startswith("induction")
            entries.append({
                "layer": layer, "head": head, "selector": selector, "writes": writes, "attends": attends,
                "induction": attends and writes in program.predicts,
            })  # fmt: skip
    if by_name:
        raise ValueError(f"{program.name}: no head writes {sorted(by_name)}")
    return entries


def witness(program: Program, sink: rasp.SOp) -> tuple[dict[str, float], float]:
    """By RASP's interpreter: per selector, the share of its selection on the targets in rows with a repeat, less the
    same in control rows; and how often what the program puts out continues the repeat.

    Raises ValueError where the two do not agree with the program's names.
    """
    rng = np.random.default_rng(0)
    selectors = {each.selector.name: each.selector for each in aggregates(sink).values()}
    shares = {"none": 0.0} | dict.fromkeys(selectors, 0.0)
    right = asked = 0
    n_rows = max(20, WITNESS_CELLS // min(program.vocabulary, program.context) ** 2)
    for _ in range(n_rows):
        repeat, control, size, again = witness_row(rng, program)
        queries = np.arange(again, again + size - 1)  # those whose next token the repeat foretells
        targets = queries - again + 1
        for name, selector in selectors.items():
            for row, sign in ((repeat, 1), (control, -1)):
                cells = np.array(causal_eval.evaluate(selector, row), dtype=float)[queries]
                on_targets = cells[np.arange(len(queries)), targets] / np.maximum(cells.sum(1), 1)
                shares[name] += sign * float(on_targets.mean()) / n_rows
        said = causal_eval.evaluate(sink, repeat)
        right += sum(said[query] == repeat[query + 1] for query in queries)
        asked += len(queries)
    for name, share in shares.items():
        if (share >= LEAST_SHARE) != name.startswith("induction"):
            raise ValueError(f"{program.name}: the selector {name!r} has a share of {share:.3f} on the targets")
    return {name: round(share, 4) for name, share in shares.items()}, round(right / asked, 4)


def witness_row(rng: np.random.Generator, program: Program) -> tuple[list[int], list[int], int, int]:
    """A row in which nothing repeats but one segment, its control, the segment's length, where it comes again."""
    length = min(program.vocabulary, program.context)
    size = int(rng.integers(3, length // 2 + 1))
    again = int(rng.integers(size, length - size + 1))
    control = rng.permutation(program.vocabulary)[:length]
    repeat = control.copy()
    repeat[again : again + size] = repeat[:size]
    return repeat.tolist(), control.tolist(), size, again


# --- arrays ---


def weights(model: AssembledTransformerModel) -> dict[str, np.ndarray]:
    """All weights one after the other, in the order of `shapes` [matrices, 2]: embeddings of tokens and of places, then
    per layer query, key, value, out, in and out of the MLP. `steps`: from each that is not zero to the next, `values`.
    Biases must be 0."""
    matrices = [model.params[name]["embeddings"] for name in ("token_embed", "pos_embed")]
    for layer in range(model.model_config.num_layers):
        for part in ("attn/query", "attn/key", "attn/value", "attn/linear", "mlp/linear_1", "mlp/linear_2"):
            given = model.params[f"transformer/layer_{layer}/{part}"]
            if np.asarray(given["b"]).any():
                raise ValueError(f"{part} of layer {layer} has a bias")
            matrices.append(given["w"])
    flat = np.concatenate([np.ravel(matrix) for matrix in matrices]).astype(np.float32)
    places = np.flatnonzero(flat)
    shapes = np.array([matrix.shape for matrix in matrices], np.int32)
    return {"shapes": shapes, "steps": np.diff(places, prepend=0).astype(np.int32), "values": flat[places]}


def compiled_predicts(program: Program, model: AssembledTransformerModel) -> float:
    """How often the compiled model, run by Tracr, puts out the token that continues the repeat, as the witness asks."""
    rng, right = np.random.default_rng(2), []
    for _ in range(APPLIED):
        repeat, _, size, again = witness_row(rng, program)
        said = model.apply([BOS, *repeat]).decoded[1:]
        right += [said[query] == repeat[query + 1] for query in range(again, again + size - 1)]
    return round(float(np.mean(right)), 4)


def reference_rows(program: Program) -> list[list[int]]:
    """A row with a repeat and one of random tokens, as long as the program takes or `REFERENCE`, BOS not counted."""
    rng = np.random.default_rng(1)
    half = min(program.context, REFERENCE) // 2
    segment = rng.integers(program.vocabulary, size=half)
    return [np.concatenate([segment, segment]).tolist(), rng.integers(program.vocabulary, size=2 * half).tolist()]


def reference(model: AssembledTransformerModel, sink: rasp.SOp, rows: list[list[int]]) -> dict[str, np.ndarray]:
    """The model's own run: `tokens` [rows, pos] ids, BOS first; `patterns` [rows, layers, heads, query, key];
    `output` [rows, pos, values], what is put out before any argmax."""
    directions = (
        [f"{sink.label}:{value}" for value in output_values(model, sink)] if rasp.is_categorical(sink) else [sink.label]
    )
    at = [model.residual_labels.index(direction) for direction in directions]
    ids, patterns, output = [], [], []
    for row in rows:
        given = [BOS, *row]
        ids.append(model.input_encoder.encode(given))
        run = model.apply(given)
        scores = np.stack([np.asarray(layer[0], dtype=np.float64) for layer in run.attn_logits])
        powers = np.exp(scores - scores.max(-1, keepdims=True))
        patterns.append(powers / powers.sum(-1, keepdims=True))
        output.append(np.asarray(run.transformer_output)[0][:, at])
    stored = {"patterns": np.round(patterns, DECIMALS), "output": np.round(output, DECIMALS)}
    return {"tokens": np.array(ids, np.int32)} | {name: array.astype(np.float32) for name, array in stored.items()}


def output_values(model: AssembledTransformerModel, sink: rasp.SOp) -> list[rasp.Value]:
    """What a categorical program can put out, in the order of its directions; of a number, nothing."""
    return list(model.output_encoder.encoding_map) if rasp.is_categorical(sink) else []


def output_is(program: Program, model: AssembledTransformerModel, sink: rasp.SOp) -> str:
    """Tokens of the vocabulary, other values (counts, true and false), or a number."""
    if rasp.is_numerical(sink):
        return "number"
    whole = all(type(value) is int and value < program.vocabulary for value in output_values(model, sink))
    return "tokens" if whole and not isinstance(sink, rasp.SelectorWidth) else "values"


def plain_label(label: str) -> str:
    """A label without Tracr's running number, which depends on what was compiled before."""
    name, _, value = label.partition(":")
    return re.sub(r"_\d+(?=$|_selector)", "", name) + (f":{value}" if value else "")


if __name__ == "__main__":
    sys.exit(main())
