"""Causal labels: what a head's attention to its targets does to the prediction of repeats. Reads no attention score.

On battery rows that detection does not draw, two effects of every head, each with its 95 % interval over rows:

1. needed: what attention knockout of the head's target cells takes from the correct token's logit, above the mean
   logit, at repeats (the rest of the head stays: taking the whole head away would indict previous-token heads too);
2. direct: what the same change of this head takes from the correct token's logit, above the mean logit, on the direct
   path to the output, all else kept and the final norm recomputed. It shows heads that cover for each other, none of
   which is needed alone (self-repair: McGrath et al. 2023, arXiv 2307.15771).

Of both, what the same change does in the control row is taken off: there the same cells hold the same tokens, and the
current token did not come before them. A head that copies whatever it sees, by chance also its targets, does as much
there. Logits are compared, not losses: what a logit does to the loss hangs on the other tokens, which compete
differently in the two rows, and a difference of losses would call such a head induction or suppression.

The rule: induction where either effect is at least `LEAST` nats and its interval lies above 0; else suppression where
either is at most `-LEAST` and its interval lies below 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from common.attention.batches import Advance, Progress, silent
from common.attention.head import Head
from common.heads.attribution import check_readout, check_written
from common.heads.labels import Labels
from common.heads.statistics import Floats, Ints, interval_over_rows, mean_per_row
from common.heads.tokens import ROW_LENGTH, TokenBatch, battery, continuing
from common.interventions.edits import knockout
from common.interventions.effects import names
from common.interventions.runner import Predictions, Runner, sweep
from common.loading.families import unembedding_weights

if TYPE_CHECKING:
    from common.attention.call import Call
    from common.loading.model import Model

LEAST = 0.05  # nats; the size that counts as an effect in the project's facts on SmolLM2-135M
LABEL_ROWS = 32
MEASURED = (
    "what attention knockout of the head's targets takes from the correct token's logit, and what they add to the "
    "correct token's logit directly"
)
LABEL_FROM = 1_000_000  # detection draws rows from 0 on, from the same seed


@dataclass(frozen=True)
class CausalEffects:
    """`needed` and `direct`, [rows, layers, heads], in nats; positive where attention to the targets helps."""

    needed: Floats
    direct: Floats
    source: str

    def labels(self) -> Labels:
        """The induction heads by the rule of this module."""
        return Labels(frozenset(self.heads(+1)), self.source, "causal", MEASURED)

    def heads(self, sign: int) -> list[Head]:
        """Heads that raise (+1) or only lower (-1) the correct token by `LEAST` nats or more, surely."""
        both = np.stack([self.needed, self.direct], 1)
        mean, (low, high) = both.mean(0), interval_over_rows(both)
        helps = ((mean >= LEAST) & (low > 0)).any(0)
        harms = ((mean <= -LEAST) & (high < 0)).any(0)
        return [Head.at(*place) for place in np.argwhere(helps if sign > 0 else harms & ~helps)]

    def as_json(self) -> dict[str, object]:
        """The content of a labels.json."""
        numbers, by_head = {}, {}
        for kind, effect in (("needed", self.needed), ("direct", self.direct)):
            numbers[kind] = np.stack([effect.mean(0), *interval_over_rows(effect)], -1).round(4)
        for place in np.ndindex(*self.needed.shape[1:]):
            by_head[str(Head.at(*place))] = {kind: values[place].tolist() for kind, values in numbers.items()}
        return {
            "kind": "causal",
            "source": self.source,
            "measured": MEASURED,
            "induction_heads": names(self.heads(+1)),
            "suppression_heads": names(self.heads(-1)),
            "effects_in_nats_with_95_percent_intervals": by_head,
        }


def measure_causal_effects(
    model: Model, *, batch_size: int = 8, seed: int = 0, progress: Progress = silent
) -> CausalEffects:
    """Both effects of every head. Takes two forward passes for every head, less the layers below it.

    Raises UserError for a model whose head outputs do not reach its logits directly: `direct` cannot be measured there.
    """
    length = min(ROW_LENGTH, model.context)
    pairs = battery(model.ordinary(), model.bos, rows=LABEL_ROWS, length=length, seed=seed, first=LABEL_FROM)
    drawn, controls = pairs.repeats, pairs.controls
    predictions = Predictions.of(drawn.tokens, continuing(drawn))
    with progress("causal labels, direct effects", LABEL_ROWS) as advance:
        direct = exact_direct_effect(model, drawn, predictions, batch_size=batch_size, advance=advance)
    every = [Head.at(*place) for place in np.ndindex(*direct.shape[1:])]
    with progress("causal labels, heads", len(every)) as advance:
        needed = _needed(model, drawn, predictions, every, batch_size=batch_size, advance=advance)
    with progress("causal labels, control rows", len(every)) as advance:
        needed -= _needed(model, controls, predictions, every, batch_size=batch_size, advance=advance)
    direct -= exact_direct_effect(model, controls, predictions, batch_size=batch_size)
    how = f"{LABEL_ROWS} rows of {drawn.tokens.shape[1]} tokens, seed {seed}, at least {LEAST} nats"
    return CausalEffects(
        needed, direct, f"causal: attention knockout of the targets, less the same in control rows, {how}"
    )


def _needed(
    model: Model,
    rows: TokenBatch,
    predictions: Predictions,
    heads: Sequence[Head],
    *,
    batch_size: int,
    advance: Advance,
) -> Floats:
    """What each of `heads` adds to the logit of the predicted tokens, above the mean logit, by its target cells,
    [rows, layers, heads] in nats. On control rows these are still the tokens that the repeat would bring."""
    runner = Runner(model, rows.tokens, predictions, batch_size=batch_size)
    clean, needed = runner.logits_above_mean(None), np.zeros((len(rows.tokens), model.n_layers, model.n_heads))
    each = [knockout([head], rows.cells["prefix_matching"]) for head in heads]
    for intervention, found in sweep(runner, each, advance=advance, measure=Runner.logits_above_mean):
        (head,) = intervention.heads
        needed[:, head.layer, head.head] = mean_per_row(clean - found, predictions.row, len(rows.tokens))
    return needed


def exact_direct_effect(
    model: Model, batch: TokenBatch, predictions: Predictions, *, batch_size: int = 8, advance: Advance = lambda n: None
) -> Floats:
    """The direct effect of each head's prefix-matching cells on the right token's logit less the mean logit,
    [rows, layers, heads], in nats; NaN for a row without a prediction. Above 0: the cells raise it.

    Final norm and unembedding are computed again on what is left of the final residual stream: exact, not the linear
    approximation of direct logit attribution. Raises UserError for a model whose logits are not an unembedding of its
    normed residual stream, or whose head outputs do not reach that stream as they are.
    """
    check_readout(model, batch.tokens[:1])
    rows, found = len(batch.tokens), np.full((len(predictions.row), model.n_layers, model.n_heads), np.nan)
    for start in range(0, rows, batch_size):
        part = batch.rows(start, start + batch_size)
        which = np.flatnonzero((predictions.row >= start) & (predictions.row < start + batch_size))
        if len(which):
            at = predictions.row[which] - start, predictions.position[which]
            found[which] = _direct_at_once(model, part, at, torch.from_numpy(predictions.token[which]).to(model.device))
        advance(len(part.tokens))
    return mean_per_row(found, predictions.row, rows)


def _direct_at_once(model: Model, part: TokenBatch, at: tuple[Ints, Ints], token: Tensor) -> Floats:
    """[predictions, layers, heads]: what each head's cells add to the logit of `token` at (row, position)."""
    cells = part.cells["prefix_matching"]
    targets = [torch.from_numpy(index).to(model.device) for index in (cells.row, cells.query, cells.key)]
    moves: dict[int, Tensor] = {}

    def keep(layer: int, call: Call) -> None:
        due = call.due_to(*targets)[at].to(call.v.dtype)  # [predictions, head, d_head]
        moves[layer] = torch.einsum("phd,hdm->phm", due, model.parts.layers[layer].weights.W_O)

    model.read(part.tokens, keep)
    layers, last = range(model.n_layers), (model.n_layers - 1, "resid_post")
    seen = model.record(part.tokens, {last, *product(layers, ("projected", "attn_out"))})
    for layer in layers:
        check_written(model, layer, seen[layer, "projected"], seen[layer, "attn_out"])
    stream, (weights, _) = seen[last][at][:, None], unembedding_weights(model.parts)  # [d_vocab, d_model]
    with torch.no_grad():
        # A bias of the unembedding stays as it is: it takes no part in the difference.
        direction, norm = weights[token] - weights.mean(0), model.parts.final_norm
        lost = [torch.einsum("nhm,nm->nh", norm(stream) - norm(stream - moves[layer]), direction) for layer in layers]
    return torch.stack(lost, 1).double().cpu().numpy()
