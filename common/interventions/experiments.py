"""Does it matter? A head's pattern, query, key and values replaced one at a time, and the paths that lead into it.

On battery rows that no other part of the project draws:

1. One part of a head at a time (`REPLACEMENTS`): its pattern (uniform, or that of another row), its query, its key or
   its values (of another row's control), attention knockout of its induction cells, its whole output (mean over control
   rows). Measured: the head's own prefix matching and the loss at repeats and at fresh tokens. Control: the same on
   random heads of the layer, each measured by its own prefix matching.
2. The path map: every earlier head is mean-ablated for the query, the key or the values of one head alone, the
   receiver; MLPs in between as they are (direct), or recomputed. Beside it the sender ablated for all that reads it.
   Measured: the receiver's prefix matching, which its values cannot change, and the loss at repeats. Control: all other
   heads of the sender's layer.
3. Predict, intervene, compare: the decomposition (common/circuits/decomposition.py) says what a score, and its score
   advantage, lose with one key source; take the source away and measure it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from common import UserError
from common.attention.batches import Advance, Progress, silent
from common.attention.head import Head
from common.circuits.decomposition import score_advantages
from common.circuits.maps import interact
from common.heads.statistics import Floats, Ints
from common.interventions import edits, effects
from common.interventions.edits import INPUTS, Intervene, Intervention, Recordings, donor_rows
from common.interventions.effects import CONTROLS, METRICS, Experiment, PathEffect, effect
from common.interventions.paths import path, without_source

if TYPE_CHECKING:
    from common.circuits.decomposition import Decomposition
    from common.circuits.maps import Interaction
    from common.heads.detection import Detection
    from common.loading.model import Model

EXPERIMENT_ROWS = 16
EXPERIMENT_FROM = 3_000_000  # ablations draw from 2,000,000 on
REPLACEMENTS = ("uniform", "pattern", "query", "key", "values", "knockout", "mean")
THROUGH = " through MLPs"
PATHS = {f"path to {word}{way}": (part, bool(way)) for way in ("", THROUGH) for part, word in INPUTS.items()}
WHOLE = "whole sender"
PATH_METRICS = ("prefix_matching", "loss_at_repeats")


@dataclass
class Experiments:
    """What was measured: `effects` of replacements and of paths; `refused`: what cannot be done on this model, and why;
    `missing`: what an interruption left out; `settings`: what another run must share to go on from here."""

    settings: Mapping[str, object]
    effects: list[PathEffect] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def about(self) -> dict[str, object]:
        """All but the effects, for results.json."""
        return {"settings": self.settings, "refused": self.refused, "missing": self.missing}


class ExperimentPlan(Experiment):
    """What `run_experiments` will do: replace the parts of `heads`, and walk the paths into the `receiver` from all
    `senders`, the heads below it. `units`: in order, each kind of replacement, or of path, and the head it ends in."""

    def __init__(
        self, model: Model, heads: Sequence[Head], receiver: Head, found: Detection, *, seed: int, batch_size: int
    ):
        super().__init__(model, found, rows=EXPERIMENT_ROWS, first=EXPERIMENT_FROM, seed=seed, batch_size=batch_size)
        self.receiver = receiver
        self.clean = Recordings(model, self.drawn.repeats.tokens, batch_size=batch_size)
        self.senders = [Head.at(*place) for place in np.ndindex(receiver.layer, model.n_heads)]
        self.units: list[tuple[str, Head]] = [(kind, head) for head in heads for kind in REPLACEMENTS]
        self.runs = len(self.units) * (1 + CONTROLS) + len(self.senders) * (1 + len(PATHS))
        self.units += [(which, receiver) for which in (WHOLE, *PATHS) if self.senders]
        others = Recordings(model, self.drawn.controls.tokens[donor_rows(EXPERIMENT_ROWS, seed)], batch_size=batch_size)
        self.replacements: dict[str, Intervene] = {
            "uniform": edits.uniform,
            "pattern": partial(edits.pattern_from, source=others),
            **{word: partial(edits.input_from, part=part, source=others) for part, word in INPUTS.items()},
            **self.ablations(),
        }
        self._measured: dict[tuple[str | None, Head], dict[str, Floats]] = {}

    def measure(self, intervention: Intervention | None, head: Head) -> dict[str, Floats]:
        """The head's prefix matching and the losses, each per row [rows], under intervention."""
        own = self.metrics.prefix_matching(head, intervention)
        return {"prefix_matching": own, **self.metrics.losses(intervention)}

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
    known = effects.known_effects(earlier, plan.settings)
    result = Experiments(plan.settings, missing=[f"{which} of {head}" for which, head in plan.units])
    with progress("intervening", plan.runs) as advance, suppress(KeyboardInterrupt):
        for (which, head), label in zip(plan.units, tuple(result.missing), strict=True):
            before = [one for one in known if (one["name"], one["heads"]) == (which, [str(head)])]
            try:
                result.effects += before or _done(plan, which, head, advance)
            except UserError as error:
                result.refused[label] = str(error)
            result.missing.remove(label)
    return result


def _done(plan: ExperimentPlan, which: str, head: Head, advance: Advance) -> list[PathEffect]:
    if which in REPLACEMENTS:
        return _replacement_effects(plan, which, head, advance)
    return _path_effects(plan, which, advance)


def _replacement_effects(plan: ExperimentPlan, kind: str, head: Head, advance: Advance) -> list[PathEffect]:
    """The effect of one of `REPLACEMENTS` on every metric, beside random heads of the layer."""
    clean, changed = (plan.changed(which, head, advance) for which in (None, kind))
    moved = {}
    for (other,) in effects.layer_matched([head], plan.model.n_heads, count=CONTROLS, avoid=plan.avoid, seed=plan.seed):
        before, after = (plan.changed(which, other, advance) for which in (None, kind))
        moved[other] = {metric: after[metric] - before[metric] for metric in before}
    note = effects.no_control([head], plan.model.n_heads, plan.avoid)
    found = []
    for metric in ("prefix_matching", *METRICS):
        # Its own prefix matching starts from another value for every control: what counts is how far it moves.
        controls = [([other], clean[metric] + move[metric]) for other, move in moved.items()]
        found.append(effect(kind, [head], metric, clean[metric], changed[metric], controls, note=note, seed=plan.seed))
    return found


def _path_effects(plan: ExperimentPlan, which: str, advance: Advance) -> list[PathEffect]:
    """The effect of every sender on the receiver by one kind of path, each beside the other heads of its layer."""
    clean, changed = plan.changed(None, plan.receiver), {}
    # All that paths read of the clean run is recorded in one pass over the rows: cheaper than one by one.
    points = ("z", "projected", "attn_out", "resid_pre", "resid_post")
    plan.clean.fetch(set(product(range(plan.receiver.layer), points)))
    for sender in plan.senders:
        intervention = plan.replacements["mean"]([sender])
        if which != WHOLE:
            part, through = PATHS[which]
            intervention = path(intervention, [plan.receiver], part, plan.clean, through_mlps=through)
        changed[sender] = plan.measure(intervention, plan.receiver)
        advance(1)
    found = []
    for sender in changed:
        others = [other for other in changed if other.layer == sender.layer and other != sender]
        for metric in PATH_METRICS:
            controls = [([other], changed[other][metric]) for other in others]
            after = changed[sender][metric]
            one = effect(which, [plan.receiver], metric, clean[metric], after, controls, seed=plan.seed)
            found.append({**one, "sender": str(sender)})
    return found


def removals(
    model: Model, tokens: Ints, met: Interaction, split: Mapping[int, Decomposition | str]
) -> dict[int, dict[str, Any] | None]:
    """`removal` for every head that has a decomposition; {refused: why} where it cannot be made."""
    found: dict[int, dict[str, Any] | None] = {}
    for head, one in split.items():
        try:
            found[head] = None if isinstance(one, str) else removal(model, tokens, met, Head.at(met.layer, head), one)
        except UserError as error:
            found[head] = {"refused": str(error)}
    return found


def removal(model: Model, tokens: Ints, met: Interaction, head: Head, split: Decomposition) -> dict[str, Any] | None:
    """What the decomposition says its cells lose without the strongest key source that is a head, and what they lose.

    The norm's scale is frozen; a head of layer 0 counts with what MLP 0 makes of it. `tokens`: the row [pos] of the
    decomposition; `met`: its layer there. Returns the `source`, the `predicted` and `measured` change of the score
    advantage, and of the score itself (`score_…`), means over the cells in score units; `relative_error`: the larger
    error of both over the predicted change of the score advantage. None where no earlier head is among the sources.
    Raises UserError where keys are normed once more, head by head: what is left of a key would then be normed anew.
    """
    earlier = {str(Head.at(*place)) for place in np.ndindex(met.layer, model.n_heads)}
    columns = [column for column, source in enumerate(split.sources) if source in earlier]
    if not columns:
        return None
    if model.parts.layers[met.layer].norms_of_heads()[1]:
        why = "a source cannot be taken out of a key alone"
        raise UserError(f"{model.name} norms the keys of each head once more: {why}")
    strongest = max(columns, key=lambda column: abs(split.terms[:, column].sum()))
    predicted = [-float(part[:, strongest].sum()) for part in (split.terms, split.raw)]
    source, recordings = Head.parse(split.sources[strongest]), Recordings(model, tokens[None])
    removed = without_source([source], [head], "k", recordings, through_first_mlp=True)
    change = (interact(model, tokens[None], met.layer, removed.edits).products - met.products)[0, head.head]
    query, key = np.array(split.cells).T
    advantage = score_advantages(change, met.rules.visible[0], query, key)
    measured = [float(np.nanmean(each)) for each in (advantage, change[query, key])]  # a cell alone has no advantage
    off = max(abs(one - other) for one, other in zip(measured, predicted, strict=True))
    return {
        "source": str(source), "predicted": predicted[0], "measured": measured[0], "score_predicted": predicted[1],
        "score_measured": measured[1], "relative_error": off / max(abs(predicted[0]), np.finfo(float).tiny),
    }  # fmt: skip
