"""Causal labels: what a head's attention to its targets does to the loss at repeats. Never reads an attention score.

On battery rows that detection does not draw, two effects of every head, each with its 95 % interval over rows:

1. needed: the rise of the loss at repeats when the head's attention to its targets is forbidden (row renormalised; the
   rest of the head stays: taking the whole head away would indict previous-token heads too);
2. direct: what the same change of this head takes from the correct token's logit, above the mean logit, on the direct
   path to the output, all else kept. It shows heads that cover for each other, none of which is needed alone.

The rule: induction where either effect is at least `LEAST` nats and its interval lies above 0; else suppression where
either is at most `-LEAST` and its interval lies below 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from common.attention.head import Head as NamedHead
from common.heads.direct import direct_logit_effect
from common.heads.labels import Labels
from common.heads.statistics import Floats, interval_over_rows
from common.heads.tokens import ROW_LENGTH, Progress, battery, continuing, silent
from common.interventions.bench import Bench, Reads
from common.interventions.effects import needed
from common.loading.models import Model

LEAST = 0.05
ROWS = 32
FIRST_ROW = 1_000_000  # detection draws rows from 0 on, from the same seed

Head = tuple[int, int]


@dataclass(frozen=True)
class CausalEffects:
    """`needed` and `direct`, [rows, layers, heads], in nats; positive where attention to the targets helps."""

    needed: Floats
    direct: Floats
    source: str

    def labels(self) -> Labels:
        """The induction heads by the rule of this module."""
        return Labels(frozenset(NamedHead.at(*place) for place in self.heads(+1)), self.source)

    def heads(self, sign: int) -> list[Head]:
        """Heads that raise (+1) or only lower (-1) the correct token by `LEAST` nats or more, surely."""
        helps, harms = self._surely(+1), self._surely(-1)
        places = np.argwhere(helps if sign > 0 else harms & ~helps)
        return [(int(layer), int(head)) for layer, head in places]

    def as_json(self) -> dict[str, Any]:
        """The content of a labels.json."""
        effects = {"needed": self.needed, "direct": self.direct}
        means = {kind: effect.mean(0) for kind, effect in effects.items()}
        ends = {kind: interval_over_rows(effect) for kind, effect in effects.items()}
        every_head = [(int(layer), int(head)) for layer, head in np.ndindex(*self.needed.shape[1:])]
        return {
            "source": self.source,
            "induction_heads": [str(NamedHead.at(*head)) for head in self.heads(+1)],
            "suppression_heads": [str(NamedHead.at(*head)) for head in self.heads(-1)],
            "effects_in_nats_with_95_percent_intervals": {
                str(NamedHead.at(*head)): {
                    kind: [round(float(value[head]), 4) for value in (means[kind], *ends[kind])] for kind in effects
                }
                for head in every_head
            },
        }

    def _surely(self, sign: int) -> Any:
        """[layers, heads]: whether either effect is large in this direction and its interval lies on one side of 0."""
        passed = np.zeros(self.needed.shape[1:], dtype=bool)
        for effect in (sign * self.needed, sign * self.direct):
            low, _ = interval_over_rows(effect)
            passed |= (effect.mean(0) >= LEAST) & (low > 0)
        return passed


def measure(model: Model, *, batch_size: int = 8, seed: int = 0, progress: Progress = silent) -> CausalEffects:
    """Both effects of every head. Takes a forward pass for every head, less the layers below it."""
    length = min(ROW_LENGTH, model.context)
    drawn = battery(model.ordinary(), model.bos, rows=ROWS, length=length, seed=seed, first=FIRST_ROW).repeats
    reads = Reads.of(drawn.tokens, continuing(drawn))
    heads = [(layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]
    shape = (ROWS, model.n_layers, model.n_heads)
    with progress("causal labels, direct effects", ROWS) as advance:
        direct = direct_logit_effect(model, drawn, reads, heads, batch_size=batch_size, advance=advance)
    bench = Bench(model, drawn.tokens, reads, batch_size=batch_size)
    found = np.zeros(shape)
    with progress("causal labels, heads", len(heads)) as advance:
        for (layer, head), rise in needed(bench, drawn, heads, advance=advance):
            found[:, layer, head] = rise
    how = f"{ROWS} rows of {length} tokens, seed {seed}, at least {LEAST} nats"
    return CausalEffects(found, direct.reshape(shape), f"causal: attention to the targets forbidden, {how}")
