"""Time a mean-ablation sweep over all heads: one `run_with_hooks` forward per head against our `sweep`.

    python -m benchmarks.interventions                 # GPT-2 small's size, random weights, a few minutes on 2 cores
    python -m benchmarks.interventions --quick         # a tiny model, seconds: does it still run, do both agree

Both ways read the same thing, the log-probability of the right token at repeats, and must agree. They are run in turn,
`--rounds` times, in one process. The plain way is timed on a sample of heads, every layer alike (each of its forwards
costs the same), and scaled to all heads; the sweep is timed whole. Prints JSON: seconds of each round, medians, ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence

import numpy as np
import torch

from common.heads.tokens import battery, continuing
from common.interventions import interventions
from common.interventions.bench import Bench, Reads, sweep
from common.interventions.edits import Head, Intervention, Recordings, hooks_of
from common.loading import models

SMALL = {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257, "n_positions": 1024}
TINY = {"n_layer": 3, "n_head": 4, "n_embd": 64, "vocab_size": 2048, "n_positions": 128}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of both ways (default 3)")
    parser.add_argument("--rows", type=int, default=8, help="rows with a repeat (default 8)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row, BOS included (default 128)")
    parser.add_argument("--sampled", type=int, default=1, help="heads per layer timed the plain way (default 1)")
    args = parser.parse_args(argv)
    size, rounds = (TINY, 1) if args.quick else (SMALL, args.rounds)
    print(json.dumps(compare(random_model(size), rounds, args.rows, args.length, args.sampled), indent=1))
    return 0


def random_model(size: dict[str, int]) -> models.Model:
    """A randomly initialised GPT-2 of that size, loaded as any model is, with the bundled tokenizer."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        AutoTokenizer.from_pretrained(models.MINI).save_pretrained(folder)
        GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
        return models.load(folder)


def compare(model: models.Model, rounds: int, rows: int, length: int, sampled: int) -> dict[str, object]:
    """Seconds of both ways, round by round, and the largest difference between their results in nats."""
    batch = battery(model.ordinary(), model.bos, rows=rows, length=length, seed=0).repeats
    reads = Reads.of(batch.tokens, continuing(batch))
    classes = interventions.position_classes(batch)
    clean = Recordings(model, batch.tokens, batch_size=rows)
    heads = [(layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]
    ablations = {head: interventions.mean([head], clean, classes, classes) for head in heads}
    sample = [head for head in heads if head[1] < sampled]
    seconds: dict[str, list[float]] = {"run_with_hooks": [], "sweep": []}
    for _ in range(rounds):
        started = time.perf_counter()
        plain = {head: plainly(model, batch.tokens, reads, ablations[head]) for head in sample}
        seconds["run_with_hooks"].append((time.perf_counter() - started) * len(heads) / len(sample))
        started = time.perf_counter()
        swept = sweep_all(model, batch.tokens, reads, list(ablations.values()))
        seconds["sweep"].append(time.perf_counter() - started)
    medians = {way: statistics.median(each) for way, each in seconds.items()}
    return {
        "model": {"layers": model.n_layers, "heads": model.n_heads, "d_model": model.bridge.cfg.d_model},
        "rows": rows, "length": length, "reads": len(reads.row), "threads": torch.get_num_threads(),
        "seconds": seconds, "median_seconds": medians, "times_as_fast": medians["run_with_hooks"] / medians["sweep"],
        "largest_difference": max(float(np.abs(plain[head] - swept[head]).max()) for head in sample),
    }  # fmt: skip


def plainly(model: models.Model, tokens: np.ndarray, reads: Reads, ablation: Intervention) -> np.ndarray:
    """One whole forward pass, all logits, then the reads."""
    with torch.no_grad():
        logits = model.bridge.run_with_hooks(torch.from_numpy(tokens), fwd_hooks=hooks_of(ablation))
        log_probs = logits[reads.row, reads.position].log_softmax(-1)
    return log_probs[np.arange(len(reads.row)), reads.token].double().numpy()


def sweep_all(
    model: models.Model, tokens: np.ndarray, reads: Reads, ablations: list[Intervention]
) -> dict[Head, np.ndarray]:
    """The same through the sweep, its preparation included."""
    bench = Bench(model, tokens, reads, batch_size=len(tokens))
    return {ablation.heads[0]: found["log_prob"] for ablation, found in sweep(bench, ablations)}


if __name__ == "__main__":
    sys.exit(main())
