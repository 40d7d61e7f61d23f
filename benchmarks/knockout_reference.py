"""Which heads does a model need in order to continue a repeat? Asked of the model itself, with nothing of this project.

    python -m benchmarks.knockout_reference outputs/judges/gpt2-0 --out reference.json
    python -m benchmarks.knockout_reference model.gguf --out reference.json

The judge of `benchmarks.trained`. It imports nothing of `common/` (a test reads its imports): rows, cells, attention,
losses and intervals are written here a second time, on plain transformers.

1. Rows. [BOS, filler, segment, gap, segment again]: random ordinary tokens, none twice but for the second segment.
   Segment and gap vary by row; the row ends with the second segment. Rows are shorter where the vocabulary is small.
2. Cells. The target cells of query i are the keys j + 1 with 0 < j, j + 1 < i and the same token at j and i.
3. Attention knockout. Before the softmax of one head its target cells become minus infinity: no attention to them, the
   rest renormalised, all other heads as they are.
4. Effect. The rise of the loss at the tokens of the second segment but the first one, in nats, mean per row. Its 95 %
   interval is Student's t over rows.
5. Label. A head is needed, and so an induction head, if its effect is at least `LEAST` nats and its interval lies above
   0. The rule was written down before the detector's answers were looked at.
6. Joint. All needed heads knocked out together; and for every head its effect while all the other needed heads are
   knocked out: a head that others cover for has a small effect alone and a large one when they are gone.

Exact and cheap: what stands before the second segments cannot change, so only the places from there on are run again,
with the keys and values of the earlier ones kept; and only from the edited layer on. A model whose logits this way of
running it does not reproduce is refused.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import t as student
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

Head = tuple[int, int]  # layer, head
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

ROWS, LENGTH, SEED = 32, 128, 31_415
LEAST = 0.05  # nats
LEVEL = 0.95
AT_ONCE = 256  # predictions whose logits exist at the same time
SAME = 1e-3  # most that logits of our way of running a model may differ from its own
LAYERS = ("transformer.h", "model.layers", "gpt_neox.layers")  # where the families keep their layers,
NORMS = ("transformer.ln_f", "model.norm", "gpt_neox.final_layer_norm")  # and the norm that follows them
_numbers = itertools.count()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder in Hugging Face format, or a GGUF file")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"rows with a repeat (default {ROWS})")
    parser.add_argument(
        "--others", type=int, metavar="N", help="measure with the others out only the N largest effects"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON file to write, and to go on with")
    args = parser.parse_args()
    tell = functools.partial(print, file=sys.stderr, flush=True)
    measure_into(args.out, args.model, rows=args.rows, others=args.others, say=tell)


def measure_into(
    file: Path, model: Path, *, rows: int = ROWS, others: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:  # fmt: skip
    """Judge `model`; every effect is in `file` as soon as it is measured, and what is there is not measured again.

    `alone`, `others_out`: by head, its effect on each row, in nats; `joint`: the same of all needed heads together.
    `others`: of how many heads, those of the largest effects, `others_out` is measured (None: of all).
    `say` hears each effect and after how many seconds it came.
    """
    network, ordinary, bos, context = read(model)
    tokens, size = draw_rows(ordinary, bos, rows=rows, length=min(LENGTH, context))
    reference = Reference(network, tokens, size)
    clean = round(float(reference.clean.mean()), 4)  # another model of the same name has another loss
    setting = {"model": model.name, "rows": rows, "length": tokens.shape[1], "seed": SEED, "clean_loss": clean}
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    known = known if known.get("setting") == setting else {"setting": setting}
    started = time.monotonic()

    def keep(part: str, head: Head, effect: Floats) -> None:
        known.setdefault(part, {})[name_of(head)] = [round(float(value), 6) for value in effect]
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(file.name + ".partial")
        partial.write_text(json.dumps(known) + "\n", encoding="utf-8")
        partial.replace(file)
        say(f"{part} {name_of(head)} {effect.mean():+.4f} nats, {time.monotonic() - started:.0f} s")

    def missing(part: str, heads: list[Head]) -> list[Head]:
        return [head for head in heads if name_of(head) not in known.get(part, {})]

    for head, effect in reference.effects(missing("alone", reference.heads), frozenset()):
        keep("alone", head, effect)
    out = needed_heads(known["alone"])
    known["joint"] = [round(float(value), 6) for value in reference.effect_of(out)]
    largest = sorted(reference.heads, key=lambda head: -abs(np.mean(known["alone"][name_of(head)])))
    for head, effect in reference.effects(missing("others_out", largest[:others]), out):
        keep("others_out", head, effect)
    return known


def name_of(head: Head) -> str:
    return f"{head[0]}.{head[1]}"


def needed_heads(effects: Mapping[str, list[float]], least: float = LEAST) -> frozenset[Head]:
    """The heads with an effect of at least `least` nats whose interval lies above 0; `effects`: per row, by name."""
    found = set()
    for name, values in effects.items():
        mean, low, _ = with_interval(values)
        if mean >= least and low > 0:
            layer, head = name.split(".")
            found.add((int(layer), int(head)))
    return frozenset(found)


def with_interval(per_row: Iterable[float]) -> tuple[float, float, float]:
    """Mean over rows, and the ends of its `LEVEL` interval by Student's t; at least two rows."""
    values = np.asarray(list(per_row), dtype=np.float64)
    half = student.ppf((1 + LEVEL) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


# --- the model and the rows ---


def read(path: Path) -> tuple[PreTrainedModel, Ints, int, int]:
    """The model in float32, its ordinary token ids, BOS, and the longest row that it takes."""
    where: dict[str, Any] = {"pretrained_model_name_or_path": path}
    if path.suffix == ".gguf":
        where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**where, local_files_only=True)
    network = AutoModelForCausalLM.from_pretrained(
        **where, local_files_only=True, dtype=torch.float32, attn_implementation="eager"
    )
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    words = min(len(tokenizer), network.config.vocab_size)
    ordinary = np.array([token for token in range(words) if token not in special])
    starts = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None]
    return network.eval().requires_grad_(False), ordinary, starts[0], network.config.max_position_embeddings


def draw_rows(ordinary: Ints, bos: int, *, rows: int, length: int, seed: int = SEED) -> tuple[Ints, Ints]:
    """Rows of step 1 above, [rows, length], and the size of each row's segment, [rows]."""
    body = min(length - 1, len(ordinary))
    drawn, sizes = np.empty((rows, body + 1), dtype=np.int64), np.empty(rows, dtype=np.int64)
    for row in range(rows):
        rng = np.random.default_rng([seed, row])
        size = int(rng.integers(max(2, body // 10), max(2, body // 6) + 1))
        gap = int(rng.integers(0, body - 2 * size + 1))
        tokens = rng.choice(ordinary, size=body, replace=False)
        first = body - 2 * size - gap
        tokens[body - size :] = tokens[first : first + size]
        drawn[row], sizes[row] = [bos, *tokens], size
    return drawn, sizes


def target_cells(tokens: Ints) -> NDArray[np.bool_]:
    """Which cells are targets (step 2 above), [rows, query, key]."""
    pos = tokens.shape[1]
    found = np.zeros((len(tokens), pos, pos), dtype=bool)
    same = tokens[:, :, None] == tokens[:, None, :]
    for query in range(pos):
        for earlier in range(1, query - 1):  # so that the token after it stands before the query
            found[:, query, earlier + 1] = same[:, query, earlier]
    return found


# --- running it with heads knocked out ---


class Reference:
    """A model on fixed rows, with attention that can be knocked out head by head.

    `tokens`: [rows, pos], the last `sizes[row]` of which are the second segment. `clean`: the loss at repeats, [rows].
    Raises ValueError if our way of running the model does not give its own logits.
    """

    def __init__(self, network: PreTrainedModel, tokens: Ints, sizes: Ints):
        self.network, self.tokens = network, torch.from_numpy(tokens)
        self.layers, self.norm = _part(network, LAYERS), _part(network, NORMS)
        self.start = tokens.shape[1] - int(sizes.max())  # nothing before it can change
        self.targets = torch.from_numpy(target_cells(tokens))[:, self.start :]
        # The token after query i is a repeat, for every query of the second segment but the last.
        places = [
            (row, pos) for row, size in enumerate(sizes) for pos in range(len(tokens[row]) - size, len(tokens[row]) - 1)
        ]
        self.row, self.query = (torch.tensor(axis) for axis in zip(*places, strict=True))
        config = network.config
        self.heads: list[Head] = [*itertools.product(range(len(self.layers)), range(config.num_attention_heads))]
        self.out: frozenset[Head] = frozenset()
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}  # per layer, keys and values before `start`
        self.rotary: dict[str, Any] = {}
        own = self._own_logits()
        self.inputs = self._first_run()
        if not torch.allclose(self._logits(self.inputs[-1], slice(0, AT_ONCE)), own, atol=SAME, rtol=SAME):
            raise ValueError(f"a {config.model_type} model does not run here as it runs by itself")
        self.clean = self._loss(self.inputs[-1])

    def effects(self, heads: Iterable[Head], out: frozenset[Head]) -> Iterator[tuple[Head, Floats]]:
        """For each head its effect, nats per row [rows]: the rise of the loss as it is knocked out beside `out`.

        For a head in `out`: the rise from where all of them but this one are knocked out.
        """
        inputs = self._run_on(self.inputs[0], 0, out) if out else self.inputs
        base = self._loss(inputs[-1])
        for layer, head in heads:
            changed = out ^ {(layer, head)}
            found = self._loss(self._run_on(inputs[layer], layer, changed)[-1])
            yield (layer, head), (base - found if (layer, head) in out else found - base)

    def effect_of(self, out: frozenset[Head]) -> Floats:
        """The rise of the loss with all of these knocked out at once, nats per row [rows]."""
        return self._loss(self._run_on(self.inputs[0], 0, out)[-1]) - self.clean

    def attend(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *,
        scaling: float, **ignored: object,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """Causal attention, [rows, pos, head, d_head] out of [rows, head, pos, d_head]; called by transformers.

        On the first run, over whole rows, keys and values before `start` are kept; later runs begin at `start`.
        """
        layer = module.layer_idx
        if layer in self.kept:
            key, value = (torch.cat(pair, 2) for pair in zip(self.kept[layer], (key, value), strict=True))
        else:
            self.kept[layer] = key[:, :, : self.start], value[:, :, : self.start]
        group = query.shape[1] // key.shape[1]  # query heads that share a key head
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scores = query @ key.transpose(-1, -2) * scaling
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1 + key.shape[2] - query.shape[2])
        scores = scores.masked_fill(hidden, -torch.inf)
        for out_layer, head in self.out:
            if out_layer == layer:
                scores[:, head] = scores[:, head].masked_fill(self.targets, -torch.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    def _own_logits(self) -> Tensor:
        """The model's own logits at the first predictions, before anything is exchanged."""
        with torch.no_grad():
            hidden = self.network.base_model(self.tokens, use_cache=False).last_hidden_state
            return self.network.get_output_embeddings()(hidden[self.row[:AT_ONCE], self.query[:AT_ONCE]])

    def _first_run(self) -> list[Tensor]:
        """Exchange the attention, run whole rows, and keep the input of every layer from `start` on, and the output."""
        name = f"knockout_reference_{next(_numbers)}"
        AttentionInterface.register(name, self.attend)
        self.network.set_attn_implementation(name)
        inputs: list[Tensor] = []

        def keep(layer: torch.nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            inputs.append((args[0] if args else kwargs["hidden_states"])[:, self.start :])
            if "position_embeddings" in kwargs:
                turned = tuple(part[:, self.start :] for part in kwargs["position_embeddings"])
                self.rotary = {"position_embeddings": turned}

        hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in self.layers]
        try:
            with torch.no_grad():
                self.network.base_model(self.tokens, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return self._run_on(inputs[0], 0, frozenset())

    def _run_on(self, hidden: Tensor, first: int, out: frozenset[Head]) -> list[Tensor]:
        """The inputs of layer `first` and of those above, and the output, [rows, pos from start, width] each."""
        self.out, inputs = out, [hidden]
        with torch.no_grad():
            for layer in self.layers[first:]:
                result = layer(inputs[-1], attention_mask=None, **self.rotary)
                inputs.append(result[0] if isinstance(result, tuple) else result)
        self.out = frozenset()
        return inputs

    def _logits(self, hidden: Tensor, part: slice) -> Tensor:
        with torch.no_grad():
            at = hidden[self.row[part], self.query[part] - self.start]
            return self.network.get_output_embeddings()(self.norm(at))

    def _loss(self, hidden: Tensor) -> Floats:
        """Mean loss at the repeats of each row, [rows], from the output of the last layer."""
        found = np.zeros(len(self.tokens))
        for start in range(0, len(self.row), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            correct = self.tokens[self.row[part], self.query[part] + 1]
            losses = torch.nn.functional.cross_entropy(self._logits(hidden, part), correct, reduction="none")
            np.add.at(found, self.row[part].numpy(), losses.double().numpy())
        return found / np.bincount(self.row.numpy(), minlength=len(found))


def _part(network: PreTrainedModel, paths: tuple[str, ...]) -> Any:
    """The part of the network at the first of these dotted paths that exists."""
    for path in paths:
        try:
            return network.get_submodule(path)
        except AttributeError:
            continue
    raise ValueError(f"a {network.config.model_type} model has none of {', '.join(paths)}")


if __name__ == "__main__":
    main()
