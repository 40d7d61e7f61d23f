"""What an intervention does, measured row by row, with an interval over rows and a control.

1. A *repeat* is a token that continues an earlier copy: its predecessor is a query, and one of that query's targets
   holds the same token. A *fresh* token stands before the row's first repeat. What is specific to induction is the rise
   of the loss at repeats beyond the rise at fresh tokens.
2. The effect of an intervention on a metric is the mean over rows of (under the intervention) - (clean), with a 95 %
   interval over rows (common/heads/statistics.py).
3. Its control is the same intervention on as many other heads of the same layers: `CONTROLS` different sets drawn at
   random, or all that there are. Their effects differ widely, so each is kept: the lowest, the median and the highest
   are reported, and the share that is at least as large as the real one.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cache
from importlib.metadata import version
from itertools import combinations, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

# Random sets of heads beside each set. Nine draws of one published set ran from 0.65 to 36 % (arXiv 2605.24059).
CONTROLS = 20
UNASKED = 60.0  # seconds that experiments may take without being asked for
COMPUTED_BY = ("torch", "transformers", "transformer-lens", "numpy")  # packages whose version can change a number
COMPUTING = ("attention", "loading", "heads", "circuits", "interventions")  # folders of common/ likewise
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
    `settings`: everything that could change a number, which another run must share to go on from this one. `known`:
    effects of such a run, which are not measured again. `runs`: how many times the rows will be run.
    """

    def __init__(self, model: Model, found: Detection, *, rows: int, first: int, seed: int, batch_size: int):
        length = min(ROW_LENGTH, model.context)
        self.model, self.seed, self.batch_size = model, seed, batch_size
        self.drawn = battery(model.ordinary(), model.bos, rows=rows, length=length, seed=seed, first=first)
        self.metrics = RowMetrics(model, self.drawn.repeats, batch_size=batch_size)
        self.avoid = [Head.at(*place) for place in np.argwhere(found.attends)]
        self.known: list[Effect] = []
        self.settings: dict[str, object] = {
            "fingerprint": model.fingerprint, "dtype": str(model.dtype), "device": device_name(model),
            "versions": {name: version(name) for name in COMPUTED_BY}, "code": code_version(), "seed": seed,
            "batch_size": batch_size, "rows": rows, "tokens": _digest(self.drawn.repeats, self.drawn.controls),
            "controls": CONTROLS, "avoided": names(self.avoid),
        }  # fmt: skip

    @property
    def runs(self) -> int:
        """How many times the rows will be run."""
        return 1

    def run_once(self) -> None:
        """One of the `runs`, without an intervention."""
        self.metrics.losses(None)

    def ablations(self) -> dict[str, Intervene]:
        """The two interventions that take a head away, by name."""
        controls = Recordings(self.model, self.drawn.controls.tokens, batch_size=self.batch_size)
        classes, cells = position_classes(self.drawn.repeats), self.drawn.repeats.cells["prefix_matching"]
        return {"mean": lambda heads: mean(heads, controls, classes), "knockout": lambda heads: knockout(heads, cells)}

    def seconds(self) -> float:
        """How long all `runs` will take at the most, from the time of one."""
        if not self.runs:
            return 0.0
        self.run_once()  # a first run is slower
        started = time.monotonic()
        self.run_once()
        return (time.monotonic() - started) * self.runs


def device_name(model: Model) -> str:
    """The device, and which kind of GPU it is."""
    device = model.device
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


@cache
def code_version() -> str:
    """SHA-256 over the source files of this project that compute a number."""
    common, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(path for folder in COMPUTING for path in (common / folder).glob("*.py")):
        digest.update(f"{path.relative_to(common).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _digest(*batches: TokenBatch) -> str:
    """SHA-256 over the rows: they hang on seed and length, but also on the tokenizer's ordinary tokens."""
    return hashlib.sha256(b"".join(batch.tokens.tobytes() for batch in batches)).hexdigest()


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


def with_interval(values: Floats) -> tuple[float, list[float]]:
    """Mean of [rows] values and its 95 % interval. Rows that are NaN are left out; the interval is NaN where fewer than
    two are left, the mean where none is."""
    values = values[~np.isnan(values)]
    mean = float(values.mean()) if len(values) else float("nan")
    return mean, [float(end) for end in interval_over_rows(values)]


def effect(
    name: str, heads: Sequence[Head], metric: str, clean: Floats, changed: Floats,
    controls: Sequence[tuple[Sequence[Head], Floats]] = (), *, exhaustive: bool = False, note: str | None = None,
) -> Effect:  # fmt: skip
    """The effect of an intervention on a metric, from its value per row, [rows], `clean` and `changed`.

    `controls`: sets of random heads and the metric per row under the same intervention on them; `exhaustive`: whether
    these are all sets there are; `note`: why there are none. Returns the `name` of the intervention and the `heads` it
    is made on; `clean`: the mean over rows without it, `effect`: that of with - without, `interval`: its 95 % interval,
    `rows`: how many rows had the metric; `control`: as `beside` has it, or None.
    """
    counted = ~np.isnan(changed - clean)
    mean_change, interval = with_interval(changed - clean)
    drawn = [(names(others), with_interval(values - clean)[0]) for others, values in controls]
    return {
        "name": name, "heads": names(heads), "metric": metric,
        "clean": float(clean[counted].mean()) if counted.any() else float("nan"),
        "effect": mean_change, "interval": interval, "rows": int(counted.sum()),
        "control": beside(mean_change, drawn, exhaustive) if drawn else None, "note": note,
    }  # fmt: skip


def beside(real: float, drawn: Sequence[tuple[list[str], float]], exhaustive: bool) -> dict[str, object]:
    """What random heads do beside a `real` effect: sets of heads with their effects, `drawn`, as results.json holds
    them: their mean (`effect`), `lowest`, `median` and `highest`, and `share_as_large`, the share of draws whose effect
    is at least as large as the real one in its direction."""
    effects = np.array([moved for _, moved in drawn])
    as_large = effects >= real if real >= 0 else effects <= real
    return {
        "effect": float(effects.mean()), "lowest": float(effects.min()), "median": float(np.median(effects)),
        "highest": float(effects.max()), "draws": len(drawn), "exhaustive": exhaustive,
        "share_as_large": float(as_large.mean()) if np.isfinite(real) else float("nan"),
        "heads": [heads for heads, _ in drawn], "effects": effects.tolist(),
    }  # fmt: skip


def effects_with_controls(
    metrics: RowMetrics, name: str, sets: Sequence[tuple[Head, ...]], intervene: Intervene, *,
    controls: int, avoid: Collection[Head] = (), seed: int = 0, advance: Advance = lambda count: None,
) -> Iterator[list[Effect]]:  # fmt: skip
    """Yield, for each set of heads (lowest layer first), the effect of `intervene(heads)` on every metric, as `name`.

    Each is set beside the same on `controls` layer-matched random sets, none of whose heads are in the set or in
    `avoid`. A set of heads that serves several times is measured once. `advance` is told of each that is measured.
    Interrupted, what was yielded stays good.
    """
    n_heads = metrics.runner.model.n_heads
    clean, measured = metrics.of(None), {}
    for heads in sorted(sets, key=min):
        others = layer_matched(heads, n_heads, count=controls, avoid=avoid, seed=seed)
        for some in (heads, *others):
            if some not in measured:
                measured[some] = metrics.of(intervene(some))
                advance(1)
        exhaustive = len(others) == matched_sets(heads, n_heads, avoid)
        yield [
            effect(name, heads, metric, before, measured[heads][metric],
                   [(some, measured[some][metric]) for some in others],
                   exhaustive=exhaustive, note=no_control(heads, n_heads, avoid))
            for metric, before in clean.items()
        ]  # fmt: skip


def with_their_controls(
    sets: Sequence[tuple[Head, ...]], n_heads: int, *, count: int, avoid: Collection[Head], seed: int
) -> set[tuple[Head, ...]]:
    """Every set of heads that `effects_with_controls` measures."""
    drawn = (layer_matched(heads, n_heads, count=count, avoid=avoid, seed=seed) for heads in sets)
    return {*sets, *(others for some in drawn for others in some)}


def layer_matched(
    heads: Sequence[Head], n_heads: int, *, count: int, avoid: Collection[Head] = (), seed: int
) -> list[tuple[Head, ...]]:
    """`count` different random sets with as many heads in each layer as `heads` has, and none of `heads` or `avoid` in
    them; all there are where those are no more. Empty where a layer has too few others: heads of other layers would be
    no match."""
    pools = _pools(heads, n_heads, avoid)
    if matched_sets(heads, n_heads, avoid) <= count:
        every = ([Head.at(layer, head) for head in pool] for layer, (_, pool) in pools.items())
        sizes = (size for size, _ in pools.values())
        chosen = product(*(combinations(pool, size) for pool, size in zip(every, sizes, strict=True)))
        return [tuple(sorted(head for some in picked for head in some)) for picked in chosen]
    rng, found = np.random.default_rng(seed), dict[tuple[Head, ...], None]()  # a set that keeps the order of drawing
    while len(found) < count:
        drawn = {layer: rng.choice(pool, size, replace=False) for layer, (size, pool) in pools.items()}
        found[tuple(sorted(Head.at(layer, head) for layer, picked in drawn.items() for head in picked))] = None
    return list(found)


def matched_sets(heads: Sequence[Head], n_heads: int, avoid: Collection[Head] = ()) -> int:
    """How many different sets `layer_matched` could draw."""
    return math.prod(math.comb(len(pool), size) for size, pool in _pools(heads, n_heads, avoid).values())


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
