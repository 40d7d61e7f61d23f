"""Does it matter? A head's pattern, query, key and values replaced one at a time, and the paths that lead into it.

On battery rows that no other part of the project draws:

1. One part of a head at a time (`KINDS`): its pattern (uniform, or that of another row), its query, its key or its
   values (of another row), its induction cells forbidden, its whole output (mean over control rows). The other row is
   another row's control: a row's own control has the same first segment, and with it the same keys and values at the
   targets. Measured: the head's own prefix matching and the loss at repeats and at fresh tokens. Control: the same on
   random heads of the layer, each measured by its own prefix matching.
2. The path map: every earlier head is mean-ablated for the query, the key or the values of one head alone, the
   receiver; MLPs in between as they are (direct), or recomputed. Beside it the sender ablated for all that reads it.
   Measured: the receiver's prefix matching, which its values cannot change, and the loss at repeats. Control: all other
   heads of the sender's layer.
3. Predict, intervene, compare: the decomposition (common/qk.py) says what a score, and its lead, lose with one key
   source; take the source away and measure it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from common import UserError
from common.circuits.qk import Decomposition, Interaction, interact, leads, readers
from common.heads.detection import Detection
from common.heads.detection import name as head_name
from common.heads.sequences import Battery, Floats, Ints, battery
from common.heads.survey import ROW_LENGTH, Progress, silent
from common.interventions.edits import Edit, GroupedKeyEdit, Head, Intervention, Recordings, applied
from common.interventions.effects import RowMetrics, effect, layer_matched, no_control, prefix_matching
from common.interventions.interventions import (
    PARTS,
    donor_rows,
    forbid,
    input_from,
    mean,
    paths_into,
    pattern_from,
    position_classes,
    uniform,
    without_source,
)
from common.loading.models import Model

if TYPE_CHECKING:
    from common.results.qk import Chosen

ROWS = 16
FIRST_ROW = 3_000_000  # ablations draw from 2,000,000 on
CONTROLS = 3  # random heads beside each head
PATIENCE = 60.0  # seconds that it may take without being asked for
KINDS = ("uniform", "pattern", "query", "key", "values", "forbid", "mean")
THROUGH = " through MLPs"
PATHS = {f"path to {word}{way}": (part, bool(way)) for way in ("", THROUGH) for part, word in PARTS.items()}
WHOLE = "whole sender"
PATH_METRICS = ("prefix_matching", "loss_at_repeats")

Intervene = Callable[[Sequence[Head]], Intervention]
Advance = Callable[[int], None]
Unit = tuple[str, Head]  # one kind of intervention, or of path, and the head that it ends in


@dataclass
class Experiments:
    """What was measured.

    `effects`: as `effects.Effect.plain` gives them; those of paths also say their `sender`; `refused`: what cannot be
    done on this model, and why; `missing`: what an interruption left out; `settings`: what another run must share to go
    on from here.
    """

    settings: dict[str, Any]
    effects: list[dict[str, Any]] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def about(self) -> dict[str, Any]:
        """All but the effects, for results.json."""
        return {"settings": self.settings, "refused": self.refused, "missing": self.missing}


class Laboratory:
    """Battery rows and what is measured on them: the parts of the `chosen` heads, the paths into the leading one.

    Heads that `found` to attend to their targets are no controls.
    """

    def __init__(self, model: Model, chosen: Chosen, found: Detection, *, seed: int, batch_size: int):
        length = min(ROW_LENGTH, model.context)
        drawn = battery(model.ordinary(), model.bos, rows=ROWS, length=length, seed=seed, first=FIRST_ROW)
        self.model, self.batch = model, drawn.repeats
        self.heads = [(chosen.layer, head) for head in chosen.heads]
        self.receiver = chosen.layer, chosen.leading
        self.avoid = [(int(layer), int(head)) for layer, head in np.argwhere(found.attends)]
        self.seed, self.batch_size = seed, batch_size
        self.settings = {
            "fingerprint": model.fingerprint, "seed": seed, "rows": ROWS, "length": length, "controls": CONTROLS,
            "avoided": " ".join(head_name(*head) for head in self.avoid),
        }  # fmt: skip
        self.clean = Recordings(model, drawn.repeats.tokens, batch_size=batch_size)
        self.kinds = _kinds(model, drawn, self.clean, seed, batch_size)
        self._metrics = RowMetrics(model, drawn.repeats, batch_size=batch_size)
        self._measured: dict[tuple[str | None, Head], dict[str, Floats]] = {}

    @property
    def senders(self) -> list[Head]:
        """Every head of the layers below the receiver."""
        return [(layer, head) for layer in range(self.receiver[0]) for head in range(self.model.n_heads)]

    @property
    def units(self) -> list[Unit]:
        """All there is to do, in order."""
        paths = [(which, self.receiver) for which in (WHOLE, *PATHS)] if self.senders else []
        return [(kind, head) for head in self.heads for kind in KINDS] + paths

    @property
    def runs(self) -> int:
        """How many times rows are run, at most."""
        return len(self.heads) * len(KINDS) * (1 + CONTROLS) + len(self.senders) * (1 + len(PATHS))

    def seconds(self) -> float:
        """How long `experiment` will take at the most, from the time of one run."""
        self.changed(None, self.receiver, lambda count: None)  # a first run is slower
        started = time.monotonic()
        self.measure(None, self.receiver)
        return (time.monotonic() - started) * self.runs

    def measure(self, intervention: Intervention | None, head: Head) -> dict[str, Floats]:
        """The head's prefix matching, and the losses (`RowMetrics.losses`), each per row [rows], under intervention."""
        own = prefix_matching(self.model, self.batch, head, intervention, batch_size=self.batch_size)
        return {"prefix_matching": own, **self._metrics.losses(intervention)}

    def changed(self, kind: str | None, head: Head, advance: Advance) -> dict[str, Floats]:
        """As `measure`, under one of `KINDS` on the head itself (None: clean); every head is run once."""
        if (kind, head) not in self._measured:
            self._measured[kind, head] = self.measure(self.kinds[kind]([head]) if kind else None, head)
        advance(kind is not None)
        return self._measured[kind, head]


def experiment(
    laboratory: Laboratory, earlier: dict[str, Any] | None = None, progress: Progress = silent
) -> Experiments:
    """Replace the heads' parts one by one, and walk every path into the receiver.

    `earlier`: the results.json of an earlier run; with the same settings, its effects are not measured again. What the
    model's architecture does not allow is refused, and the rest done. On Ctrl-C what is done is kept, and `missing`
    says what is not.
    """
    result = Experiments(laboratory.settings)
    settings = ((earlier or {}).get("experiments") or {}).get("settings")
    known = (earlier or {})["interventions"] if settings == laboratory.settings else []
    result.missing = [_label(unit) for unit in laboratory.units]
    with progress("intervening", laboratory.runs) as advance:
        try:
            for unit in laboratory.units:
                result.effects += _known(known, unit) or _done(laboratory, unit, advance, result.refused)
                result.missing.remove(_label(unit))
        except KeyboardInterrupt:
            pass
    return result


def _kinds(model: Model, drawn: Battery, clean: Recordings, seed: int, batch_size: int) -> dict[str, Intervene]:
    """From each of `KINDS` to a function of the heads that it is made on."""
    controls = Recordings(model, drawn.controls.tokens, batch_size=batch_size)
    others = Recordings(model, drawn.controls.tokens[donor_rows(ROWS, seed)], batch_size=batch_size)
    classes, cells = position_classes(drawn.repeats), drawn.repeats.cells["prefix_matching"]
    return {
        "uniform": uniform,
        "pattern": lambda heads: pattern_from(heads, others),
        "query": lambda heads: input_from(heads, "q", clean, others),
        "key": lambda heads: input_from(heads, "k", clean, others),
        "values": lambda heads: input_from(heads, "v", clean, others),
        "forbid": lambda heads: forbid(heads, cells),
        "mean": lambda heads: mean(heads, controls, classes, classes),
    }


def _label(unit: Unit) -> str:
    return f"{unit[0]} of {head_name(*unit[1])}"


def _known(effects: Sequence[dict[str, Any]], unit: Unit) -> list[dict[str, Any]]:
    """The effects of one unit among those of an earlier run."""
    return [one for one in effects if (one["name"], one["head"]) == (unit[0], head_name(*unit[1]))]


def _done(laboratory: Laboratory, unit: Unit, advance: Advance, refused: dict[str, str]) -> list[dict[str, Any]]:
    """The effects of one unit; none, and the reason in `refused`, where the architecture does not allow it."""
    which, head = unit
    try:
        if which in KINDS:
            return _part_effects(laboratory, which, head, advance)
        return _path_effects(laboratory, which, advance)
    except UserError as error:
        refused[_label(unit)] = str(error)
        return []


# --- one part of a head ---


def _part_effects(laboratory: Laboratory, kind: str, head: Head, advance: Advance) -> list[dict[str, Any]]:
    """The effect of one of `KINDS` on every metric, beside random heads of the layer."""
    clean, changed = (laboratory.changed(which, head, advance) for which in (None, kind))
    n_heads, avoid = laboratory.model.n_heads, laboratory.avoid
    drawn = layer_matched([head], n_heads, count=CONTROLS, avoid=avoid, seed=laboratory.seed)
    moved = {other: _moved(laboratory, kind, other, advance) for (other,) in drawn}
    note = None if drawn else no_control([head], n_heads, avoid)
    shared: dict[str, Any] = {"note": note, "seed": laboratory.seed}
    named = Intervention(kind, (head,), ())
    found = []
    for metric, before in clean.items():
        controls = [([other], before + move[metric]) for other, move in moved.items()]
        found.append(effect(named, metric, before, changed[metric], controls, **shared).plain())
    return found


def _moved(laboratory: Laboratory, kind: str, head: Head, advance: Advance) -> dict[str, Floats]:
    """By metric, how far the intervention moves it, per row [rows]; prefix matching is the head's own."""
    clean, changed = (laboratory.changed(which, head, advance) for which in (None, kind))
    return {metric: changed[metric] - clean[metric] for metric in clean}


# --- paths ---


def _path_effects(laboratory: Laboratory, which: str, advance: Advance) -> list[dict[str, Any]]:
    """The effect of every sender on the receiver by one kind of path, each beside the other heads of its layer."""
    receiver = laboratory.receiver
    clean = laboratory.changed(None, receiver, lambda count: None)
    changed = {}
    for sender, intervention in zip(laboratory.senders, _paths(laboratory, which), strict=True):
        changed[sender] = laboratory.measure(intervention, receiver)
        advance(1)
    named = Intervention(which, (receiver,), ())
    found = []
    for sender in changed:
        others = [other for other in changed if other[0] == sender[0] and other != sender]
        for metric in PATH_METRICS:
            controls = [([other], changed[other][metric]) for other in others]
            one = effect(named, metric, clean[metric], changed[sender][metric], controls, seed=laboratory.seed)
            found.append({**one.plain(), "sender": head_name(*sender)})
    return found


def _paths(laboratory: Laboratory, which: str) -> Iterator[Intervention] | list[Intervention]:
    """One intervention per sender."""
    ablate = laboratory.kinds["mean"]
    if which == WHOLE:
        return (ablate([sender]) for sender in laboratory.senders)
    part, through = PATHS[which]
    return paths_into(laboratory.receiver, part, ablate, laboratory.clean, through_mlps=through)


# --- predict, intervene, compare ---


def removals(
    model: Model, tokens: Ints, met: Interaction, split: Mapping[int, Decomposition | str]
) -> dict[int, dict[str, Any] | None]:
    """`removal` for every head that has a decomposition; {refused: why} where it cannot be made."""
    found: dict[int, dict[str, Any] | None] = {}
    for head, one in split.items():
        try:
            found[head] = None if isinstance(one, str) else removal(model, tokens, met, head, one)
        except UserError as error:
            found[head] = {"refused": str(error)}
    return found


def removal(model: Model, tokens: Ints, met: Interaction, head: int, split: Decomposition) -> dict[str, Any] | None:
    """What the decomposition says its cells lose without the strongest key source that is a head, and what they lose.

    {source, predicted, measured: change of the lead; score_predicted, score_measured: of the score itself;
    relative_error: the larger error of both, relative to the predicted change of the lead}; means over the cells, in
    score units, LayerNorm's scale frozen; a head of layer 0 counts with what MLP 0 makes of it. `tokens`: the row [pos]
    of the decomposition; `met`: its layer there. None where no earlier head is among the sources. Raises UserError
    where keys are normed once more, head by head: what is left of a key would then be normed anew.
    """
    earlier = {head_name(layer, other): (layer, other) for layer in range(met.layer) for other in range(model.n_heads)}
    columns = [column for column, source in enumerate(split.sources) if source in earlier]
    if not columns:
        return None
    if readers(model, met.layer, head)[1].after:
        raise UserError(
            f"{model.name} norms the keys of each head once more: a source cannot be taken out of a key alone"
        )
    strongest = max(columns, key=lambda column: abs(split.terms[:, column].sum()))
    source = split.sources[strongest]
    predicted = {"lead": -float(split.terms[:, strongest].sum()), "score": -float(split.raw[:, strongest].sum())}
    measured = _without(model, tokens, met, head, earlier[source], split.cells)
    off = max(abs(measured[of] - predicted[of]) for of in predicted)
    return {
        "source": source,
        "predicted": predicted["lead"],
        "measured": measured["lead"],
        "score_predicted": predicted["score"],
        "score_measured": measured["score"],
        "relative_error": off / max(abs(predicted["lead"]), np.finfo(float).tiny),
    }


def _without(
    model: Model, tokens: Ints, met: Interaction, head: int, source: Head, cells: Sequence[tuple[int, int]]
) -> dict[str, float]:
    """The mean change of lead and score over the cells with the source taken out of the head's key."""
    clean = Recordings(model, tokens[None])
    removed = without_source([source], [(met.layer, head)], "k", clean, through_first_mlp=True)
    with applied(model, _shared_key(removed)):
        changed = interact(model, tokens[None], met.layer)
    query, key = np.array(cells).T
    products = (changed.products - met.products)[0, head]
    lead = leads(products, met.rules.visible[0], query, key)
    return {"lead": float(lead.mean()), "score": float(products[query, key].mean())}


def _shared_key(intervention: Intervention) -> Intervention:
    """The same, written at the key itself where several heads share it: scores are read of one of them alone."""
    edits = tuple(
        Edit(edit.layer, "k", edit.group, edit.change) if isinstance(edit, GroupedKeyEdit) else edit
        for edit in intervention.edits
    )
    return replace(intervention, edits=edits)
