"""Does it matter? A head's pattern, query, key and values replaced one at a time, and the paths that lead into it.

On battery rows that no other part of the project draws:

1. One part of a head at a time (`REPLACEMENTS`): its pattern (uniform, or that of another row), its query, its key or
   its values (of another row), attention knockout of its induction cells, its whole output (mean over control rows).
   The other row is another row's control: a row's own control has the same first segment, and with it the same keys and
   values at the targets. Measured: the head's own prefix matching and the loss at repeats and at fresh tokens. Control:
   the same on random heads of the layer, each measured by its own prefix matching.
2. The path map: every earlier head is mean-ablated for the query, the key or the values of one head alone, the
   receiver; MLPs in between as they are (direct), or recomputed. Beside it the sender ablated for all that reads it.
   Measured: the receiver's prefix matching, which its values cannot change, and the loss at repeats. Control: all other
   heads of the sender's layer.
3. Predict, intervene, compare: the decomposition (common/circuits/decomposition.py) says what a score, and its score
   advantage, lose with one key source; take the source away and measure it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from common import UserError
from common.attention.batches import Advance, Progress, silent
from common.attention.head import Head
from common.circuits.decomposition import score_advantages
from common.circuits.maps import interact
from common.heads.statistics import Floats, Ints
from common.interventions.ablation import known_effects
from common.interventions.edits import INPUTS, Intervention, Recordings, donor_rows, input_from, pattern_from, uniform
from common.interventions.effects import (
    CONTROLS,
    METRICS,
    Experiment,
    Intervene,
    PathEffect,
    effect,
    layer_matched,
    no_control,
)
from common.interventions.paths import paths_into, without_source

if TYPE_CHECKING:
    from common.circuits.decomposition import Decomposition
    from common.circuits.maps import Interaction
    from common.heads.detection import Detection
    from common.loading.model import Model

ROWS = 16
FIRST_ROW = 3_000_000  # ablations draw from 2,000,000 on
REPLACEMENTS = ("uniform", "pattern", "query", "key", "values", "knockout", "mean")
THROUGH = " through MLPs"
PATHS = {f"path to {word}{way}": (part, bool(way)) for way in ("", THROUGH) for part, word in INPUTS.items()}
WHOLE = "whole sender"
PATH_METRICS = ("prefix_matching", "loss_at_repeats")

Unit = tuple[str, Head]  # one kind of replacement, or of path, and the head that it ends in


@dataclass
class Experiments:
    """What was measured.

    `effects`: of replacements and of paths; `refused`: what cannot be done on this model, and why; `missing`: what an
    interruption left out; `settings`: what another run must share to go on from here.
    """

    settings: Mapping[str, object]
    effects: list[PathEffect] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def about(self) -> dict[str, object]:
        """All but the effects, for results.json."""
        return {"settings": self.settings, "refused": self.refused, "missing": self.missing}


class ExperimentPlan:
    """What `run_experiments` will do: replace the parts of `heads`, and walk the paths into the `receiver`."""

    def __init__(
        self, model: Model, heads: Sequence[Head], receiver: Head, found: Detection, *, seed: int, batch_size: int
    ):
        options = {"rows": ROWS, "first": FIRST_ROW, "seed": seed, "batch_size": batch_size}
        self.experiment = Experiment(model, found, **options)
        self.heads, self.receiver = list(heads), receiver
        self.settings = self.experiment.settings
        self.clean = self.experiment.recorded(self.experiment.drawn.repeats.tokens)
        self.replacements = _replacements(self.experiment)
        self._measured: dict[tuple[str | None, Head], dict[str, Floats]] = {}

    @property
    def senders(self) -> list[Head]:
        """Every head of the layers below the receiver."""
        n_heads = self.experiment.model.n_heads
        return [Head.at(layer, head) for layer in range(self.receiver.layer) for head in range(n_heads)]

    @property
    def units(self) -> list[Unit]:
        """All there is to do, in order."""
        paths = [(which, self.receiver) for which in (WHOLE, *PATHS)] if self.senders else []
        return [(kind, head) for head in self.heads for kind in REPLACEMENTS] + paths

    @property
    def runs(self) -> int:
        """How many times rows are run, at most."""
        return len(self.heads) * len(REPLACEMENTS) * (1 + CONTROLS) + len(self.senders) * (1 + len(PATHS))

    def seconds(self) -> float:
        """How long `run_experiments` will take at the most."""
        return self.experiment.seconds(self.runs)

    def measure(self, intervention: Intervention | None, head: Head) -> dict[str, Floats]:
        """The head's prefix matching and the losses, each per row [rows], under intervention."""
        metrics = self.experiment.metrics
        return {"prefix_matching": metrics.prefix_matching(head, intervention), **metrics.losses(intervention)}

    def changed(self, kind: str | None, head: Head, advance: Advance = lambda runs: None) -> dict[str, Floats]:
        """As `measure`, under one of `REPLACEMENTS` on the head itself (None: clean); every head is run once."""
        if (kind, head) not in self._measured:
            self._measured[kind, head] = self.measure(self.replacements[kind]([head]) if kind else None, head)
        advance(kind is not None)
        return self._measured[kind, head]


def run_experiments(plan: ExperimentPlan, earlier: object = None, progress: Progress = silent) -> Experiments:
    """Replace the heads' parts one by one, and walk every path into the receiver.

    `earlier`: {settings, effects} of an earlier run; with the same settings, its effects are not measured again. What
    the model's architecture does not allow is refused, and the rest done. On Ctrl-C what is done is kept, and `missing`
    says what is not.
    """
    result = Experiments(plan.settings)
    known: list[PathEffect] = [{**one} for one in known_effects(earlier, plan.settings)]
    result.missing = [_label(unit) for unit in plan.units]
    with progress("intervening", plan.runs) as advance:
        try:
            for unit in plan.units:
                result.effects += _known(known, unit) or _done(plan, unit, advance, result.refused)
                result.missing.remove(_label(unit))
        except KeyboardInterrupt:
            pass
    return result


def _replacements(of: Experiment) -> dict[str, Intervene]:
    """From each of `REPLACEMENTS` to a function of the heads that it is made on."""
    others = of.recorded(of.drawn.controls.tokens[donor_rows(ROWS, of.seed)])
    return {
        "uniform": uniform,
        "pattern": lambda heads: pattern_from(heads, others),
        "query": lambda heads: input_from(heads, "q", others),
        "key": lambda heads: input_from(heads, "k", others),
        "values": lambda heads: input_from(heads, "v", others),
        **of.ablations(),
    }


def _label(unit: Unit) -> str:
    return f"{unit[0]} of {unit[1]}"


def _known(effects: Sequence[PathEffect], unit: Unit) -> list[PathEffect]:
    """The effects of one unit among those of an earlier run."""
    return [one for one in effects if (one["name"], one["heads"]) == (unit[0], [str(unit[1])])]


def _done(plan: ExperimentPlan, unit: Unit, advance: Advance, refused: dict[str, str]) -> list[PathEffect]:
    """The effects of one unit; none, and the reason in `refused`, where the architecture does not allow it."""
    which, head = unit
    try:
        if which in REPLACEMENTS:
            return _replacement_effects(plan, which, head, advance)
        return _path_effects(plan, which, advance)
    except UserError as error:
        refused[_label(unit)] = str(error)
        return []


# --- one part of a head ---


def _replacement_effects(plan: ExperimentPlan, kind: str, head: Head, advance: Advance) -> list[PathEffect]:
    """The effect of one of `REPLACEMENTS` on every metric, beside random heads of the layer."""
    of = plan.experiment
    clean, changed = (plan.changed(which, head, advance) for which in (None, kind))
    drawn = layer_matched([head], of.model.n_heads, count=CONTROLS, avoid=of.avoid, seed=of.seed)
    moved = {other: _moves(plan, kind, other, advance) for (other,) in drawn}
    note = None if drawn else no_control([head], of.model.n_heads, of.avoid)
    found: list[PathEffect] = []
    for metric in ("prefix_matching", *METRICS):
        before = clean[metric]
        controls = [([other], before + move[metric]) for other, move in moved.items()]
        found.append({**effect(kind, [head], metric, before, changed[metric], controls, note=note, seed=of.seed)})
    return found


def _moves(plan: ExperimentPlan, kind: str, head: Head, advance: Advance) -> dict[str, Floats]:
    """By metric, how far the replacement moves it, per row [rows]; prefix matching is the head's own."""
    clean, changed = (plan.changed(which, head, advance) for which in (None, kind))
    return {metric: changed[metric] - clean[metric] for metric in clean}


# --- paths ---


def _path_effects(plan: ExperimentPlan, which: str, advance: Advance) -> list[PathEffect]:
    """The effect of every sender on the receiver by one kind of path, each beside the other heads of its layer."""
    clean = plan.changed(None, plan.receiver)
    changed = {}
    for sender, intervention in zip(plan.senders, _paths(plan, which), strict=True):
        changed[sender] = plan.measure(intervention, plan.receiver)
        advance(1)
    found: list[PathEffect] = []
    for sender in changed:
        others = [other for other in changed if other.layer == sender.layer and other != sender]
        for metric in PATH_METRICS:
            controls = [([other], changed[other][metric]) for other in others]
            seed = plan.experiment.seed
            one = effect(which, [plan.receiver], metric, clean[metric], changed[sender][metric], controls, seed=seed)
            found.append({**one, "sender": str(sender)})
    return found


def _paths(plan: ExperimentPlan, which: str) -> Iterator[Intervention] | list[Intervention]:
    """One intervention per sender."""
    ablate = plan.replacements["mean"]
    if which == WHOLE:
        return (ablate([sender]) for sender in plan.senders)
    part, through = PATHS[which]
    return paths_into(plan.receiver, part, ablate, plan.clean, through_mlps=through)


# --- predict, intervene, compare ---


class Removal(TypedDict):
    """What the cells of a decomposition lose without one key source: `predicted` and `measured` change of the score
    advantage, and of the score itself; `relative_error`: the larger error of both, relative to the predicted change of
    the score advantage. Means over the cells, in score units."""

    source: str
    predicted: float
    measured: float
    score_predicted: float
    score_measured: float
    relative_error: float


def removals(
    model: Model, tokens: Ints, met: Interaction, split: Mapping[int, Decomposition | str]
) -> dict[int, Removal | dict[str, str] | None]:
    """`removal` for every head that has a decomposition; {refused: why} where it cannot be made."""
    found: dict[int, Removal | dict[str, str] | None] = {}
    for head, one in split.items():
        try:
            found[head] = None if isinstance(one, str) else removal(model, tokens, met, Head.at(met.layer, head), one)
        except UserError as error:
            found[head] = {"refused": str(error)}
    return found


def removal(model: Model, tokens: Ints, met: Interaction, head: Head, split: Decomposition) -> Removal | None:
    """What the decomposition says its cells lose without the strongest key source that is a head, and what they lose.

    The norm's scale is frozen; a head of layer 0 counts with what MLP 0 makes of it. `tokens`: the row [pos] of the
    decomposition; `met`: its layer there. None where no earlier head is among the sources. Raises UserError where keys
    are normed once more, head by head: what is left of a key would then be normed anew.
    """
    earlier = {str(one): one for one in (Head.at(*place) for place in np.ndindex(met.layer, model.n_heads))}
    columns = [column for column, source in enumerate(split.sources) if source in earlier]
    if not columns:
        return None
    if model.parts.layers[met.layer].norms_of_heads()[1]:
        raise UserError(
            f"{model.name} norms the keys of each head once more: a source cannot be taken out of a key alone"
        )
    strongest = max(columns, key=lambda column: abs(split.terms[:, column].sum()))
    source = split.sources[strongest]
    predicted = -float(split.terms[:, strongest].sum()), -float(split.raw[:, strongest].sum())
    measured = _without(model, tokens, met, head, earlier[source], split.cells)
    off = max(abs(one - other) for one, other in zip(measured, predicted, strict=True))
    return {
        "source": source,
        "predicted": predicted[0],
        "measured": measured[0],
        "score_predicted": predicted[1],
        "score_measured": measured[1],
        "relative_error": off / max(abs(predicted[0]), np.finfo(float).tiny),
    }


def _without(
    model: Model, tokens: Ints, met: Interaction, head: Head, source: Head, cells: Sequence[tuple[int, int]]
) -> tuple[float, float]:
    """The mean change of score advantage and score over the cells with the source taken out of the head's key."""
    removed = without_source([source], [head], "k", Recordings(model, tokens[None]), through_first_mlp=True)
    query, key = np.array(cells).T
    change = (interact(model, tokens[None], met.layer, removed.edits).products - met.products)[0, head.head]
    advantage = score_advantages(change, met.rules.visible[0], query, key)
    return float(advantage.mean()), float(change[query, key].mean())
