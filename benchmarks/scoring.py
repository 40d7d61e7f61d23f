"""What does it cost to score every head of a model? Our scoring beside a bare forward pass and the usual ways.

    python -m benchmarks.scoring             # about 7 minutes on 2 CPU cores, 10 GB of memory
    python -m benchmarks.scoring --quick     # mini alone, few rows, once

Prints tables, writes every timing to outputs/benchmark_scoring/results.json and a picture beside it.

1. Models. One of GPT-2 small's size with random weights (what is computed does not matter to its cost), and `mini`.
2. Tokens. The battery's rows, half of them with a repeat and half their controls; the same ids for every way. Numbers
   of rows include the controls.
3. Ways, each in a process of its own:
   - base model: the Hugging Face model without unembedding, fused attention (sdpa): the least any scoring costs;
   - forward: the same with logits;
   - ours: `score` on repeats and on controls, all head types and the attention budget, rows drawn and cells found anew
     each time; and the same in bfloat16;
   - run_with_cache: TransformerLens caches all, then the target cells are read from each pattern;
   - detect_head: TransformerLens' detector, row by row, for its three head types, as its users call it;
   - diagonals: the way often written by hand, all patterns cached, then the mean of three of their diagonals.
4. Timing. Wall and processor time. All ways take turns, one at a time, `--repeats` times; medians are shown.
5. Memory. The peak of the process's resident memory while it runs, weights and libraries included, reset before each
   run where the system allows (Linux). On a GPU, the peak that torch allocated there.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, TypedDict, cast

import numpy as np
import torch

from common import UserError, cli
from common.attention import batches
from common.heads import scores
from common.heads.statistics import Floats, Ints
from common.heads.tokens import HEAD_TYPES, TokenBatch, battery
from common.loading import Model, load
from common.loading.find import MINI
from common.results import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from transformers import PreTrainedModel

PROGRAM = "benchmark_scoring"
OURS, HALF = "ours", "ours, bfloat16"
POINTS = ((1, 64), (1, 257), (1, 1024), (8, 257), (32, 257))  # rows, tokens per row
REFERENCE = (8, 257)  # what the targets are about
QUICK = ((2, 64), (8, 64))
ROWS_TAKEN = {"base model": 32, OURS: 32}  # how many rows each way is asked to take; 8 where not named
SEED = 0
MEBIBYTE = 1 << 20

Run = Callable[[Ints], object]  # of [rows, pos] ids
Timing = tuple[float, float, int, Floats | None]  # wall and processor seconds, bytes at the peak, and the scores


class Target(TypedDict):
    """What is asked of our scoring, what was measured, and whether that is enough."""

    what: str
    value: float
    wanted: str
    met: bool


@dataclass(frozen=True)
class Point:
    """One thing that was measured, `repeats` times: seconds, and bytes at the peak."""

    model: str
    device: str
    way: str
    rows: int
    length: int
    wall: list[float]
    cpu: list[float]
    peak: int

    @property
    def seconds(self) -> float:
        return median(self.wall)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit code as for the scripts."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="mini alone, few rows, once")
    parser.add_argument("--repeats", type=cli.positive, default=3, help="how often each is timed (default 3)")
    parser.add_argument("--out", type=Path, default=Path("outputs") / PROGRAM, metavar="DIR", help="output folder")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return cli.run(benchmark, parser.parse_args(argv), PROGRAM)


def benchmark(args: argparse.Namespace) -> None:
    """Every way on every model, device and number of tokens; tables to stdout, everything to files."""
    started = time.monotonic()
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    repeats, wanted = (1, QUICK) if args.quick else (args.repeats, POINTS)
    measured: list[Point] = []
    deviations: dict[str, dict[str, float]] = {}
    with files.output_folder(args.out) as folder, subjects(quick=args.quick) as named:
        for model, path in named.items():
            for device in devices:
                cli.say(f"{model} on {device}, {time.monotonic() - started:.0f} s")
                with workers(path, device) as ways:
                    measured += timed(ways, model, device, points(wanted, path), repeats)
                    deviations[f"{model} on {device}"] = deviation(ways, max(QUICK) if args.quick else REFERENCE)
        entries = [{**vars(point), "seconds": point.seconds} for point in measured]
        asked = targets(measured)
        results = {
            "command": "python -m benchmarks.scoring",
            "arguments": {"quick": args.quick, "repeats": repeats},
            "torch_threads": torch.get_num_threads(),
            "wall_seconds": round(time.monotonic() - started, 1),
            "targets": asked,
            "bfloat16": deviations,
            "points": entries,
            "files": ["results.json", "scoring.png"],
        }
        draw(measured, folder / "scoring.png")
        files.write_json(folder / "results.json", results)
    print_results(asked, deviations, measured)
    print(f"Every timing: {args.out / 'results.json'}; drawn: {args.out / 'scoring.png'}")


@contextmanager
def subjects(*, quick: bool) -> Iterator[dict[str, Path]]:
    """Folders of the models, by the name to show."""
    named = {"mini": MINI}
    with tempfile.TemporaryDirectory() as folder:
        if not quick:
            save_random_gpt2(Path(folder))
            named = {"GPT-2 small size": Path(folder), **named}
        yield named


def save_random_gpt2(folder: Path) -> None:
    """Random weights in the shape of GPT-2 small; the bundled tokenizer, since rows are drawn as ids."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(MINI)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.bos_token_id}
    # twice GPT-2's positions, because detect_head wants a context longer than its row
    GPT2LMHeadModel(GPT2Config(n_positions=2048, **special)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def points(wanted: Sequence[tuple[int, int]], path: Path) -> list[tuple[int, int]]:
    """The (rows, length) that the model's context allows."""
    from transformers import AutoConfig

    context = AutoConfig.from_pretrained(path).max_position_embeddings
    return [(rows, length) for rows, length in wanted if length <= context]


# --- the ways ---


def hugging_face(path: Path, device: str) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa").to(device).eval()


def base_model(path: Path, device: str) -> Run:
    model = hugging_face(path, device).base_model
    return lambda tokens: model(torch.from_numpy(tokens).to(device), use_cache=False)


def forward(path: Path, device: str) -> Run:
    model = hugging_face(path, device)
    return lambda tokens: model(torch.from_numpy(tokens).to(device), use_cache=False).logits


def ours(path: Path, device: str, dtype: str = "float32") -> Run:
    """The scores, [head types, layers, heads], on rows with a repeat."""
    model = load(str(path), device=device, dtype=dtype)

    def run(tokens: Ints) -> Floats:
        rows, length = tokens.shape
        at_once = batches.batch_size(model, length)
        if rows == 1:
            found = scores.score(model, TokenBatch.of(list(tokens), pad=model.bos), batch_size=at_once)
        else:
            drawn = battery(every_id(model), model.bos, rows=rows // 2, length=length, seed=SEED)
            found, _ = (scores.score(model, rows, batch_size=at_once) for rows in (drawn.repeats, drawn.controls))
        return np.stack([found.mean(kind) for kind in HEAD_TYPES])

    return run


def ours_in_bfloat16(path: Path, device: str) -> Run:
    return ours(path, device, dtype="bfloat16")


def run_with_cache(path: Path, device: str) -> Run:
    model = load(str(path), device=device)

    def run(tokens: Ints) -> None:
        _, cache = model.bridge.run_with_cache(torch.from_numpy(tokens).to(device))
        cells = TokenBatch.of(list(tokens), pad=model.bos).cells["prefix_matching"]
        for layer in range(model.n_layers):
            cache["pattern", layer][cells.row, :, cells.query, cells.key].sum(0)

    return run


def detect_head(path: Path, device: str) -> Run:
    from transformer_lens.head_detector import HEAD_NAMES
    from transformer_lens.head_detector import detect_head as detect

    model = load(str(path), device=device)
    model.bridge.to_tokens = lambda row: torch.from_numpy(row)[None]  # rows are ids, which no text would give back

    def run(tokens: Ints) -> None:
        for row in tokens:
            for kind in HEAD_NAMES:
                detect(model.bridge, row, kind)

    return run


def diagonals(path: Path, device: str) -> Run:
    model = load(str(path), device=device)

    def run(tokens: Ints) -> None:
        period = tokens.shape[1] // 2
        _, cache = model.bridge.run_with_cache(
            torch.from_numpy(tokens).to(device), names_filter=lambda name: name.endswith("hook_pattern")
        )
        for layer in range(model.n_layers):
            for offset in (-1, -period, 1 - period):
                cache["pattern", layer].diagonal(offset, -2, -1).mean((0, -1))

    return run


WAYS: dict[str, Callable[[Path, str], Run]] = {
    "base model": base_model,
    "forward": forward,
    OURS: ours,
    HALF: ours_in_bfloat16,
    "run_with_cache": run_with_cache,
    "diagonals": diagonals,
    "detect_head": detect_head,
}


def every_id(model: Model) -> Ints:
    """Ids of the model's whole vocabulary but BOS, whatever its tokenizer holds."""
    return np.setdiff1d(np.arange(model.bridge.cfg.d_vocab), [model.bos])


def drawn_tokens(vocabulary: int, bos: int, rows: int, length: int) -> Ints:
    """The ids of `rows` battery rows, [rows, pos]: those with a repeat, then their controls."""
    drawn = battery(np.setdiff1d(np.arange(vocabulary), [bos]), bos, rows=max(1, rows // 2), length=length, seed=SEED)
    return np.concatenate([drawn.repeats.tokens, drawn.controls.tokens])[:rows]


# --- one process for each way ---


@contextmanager
def workers(path: Path, device: str) -> Iterator[dict[str, Connection]]:
    """A process for each way, loaded and waiting for tokens; all end with the block."""
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        ways = {}
        for way in WAYS:
            near, far = context.Pipe()
            process = context.Process(target=serve, args=(way, path, device, far), daemon=True)
            process.start()
            far.close()
            stack.callback(stop, near, process)
            ways[way] = near
        for connection in ways.values():
            answer(connection)
        yield ways


def stop(connection: Connection, process: BaseProcess) -> None:
    """Let a process end."""
    with suppress(BrokenPipeError):
        connection.send(None)
    process.join()


def answer(connection: Connection) -> object:
    """What a process has to say; UserError where it ended instead."""
    try:
        return connection.recv()
    except EOFError:
        raise UserError("a way of scoring failed in its process (its own words are above)") from None


def serve(way: str, path: Path, device: str, asked: Connection) -> None:
    """Load, run once on a few tokens, then measure what is asked for until None comes."""
    from transformers import AutoConfig

    run = WAYS[way](path, device)
    config = AutoConfig.from_pretrained(path)
    with torch.inference_mode():
        run(drawn_tokens(config.vocab_size, config.bos_token_id, *QUICK[0]))
        asked.send("ready")
        while (wanted := asked.recv()) is not None:
            asked.send(timed_run(run, drawn_tokens(config.vocab_size, config.bos_token_id, *wanted), device))


def timed_run(run: Run, tokens: Ints, device: str) -> Timing:
    """Time and peak of a run, with its scores if the way gives any."""
    gc.collect()
    reset_peak(device)
    wall, cpu = time.perf_counter(), time.process_time()
    found = run(tokens)
    if device == "cuda":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return wall, cpu, peak(device), found if isinstance(found, np.ndarray) else None


def reset_peak(device: str) -> None:
    """Give free memory back to the system, and start its note of the peak anew."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM


def peak(device: str) -> int:
    """Bytes: on a GPU what torch allocated at most, else the most that was resident."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def ask(way: Connection, rows: int, length: int) -> Timing:
    way.send((rows, length))
    return cast(Timing, answer(way))


def timed(
    ways: Mapping[str, Connection], model: str, device: str, wanted: Sequence[tuple[int, int]], repeats: int
) -> list[Point]:
    """All ways in turn on each number of tokens, over and over; the peak is that of the first time."""
    found: dict[tuple[str, int, int], Point] = {}
    for _ in range(repeats):
        for rows, length in wanted:
            for way, connection in ways.items():
                if rows > ROWS_TAKEN.get(way, 8):
                    continue
                wall, cpu, at_peak, _ = ask(connection, rows, length)
                point = found.setdefault(
                    (way, rows, length), Point(model, device, way, rows, length, [], [], peak=at_peak)
                )
                point.wall.append(wall)
                point.cpu.append(cpu)
    return list(found.values())


def deviation(ways: Mapping[str, Connection], at: tuple[int, int]) -> dict[str, float]:
    """Largest and mean difference of the scores in bfloat16 from those in float32."""
    exact, half = (cast(Floats, ask(ways[way], *at)[-1]) for way in (OURS, HALF))  # both give their scores
    return {"largest": float(np.nanmax(abs(half - exact))), "mean": float(np.nanmean(abs(half - exact)))}


# --- what came out ---


def targets(measured: Sequence[Point]) -> list[Target]:
    """What is asked of our scoring, in ratios of one run, wherever its reference was measured on a CPU."""
    at = {point.way: point for point in measured if is_reference(point, "GPT-2 small size")}
    if not at:
        return []
    mine, bare = at[OURS], at["forward"]
    by_rows = {point.rows: point for point in measured if point.way == OURS and point.length == REFERENCE[1]
               and point.model == mine.model and point.device == "cpu"}  # fmt: skip
    few, many = by_rows[REFERENCE[0]], by_rows[max(by_rows)]
    asked = [
        ("time, ours / base model", mine.seconds / at["base model"].seconds, "at most", 1.10),
        ("time, ours / forward with logits", mine.seconds / bare.seconds, "at most", 0.75),
        ("time, detect_head / ours", at["detect_head"].seconds / mine.seconds, "at least", 5.0),
        ("peak memory, ours / forward with logits", mine.peak / bare.peak, "at most", 1.1),
        (f"time per row, {many.rows} rows / {few.rows} rows",
         many.seconds / many.rows / (few.seconds / few.rows), "at most", 1.1),
        (f"peak memory, {many.rows} rows / {few.rows} rows", many.peak / few.peak, "at most", 1.1),
    ]  # fmt: skip
    return [
        {"what": what, "value": value, "wanted": f"{side} {limit}", "met": (value <= limit) == (side == "at most")}
        for what, value, side, limit in asked
    ]


def is_reference(point: Point, model: str, device: str = "cpu") -> bool:
    return (point.model, point.device) == (model, device) and (point.rows, point.length) == REFERENCE


def print_results(
    asked: Sequence[Target], deviations: Mapping[str, dict[str, float]], measured: Sequence[Point]
) -> None:
    """The tables for people."""
    names = dict.fromkeys(point.model for point in measured)
    for model in names:
        print_ways(model, measured)
        print_ratios(model, measured)
    if asked:
        rows = [[t["what"], f"{t['value']:.2f}", t["wanted"], "yes" if t["met"] else "NO"] for t in asked]
        cli.print_table("Targets, on the model of GPT-2 small's size", ["what", "measured", "wanted", "met"], rows)
    rows = [[where, f"{by['largest']:.4f}", f"{by['mean']:.4f}"] for where, by in deviations.items()]
    cli.print_table("Scores in bfloat16 against float32 (scores lie in [0, 1])", ["model", "largest", "mean"], rows)


def print_ways(model: str, measured: Sequence[Point]) -> None:
    """Time and memory of each way on the reference's tokens, or the most that were measured for all ways."""
    here = [point for point in measured if point.model == model]
    tokens = REFERENCE if any(is_reference(point, model) for point in here) else max((p.rows, p.length) for p in here)
    at = {(point.device, point.way): point for point in here if (point.rows, point.length) == tokens}
    rows = []
    for way in WAYS:
        if not (point := at.get(("cpu", way))):
            continue
        base = at["cpu", "base model"]
        gpu = at.get(("cuda", way))
        rows.append([
            way, f"{point.seconds:.3f}", f"{median(point.cpu):.3f}", f"{point.seconds / base.seconds:.2f}",
            f"{point.peak / MEBIBYTE:.0f}", f"{point.peak / base.peak:.2f}",
            f"{1000 * gpu.seconds:.1f}" if gpu else "-", f"{gpu.peak / MEBIBYTE:.0f}" if gpu else "-",
        ])  # fmt: skip
    columns = ["way", "seconds", "CPU s", "x base", "peak MiB", "x base", "GPU ms", "GPU MiB"]
    cli.print_table(f"{model}: {tokens[0]} rows of {tokens[1]} tokens, controls included", columns, rows)


def print_ratios(model: str, measured: Sequence[Point]) -> None:
    """Seconds of every way at every number of tokens."""
    here = {(p.way, p.rows, p.length): p for p in measured if p.model == model and p.device == "cpu"}
    places = list(dict.fromkeys((rows, length) for _, rows, length in here))
    rows = [
        [way, *(f"{here[(way, *place)].seconds:.3f}" if (way, *place) in here else "-" for place in places)]
        for way in WAYS
    ]
    columns = ["way", *(f"{rows} x {length}" for rows, length in places)]
    cli.print_table(f"{model}: seconds, by rows x tokens", columns, rows)


def draw(measured: Sequence[Point], path: Path) -> None:
    """Time and peak memory on a CPU against the length of a row, and against the number of rows."""
    import matplotlib.pyplot as plt

    model = measured[0].model
    here = [point for point in measured if (point.model, point.device) == (model, "cpu")]
    fewest, usual = min(point.rows for point in here), max(point.length for point in here if point.rows > 1)
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharex="col", layout="constrained")
    for column, (across, kept, value) in enumerate((("length", "rows", fewest), ("rows", "length", usual))):
        lines = [point for point in here if getattr(point, kept) == value]
        draw_lines(axes[0, column], lines, across, lambda point: point.seconds)
        axes[0, column].set(yscale="log")
        axes[0, column].yaxis.set_major_formatter("{x:g}")
        draw_lines(axes[1, column], lines, across, lambda point: point.peak / MEBIBYTE)
        axes[1, column].set_ylim(bottom=0)
        what = "row" if value == 1 else "rows" if kept == "rows" else "tokens per row"
        axes[0, column].set_title(f"{value} {what}", fontsize=10)
    axes[0, 0].set_ylabel("seconds (median)")
    axes[1, 0].set_ylabel("peak memory, MiB")
    axes[1, 0].set_xlabel("tokens per row")
    axes[1, 1].set_xlabel("rows, controls included")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.suptitle(f"Scoring all heads of a model: {model}, CPU")
    figure.savefig(path, dpi=120, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def draw_lines(axes: Axes, lines: Sequence[Point], across: str, value: Callable[[Point], float]) -> None:
    """A line per way, along a logarithmic axis."""
    for way, colour, marker in zip(WAYS, COLOURS, "so^v*DP", strict=False):
        mine = sorted((point for point in lines if point.way == way), key=lambda point: getattr(point, across))
        x = [getattr(point, across) for point in mine]
        axes.plot(x, [value(point) for point in mine], color=colour, marker=marker, markersize=5, label=way)
    axes.set(xscale="log")
    ticks = sorted({getattr(point, across) for point in lines})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.minorticks_off()
    axes.grid(color="0.92")
    axes.set_axisbelow(True)


COLOURS = ("black", "0.55", "#D55E00", "#E69F00", "#0072B2", "#56B4E9", "#009E73")  # Okabe and Ito's palette


if __name__ == "__main__":
    sys.exit(main())
