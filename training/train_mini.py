"""Train the bundled model `models/mini` from scratch: a small GPT-2 in which induction forms.

    pip install -r training/requirements.txt
    python training/train_mini.py                 # train with the recipe's seed, or go on where it stopped
    python training/train_mini.py --seed 1 --out /tmp/mini-1

Writes to --out: `model/` (config.json, model.safetensors, tokenizer), `checkpoints/step-*` (16-bit copies),
`held_out.txt` (text that was not trained on), `log.csv`, and `state.pt` (to resume; delete it to start over).
Takes about 25 minutes on 2 CPU cores; uses a GPU where there is one.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast
from transformers.activations import ACT2FN

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training import corpus, rows

BOS = "<|endoftext|>"
VOCABULARY = 2048
CONFIG = {"n_positions": 512, "n_embd": 128, "n_layer": 3, "n_head": 4}
POSITION_SCALE = 0.3  # size of the sinusoidal start of the position embeddings; learned from there
STEPS = 3600
WARM_UP = 100
CYCLES = ((0, 2100, 2e-3), (2100, 3600, 1.5e-3))  # from step, to step, peak learning rate
FINAL_RATE = 1e-4
KEEP = (100, 400, 700, 1200)  # steps whose weights are kept as 16-bit checkpoints
SAVE_EVERY = 100


@dataclass(frozen=True)
class Stage:
    """A stretch of the training: from step `start`, rows of `length` tokens, `rows` a step, `mix` of row kinds.

    With `active` tokens only those are drawn and predicted. Induction forms on 512 tokens in a few hundred steps and
    not in thousands on 2,048; once it is there it carries over to tokens it has never seen.
    """

    start: int
    length: int
    rows: int
    mix: dict[str, float]
    active: int = VOCABULARY


STAGES = (
    Stage(0, 96, 64, {"chain": 1.0}, active=512),
    Stage(700, 256, 32, {"english": 0.60, "chain": 0.10, "random": 0.15, "natural": 0.15}),
    Stage(1950, 512, 16, {"english": 0.55, "chain": 0.10, "random": 0.15, "natural": 0.20}),
    Stage(2100, 256, 32, {"english": 0.45, "chain": 0.05, "random": 0.15, "natural": 0.35}),
    Stage(3450, 512, 16, {"english": 0.50, "chain": 0.05, "random": 0.15, "natural": 0.30}),
)


def main() -> None:
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    corpus.fetch(args.data)
    train_texts, held_out_texts = corpus.load(args.data)
    (args.out / "held_out.txt").write_text("\n\n".join(held_out_texts), encoding="utf-8")
    tokenizer = make_tokenizer(train_texts, args.out / "model")
    text = np.concatenate([np.array(ids) for ids in tokenizer(train_texts, verbose=False)["input_ids"]])
    print(f"{len(text):,} tokens of English, vocabulary {len(tokenizer)}", file=sys.stderr)
    train(args, text, tokenizer)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of every row (default 0)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimiser steps (default {STEPS})")
    parser.add_argument("--out", type=Path, default=Path("training/runs/mini"), help="folder to write to")
    parser.add_argument("--data", type=Path, default=Path("training/data"), help="folder for the fetched texts")
    return parser.parse_args()


def make_tokenizer(texts: list[str], folder: Path) -> GPT2TokenizerFast:
    """A GPT-2-style byte-level BPE tokenizer learned from `texts`, saved to `folder`: any text encodes."""
    learned = ByteLevelBPETokenizer()
    learned.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=[BOS], show_progress=False)
    folder.mkdir(parents=True, exist_ok=True)
    learned.save_model(str(folder))
    tokenizer = GPT2TokenizerFast(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        bos_token=BOS,
        eos_token=BOS,
        unk_token=BOS,
        model_max_length=CONFIG["n_positions"],
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_model(vocabulary: int, bos: int) -> GPT2LMHeadModel:
    """GPT-2 as Hugging Face initialises it, but with sinusoidal position embeddings to start from."""
    drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(vocab_size=vocabulary, bos_token_id=bos, eos_token_id=bos, **CONFIG, **drop)
    model = GPT2LMHeadModel(config)
    model.set_attn_implementation("eager")  # the fastest on a CPU at these lengths
    for block in model.transformer.h:
        block.mlp.act = ACT2FN["gelu_pytorch_tanh"]  # GPT-2's own GELU in one kernel
    positions, width = CONFIG["n_positions"], CONFIG["n_embd"]
    frequency = torch.exp(-math.log(10_000) * torch.arange(0, width, 2) / width)
    angle = torch.arange(positions)[:, None] * frequency
    with torch.no_grad():
        model.transformer.wpe.weight[:, 0::2] = POSITION_SCALE * torch.sin(angle)
        model.transformer.wpe.weight[:, 1::2] = POSITION_SCALE * torch.cos(angle)
    return model


def train(args: argparse.Namespace, text: rows.Row, tokenizer: GPT2TokenizerFast) -> None:
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bos = tokenizer.bos_token_id
    model = make_model(len(tokenizer), bos).to(device)
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    plain = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=FINAL_RATE, fused=True)
    start = resume(args.out / "state.pt", model, optimizer)
    ordinary = np.array([token for token in range(len(tokenizer)) if token != bos])
    with progress_bar() as bar:
        task = bar.add_task("training", total=args.steps, completed=start)
        for step in range(start, args.steps):
            stage = next(stage for stage in reversed(STAGES) if step >= stage.start)
            rng = np.random.default_rng([args.seed, step])
            known = ordinary[ordinary < stage.active]
            tokens, kinds = rows.make_batch(rng, text, known, bos, rows=stage.rows, length=stage.length, mix=stage.mix)
            tokens_there = torch.from_numpy(tokens).to(device)
            losses = one_step(model, optimizer, tokens_there, rate(step), stage.active)
            bar.update(task, advance=1, description=f"loss {losses.mean():.2f}")
            log(args.out / "log.csv", step + 1, losses, kinds)
            if step + 1 in KEEP:
                save_checkpoint(model, tokenizer, args.out / "checkpoints" / f"step-{step + 1:04d}")
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == args.steps:
                save_state(args.out / "state.pt", model, optimizer, step + 1)
    model.float().save_pretrained(args.out / "model")


def one_step(
    model: GPT2LMHeadModel, optimizer: torch.optim.Optimizer, tokens: torch.Tensor, learning_rate: float, active: int
) -> torch.Tensor:
    """One optimiser step on [rows, length] token ids; the mean loss of each row, [rows], in nats per token.

    Only the first `active` tokens of the vocabulary take part in the prediction.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    with torch.autocast(tokens.device.type, torch.bfloat16):
        logits = model(tokens[:, :-1], use_cache=False).logits[..., :active]
    targets = tokens[:, 1:]
    flat = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    flat.mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return flat.detach().float().view_as(targets).mean(1).cpu()


def rate(step: int) -> float:
    """Per cycle: linear warm-up, then a cosine from its peak to the final rate."""
    start, stop, peak = next(cycle for cycle in reversed(CYCLES) if step >= cycle[0])
    if step < start + WARM_UP:
        return peak * (step - start + 1) / WARM_UP
    done = min(1.0, (step - start - WARM_UP) / (stop - start - WARM_UP))
    return FINAL_RATE + (peak - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * done))


def resume(path: Path, model: GPT2LMHeadModel, optimizer: torch.optim.Optimizer) -> int:
    """Load the state that an interrupted run left, if any; the step to go on from."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def save_state(path: Path, model: GPT2LMHeadModel, optimizer: torch.optim.Optimizer, step: int) -> None:
    partial = path.with_suffix(".partial")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, partial)
    partial.replace(path)


def save_checkpoint(model: GPT2LMHeadModel, tokenizer: GPT2TokenizerFast, folder: Path) -> None:
    """A 16-bit copy, half the size, for tests and for pictures of induction emerging."""
    copy = GPT2LMHeadModel(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def log(path: Path, step: int, losses: torch.Tensor, kinds: list[str]) -> None:
    """Append the mean loss per row kind; empty where no row of that kind was drawn."""
    new = not path.exists()
    means = [losses[[drawn == kind for drawn in kinds]] for kind in rows.KINDS]
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["step", *(f"{kind}_loss" for kind in rows.KINDS)])
        writer.writerow([step, *(f"{mean.mean().item():.4f}" if len(mean) else "" for mean in means)])


def progress_bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())


if __name__ == "__main__":
    main()
