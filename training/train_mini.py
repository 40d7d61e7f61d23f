"""Train the bundled model `models/mini` from scratch: a small GPT-2 in which induction forms.

    pip install -r training/requirements.txt
    python -m training.train_mini                 # train with the recipe's seed, or go on where it stopped
    python -m training.train_mini --seed 1 --out /tmp/mini-1

Writes to --out: `model/` (config.json, model.safetensors, tokenizer), `checkpoints/step-*` (16-bit copies),
`held_out.txt` (text that was not trained on), `log.csv`, and `state.pt` (to resume; delete it to start over).
Takes about 25 minutes on 2 CPU cores; uses a GPU where there is one.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast
from transformers.activations import ACT2FN

from training import corpus, rows
from training.muon import Muon

BOS = "<|endoftext|>"
VOCABULARY = 2048
CONFIG = {"n_positions": 512, "n_embd": 192, "n_layer": 4, "n_head": 6, "initializer_range": 0.05}
POSITION_SCALE = 0.3  # size of the sinusoidal start of the position embeddings; learned from there
LONGEST_WAVE = 1000  # of that start, in positions over 2 pi
STEPS = 2560
WARM_UP = 30  # steps over which the learning rate rises
COOL_DOWN = (1400, 2400)  # steps between which it falls linearly
MATRIX_RATE, OTHER_RATE = 3e-3, 2e-3  # peak learning rates of Muon and of AdamW
FINAL_SHARE = 0.05  # of the peak, from then on
KEEP = (100, 300, 600)  # steps whose weights are kept as 16-bit checkpoints
WEIGHT_DECAY = 0.01
SAVE_EVERY = 100


@dataclass(frozen=True)
class Stage:
    """A stretch of the training: from step `start`, rows of `length` tokens, `rows` a step, `mix` of row kinds.

    With `active` tokens only those are drawn and predicted. Induction forms on 512 tokens in a few hundred steps and
    not in thousands on 2,048; once it is there it carries over to tokens it has never seen.

    Only the first `heads` heads of each layer take part, the rest are silent and learn nothing. With all of them at
    work on rows made of repeats, every head of a layer becomes an induction head, which no larger model shows.
    """

    start: int
    length: int
    rows: int
    mix: dict[str, float]
    active: int = VOCABULARY
    heads: int = int(CONFIG["n_head"])


STAGES = (
    Stage(0, 64, 64, {"chain": 0.5, "loop": 0.5}, active=512, heads=2),
    Stage(500, 128, 32, {"english": 0.70, "chain": 0.02, "random": 0.10, "natural": 0.18}),
    Stage(1100, 128, 32, {"english": 0.60, "chain": 0.02, "random": 0.08, "natural": 0.30}),
    Stage(2150, 256, 16, {"english": 0.60, "chain": 0.02, "random": 0.08, "natural": 0.30}),
    Stage(2300, 512, 8, {"english": 0.60, "chain": 0.02, "random": 0.08, "natural": 0.30}),
    Stage(2400, 128, 32, {"english": 0.50, "chain": 0.02, "random": 0.08, "natural": 0.40}),
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
        torch.nn.init.zeros_(block.attn.c_proj.weight)  # each layer starts by adding nothing
        torch.nn.init.zeros_(block.mlp.c_proj.weight)
    positions, width = CONFIG["n_positions"], CONFIG["n_embd"]
    frequency = torch.exp(-math.log(LONGEST_WAVE) * torch.arange(0, width, 2) / width)
    angle = torch.arange(positions)[:, None] * frequency
    with torch.no_grad():
        model.transformer.wpe.weight[:, 0::2] = POSITION_SCALE * torch.sin(angle)
        model.transformer.wpe.weight[:, 1::2] = POSITION_SCALE * torch.cos(angle)
    return model


def train(args: argparse.Namespace, text: rows.Row, tokenizer: GPT2TokenizerFast) -> None:
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model(len(tokenizer), tokenizer.bos_token_id).to(device)
    optimizers = make_optimizers(model)
    start = resume(args.out / "state.pt", model, optimizers)
    cut_log(args.out / "log.csv", start)
    with progress_bar() as bar:
        task = bar.add_task("training", total=args.steps, completed=start)
        for step in range(start, args.steps):
            losses, kinds = take_step(model, optimizers, text, step=step, seed=args.seed)
            bar.update(task, advance=1, description=f"loss {losses.mean():.2f}")
            log(args.out / "log.csv", step + 1, losses, kinds)
            if step + 1 in KEEP:
                save_checkpoint(model, tokenizer, args.out / "checkpoints" / f"step-{step + 1:04d}")
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == args.steps:
                save_state(args.out / "state.pt", model, optimizers, step + 1)
    model.float().save_pretrained(args.out / "model")


def take_step(
    model: GPT2LMHeadModel, optimizers: list[torch.optim.Optimizer], text: rows.Row, *, step: int, seed: int
) -> tuple[torch.Tensor, list[str]]:
    """Draw the rows of `step` and learn from them; the mean loss of each row, [rows], and its kind."""
    stage = next(stage for stage in reversed(STAGES) if step >= stage.start)
    bos = model.config.bos_token_id
    ordinary = np.array([token for token in range(stage.active) if token != bos])
    rng = np.random.default_rng([seed, step])
    tokens, kinds = rows.make_batch(rng, text, ordinary, bos, rows=stage.rows, length=stage.length, mix=stage.mix)
    for optimizer, peak in zip(optimizers, (MATRIX_RATE, OTHER_RATE), strict=True):
        optimizer.param_groups[0]["lr"] = peak * rate(step)
    with only_heads(model, stage.heads):
        return learn(model, optimizers, torch.from_numpy(tokens).to(model.device), stage.active), kinds


def make_optimizers(model: GPT2LMHeadModel) -> list[torch.optim.Optimizer]:
    """Muon for the weight matrices of the blocks, AdamW for embeddings, biases and LayerNorms."""
    blocks = {id(weight) for weight in model.transformer.h.parameters() if weight.ndim == 2}
    matrices = [parameter for parameter in model.parameters() if id(parameter) in blocks]
    others = [parameter for parameter in model.parameters() if id(parameter) not in blocks]
    adamw = torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    return [Muon(matrices, lr=MATRIX_RATE, weight_decay=WEIGHT_DECAY), adamw]


def learn(
    model: GPT2LMHeadModel,
    optimizers: list[torch.optim.Optimizer],
    tokens: torch.Tensor,
    active: int,
) -> torch.Tensor:
    """One optimiser step on [rows, length] token ids; the mean loss of each row, [rows], in nats per token.

    Only the first `active` tokens of the vocabulary take part in the prediction.
    """
    with torch.autocast(tokens.device.type, torch.bfloat16):
        logits = model(tokens[:, :-1], use_cache=False).logits[..., :active]
    targets = tokens[:, 1:]
    flat = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    flat.mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return flat.detach().float().view_as(targets).mean(1).cpu()


@contextmanager
def only_heads(model: GPT2LMHeadModel, count: int) -> Iterator[None]:
    """Silence all heads but the first `count` of each layer: they add nothing and get no gradient."""
    width = model.config.n_embd // model.config.n_head
    heard = (torch.arange(model.config.n_embd, device=model.device) < count * width).float()

    def silence(projection: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (inputs[0] * heard,)

    hooks = [block.attn.c_proj.register_forward_pre_hook(silence) for block in model.transformer.h]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def rate(step: int) -> float:
    """Share of the peak learning rate, in (0, 1]: a linear rise, the peak, a linear fall, the final share."""
    start, stop = COOL_DOWN
    left = min(1.0, max(0.0, (stop - step) / (stop - start)))
    return min(1.0, (step + 1) / WARM_UP) * (FINAL_SHARE + (1 - FINAL_SHARE) * left)


def resume(path: Path, model: GPT2LMHeadModel, optimizers: list[torch.optim.Optimizer]) -> int:
    """Load the state that an interrupted run left, if any; the step to go on from."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"]


def save_state(path: Path, model: GPT2LMHeadModel, optimizers: list[torch.optim.Optimizer], step: int) -> None:
    partial = path.with_suffix(".partial")
    saved = [optimizer.state_dict() for optimizer in optimizers]
    torch.save({"model": model.state_dict(), "optimizers": saved, "step": step}, partial)
    partial.replace(path)


def cut_log(path: Path, step: int) -> None:
    """Drop what an interrupted run logged after the state it left: those steps are done again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(lines[: step + 1] if step else []), encoding="utf-8")


def save_checkpoint(model: GPT2LMHeadModel, tokenizer: GPT2TokenizerFast, folder: Path) -> None:
    """A 16-bit copy, half the size, for tests and for pictures of induction emerging."""
    copy = GPT2LMHeadModel(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def log(path: Path, step: int, losses: torch.Tensor, kinds: list[str]) -> None:
    """Append the mean loss per row kind; empty where no row of that kind was drawn."""
    new = not path.exists() or not path.stat().st_size
    means = [losses[[drawn == kind for drawn in kinds]] for kind in rows.KINDS]
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(["step", *(f"{kind}_loss" for kind in rows.KINDS)])
        writer.writerow([step, *(f"{mean.mean().item():.4f}" if len(mean) else "" for mean in means)])


def progress_bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())


if __name__ == "__main__":
    main()
