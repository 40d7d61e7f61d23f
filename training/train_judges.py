"""Train the small models that judge the detector: three families, several seeds, and some that see no repeats.

    python -m training.train_judges                    # all of them, one after the other: half an hour of one core
    python -m training.train_judges llama-1 none-gpt2  # these alone
    python -m training.train_judges --list

Writes a folder per model to --out: config.json, model.safetensors (16-bit), a word-level tokenizer, and `training.json`
with the shape, the seed, the losses on the way, and whether induction formed. A finished folder is left as it is.

1. Language. A random one for each model: every word has `SUCCESSORS` words that may follow it, the likelier the earlier
   it stands in the list. Nothing in it is English; it gives the heads something to do that is not induction.
2. Rows. Those of training/rows.py: the language, loops, in-context chains, random repeats, the language with repeats.
   Of the models named `none-*` all rows are of a language that never says a word twice within a context: the same
   shapes, and no repeat that could be continued.
3. Training. AdamW on the loss in nats per token, a fixed number of steps. Seeds and shapes were added until induction
   had formed in three of each family; models in which it did not are kept, as ones with nothing to find. Position
   embeddings of GPT-2 start sinusoidal, as those of models/mini do; rotary families need no such help.
4. Formed. Induction counts as formed if the loss at random repeats is below `FORMED` times the loss at fresh tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.activations import ACT2FN

from tests.handbuilt import word_tokenizer
from training import rows

BOS = 0
STEPS, UNREPEATING_STEPS = 900, 400  # optimiser steps; a language without repeats is learned sooner
FIRST = 600  # steps of loops and chains alone: among other rows induction does not form in so few
BATCH = 32
RATE, WARM_UP, COOL_DOWN = 3e-3, 100, 200  # peak learning rate; steps of its rise, and of its fall at the end
INITIAL = 0.05  # standard deviation of the weights at the start
POSITION_SCALE, LONGEST_WAVE = 0.3, 1000  # of the sinusoids that GPT-2's position embeddings start from
SUCCESSORS = 8
TEXT = 300_000  # tokens of each language
FORMING = {"chain": 0.6, "loop": 0.4}
REPEATING = {"english": 0.3, "chain": 0.25, "loop": 0.05, "random": 0.25, "natural": 0.15}
UNREPEATING = {"english": 1.0}  # kinds of row as training/rows.py names them; "english" is the language here
FORMED = 0.5
LOG_EVERY = 100


@dataclass(frozen=True)
class Judge:
    """One model. `vocabulary` counts BOS; `key_heads` is `heads` but for Llama; `repeats`: see step 2 above."""

    name: str
    family: str
    layers: int
    heads: int
    key_heads: int
    width: int
    vocabulary: int
    context: int
    seed: int
    repeats: bool = True


JUDGES = (
    Judge("gpt2-0", "gpt2", 2, 4, 4, 64, 256, 64, seed=0),
    Judge("gpt2-1", "gpt2", 3, 4, 4, 64, 128, 64, seed=1),
    Judge("gpt2-2", "gpt2", 4, 4, 4, 64, 256, 64, seed=2),
    Judge("llama-0", "llama", 2, 4, 2, 64, 128, 64, seed=3),
    Judge("llama-1", "llama", 3, 6, 2, 96, 64, 96, seed=4),
    Judge("llama-2", "llama", 4, 4, 2, 64, 256, 64, seed=5),
    Judge("llama-3", "llama", 4, 4, 2, 64, 128, 64, seed=13),
    Judge("llama-4", "llama", 3, 4, 1, 64, 128, 64, seed=14),
    Judge("llama-5", "llama", 2, 6, 3, 96, 128, 64, seed=16),
    Judge("llama-6", "llama", 2, 4, 2, 64, 128, 64, seed=17),
    Judge("llama-7", "llama", 2, 4, 1, 64, 128, 64, seed=19),
    Judge("neox-0", "neox", 2, 4, 4, 64, 128, 64, seed=6),
    Judge("neox-1", "neox", 3, 4, 4, 64, 64, 96, seed=7),
    Judge("neox-2", "neox", 4, 4, 4, 64, 128, 64, seed=8),
    Judge("neox-3", "neox", 3, 4, 4, 64, 128, 64, seed=12),
    Judge("neox-4", "neox", 2, 6, 6, 96, 128, 64, seed=15),
    Judge("neox-5", "neox", 2, 4, 4, 64, 128, 64, seed=18),
    Judge("none-gpt2", "gpt2", 2, 4, 4, 64, 256, 64, seed=9, repeats=False),
    Judge("none-llama", "llama", 3, 4, 1, 64, 128, 64, seed=10, repeats=False),
    Judge("none-neox", "neox", 4, 4, 4, 64, 512, 64, seed=11, repeats=False),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="the models to train (default: all)")
    parser.add_argument("--list", action="store_true", help="print their names and shapes, and train nothing")
    parser.add_argument("--steps", type=int, help=f"optimiser steps (default {STEPS}, {UNREPEATING_STEPS} for none-*)")
    parser.add_argument("--out", type=Path, default=Path("outputs/judges"), metavar="DIR", help="folder to write to")
    args = parser.parse_args()
    known = {judge.name: judge for judge in JUDGES}
    if unknown := sorted(set(args.names) - set(known)):
        parser.error(f"no model named {', '.join(unknown)}: there are {', '.join(known)}")
    for judge in [known[name] for name in args.names] or JUDGES:
        if args.list:
            print(judge)
        elif not (args.out / judge.name / "training.json").exists():
            train(judge, args.out / judge.name, args.steps or (STEPS if judge.repeats else UNREPEATING_STEPS))


def train(judge: Judge, folder: Path, steps: int) -> None:
    """Train one model and write its folder."""
    started = time.monotonic()
    torch.manual_seed(judge.seed)
    model = make_model(judge)
    model.set_attn_implementation("eager")  # the fastest on a CPU at these lengths
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    log = []
    for step, batch in enumerate(batches(judge, steps)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = losses(model, batch).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = RATE * rate(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % LOG_EVERY == 0 or step + 1 == steps:
            fresh, repeats = loss_on_random_repeats(model, judge)
            log.append({"step": step + 1, "loss": round(loss.item(), 4), "fresh": fresh, "repeats": repeats})
            print(f"{judge.name} {log[-1]} {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    model.half().save_pretrained(folder)  # half the size; what is judged are these rounded weights
    word_tokenizer(judge.vocabulary - 1).save_pretrained(folder)
    formed = log[-1]["repeats"] < FORMED * log[-1]["fresh"]
    record = {"judge": asdict(judge), "steps": steps, "seconds": round(time.monotonic() - started), "formed": formed}
    (folder / "training.json").write_text(json.dumps({**record, "log": log}, indent=1) + "\n", encoding="utf-8")


def make_model(judge: Judge) -> PreTrainedModel:
    """A randomly initialised model of this shape, in float32."""
    shared = {
        "tie_word_embeddings": True,
        "vocab_size": judge.vocabulary,
        "initializer_range": INITIAL,
        "bos_token_id": BOS,
        "eos_token_id": BOS,
    }
    if judge.family == "gpt2":
        drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        shape = {"n_layer": judge.layers, "n_head": judge.heads, "n_embd": judge.width, "n_positions": judge.context}
        model = GPT2LMHeadModel(GPT2Config(**shape, **drop, **shared))
        with torch.no_grad():
            model.transformer.wpe.weight.copy_(POSITION_SCALE * sinusoids(judge.context, judge.width))
        for block in model.transformer.h:
            block.mlp.act = ACT2FN["gelu_pytorch_tanh"]  # GPT-2's own GELU in one kernel
        return model
    shared |= {
        "num_hidden_layers": judge.layers, "num_attention_heads": judge.heads, "hidden_size": judge.width,
        "max_position_embeddings": judge.context,
    }  # fmt: skip
    if judge.family == "llama":
        gated = {"intermediate_size": 2 * judge.width, "num_key_value_heads": judge.key_heads}
        return LlamaForCausalLM(LlamaConfig(**gated, **shared))
    # GPT-NeoX rotates a quarter of heads that are four times as wide as these. Llama's slow waves leave dimensions to
    # compare content with; here the half that is not rotated does, and the other half needs fast waves only.
    partial = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
    return GPTNeoXForCausalLM(GPTNeoXConfig(intermediate_size=4 * judge.width, rope_parameters=partial, **shared))


def sinusoids(positions: int, width: int) -> Tensor:
    """[positions, width]: sine and cosine in turn, of wavelengths from 2 pi to 2 pi times `LONGEST_WAVE`."""
    frequency = torch.exp(-math.log(LONGEST_WAVE) * torch.arange(0, width, 2) / width)
    angle = torch.arange(positions)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


def batches(judge: Judge, steps: int) -> Iterator[Tensor]:
    """`steps` batches of token ids, [BATCH, context]; each depends on the seed and its number alone."""
    text = language(judge)
    ordinary = np.arange(1, judge.vocabulary)
    for step in range(steps):
        rng = np.random.default_rng([judge.seed, step])
        mix = (FORMING if step < FIRST else REPEATING) if judge.repeats else UNREPEATING
        drawn, _ = rows.make_batch(rng, text, ordinary, BOS, rows=BATCH, length=judge.context, mix=mix)
        yield torch.from_numpy(drawn)


def language(judge: Judge) -> rows.Row:
    """`TEXT` tokens of a random language; without repeats, none that stood among the `context` tokens before it."""
    rng = np.random.default_rng([judge.seed, 10**6])  # no step has this number
    words = np.arange(1, judge.vocabulary)
    may_follow = np.stack([rng.choice(words, size=SUCCESSORS, replace=False) for _ in range(judge.vocabulary)])
    likelihood = 1 / np.arange(1, SUCCESSORS + 1)
    preferred = rng.choice(SUCCESSORS, size=TEXT, p=likelihood / likelihood.sum())
    text = np.zeros(TEXT, dtype=np.int64)
    last = np.full(judge.vocabulary, -judge.context - 1)  # where each token stood last
    for place in range(TEXT):
        found = int(may_follow[text[place - 1], preferred[place]])
        if not judge.repeats and place - last[found] <= judge.context:
            found = _another(rng, may_follow[text[place - 1]], words, last, place - judge.context)
        text[place], last[found] = found, place
    return text


def _another(rng: np.random.Generator, may_follow: rows.Row, words: rows.Row, last: rows.Row, since: int) -> int:
    """A word that did not stand at `since` or later: one that may follow, the likeliest first, else any."""
    free = may_follow[last[may_follow] < since]
    return int(free[0] if len(free) else rng.choice(words[last[words] < since]))


def rate(step: int, steps: int) -> float:
    """Share of the peak learning rate, in (0, 1]: a linear rise, the peak, a linear fall to a twentieth."""
    return min(1.0, (step + 1) / WARM_UP, max(0.05, (steps - step) / COOL_DOWN))


def losses(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Loss of each token but the first, [rows, pos - 1], in nats."""
    logits = model(tokens[:, :-1], use_cache=False).logits
    flat = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    return flat.view(len(tokens), -1)


def loss_on_random_repeats(model: PreTrainedModel, judge: Judge) -> tuple[float, float]:
    """Mean loss on rows [BOS] R R: at the first R, and at the second but for its first token; nats."""
    rng = np.random.default_rng([judge.seed, 10**6 + 1])
    size = min(judge.context - 1, judge.vocabulary - 1) // 2
    segments = np.stack([rng.choice(np.arange(1, judge.vocabulary), size=size, replace=False) for _ in range(BATCH)])
    drawn = np.concatenate([np.full((BATCH, 1), BOS), segments, segments], axis=1)
    with torch.no_grad():
        found = losses(model, torch.from_numpy(drawn)).double()
    return round(found[:, :size].mean().item(), 4), round(found[:, size + 1 :].mean().item(), 4)


if __name__ == "__main__":
    main()
