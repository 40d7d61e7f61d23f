"""What do the queries of a layer look for, what are its scores made of, and does it matter?

1. Choose: the layer of the strongest induction head, or any, and heads in it.
2. Maps: on each text the layer's queries and keys meet; a map that is not the model's own stops the analysis.
3. Decompose: the chosen heads' scores by query source × key source (circuits/decomposition).
4. Weights: which earlier heads the layer reads, and what the leading head makes of the tokens of one text.
5. Intervene: parts of the chosen heads are replaced, and the paths into the leading one are cut.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from common import UserError
from common.attention.batches import Progress, silent
from common.attention.head import Head
from common.circuits import maps
from common.circuits.composition import Composition, Pair, compose
from common.circuits.decomposition import Decomposition, decompose
from common.circuits.maps import Check, Interaction
from common.circuits.weights import HeadCircuits, head_circuits
from common.heads.detection import Detection, by_score
from common.heads.statistics import Floats, Ints
from common.heads.survey import survey
from common.heads.tokens import TokenBatch
from common.interventions import effects, experiments
from common.interventions.effects import PathEffect
from common.interventions.experiments import Experiments
from common.results import figures_circuits, figures_heads, files, page, tables
from common.results.analysis import Analysis, Note, Notes, Provenance, encode, go_on_from, ignore, rows_at_once
from common.results.spec import Figure
from common.results.tables import TERMS, Screenful, shortened

if TYPE_CHECKING:
    from common.loading.model import Model

GRID = 16  # heads drawn side by side; of a layer with more, those with the highest prefix matching
DISTANCES = (1, 4, 16)  # between query and key, where the weights' score depends on it
KEPT = 64_000_000  # bytes of maps kept for figures and export; texts beyond are run again when they are drawn
PART_METRICS = 4  # of each part that is replaced: prefix matching and three losses
REMOVAL = (
    "Without {source} in its key, the score advantage changes by {measured:+.4f}, where the decomposition predicts "
    "{predicted:+.4f} (off by {relative_error:.0e} of it); the score by {score_measured:+.4f}, predicted "
    "{score_predicted:+.4f}."
)


@dataclass(frozen=True, repr=False)
class Chosen(Screenful):
    """The layer, its `heads` to show large, the `leading` one of them, those to draw side by side (`grid`), the layer's
    induction heads, and why these."""

    layer: int
    heads: list[int]
    leading: int
    grid: list[int]
    induction: list[int]
    reason: str


@dataclass(frozen=True, repr=False)
class LayerHead(Screenful):
    """One head of the layer: its scores, in [0, 1], and whether it is an induction head."""

    layer: int
    head: int
    prefix_matching: float
    induction: bool
    previous_token: float


@dataclass(frozen=True, repr=False, eq=False)
class LayerOnText(Screenful):
    """How the layer's queries and keys meet on one text.

    `tokens`: as a reader should see them, BOS first; `ids`: [pos]; `cells`: its induction cells (query, key); `check`:
    the errors against the model; `split`: by head, what its scores are made of, or why that cannot be said; `removal`:
    by head, what taking out the strongest key source was predicted and measured to do, None where not measured.
    """

    number: int
    text: str
    tokens: tuple[str, ...]
    ids: Ints
    cells: list[tuple[int, int]]
    check: Check
    split: dict[int, Decomposition | str]
    removal: Mapping[int, Mapping[str, object] | None]
    kept: Interaction | None

    def summary(self) -> Iterable[str]:
        yield f"text {self.number}: {shortened(self.text)}; {len(self.cells)} induction cells"
        yield tables.check_sentence(self.check.max_abs_error)

    def as_json(self, maps: Sequence[str]) -> dict[str, object]:
        """As results.json holds it; `maps`: the names of its pictures."""
        own = {key: getattr(self, key) for key in ("number", "text", "tokens", "cells")}
        return {**own, "check": {**asdict(self.check), "max_abs_error": self.check.max_abs_error}, "maps": maps}

    def records(self, layer: int) -> list[dict[str, object]]:
        """The decompositions as results.json holds them, one per head."""
        found = []
        for head, one in self.split.items():
            if isinstance(one, str):
                record: dict[str, object] = {"refused": one, "terms": []}
            else:
                record = one.record(TERMS)
            where = {"text": self.number, "head": str(Head.at(layer, head))}
            found.append({**where, **record, "removal": self.removal.get(head)})
        return found


@dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class QKAnalysis(Analysis):
    """What the queries of a layer look for, and what that does.

    `chosen`: layer and heads, and why; `heads`: the heads of the layer; `texts`: maps and decompositions on each text;
    `composition` of the layer with earlier heads; the `pair` of a previous-token head and a head that reads it;
    `circuits`: the leading head's weights on the tokens of the `richest` text (each None where the architecture does
    not allow it, the first two in layer 0); `experiments`: interventions, None where they were left out; `found`: the
    survey's verdicts.
    """

    chosen: Chosen
    heads: tuple[LayerHead, ...]
    texts: tuple[LayerOnText, ...]
    composition: Composition | None
    pair: Pair | None
    circuits: HeadCircuits | None
    experiments: Experiments | None
    found: Detection

    @property
    def leading(self) -> str:
        """The name of the head that is drawn large: "5.1"."""
        return str(Head.at(self.chosen.layer, self.chosen.leading))

    @property
    def effects(self) -> list[PathEffect]:
        """The effects of all interventions."""
        return self.experiments.effects if self.experiments else []

    @property
    def richest(self) -> LayerOnText | None:
        """The text with most induction cells, the first of several; None without texts."""
        return _richest(self.texts)

    @property
    def max_abs_error(self) -> float:
        """Largest absolute error of scores and patterns against the model's own; 0 without texts."""
        return max((text.check.max_abs_error for text in self.texts), default=0.0)

    def checks(self) -> list[str]:
        """The self-check, and the composed pair where there is one."""
        said = [tables.check_sentence(self.max_abs_error)] if self.texts else []
        if self.composition and self.pair:
            found, (writes, reads) = self.composition, self.pair
            at = found.senders.index(writes), reads.head
            score, baseline, z = (float(of["K"][at]) for of in (found.scores, found.baseline, found.z))
            chance = f"{baseline:.3f} by chance, z = {z:.1f} (above {found.limit:.1f} counts)"
            said.append(f"K-composition {writes} → {reads}: {score:.3f}, {chance}")
        return said

    def decomposed(self) -> Iterator[tuple[str, Decomposition, str | None]]:
        """Of the text with most induction cells, each head's sentence, decomposition, and what a removal did."""
        if text := self.richest:
            for head, one in text.split.items():
                if isinstance(one, Decomposition):
                    said = (
                        f"Head {Head.at(self.chosen.layer, head)} on {len(one.cells)} {one.kind} of text {text.number}:"
                        f" {one.advantage()}; its largest parts:"
                    )
                    removed = text.removal.get(head)
                    yield said, one, REMOVAL.format(**removed) if removed and "predicted" in removed else None

    def summary(self) -> Iterable[str]:
        yield f"QKAnalysis of {self.model.name}, layer {self.chosen.layer}: {self.chosen.reason}"
        yield from self.warnings()
        for said, split, _ in self.decomposed():
            query, key, value = split.top(1)[0]
            yield f"{said} {query} × {key} ({value:.2f}) and smaller ones"
        yield from self.checks()
        if walked := tables.path_sentence(self.effects):
            yield walked
        yield f".table(), .figure(name), .page(), .save(folder); figures: {', '.join(self.figures)}"

    def rows(self) -> dict[str, dict[str, object]]:
        return {str(Head.at(head.layer, head.head)): asdict(head) for head in self.heads}

    @property
    def figures(self) -> list[str]:
        parts = dict.fromkeys(one["heads"][0] for one in self.effects if "sender" not in one)
        paths = any("sender" in one for one in self.effects)
        return [
            *(name for text in self.texts for name in self.figures_of(text)),
            *([f"circuits_{self.leading}"] if self.circuits else []),
            *(["composition"] if self.pair else []),
            *(f"parts_{head}" for head in parts),
            *([f"paths_{self.leading}"] if paths else []),
        ]

    def figures_of(self, text: LayerOnText) -> list[str]:
        """The names of the figures of one text."""
        stems = ["scores", "patterns"]
        for head, one in text.split.items():
            name = Head.at(self.chosen.layer, head)
            stems += [f"head_{name}"] + ([] if isinstance(one, str) else [f"decomposition_{name}"])
        return [f"{stem}_{text.number:02d}" for stem in stems]

    def specified(self, names: Sequence[str]) -> Iterator[tuple[str, Figure]]:
        return ((name, figure) for name, figure in _figures(self, names) if name in names)

    def page(self) -> str:
        shown = dict(self.specified([name for name in self.figures if page.takes(name)]))
        title, said = f"Layer {self.chosen.layer} of", [*self.checks(), *self.warnings()]
        return page.report(self.as_json(), title, self.leading, said, _layer_on_page(self), shown)

    def interaction(self, text: LayerOnText) -> Interaction:
        """Queries, keys, scores and patterns of every head of the layer on one text."""
        return text.kept or maps.interact(self.model, text.ids[None], self.chosen.layer)

    def terms(self) -> list[dict[str, object]]:
        """The rows of terms.csv: the largest terms of each decomposition."""
        records = (record for text in self.texts for record in text.records(self.chosen.layer))
        return [
            {"text": one["text"], "head": one["head"], **term}
            for one in records
            for term in cast("list[dict[str, object]]", one["terms"])
        ]

    def content(self, written: Sequence[str]) -> dict[str, object]:
        texts, directions = [], []
        for text in self.texts:
            pictures = [f"{name}.png" for name in self.figures_of(text)]
            texts.append(text.as_json([name for name in pictures if name in written]))
        if self.circuits:
            strings = self.model.strings(self.circuits.tokens)
            directions = [direction.record(strings, TERMS) for direction in self.circuits.directions]
        return {
            "layer": self.chosen.layer,
            "chosen": self.chosen.reason,
            "heads": [asdict(head) for head in self.heads],
            "check": {"max_abs_error": self.max_abs_error},
            "sequences": texts,
            "decomposition": [record for text in self.texts for record in text.records(self.chosen.layer)],
            "composition": self.composition.record(self.pair) if self.composition and self.pair else None,
            "directions": directions,
            "interventions": [{**one, "head": one["heads"][0]} for one in self.effects],  # each is made on one head
            "experiments": self.experiments.about() if self.experiments else None,
        }

    def save(
        self, folder: str | Path, *, pictures: bool = True, export: bool = False, argv: Sequence[str] = ()
    ) -> list[str]:
        """Write results.json, terms.csv, with `pictures` PNGs and report.html, and with `export` q and k of the layer
        as qk_NN.safetensors, whole or not at all; the names of the files. Raises UserError where the folder cannot be
        written. `argv`: the command of a script."""

        def write_more(staging: Path) -> None:
            if terms := self.terms():
                files.write_csv(staging / "terms.csv", terms)
            for text in self.texts if export else ():
                maps.export(self.interaction(text), text.ids, staging / f"qk_{text.number:02d}.safetensors")

        return self.write(folder, write_more, pictures, argv)


def analyse_qk(
    model: Model, sequences: Sequence[str], layer: int | str = "auto", *, head: int | str = "auto",
    threshold: float | None = None, interventions: bool | None = None, seed: int = 0, batch_size: int | None = None,
    earlier: object = None, progress: Progress = silent, hear: Callable[[Note], None] = ignore,
) -> QKAnalysis:  # fmt: skip
    """Show what the queries of one layer look for on the texts of `sequences`, and which parts of the model make them.

    `layer`: from 0, or "auto", the layer of the strongest induction head; `head`: from 0, "auto" (the strongest of the
    layer) or "all"; `threshold`: one number in [0, 1] for all heads in place of their own; `interventions`: whether to
    replace parts of heads and cut paths, None: where that takes less than a minute; `batch_size`: rows per forward
    pass, None: as many as help and fit; `earlier`: the content of an earlier results.json, whose interventions are used
    again where everything that could change them is the same; `progress(what, total)`: entered for each long step, told
    of each finished part; `hear`: told of each note at once.

    Raises UserError for a layer or head that does not exist, for a map that is not the model's own, for a text longer
    than the context, and where no text has two tokens. After Ctrl-C during the interventions, what was measured is
    returned and `missing` names the rest.
    """
    started, notes = time.monotonic(), Notes(hear)
    encoded = encode(model, sequences, notes)
    maps.check_exists(model, layer if isinstance(layer, int) else None, head if isinstance(head, int) else None)
    batch_size = rows_at_once(model, encoded, batch_size)
    options = {"seed": seed, "batch_size": batch_size}
    with notes.listening():
        measured = survey(model, **options, threshold=threshold, progress=progress)
        found, previous_token = measured.found, measured.evidence.controls.mean("previous_token")
        chosen = choose(found, layer, head)
        notes.say(f"layer {chosen.layer}: {chosen.reason}")
        columns = {"prefix_matching": found.score, "induction": found.induction, "previous_token": previous_token}
        texts: list[LayerOnText] = []
        for number, text, ids in encoded:
            room = KEPT - sum(_size(one.kept) for one in texts)
            texts.append(_look_at(model, chosen, number, text, ids, interventions is not False, room, notes))
        composition, pair, circuits = _weigh(model, chosen, previous_token, seed, texts, notes)
        done = None
        if interventions is not False:
            done = _intervene(model, chosen, found, interventions, options, earlier, progress, notes)
    arguments: dict[str, object] = {
        "layer": chosen.layer,
        "head": "all" if head == "all" else chosen.leading,
        **options,
    }
    arguments |= {"threshold": "dynamic" if threshold is None else threshold, "interventions": done is not None}
    return QKAnalysis(
        model=model, provenance=Provenance.of(model, seed, started, arguments), notes=tuple(notes),
        missing=tuple(done.missing) if done else (), chosen=chosen,
        heads=tuple(row for row in tables.rows(LayerHead, columns) if row.layer == chosen.layer), texts=tuple(texts),
        composition=composition, pair=pair, circuits=circuits, experiments=done, found=found,
    )  # fmt: skip


def choose(found: Detection, layer: int | str, head: int | str, *, drawn: int = GRID) -> Chosen:
    """The layer of the strongest induction head ("auto"), or the one asked for; where it has none, the head closest to
    one. Of the layer the strongest head ("auto"), "all", or the one asked for; at most `drawn` side by side."""
    by_rank = by_score(found.score)  # of heads with equal scores the earlier comes first
    induction = [place for place in by_rank if found.induction[place]]
    order = [place for place in [*induction, *by_rank] if layer in ("auto", place[0])]
    at, strongest = order[0]
    kind = "the strongest induction head is" if found.induction[order[0]] else "no induction head; the closest is"
    asked = "" if head == "auto" else f"--head {head}; "
    leading = head if isinstance(head, int) else strongest
    heads = list(range(found.score.shape[1])) if head == "all" else [leading]
    grid = sorted([inside for within, inside in by_rank if within == at][:drawn])
    reason = f"{asked}{kind} {Head.at(at, strongest)}, prefix matching {found.score[at, strongest]:.2f}"
    return Chosen(at, heads, leading, grid, [inside for within, inside in induction if within == at], reason)


def _look_at(
    model: Model, chosen: Chosen, number: int, text: str, ids: Ints, remove: bool, room: int, notes: Notes
) -> LayerOnText:
    """One text: how queries and keys of the layer meet, and what scores of the chosen heads are made of. `remove`: also
    take out the strongest key source; `room`: bytes of maps that may be kept."""
    induction = TokenBatch.of([ids], pad=model.bos).cells["prefix_matching"]
    cells = sorted(zip(induction.query.tolist(), induction.key.tolist(), strict=True))
    met = maps.interact(model, ids[None], chosen.layer)
    split: dict[int, Decomposition | str]
    try:
        split = {**decompose(model, ids, met, chosen.heads, cells)}
    except UserError as error:  # the maps were checked and stay good without a decomposition
        notes.warn(str(error))
        split = {head: str(error) for head in chosen.heads}
    removed = experiments.removals(model, ids, met, split) if remove else {}
    # Text by text: a thousand long texts must not fill the memory.
    kept = met if _size(met) <= room else None
    return LayerOnText(number, text, tuple(model.strings(ids)), ids, cells, met.check, split, removed, kept)


def _size(met: Interaction | None) -> int:
    """Bytes of its arrays."""
    return sum(array.nbytes for array in (met.q, met.k, met.products, met.scores, met.pattern)) if met else 0


def _richest(texts: Sequence[LayerOnText]) -> LayerOnText | None:
    return max(texts, key=lambda text: len(text.cells), default=None)


def _weigh(
    model: Model, chosen: Chosen, previous_token: Floats, seed: int, texts: Sequence[LayerOnText], notes: Notes
) -> tuple[Composition | None, Pair | None, HeadCircuits | None]:
    """Which earlier heads the layer reads, and what its leading head makes of the text with most induction cells."""
    if not (text := _richest(texts)):
        return None, None, None
    try:
        composition = compose(model, chosen.layer, seed=seed)
        heads = [Head.at(chosen.layer, head) for head in chosen.induction or chosen.heads]
        pair = composition.from_previous_token(previous_token, heads) if composition else None
        head = Head.at(chosen.layer, chosen.leading)
        found = head_circuits(model, head, pair and pair[0], text.ids, distances=DISTANCES)
    except UserError as error:
        notes.warn(str(error))
        return None, None, None
    return composition, pair, found


def _intervene(
    model: Model, chosen: Chosen, found: Detection, wanted: bool | None, options: Mapping[str, int],
    earlier: object, progress: Progress, notes: Notes,
) -> Experiments | None:  # fmt: skip
    """What the chosen heads' parts do, and the paths into the leading one; None where that would take long."""
    heads = [Head.at(chosen.layer, head) for head in chosen.heads]
    receiver = Head.at(chosen.layer, chosen.leading)
    plan = experiments.ExperimentPlan(model, heads, receiver, found, **options)
    metrics = {False: PART_METRICS, True: len(experiments.PATH_METRICS)}
    if before := go_on_from(earlier, "experiments", plan, metrics, notes):
        plan.known = list(before["effects"])
    if wanted is None and (seconds := plan.seconds()) > effects.UNASKED:
        notes.say(f"interventions left out: they would take {seconds / 60:.0f} minutes; --interventions does them")
        return None
    done = experiments.run_experiments(plan, progress)
    # Many kinds of paths are refused for one and the same reason, which is said once.
    for reason in sorted(set(done.refused.values())):
        notes.warn(reason)
    return done


# --- pictures ---


def _figures(found: QKAnalysis, names: Sequence[str]) -> Iterator[tuple[str, Figure]]:
    """Figures, those of these names among them. Those of one text are made together: its maps are the costly part."""
    model, grid = found.model, found.chosen.grid
    for text in found.texts:
        if not set(names).isdisjoint(found.figures_of(text)):
            met, title = found.interaction(text), f"{model.name}, text {text.number}: {shortened(text.text)}"
            drawn = met, text.split, grid, text.tokens, text.cells, title, text.number
            yield from figures_circuits.text_figures(*drawn).items()
    if found.circuits and (richest := found.richest):
        title, strings = f"{model.name}, tokens of: {shortened(richest.text)}", model.strings(found.circuits.tokens)
        weights = found.circuits, found.composition, found.pair, strings, len(richest.tokens), title
        yield from figures_circuits.weight_figures(*weights).items()
    yield from figures_circuits.intervention_figures([dict(one) for one in found.effects], model.name).items()


def _layer_on_page(found: QKAnalysis) -> Iterator[page.TextMaps]:
    """What the page shows of each text: scores and patterns of every head of the layer, and the decompositions."""
    for text in found.texts:
        met, tokens = found.interaction(text), text.tokens
        places = figures_heads.drawn_places(len(tokens), text.cells)
        rows, columns = np.ix_(places, places)
        visible = met.rules.visible[0][rows, columns]
        maps = {kind: np.where(visible, values[0][:, rows, columns], np.nan)
                for kind, values in (("scores", met.scores), ("pattern", met.pattern))}  # fmt: skip
        figures, said = [], "No decomposition."
        for number, split in text.split.items():
            if isinstance(split, str):
                said = split
                continue
            head = str(Head.at(met.layer, number))
            said = _largest_part(head, split)
            title = split.title(head)
            most = figures_circuits.MOST_ZOOMED
            figures.append(figures_circuits.decomposition_figure(split, title, tokens, most))
        yield page.TextMaps(text.number, text.text, tokens, said, text.cells, places, maps, figures)


def _largest_part(head: str, split: Decomposition) -> str:
    query, key, value = split.top(1)[0]
    return (
        f"Head {head} on its {split.kind} ({len(split.cells)}): {split.advantage()}; the largest part, {value:.2f}, is "
        f"{query} as a query meeting {key} as a key."
    )
