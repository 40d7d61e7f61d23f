"""What an intervention does, measured row by row, with an interval over rows and a control.

1. A *repeat* is a token that continues an earlier copy: its predecessor is a query, and one of that query's targets
   holds the same token. A *fresh* token stands before the row's first repeat. What is specific to induction is the rise
   of the loss at repeats beyond the rise at fresh tokens.
2. The effect of an intervention on a metric is the mean over rows of (under the intervention) - (clean), with a 95 %
   bootstrap interval over rows.
3. Its control is the same intervention on as many other heads of the same layers, drawn at random several times:
   the mean of their effects, row by row, with an interval made the same way.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jsonschema
import numpy as np
import torch
from numpy.typing import NDArray

from common.attention.batches import Advance
from common.attention.head import Head
from common.heads.statistics import Floats, Ints, interval_over_rows, mean_per_row
from common.heads.tokens import ROW_LENGTH, TokenBatch, battery, continuing
from common.interventions.edits import Intervene, Intervention, Recordings, knockout, mean, position_classes
from common.interventions.runner import Predictions, Runner

if TYPE_CHECKING:
    from common.attention.call import Call
    from common.heads.detection import Detection
    from common.loading.model import Model

CONTROLS = 3  # random sets of heads beside each set
UNASKED = 60.0  # seconds that experiments may take without being asked for
METRICS = ("loss_at_repeats", "loss_at_fresh", "loss_difference")  # those that every intervention is measured by

Effect = dict[str, Any]  # what `effect` returns, as results.json holds it
PathEffect = Effect  # that of a path also names its `sender`


def fresh(batch: TokenBatch) -> NDArray[np.bool_]:
    """Which tokens, [rows, pos], stand after BOS and before the row's first repeat."""
    repeated = continuing(batch)
    first = np.where(repeated.any(1), repeated.argmax(1), batch.lengths)
    position = np.arange(batch.tokens.shape[1])
    return (position > 0) & (position < first[:, None])


class Experiment:
    """Battery rows that no other part of the project draws, and what is measured on them.

    `found`: heads that attend to their targets are no controls (`avoid`). `first`: the battery row to begin at.
    `settings`: what another run must share to go on from this one. `runs`: how many times rows are run, at most.
    """

    runs = 1

    def __init__(self, model: Model, found: Detection, *, rows: int, first: int, seed: int, batch_size: int):
        length = min(ROW_LENGTH, model.context)
        self.model, self.seed, self.batch_size = model, seed, batch_size
        self.drawn = battery(model.ordinary(), model.bos, rows=rows, length=length, seed=seed, first=first)
        self.metrics = RowMetrics(model, self.drawn.repeats, batch_size=batch_size)
        self.avoid = [Head.at(*place) for place in np.argwhere(found.attends)]
        self.settings: dict[str, object] = {
            "fingerprint": model.fingerprint, "seed": seed, "rows": rows, "controls": CONTROLS,
            "length": self.drawn.repeats.tokens.shape[1], "avoided": names(self.avoid),
        }  # fmt: skip

    def ablations(self) -> dict[str, Intervene]:
        """The two interventions that take a head away, by name."""
        controls = Recordings(self.model, self.drawn.controls.tokens, batch_size=self.batch_size)
        classes, cells = position_classes(self.drawn.repeats), self.drawn.repeats.cells["prefix_matching"]
        return {"mean": lambda heads: mean(heads, controls, classes), "knockout": lambda heads: knockout(heads, cells)}

    def seconds(self) -> float:
        """How long all `runs` will take at the most, from the time of one."""
        self.metrics.losses(None)  # a first run is slower
        started = time.monotonic()
        self.metrics.losses(None)
        return (time.monotonic() - started) * self.runs


class RowMetrics:
    """What is measured of a model's predictions on rows, per row; higher is worse but for `log_prob_at_repeats`.

    | metric | mean over the row's |
    |---|---|
    | loss_at_repeats, loss_at_fresh | loss in nats of repeats, of fresh tokens |
    | loss_difference | the first less the second |
    | log_prob_at_repeats | log-probability of repeats, in nats |
    | rank_at_repeats | place of the right token among all, from 1 |
    | kl_at_repeats | divergence from the clean prediction, in nats |
    """

    def __init__(self, model: Model, batch: TokenBatch, *, batch_size: int = 8):
        repeated = continuing(batch)
        predictions = Predictions.of(batch.tokens, repeated | fresh(batch))
        self.batch = batch
        self.runner = Runner(model, batch.tokens, predictions, batch_size=batch_size)
        self._repeated = repeated[predictions.row, predictions.position + 1]

    def of(self, intervention: Intervention | None) -> dict[str, Floats]:
        """Each metric, {name: [rows]}, under the intervention (None: clean); NaN for a row with nothing to read."""
        runner = self.runner
        found = runner.measure(intervention, {"log_prob": runner.log_prob, "rank": runner.rank, "kl": runner.kl})
        at_repeats = {f"{name}_at_repeats": self._mean(values, self._repeated) for name, values in found.items()}
        return {**self._losses(found["log_prob"]), **at_repeats}

    def losses(self, intervention: Intervention | None) -> dict[str, Floats]:
        """`METRICS` alone, which need neither ranks nor the clean predictions."""
        return self._losses(self.runner.log_probs(intervention))

    def prefix_matching(self, head: Head, intervention: Intervention | None = None) -> Floats:
        """The head's own prefix matching per row, [rows] in [0, 1]; NaN without a target."""
        cells = self.batch.cells["prefix_matching"]
        paid = np.zeros(self.batch.tokens.shape)

        def read(call: Call, rows: slice) -> None:
            inside = (cells.row >= rows.start) & (cells.row < rows.stop)
            pattern = call.pattern_of(head.head).double().cpu().numpy()
            read_off = pattern[cells.row[inside] - rows.start, cells.query[inside], cells.key[inside]]
            np.add.at(paid, (cells.row[inside], cells.query[inside]), read_off)

        self.runner.watch(head.layer, intervention, read)
        row, query = cells.queries()
        return mean_per_row(paid[row, query], row, len(self.batch.tokens))

    def _losses(self, log_prob: Floats) -> dict[str, Floats]:
        repeats, fresh = (-self._mean(log_prob, chosen) for chosen in (self._repeated, ~self._repeated))
        return dict(zip(METRICS, (repeats, fresh, repeats - fresh), strict=True))

    def _mean(self, values: Floats, chosen: NDArray[np.bool_]) -> Floats:
        return mean_per_row(values[chosen], self.runner.predictions.row[chosen], len(self.batch.tokens))


def losses(model: Model, batch: TokenBatch, intervention: Intervention | None = None, *, batch_size: int = 8) -> Floats:
    """Loss of every token given those before it, [rows, pos], in nats, clean or under an intervention; NaN at 0."""
    found = np.full(batch.tokens.shape, np.nan)
    for start in range(0, len(batch.tokens), batch_size):
        rows = slice(start, start + batch_size)
        logits = model.logits(batch.tokens[rows], intervention.edits if intervention else (), rows=rows).float()
        following = torch.from_numpy(batch.tokens[rows, 1:]).to(logits.device)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), following, reduction="none")
        found[rows, 1:] = loss.double().cpu().numpy()
    return found


def continuation(
    model: Model, tokens: Ints, count: int, intervene: Callable[[TokenBatch], Intervention] | None = None
) -> Ints:
    """The `count` likeliest next ids, one by one, after [pos] ids that start with BOS. `intervene` is asked anew as the
    row grows, such as `lambda row: knockout(heads, row.cells["prefix_matching"])`."""
    grown = list(tokens)
    for _ in range(count):
        row = TokenBatch.of([np.array(grown, dtype=np.int64)], pad=model.bos)
        grown.append(int(model.logits(row.tokens, intervene(row).edits if intervene else ())[0, -1].argmax()))
    return np.array(grown[len(tokens) :], dtype=np.int64)


def with_interval(values: Floats, *, seed: int = 0) -> tuple[float, list[float]]:
    """Mean of [rows] values and its 95 % bootstrap interval. Rows that are NaN are left out; NaN throughout where none
    is left."""
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), [float("nan")] * 2
    return float(values.mean()), [float(end) for end in interval_over_rows(values, seed)]


def effect(
    name: str, heads: Sequence[Head], metric: str, clean: Floats, changed: Floats,
    controls: Sequence[tuple[Sequence[Head], Floats]] = (), *, note: str | None = None, seed: int = 0,
) -> Effect:  # fmt: skip
    """The effect of an intervention on a metric, from its value per row, [rows], `clean` and `changed`.

    `controls`: sets of random heads and the metric per row under the same intervention on them; `note`: why there are
    none. Returns the `name` of the intervention and the `heads` it is made on; `clean`: the mean over rows without it,
    `effect`: that of with - without, `interval`: its 95 % interval, `rows`: how many rows had the metric; `control`:
    effect, interval and sets of `heads` of the controls, or None.
    """
    counted = ~np.isnan(changed - clean)
    mean_change, interval = with_interval(changed - clean, seed=seed)
    control: dict[str, object] | None = None
    if controls:
        moved, ends = with_interval(np.mean([values - clean for _, values in controls], axis=0), seed=seed)
        control = {"effect": moved, "interval": ends, "heads": [names(others) for others, _ in controls]}
    return {
        "name": name, "heads": names(heads), "metric": metric,
        "clean": float(clean[counted].mean()) if counted.any() else float("nan"),
        "effect": mean_change, "interval": interval, "rows": int(counted.sum()), "control": control, "note": note,
    }  # fmt: skip


def effects_with_controls(
    metrics: RowMetrics, name: str, sets: Sequence[tuple[Head, ...]], intervene: Intervene, *,
    controls: int, avoid: Collection[Head] = (), seed: int = 0, advance: Advance = lambda count: None,
) -> Iterator[list[Effect]]:  # fmt: skip
    """Yield, for each set of heads (lowest layer first), the effect of `intervene(heads)` on every metric, as `name`.

    Each is set beside the same on `controls` layer-matched random sets, none of whose heads are in the set or in
    `avoid`. `advance` is told of each set and each control done. Interrupted, what was yielded stays good.
    """
    n_heads = metrics.runner.model.n_heads
    clean = metrics.of(None)
    for heads in sorted(sets, key=min):
        measured = {}
        for some in (heads, *layer_matched(heads, n_heads, count=controls, avoid=avoid, seed=seed)):
            measured[some] = metrics.of(intervene(some))
            advance(1)
        changed, note = measured.pop(heads), no_control(heads, n_heads, avoid)
        yield [
            effect(name, heads, metric, before, changed[metric],
                   [(others, values[metric]) for others, values in measured.items()], note=note, seed=seed)
            for metric, before in clean.items()
        ]  # fmt: skip


def layer_matched(
    heads: Sequence[Head], n_heads: int, *, count: int, avoid: Collection[Head] = (), seed: int
) -> list[tuple[Head, ...]]:
    """Up to `count` different random sets with as many heads in each layer as `heads` has, and none of `heads` or
    `avoid` in them. Empty where a layer has too few others: heads of other layers would be no match."""
    if no_control(heads, n_heads, avoid):
        return []
    pools, rng = _pools(heads, n_heads, avoid), np.random.default_rng(seed)
    found: dict[tuple[Head, ...], None] = {}  # a set that keeps the order of drawing
    for _ in range(20 * count):  # a small pool has fewer different sets than are asked for
        chosen = {layer: rng.choice(pool, size, replace=False) for layer, (size, pool) in pools.items()}
        found[tuple(sorted(Head.at(layer, head) for layer, picked in chosen.items() for head in picked))] = None
        if len(found) == count:
            break
    return list(found)


def no_control(heads: Sequence[Head], n_heads: int, avoid: Collection[Head] = ()) -> str | None:
    """Why `layer_matched` has nothing to draw from, or None."""
    for layer, (size, pool) in sorted(_pools(heads, n_heads, avoid).items()):
        if len(pool) < size:
            return f"no control: layer {layer} has {len(pool)} other heads, {size} are needed"
    return None


def _pools(heads: Sequence[Head], n_heads: int, avoid: Collection[Head]) -> dict[int, tuple[int, list[int]]]:
    """By layer, how many of `heads` it has, and the heads that are neither among them nor to be avoided."""
    taken = {*heads, *avoid}
    return {
        layer: (size, [head for head in range(n_heads) if Head.at(layer, head) not in taken])
        for layer, size in Counter(head.layer for head in heads).items()
    }


def names(heads: Sequence[Head]) -> list[str]:
    """`["5.1", "6.9"]`."""
    return [str(head) for head in heads]


_NUMBER = {"type": ["number", "null"]}  # NaN is saved as null
_ENDS = {"type": "array", "items": _NUMBER, "minItems": 2, "maxItems": 2}
_HEADS = {"type": "array", "items": {"type": "string"}}
_CONTROL = {"effect": _NUMBER, "interval": _ENDS, "heads": {"type": "array", "items": _HEADS}}
_EFFECT = {
    "name": {"type": "string"}, "heads": _HEADS, "metric": {"type": "string"}, "clean": _NUMBER, "effect": _NUMBER,
    "interval": _ENDS, "rows": _NUMBER, "note": {"type": ["string", "null"]},
    "control": {"type": ["object", "null"], "required": list(_CONTROL), "properties": _CONTROL},
}  # fmt: skip
_FORM = {"type": "object", "required": list(_EFFECT), "properties": {**_EFFECT, "sender": {"type": "string"}}}


def known_effects(earlier: object, settings: Mapping[str, object]) -> list[Effect]:
    """The effects of an earlier result that was measured with the same settings; none of anything else."""
    # It was read from a file that anybody may have written: nothing is taken for granted.
    if not isinstance(earlier, dict) or earlier.get("settings") != settings:
        return []
    effects: Any = earlier.get("effects")
    return effects if jsonschema.Draft202012Validator({"type": "array", "items": _FORM}).is_valid(effects) else []
