"""Time a mean-ablation sweep over all heads: one `run_with_hooks` forward per head against our `sweep`.

    python -m benchmarks.interventions                 # GPT-2 small's size, random weights, a few minutes on 2 cores
    python -m benchmarks.interventions --quick         # a tiny model, seconds: does it still run, do both agree

Both ways read the same thing, the log-probability of the right token at repeats, and must agree. The plain way is what
a user of TransformerLens would write: a hook at `hook_z` that puts the head's mean there. They are run in turn,
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
from torch import Tensor

from common.attention.head import Head
from common.heads.statistics import Floats, Ints
from common.heads.tokens import battery, continuing
from common.interventions.edits import Intervention, Recordings, mean, position_classes
from common.interventions.runner import Predictions, Runner, sweep
from common.loading import Model, load
from common.loading.find import MINI

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


def random_model(size: dict[str, int]) -> Model:
    """A randomly initialised GPT-2 of that size, loaded as any model is, with the bundled tokenizer."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        AutoTokenizer.from_pretrained(MINI).save_pretrained(folder)
        GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
        return load(folder)


def compare(model: Model, rounds: int, rows: int, length: int, sampled: int) -> dict[str, object]:
    """Seconds of both ways, round by round, and the largest difference between their results in nats."""
    batch = battery(model.ordinary(), model.bos, rows=rows, length=length, seed=0).repeats
    predictions = Predictions.of(batch.tokens, continuing(batch))
    classes = position_classes(batch)
    clean = Recordings(model, batch.tokens, batch_size=rows)
    heads = [Head.at(layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]
    ablations = {head: mean([head], clean, classes) for head in heads}
    sample = [head for head in heads if head.head < sampled]
    seconds: dict[str, list[float]] = {"run_with_hooks": [], "sweep": []}
    for _ in range(rounds):
        started = time.perf_counter()
        plain = {head: plainly(model, batch.tokens, predictions, ablations[head]) for head in sample}
        seconds["run_with_hooks"].append((time.perf_counter() - started) * len(heads) / len(sample))
        started = time.perf_counter()
        swept = sweep_all(model, batch.tokens, predictions, list(ablations.values()))
        seconds["sweep"].append(time.perf_counter() - started)
    medians = {way: statistics.median(each) for way, each in seconds.items()}
    return {
        "model": {"layers": model.n_layers, "heads": model.n_heads, "d_model": model.d_model},
        "rows": rows, "length": length, "predictions": len(predictions.row), "threads": torch.get_num_threads(),
        "seconds": seconds, "median_seconds": medians, "times_as_fast": medians["run_with_hooks"] / medians["sweep"],
        "largest_difference": max(float(np.abs(plain[head] - swept[head]).max()) for head in sample),
    }  # fmt: skip


def plainly(model: Model, tokens: Ints, predictions: Predictions, ablation: Intervention) -> Floats:
    """One whole forward pass, all logits, then the predictions."""
    (edit,) = ablation.edits

    def put(z: Tensor, hook: object) -> Tensor:
        z = z.clone()
        z[:, :, edit.head.head] = edit.change(z[:, :, edit.head.head], slice(None)).to(z)
        return z

    hooks = [(f"blocks.{edit.head.layer}.attn.hook_z", put)]
    with torch.no_grad():
        logits = model.bridge.run_with_hooks(torch.from_numpy(tokens), fwd_hooks=hooks)  # type: ignore[attr-defined]
        log_probs = logits[predictions.row, predictions.position].log_softmax(-1)
    return log_probs[np.arange(len(predictions.row)), predictions.token].double().numpy()


def sweep_all(
    model: Model, tokens: Ints, predictions: Predictions, ablations: list[Intervention]
) -> dict[Head, Floats]:
    """The same through the sweep, its preparation included."""
    runner = Runner(model, tokens, predictions, batch_size=len(tokens))
    return {ablation.heads[0]: found for ablation, found in sweep(runner, ablations)}


if __name__ == "__main__":
    sys.exit(main())
