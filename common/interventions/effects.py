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

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from common.attention.head import Head as NamedHead
from common.heads.statistics import Floats, Ints, interval_over_rows
from common.heads.tokens import TokenBatch, continuing
from common.interventions.bench import Bench, Reads, sweep
from common.interventions.edits import Head, Intervention, applied, record, run_forward
from common.interventions.interventions import forbid
from common.loading.models import Model


def fresh(batch: TokenBatch) -> NDArray[np.bool_]:
    """Which tokens, [rows, pos], stand after BOS and before the row's first repeat."""
    repeated = continuing(batch)
    first = np.where(repeated.any(1), repeated.argmax(1), batch.lengths)
    position = np.arange(batch.tokens.shape[1])
    return (position > 0) & (position < first[:, None])


# --- measures, per row ---


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
        self.bench = Bench(model, batch.tokens, Reads.of(batch.tokens, repeated | fresh(batch)), batch_size=batch_size)
        reads = self.bench.reads
        self._repeated = repeated[reads.row, reads.position + 1]

    def of(self, intervention: Intervention | None) -> dict[str, Floats]:
        """Each metric, {name: [rows]}, under the intervention (None: clean); NaN for a row with nothing to read."""
        bench = self.bench
        found = bench.measure(intervention, {"log_prob": bench.log_prob, "rank": bench.rank, "kl": bench.kl})
        losses = self._losses(found["log_prob"])
        return {
            **losses,
            "log_prob_at_repeats": -losses["loss_at_repeats"],
            "rank_at_repeats": self._mean(found["rank"], self._repeated),
            "kl_at_repeats": self._mean(found["kl"], self._repeated),
        }

    def losses(self, intervention: Intervention | None) -> dict[str, Floats]:
        """The first three metrics alone, which need neither ranks nor the clean predictions."""
        return self._losses(self.bench.measure(intervention, {"log_prob": self.bench.log_prob})["log_prob"])

    def _losses(self, log_prob: Floats) -> dict[str, Floats]:
        repeats, fresh = (-self._mean(log_prob, chosen) for chosen in (self._repeated, ~self._repeated))
        return {"loss_at_repeats": repeats, "loss_at_fresh": fresh, "loss_difference": repeats - fresh}

    def _mean(self, values: Floats, chosen: NDArray[np.bool_]) -> Floats:
        reads = self.bench.reads
        some = Reads(reads.row[chosen], reads.position[chosen], reads.token[chosen])
        return some.row_means(values[chosen], len(self.bench.tokens))


def losses(model: Model, batch: TokenBatch, intervention: Intervention | None = None, *, batch_size: int = 8) -> Floats:
    """Loss of every token given those before it, [rows, pos], in nats, clean or under an intervention; NaN at 0."""
    found = np.full(batch.tokens.shape, np.nan)
    for start in range(0, len(batch.tokens), batch_size):
        rows = slice(start, start + batch_size)
        with applied(model, intervention, rows):
            logits = run_forward(model, batch.tokens[rows]).float()
        following = torch.from_numpy(batch.tokens[rows, 1:]).to(logits.device)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), following, reduction="none")
        found[rows, 1:] = loss.double().cpu().numpy()
    return found


def prefix_matching(
    model: Model, batch: TokenBatch, head: Head, intervention: Intervention | None = None, *, batch_size: int = 8
) -> Floats:
    """The head's own prefix matching per row, [rows] in [0, 1], clean or under an intervention; NaN without a target.

    Runs no layer above the head's.
    """
    found = np.full(len(batch.tokens), np.nan)
    place = head[0], "pattern"
    for start in range(0, len(batch.tokens), batch_size):
        rows = slice(start, start + batch_size)
        part = batch.rows(start, start + batch_size)
        cells = part.cells["prefix_matching"]
        pattern = record(model, part.tokens, {place}, intervention, rows)[place][:, head[1]].double().cpu().numpy()
        paid = np.bincount(cells.row, pattern[cells.row, cells.query, cells.key], minlength=len(part.tokens))
        with np.errstate(invalid="ignore"):
            found[rows] = paid / np.bincount(cells.group_row, minlength=len(part.tokens))
    return found


def needed(
    bench: Bench, batch: TokenBatch, heads: Sequence[Head], *, advance: Callable[[int], None] = lambda count: None
) -> Iterator[tuple[Head, Floats]]:
    """Yield each head with the rise of the loss at the bench's reads, per row [rows], when its own prefix-matching
    cells are forbidden. `bench` holds the rows of `batch`. Interrupted, what was yielded stays good."""
    clean = bench.measure(None, {"log_prob": bench.log_prob})["log_prob"]
    cells = batch.cells["prefix_matching"]
    for intervention, found in sweep(bench, [forbid([head], cells) for head in heads], advance=advance):
        yield intervention.heads[0], bench.reads.row_means(clean - found["log_prob"], len(batch.tokens))


def continuation(
    model: Model, tokens: Ints, count: int, intervene: Callable[[TokenBatch], Intervention] | None = None
) -> Ints:
    """The `count` likeliest next ids, one by one, after [pos] ids that start with BOS.

    `intervene` makes the intervention anew for the row as it grows, such as
    `lambda row: forbid(heads, row.cells["prefix_matching"])`.
    """
    grown = list(tokens)
    for _ in range(count):
        row = TokenBatch.of([np.array(grown, dtype=np.int64)], pad=model.bos)
        with applied(model, intervene(row) if intervene else None):
            grown.append(int(run_forward(model, row.tokens)[0, -1].argmax()))
    return np.array(grown[len(tokens) :], dtype=np.int64)


# --- from rows to an effect ---


def row_means(values: Floats, mask: NDArray[np.bool_]) -> Floats:
    """Mean of `values` [rows, pos] over `mask`, per row; NaN for a row with no place in it."""
    with np.errstate(invalid="ignore"):
        return np.where(mask, values, 0.0).sum(1) / mask.sum(1)


def interval(values: Floats, *, seed: int = 0) -> tuple[float, float, float]:
    """Mean of [rows] values and its 95 % bootstrap interval: (estimate, low, high). Rows that are NaN are left out; NaN
    throughout where none is left."""
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan"), float("nan")
    low, high = interval_over_rows(values, seed)
    return float(values.mean()), float(low), float(high)


@dataclass(frozen=True)
class Effect:
    """An intervention's effect on one metric, ready for results.json.

    `clean`: mean over rows without it. `effect`: mean over rows of with - without, `interval` its 95 % interval, `rows`
    how many rows had the metric. `control`: the same on random heads, {effect, interval, heads: the sets drawn}, or
    None, and then `note` says why.
    """

    name: str
    head: str
    metric: str
    clean: float
    effect: float
    interval: tuple[float, float]
    rows: int
    control: dict[str, Any] | None
    note: str | None = None

    def plain(self) -> dict[str, Any]:
        """Plain values, as `report.write_json` takes them."""
        return asdict(self)


def effect(
    intervention: Intervention,
    metric: str,
    clean: Floats,
    changed: Floats,
    controls: Sequence[tuple[Sequence[Head], Floats]] = (),
    *,
    note: str | None = None,
    seed: int = 0,
) -> Effect:
    """The effect of an intervention on a metric, from its value per row, [rows], `clean` and `changed`.

    `controls`: sets of random heads and the metric per row under the same intervention on them.
    """
    estimate, low, high = interval(changed - clean, seed=seed)
    control = None
    if controls:
        moved = np.mean([values - clean for _, values in controls], axis=0)
        mean, least, most = interval(moved, seed=seed)
        control = {"effect": mean, "interval": (least, most), "heads": [names(heads) for heads, _ in controls]}
    counted = ~np.isnan(changed - clean)
    level = float(clean[counted].mean()) if counted.any() else float("nan")
    return Effect(
        intervention.name,
        names(intervention.heads),
        metric,
        level,
        estimate,
        (low, high),
        int(counted.sum()),
        control,
        note,
    )


def effects_with_controls(
    metrics: RowMetrics,
    sets: Sequence[Sequence[Head]],
    intervene: Callable[[Sequence[Head]], Intervention],
    *,
    controls: int,
    avoid: Collection[Head] = (),
    seed: int = 0,
    advance: Callable[[int], None] = lambda count: None,
) -> Iterator[list[Effect]]:
    """Yield, for each set of heads (lowest layer first), the effect of `intervene(heads)` on every metric.

    Each is set beside the same on `controls` layer-matched random sets, none of whose heads are in the set or in
    `avoid`. `advance` is told of each set and each control done. Interrupted, what was yielded stays good.
    """
    n_heads = metrics.bench.model.n_heads
    clean = metrics.of(None)
    for heads in sorted(sets, key=min):
        intervention = intervene(heads)
        changed = metrics.of(intervention)
        advance(1)
        drawn = []
        for others in layer_matched(heads, n_heads, count=controls, avoid=avoid, seed=seed):
            drawn.append((others, metrics.of(intervene(others))))
            advance(1)
        note = None if drawn else no_control(heads, n_heads, avoid)
        yield [
            effect(
                intervention, metric, clean[metric], changed[metric],
                [(others, values[metric]) for others, values in drawn], note=note, seed=seed,
            )
            for metric in clean
        ]  # fmt: skip


def layer_matched(
    heads: Sequence[Head], n_heads: int, *, count: int, avoid: Collection[Head] = (), seed: int
) -> list[tuple[Head, ...]]:
    """Up to `count` different random sets with as many heads in each layer as `heads` has, and none of `heads` or
    `avoid` in them. Empty where a layer has too few others: heads of other layers would be no match."""
    if no_control(heads, n_heads, avoid):
        return []
    pools, sizes = _pools(heads, n_heads, avoid), Counter(layer for layer, _ in heads)
    rng = np.random.default_rng(seed)
    found: dict[tuple[Head, ...], None] = {}  # a set that keeps the order of drawing
    for _ in range(20 * count):
        chosen = {layer: rng.choice(pools[layer], size, replace=False).tolist() for layer, size in sizes.items()}
        found[tuple(sorted((layer, head) for layer, picked in chosen.items() for head in picked))] = None
        if len(found) == count:
            break
    return list(found)


def no_control(heads: Sequence[Head], n_heads: int, avoid: Collection[Head] = ()) -> str | None:
    """Why `layer_matched` has nothing to draw from, or None."""
    pools = _pools(heads, n_heads, avoid)
    for layer, size in sorted(Counter(layer for layer, _ in heads).items()):
        if len(pools[layer]) < size:
            return f"no control: layer {layer} has {len(pools[layer])} other heads, {size} are needed"
    return None


def _pools(heads: Sequence[Head], n_heads: int, avoid: Collection[Head]) -> dict[int, list[int]]:
    """Per layer of `heads`, the heads that are neither in it nor to be avoided."""
    taken = {*heads, *avoid}
    return {layer: [head for head in range(n_heads) if (layer, head) not in taken] for layer, _ in heads}


def names(heads: Sequence[Head]) -> str:
    """`5.1 6.9`."""
    return " ".join(str(NamedHead.at(*head)) for head in heads)
