"""What a model loses without its induction heads: each of them, all together, and greedily one after the other.

Two interventions (common/interventions.py) on battery rows that detection does not draw:

- mean ablation: a head writes its mean output at positions of the same kind in the control rows. Nothing that it says
  of this row is left, its constant part stays.
- forbidding: a head may not attend to the tokens after earlier copies; its row of attention is renormalised.

Each effect has a 95 % interval over rows and, as its control, the same intervention on as many other heads of the same
layers, drawn at random. Single heads mislead where heads cover for each other, so the set of all comes with them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from common import UserError
from common.heads.detection import Detection
from common.heads.tokens import ROW_LENGTH, Battery, Progress, battery, continuing, silent
from common.interventions.bench import Bench, Reads, greedy
from common.interventions.edits import Head, Intervention, Recordings
from common.interventions.effects import RowMetrics, effects_with_controls, names
from common.interventions.interventions import forbid, mean, position_classes
from common.loading.models import Model

ROWS = 16
FIRST_ROW = 2_000_000  # neither detection nor causal labels draw from here on
CONTROLS = 3  # random sets of heads beside each set
MOST_SINGLE = 8  # heads taken one by one, strongest first
MOST_GREEDY = 4
KINDS = ("mean", "forbid")
GREEDY = "the greedy order"
PATIENCE = 60.0  # seconds that it may take without being asked for

Intervene = Callable[[Sequence[Head]], Intervention]


@dataclass
class Ablation:
    """What was measured.

    `clean`: each metric without intervention; `effects`: of single heads and of the `together` set; `greedy`: heads in
    the order in which adding them raises the loss at repeats most, with the loss so far; `missing`: what an
    interruption left out; `impossible`: by kind, why the model does not let it be made; `settings`: what another run
    must share to go on from here.
    """

    together: str
    settings: dict[str, Any]
    clean: dict[str, float]
    effects: list[dict[str, Any]] = field(default_factory=list)
    greedy: list[dict[str, Any]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    impossible: dict[str, str] = field(default_factory=dict)

    def of(self, heads: str, kind: str, metric: str) -> dict[str, Any] | None:
        """The effect of one intervention on one metric; None where it was not measured."""
        wanted = (heads, kind, metric)
        return next((one for one in self.effects if (one["head"], one["name"], one["metric"]) == wanted), None)

    def plain(self) -> dict[str, Any]:
        """For results.json."""
        return asdict(self)


class Laboratory:
    """Battery rows, their metrics, and the interventions on them, for the induction heads that were `found`."""

    def __init__(self, model: Model, found: Detection, *, seed: int, batch_size: int):
        length = min(ROW_LENGTH, model.context)
        drawn = battery(model.ordinary(), model.bos, rows=ROWS, length=length, seed=seed, first=FIRST_ROW)
        heads = [head.place for head in found.ranked()]
        self.heads = heads[:MOST_SINGLE]
        self.sets: list[tuple[Head, ...]] = [(head,) for head in self.heads] + (
            [tuple(heads)] if len(heads) > 1 else []
        )
        self.avoid = [(int(layer), int(head)) for layer, head in np.argwhere(found.attends)]
        self.seed = seed
        self.settings = {
            "fingerprint": model.fingerprint, "seed": seed, "rows": ROWS, "length": length, "heads": names(heads),
            "controls": CONTROLS, "avoided": names(self.avoid),
        }  # fmt: skip
        self.metrics = RowMetrics(model, drawn.repeats, batch_size=batch_size)
        self.clean = self.metrics.of(None)
        reads = Reads.of(drawn.repeats.tokens, continuing(drawn.repeats))
        self.at_repeats = Bench(model, drawn.repeats.tokens, reads, batch_size=batch_size)
        self.interventions = _interventions(model, drawn, batch_size)

    @property
    def runs(self) -> int:
        """How many times rows are run, at most."""
        return 2 * len(self.sets) * (1 + CONTROLS) + MOST_GREEDY * len(self.heads)

    def seconds(self) -> float:
        """How long `ablate` will take at the most, from the time of one run."""
        started = time.monotonic()
        self.metrics.of(None)
        return (time.monotonic() - started) * self.runs


def ablate(laboratory: Laboratory, earlier: dict[str, Any] | None = None, progress: Progress = silent) -> Ablation:
    """Take the induction heads away, one by one and together, each way.

    `earlier`: what `Ablation.plain` gave before; with the same settings, its effects are not measured again. On Ctrl-C
    what is done is kept, and `missing` says what is not.
    """
    clean = {metric: float(np.nanmean(values)) for metric, values in laboratory.clean.items()}
    result = Ablation(names(laboratory.sets[-1]) if laboratory.sets else "", laboratory.settings, clean)
    if earlier and earlier.get("settings") == laboratory.settings:
        result.effects = earlier["effects"]
    done = {(one["name"], one["head"]) for one in result.effects}
    wanted = {kind: [some for some in laboratory.sets if (kind, names(some)) not in done] for kind in KINDS}
    result.missing = [f"{kind} {names(some)}" for kind, sets in wanted.items() for some in sets] + [GREEDY]
    with progress("ablating heads", laboratory.runs) as advance:
        try:
            for kind, sets in wanted.items():
                _add_effects(result, laboratory, kind, sets, advance)
            if "forbid" not in result.impossible:
                result.greedy = _greedy(laboratory, advance)
            result.missing = []
        except KeyboardInterrupt:
            pass
    return result


def _interventions(model: Model, drawn: Battery, batch_size: int) -> dict[str, Intervene]:
    """From the kind of an intervention to a function of the heads that it is made on."""
    controls = Recordings(model, drawn.controls.tokens, batch_size=batch_size)
    classes = position_classes(drawn.repeats)
    cells = drawn.repeats.cells["prefix_matching"]
    return {
        "mean": lambda heads: mean(heads, controls, classes, classes),
        "forbid": lambda heads: forbid(heads, cells),
    }


def _add_effects(
    result: Ablation,
    laboratory: Laboratory,
    kind: str,
    sets: Sequence[tuple[Head, ...]],
    advance: Callable[[int], None],
) -> None:
    """Add the effects of one kind as they come; where the model does not let it be made, the reason."""
    try:
        for effects in _effects(laboratory, kind, sets, advance):
            result.effects += effects
            result.missing.remove(f"{kind} {effects[0]['head']}")
    except UserError as error:
        result.impossible[kind] = str(error)


def _effects(
    laboratory: Laboratory, kind: str, sets: Sequence[tuple[Head, ...]], advance: Callable[[int], None]
) -> Iterator[list[dict[str, Any]]]:
    """One intervention on each of the sets, beside its controls, as plain values."""
    intervene = laboratory.interventions[kind]
    options: dict[str, Any] = {"controls": CONTROLS, "avoid": laboratory.avoid, "seed": laboratory.seed}
    for effects in effects_with_controls(laboratory.metrics, sets, intervene, **options, advance=advance):
        yield [{**one.plain(), "name": kind} for one in effects]


def _greedy(laboratory: Laboratory, advance: Callable[[int], None]) -> list[dict[str, Any]]:
    """Which head to forbid next, up to `MOST_GREEDY`, and the loss at repeats with all so far."""
    bench, forbidding = laboratory.at_repeats, laboratory.interventions["forbid"]
    order = greedy(bench, laboratory.heads, forbidding, most=MOST_GREEDY, advance=advance)
    return [{"head": names([head]), "loss_at_repeats": float(loss.mean())} for head, loss in order]
