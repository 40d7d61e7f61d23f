"""Save a model as a folder that both scripts read: here an untrained GPT-2 with the tokenizer of mini.

    python -m examples.save_a_model outputs/examples/untrained

A model of your own is saved by the same two calls of `save_pretrained`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

MINI = Path(__file__).resolve().parents[1] / "models" / "mini"


def main(folder: str) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(MINI)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.bos_token_id}
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=128, n_embd=64, n_layer=3, n_head=4, **ends)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"Written to {folder}: {', '.join(sorted(path.name for path in Path(folder).iterdir()))}")


if __name__ == "__main__":
    main(sys.argv[1])
