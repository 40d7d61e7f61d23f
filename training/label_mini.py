"""Label a model's induction heads by intervention and write its labels.json. Never reads an attention score.

    python training/label_mini.py                        # models/mini/labels.json
    python training/label_mini.py --model FOLDER --out labels.json

On random rows with a repeat, "forbid" sets a head's attention to the targets of every query to 0 and renormalises the
row: the rest of the head stays. Two effects on the loss at tokens that continue the repeat, each with a 95 % bootstrap
interval over rows:

1. needed:     the loss rises when the cells of this head alone are forbidden;
2. sufficient: with the cells of all heads forbidden, the loss falls when this head's alone are allowed again. It shows
   heads that cover for each other, of which none is needed alone.

A head is labelled where the lower end of either interval is at least `LEAST` nats.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from numpy.typing import NDArray

from common import models
from common.detection import name
from common.sequences import TokenBatch, battery
from training.evaluate_mini import continuing, token_losses

LEAST = 0.05
ROWS, LENGTH = 64, 128
SEED = 30_000  # rows that neither training nor detection draws
RESAMPLES = 2000

Head = tuple[int, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini", help="mini or a folder (default mini)")
    parser.add_argument("--out", type=Path, default=models.MINI / "labels.json", help="where to write")
    args = parser.parse_args()
    model = models.load(args.model)
    rows = battery(model.ordinary(), model.bos, rows=ROWS, length=LENGTH, seed=SEED).repeats
    effects = measure(model, rows)
    labelled = [head for head, effect in effects.items() if max(effect["needed"][1], effect["sufficient"][1]) >= LEAST]
    content = {
        "source": f"causal: training/label_mini.py, {ROWS} rows of {LENGTH} tokens, at least {LEAST} nats",
        "induction_heads": labelled,
        "effects_in_nats_with_95_percent_intervals": effects,
    }
    args.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for head, effect in effects.items():
        print(head, effect, "induction" if head in labelled else "")


def measure(model: models.Model, rows: TokenBatch) -> dict[str, dict[str, list[float]]]:
    """Per head: [estimate, lower, upper] of both effects, in nats."""
    heads = [(layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]
    clean = loss_at_repeats(model, rows, [])
    none = loss_at_repeats(model, rows, heads)
    effects = {}
    for head in heads:
        needed = loss_at_repeats(model, rows, [head]) - clean
        sufficient = none - loss_at_repeats(model, rows, [other for other in heads if other != head])
        effects[name(*head)] = {"needed": interval(needed), "sufficient": interval(sufficient)}
    return effects


def loss_at_repeats(model: models.Model, rows: TokenBatch, forbidden: list[Head]) -> NDArray[np.float64]:
    """Mean loss at continuing tokens, [rows], while the `forbidden` heads may not attend to their targets."""
    layers = sorted({layer for layer, _ in forbidden})
    hooks = [
        (f"blocks.{layer}.attn.hook_pattern", forbid(rows, [head for at, head in forbidden if at == layer]))
        for layer in layers
    ]
    with model.bridge.hooks(fwd_hooks=hooks):
        losses = token_losses(model, rows.tokens).double().numpy()
    mask = continuing(rows)[:, 1:]
    return (losses * mask).sum(1) / mask.sum(1)


def forbid(rows: TokenBatch, heads: list[int]) -> Callable[[torch.Tensor, Any], torch.Tensor]:
    """A hook on a pattern [batch, head, query, key] that takes the target cells of `heads` away and renormalises."""
    cells = rows.cells["prefix_matching"]
    row, query, key = (torch.from_numpy(index) for index in (cells.row, cells.query, cells.key))

    def hook(pattern: torch.Tensor, hook: Any) -> torch.Tensor:
        pattern = pattern.clone()
        for head in heads:
            pattern[row, head, query, key] = 0.0
        return pattern / pattern.sum(-1, keepdim=True).clamp_min(1e-9)

    return hook


def interval(values: NDArray[np.float64]) -> list[float]:
    """Mean over rows with its 95 % bootstrap interval."""
    drawn = np.random.default_rng(0).choice(values, size=(RESAMPLES, len(values)))
    low, high = np.quantile(drawn.mean(1), [0.025, 0.975])
    return [round(float(number), 4) for number in (values.mean(), low, high)]


if __name__ == "__main__":
    main()
