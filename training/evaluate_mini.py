"""Print the figures that a model's README quotes: its heads, its losses on repeats, and a continuation.

    python -m training.evaluate_mini                                   # models/mini
    python -m training.evaluate_mini --model models/mini-checkpoints/step-0100

Measured on fresh random rows with a repeat and on rows made of held-out English sentences said twice. "Repeats" are the
tokens of the second copy but its first, "fresh" all tokens before it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from common.attention.head import Head
from common.heads import scores
from common.heads.tokens import TokenBatch, battery, continuing
from common.interventions import effects
from common.loading import Model, load
from common.loading.find import MINI

ROWS = 32
LENGTH = 128
SEED = 20_000  # no training row is drawn with it
STARTS = ("And the king said unto", "She was not at all", "In the beginning")
TEMPERATURE = 0.7
SHOWN = ("prefix_matching", "previous_token", "duplicate_token", "first_token")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini", help="mini or a folder (default mini)")
    parser.add_argument("--held-out", type=Path, default=MINI / "held_out.txt", help="text not trained on")
    args = parser.parse_args()
    model = load(args.model)
    random_rows = battery(model.ordinary(), model.bos, rows=ROWS, length=LENGTH, seed=SEED).repeats
    report(model, "random tokens", random_rows)
    text = args.held_out.read_text(encoding="utf-8")
    report(model, "held-out English, said twice", said_twice(model, text))
    print(f"loss on held-out English: {plain_loss(model, text):.2f} nats per token")
    quarters = ", ".join(f"{loss:.2f}" for loss in loss_by_position(model, text))
    print(f"the same in rows of {model.context} tokens, by quarter of the row: {quarters}")
    for start in STARTS:
        print(f"likeliest token by token: {continuation(model, start)!r}")
        print(f"drawn at temperature {TEMPERATURE}: {continuation(model, start, temperature=TEMPERATURE)!r}")


def said_twice(model: Model, text: str) -> TokenBatch:
    """Rows of BOS, a stretch of text, and the same stretch again."""
    ids = model.encode(text)[1:]
    size = (LENGTH - 1) // 2
    starts = np.linspace(0, len(ids) - size, ROWS).astype(int)
    rows = [np.concatenate([[model.bos], ids[start : start + size], ids[start : start + size]]) for start in starts]
    return TokenBatch.of(rows, pad=model.bos)


def report(model: Model, what: str, batch: TokenBatch) -> None:
    """Print the scores of every head and the losses on repeats and on fresh tokens."""
    measured = scores.score(model, batch, batch_size=8)
    means = [measured.mean(head_type) for head_type in SHOWN]
    print(f"{what} ({len(batch.tokens)} rows of {batch.tokens.shape[1]} tokens)")
    print("  head  " + "  ".join(SHOWN))
    for layer, head in np.ndindex(model.n_layers, model.n_heads):
        cells = (f"{mean[layer, head]:{len(head_type)}.2f}" for head_type, mean in zip(SHOWN, means, strict=True))
        print(f"  {str(Head.at(layer, head)):4}  " + "  ".join(cells))
    repeat, fresh = split_losses(model, batch)
    print(f"  loss on repeats {repeat:.2f}, on fresh tokens {fresh:.2f}, ratio {repeat / fresh:.2f}")


def split_losses(model: Model, batch: TokenBatch) -> tuple[float, float]:
    """Mean loss at tokens that continue a repeat, and at tokens before the first repeat, in nats."""
    losses = effects.losses(model, batch)
    return float(losses[continuing(batch)].mean()), float(losses[effects.fresh(batch)].mean())


def plain_loss(model: Model, text: str) -> float:
    ids = model.encode(text)[1:]
    starts = range(0, len(ids) - LENGTH, LENGTH)
    rows = [np.concatenate([[model.bos], ids[start : start + LENGTH]]) for start in starts]
    return float(np.nanmean(effects.losses(model, TokenBatch.of(rows, pad=model.bos))))


def loss_by_position(model: Model, text: str) -> list[float]:
    """Loss on `ROWS` rows of text as long as the context, in nats per token, for each quarter of the row."""
    ids = model.encode(text)[1:]
    starts = np.linspace(0, len(ids) - model.context, ROWS).astype(int)
    rows = np.stack([np.concatenate([[model.bos], ids[start : start + model.context - 1]]) for start in starts])
    losses = effects.losses(model, TokenBatch.of(list(rows), pad=model.bos))[:, 1:]
    return [float(part.mean()) for part in np.array_split(losses, 4, axis=1)]


def continuation(model: Model, start: str, *, count: int = 40, temperature: float = 0.0) -> str:
    """`start` and `count` tokens more: the likeliest each time, or drawn (fixed seed) at a `temperature` above 0."""
    ids = list(model.encode(start))
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        logits = model.logits(np.array([ids]))[0, -1].float()
        if temperature:
            following = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        else:
            following = logits.argmax(keepdim=True)
        ids.append(int(following))
    return model.tokenizer.decode(ids[1:])


if __name__ == "__main__":
    main()
