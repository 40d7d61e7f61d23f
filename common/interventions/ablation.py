"""What a model loses without its induction heads: each of them, all together, and greedily one after the other.

Two interventions (common/interventions/edits.py) on battery rows that detection does not draw:

- mean ablation: the head output is its mean at positions of the same kind in the control rows. All of the head's
  output that depends on the row is gone, its constant part stays;
- attention knockout: the head does not attend to the tokens after earlier copies; its row of attention is renormalised.

Each effect has a 95 % interval over rows and, as its control, the same intervention on as many other heads of the same
layers, drawn at random. Single heads mislead where heads cover for each other, so the set of all comes with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, TypedDict, cast

import numpy as np

from common import UserError
from common.attention.batches import Advance, Progress, silent
from common.heads.tokens import continuing
from common.interventions.effects import CONTROLS, Effect, Experiment, effects_with_controls, names
from common.interventions.runner import Predictions, Runner, greedy

if TYPE_CHECKING:
    from common.attention.head import Head
    from common.heads.detection import Detection
    from common.loading.model import Model

ROWS = 16
FIRST_ROW = 2_000_000  # neither detection nor causal labels draw from here on
MOST_SINGLE = 8  # heads taken one by one, strongest first
MOST_GREEDY = 4
ABLATIONS = ("mean", "knockout")
GREEDY = "the greedy order"


class GreedyStep(TypedDict):
    """The head to take next, and the loss at repeats without it and all before it."""

    head: str
    loss_at_repeats: float


@dataclass
class Ablation:
    """What was measured.

    `clean`: each metric without intervention; `effects`: of single heads and of the `together` set; `greedy`: heads in
    the order in which adding them raises the loss at repeats most; `missing`: what an interruption left out;
    `impossible`: by intervention, why the model does not let it be made; `settings`: what another run must share to go
    on from here.
    """

    together: list[str]
    settings: Mapping[str, object]
    clean: dict[str, float]
    effects: list[Effect] = field(default_factory=list)
    greedy: list[GreedyStep] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    impossible: dict[str, str] = field(default_factory=dict)

    def of(self, heads: Sequence[str], name: str, metric: str) -> Effect | None:
        """The effect of one intervention on one metric; None where it was not measured."""
        wanted = list(heads), name, metric
        return next((one for one in self.effects if (one["heads"], one["name"], one["metric"]) == wanted), None)

    def as_json(self) -> dict[str, object]:
        """For results.json."""
        return asdict(self)


class AblationPlan:
    """What `ablate` will do for the induction heads that were `found`: single heads, and the set of all."""

    def __init__(self, model: Model, found: Detection, *, seed: int, batch_size: int):
        options = {"rows": ROWS, "first": FIRST_ROW, "seed": seed, "batch_size": batch_size}
        self.experiment = Experiment(model, found, **options)
        heads = found.ranked()
        self.singles = heads[:MOST_SINGLE]
        self.sets: list[tuple[Head, ...]] = [(head,) for head in self.singles]
        if len(heads) > 1:
            self.sets.append(tuple(heads))
        self.settings = {**self.experiment.settings, "heads": names(heads)}
        self.interventions = self.experiment.ablations()

    @property
    def runs(self) -> int:
        """How many times rows are run, at most."""
        return 2 * len(self.sets) * (1 + CONTROLS) + MOST_GREEDY * len(self.singles)

    def seconds(self) -> float:
        """How long `ablate` will take at the most."""
        return self.experiment.seconds(self.runs)


def ablate(plan: AblationPlan, earlier: object = None, progress: Progress = silent) -> Ablation:
    """Take the induction heads away, one by one and together, each way.

    `earlier`: what `Ablation.as_json` gave before; with the same settings, its effects are not measured again, and
    anything that is no such thing is ignored. On Ctrl-C what is done is kept, and `missing` says what is not.
    """
    clean = {metric: float(np.nanmean(values)) for metric, values in plan.experiment.metrics.of(None).items()}
    result = Ablation(names(plan.sets[-1]) if plan.sets else [], plan.settings, clean)
    result.effects = known_effects(earlier, plan.settings)
    done = {(one["name"], *one["heads"]) for one in result.effects}
    wanted = {kind: [some for some in plan.sets if (kind, *names(some)) not in done] for kind in ABLATIONS}
    result.missing = [_label(kind, names(some)) for kind, sets in wanted.items() for some in sets] + [GREEDY]
    with progress("ablating heads", plan.runs) as advance:
        try:
            for kind, sets in wanted.items():
                _add_effects(result, plan, kind, sets, advance)
            if "knockout" not in result.impossible:
                result.greedy = _greedy_order(plan, advance)
            result.missing = []
        except KeyboardInterrupt:
            pass
    return result


def known_effects(earlier: object, settings: Mapping[str, object]) -> list[Effect]:
    """The effects of an earlier result that was measured with the same settings; none of anything else.

    `earlier` was read from a file that anybody may have written, so nothing is taken for granted.
    """
    if not isinstance(earlier, dict) or earlier.get("settings") != settings:
        return []
    effects = earlier.get("effects")
    if not isinstance(effects, list) or not all(isinstance(one, dict) for one in effects):
        return []
    return [cast(Effect, one) for one in effects if _is_effect(one)]


def _is_effect(one: dict[str, object]) -> bool:
    """Whether a dict out of a file has the form of `Effect`: names and tables are made of it."""
    if not Effect.__required_keys__ <= one.keys():
        return False
    words = one["name"], one["metric"], one.get("sender", ""), one["note"] or ""  # paths have a sender too
    numbers = one["clean"], one["rows"]
    return (
        all(isinstance(word, str) for word in words)
        and all(isinstance(number, int | float | None) for number in numbers)  # NaN is saved as null
        and _is_estimate(one)
        and _are_strings(one["heads"])
        and (one["control"] is None or _is_control(one["control"]))
    )


def _is_control(one: object) -> bool:
    if not isinstance(one, dict) or not isinstance(one.get("heads"), list):
        return False
    return _is_estimate(one) and all(_are_strings(heads) for heads in one["heads"])


def _is_estimate(one: dict[str, object]) -> bool:
    interval = one.get("interval")
    if not isinstance(interval, list | tuple) or len(interval) != 2:
        return False
    return all(isinstance(number, int | float | None) for number in (one.get("effect"), *interval))


def _are_strings(heads: object) -> bool:
    return isinstance(heads, list) and all(isinstance(head, str) for head in heads)


def _label(kind: str, heads: Sequence[str]) -> str:
    return f"{kind} {' '.join(heads)}"


def _add_effects(
    result: Ablation, plan: AblationPlan, kind: str, sets: Sequence[tuple[Head, ...]], advance: Advance
) -> None:
    """Add the effects of one intervention as they come; where the model does not let it be made, the reason."""
    of = plan.experiment
    try:
        for effects in effects_with_controls(
            of.metrics, kind, sets, plan.interventions[kind],
            controls=CONTROLS, avoid=of.avoid, seed=of.seed, advance=advance,
        ):  # fmt: skip
            result.effects += effects
            result.missing.remove(_label(kind, effects[0]["heads"]))
    except UserError as error:
        result.impossible[kind] = str(error)


def _greedy_order(plan: AblationPlan, advance: Advance) -> list[GreedyStep]:
    """Which head to knock out next, up to `MOST_GREEDY`, and the loss at repeats with all so far."""
    of = plan.experiment
    predictions = Predictions.of(of.drawn.repeats.tokens, continuing(of.drawn.repeats))
    runner = Runner(of.model, of.drawn.repeats.tokens, predictions, batch_size=of.batch_size)
    order = greedy(runner, plan.singles, plan.interventions["knockout"], most=MOST_GREEDY, advance=advance)
    return [{"head": str(head), "loss_at_repeats": float(loss.mean())} for head, loss in order]
