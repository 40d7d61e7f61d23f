"""What a model loses without its induction heads: each of them, all together, and greedily one after the other.

Two interventions (common/interventions/edits.py) on battery rows that detection does not draw:

- mean ablation: the head output is its mean at positions of the same kind in the control rows. All of the head's
  output that depends on the row is gone, its constant part stays;
- attention knockout: the head does not attend to the tokens after earlier copies; its row of attention is renormalised.

Each effect has an interval and a control (common/interventions/effects.py). Single heads mislead where heads cover for
each other, so the set of all comes with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from common import UserError
from common.attention.batches import Advance, Progress, silent
from common.heads.tokens import continuing
from common.interventions.effects import (
    CONTROLS,
    Effect,
    Experiment,
    effects_with_controls,
    names,
    with_their_controls,
)
from common.interventions.runner import Predictions, Runner, greedy

if TYPE_CHECKING:
    from common.attention.head import Head
    from common.heads.detection import Detection
    from common.loading.model import Model

ABLATION_ROWS = 16
ABLATED_FROM = 2_000_000  # neither detection nor causal labels draw from here on
MOST_SINGLE = 8  # heads taken one by one, strongest first
MOST_GREEDY = 4
GREEDY = "the greedy order"


@dataclass
class Ablation:
    """What was measured. `clean`: each metric without intervention; `effects`: of single heads and of the `together`
    set; `greedy`: the head to take next, and the loss at repeats without it and all before it; `missing`: what an
    interruption left out; `impossible`: by intervention, why the model does not let it be made; `settings`: what
    another run must share to go on from here."""

    together: list[str]
    settings: Mapping[str, object]
    clean: dict[str, float]
    effects: list[Effect] = field(default_factory=list)
    greedy: list[dict[str, Any]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    impossible: dict[str, str] = field(default_factory=dict)

    def of(self, heads: Sequence[str], name: str, metric: str) -> Effect | None:
        """The effect of one intervention on one metric; None where it was not measured."""
        wanted = list(heads), name, metric
        return next((one for one in self.effects if (one["heads"], one["name"], one["metric"]) == wanted), None)

    def as_json(self) -> dict[str, object]:
        """For results.json."""
        return asdict(self)


class AblationPlan(Experiment):
    """What `ablate` will do for the induction heads that were `found`: single heads, and the set of all."""

    def __init__(self, model: Model, found: Detection, *, seed: int, batch_size: int):
        super().__init__(model, found, rows=ABLATION_ROWS, first=ABLATED_FROM, seed=seed, batch_size=batch_size)
        heads = found.ranked()
        self.settings["heads"] = names(heads)
        self.singles = heads[:MOST_SINGLE]
        self.sets = [(head,) for head in self.singles] + ([tuple(heads)] if len(heads) > 1 else [])
        self.interventions = self.ablations()
        self.greedy: list[dict[str, Any]] = []

    def go_on(self, earlier: Mapping[str, Any]) -> None:
        """Take over what `Ablation.as_json` gave in a run with the same settings: it is not measured again."""
        self.known, self.greedy = list(earlier["effects"]), list(earlier["greedy"])

    @property
    def wanted(self) -> dict[str, list[tuple[Head, ...]]]:
        """By intervention, the sets of heads whose effects are not known yet."""
        done = {(one["name"], *one["heads"]) for one in self.known}
        return {way: [some for some in self.sets if (way, *names(some)) not in done] for way in self.interventions}

    @property
    def greedy_steps(self) -> int:
        """How many heads the greedy order has."""
        return min(MOST_GREEDY, len(self.singles))

    @property
    def runs(self) -> int:
        """How many times the rows will be run."""
        draw: Mapping[str, Any] = {"count": CONTROLS, "avoid": self.avoid, "seed": self.seed}
        sets = sum(len(with_their_controls(sets, self.model.n_heads, **draw)) for sets in self.wanted.values())
        steps = 0 if len(self.greedy) == self.greedy_steps else self.greedy_steps
        return sets + sum(len(self.singles) - step for step in range(steps))

    def run_once(self) -> None:
        self.metrics.of(None)


def ablate(plan: AblationPlan, progress: Progress = silent) -> Ablation:
    """Take the induction heads away, one by one and together, each way; what the plan knows is not measured again. On
    Ctrl-C what is done is kept, and `missing` says what is not."""
    clean = {metric: float(np.nanmean(values)) for metric, values in plan.metrics.of(None).items()}
    result = Ablation(names(plan.sets[-1]) if plan.sets else [], plan.settings, clean, list(plan.known))
    result.missing = [" ".join([way, *names(some)]) for way, sets in plan.wanted.items() for some in sets] + [GREEDY]
    with progress("ablating heads", plan.runs) as advance, suppress(KeyboardInterrupt):
        for way, sets in plan.wanted.items():
            made = effects_with_controls(
                plan.metrics, way, sets, plan.interventions[way],
                controls=CONTROLS, avoid=plan.avoid, seed=plan.seed, advance=advance,
            )  # fmt: skip
            try:
                for effects in made:
                    result.effects += effects
                    result.missing.remove(" ".join([way, *effects[0]["heads"]]))
            except UserError as error:  # the model does not let it be made; the other way may be allowed
                result.impossible[way] = str(error)
        if "knockout" not in result.impossible:
            result.greedy = _greedy_order(plan, advance)
        result.missing = []
    return result


def _greedy_order(plan: AblationPlan, advance: Advance) -> list[dict[str, Any]]:
    """Which head to knock out next, up to `MOST_GREEDY`, and the loss at repeats with all so far."""
    if len(plan.greedy) == plan.greedy_steps:
        return plan.greedy
    repeats = plan.drawn.repeats
    predictions = Predictions.of(repeats.tokens, continuing(repeats))
    runner = Runner(plan.model, repeats.tokens, predictions, batch_size=plan.batch_size)
    order = greedy(runner, plan.singles, plan.interventions["knockout"], most=MOST_GREEDY, advance=advance)
    return [{"head": str(head), "loss_at_repeats": float(loss.mean())} for head, loss in order]
