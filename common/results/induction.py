"""Which heads are induction heads, and what do they do on my texts?

1. Survey: every head is scored on battery rows, against its own threshold, and gets a verdict (heads/survey.py).
2. Evaluate: the verdicts are compared with labels, where there are any (heads/labels.py).
3. Ablate: the induction heads are switched off, and the rise of the loss is measured (interventions/ablation.py).
4. Texts: every head is scored on each text, with as much care (heads/texts.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from common import UserError
from common.attention.batches import Progress, silent
from common.attention.head import Head
from common.heads import labels as ground_truth
from common.heads import metrics as agreement
from common.heads.detection import Detection, by_score
from common.heads.labels import Labels
from common.heads.metrics import Metrics
from common.heads.scores import patterns
from common.heads.statistics import Floats, Ints, interval_over_rows
from common.heads.survey import Survey, copying, survey
from common.heads.texts import CONTROL_ROWS, FEW, TextScores, score_text
from common.heads.tokens import HEAD_TYPES
from common.interventions import ablation, causal_labels, effects
from common.interventions.ablation import Ablation
from common.results import figures_heads, files, page, tables
from common.results.analysis import Analysis, Note, Notes, Provenance, encode, go_on_from, ignore, rows_at_once
from common.results.spec import Figure
from common.results.tables import HeadOnText, HeadRow, Screenful, pairs

if TYPE_CHECKING:
    from common.loading.model import Model

HEADS_DRAWN = 4  # heads drawn per text
ABLATION_METRICS = 6  # of each ablation: those of effects.RowMetrics


@dataclass(frozen=True, repr=False)
class TextResult(Screenful):
    """What the heads do on one text.

    `tokens`: as a reader should see them, BOS first; `ids`: [pos]; `queries`: how many have a target; `ranked`: the
    induction heads, highest prefix matching on this text first; `induction_at_work`: those of them that reach their
    threshold here; `heads`: every head, layer by layer; `scores`: where they come from.
    """

    number: int
    text: str
    tokens: tuple[str, ...]
    ids: Ints
    queries: int
    ranked: tuple[Head, ...]
    induction_at_work: tuple[Head, ...]
    heads: tuple[HeadOnText, ...]
    scores: TextScores

    def sentence(self) -> str:
        """Whether induction is at work in the text, and how much that rests on."""
        if not self.queries:  # not "no induction": there was nothing to do
            return f"Text {self.number}: no token comes again after another, so there is nothing for induction to do."
        rests_on = f"{self.queries} {'query' if self.queries == 1 else 'queries'} with a target"
        rests_on += ", which is few" if self.queries < FEW else ""
        if open_heads := self._undecided():
            rests_on += f"; not decided for {', '.join(map(str, open_heads))}, as they look there in a control text too"
        if not self.induction_at_work:
            return f"Text {self.number}: no induction head is at work ({rests_on})."
        matching, highest = self.scores.scores.mean("prefix_matching"), self.scores.highest
        named = ", ".join(f"{head} ({matching[head.place]:.2f})" for head in self.induction_at_work[:6])
        if highest is not None:
            most = max(float(highest[head.place]) for head in self.induction_at_work)
            rests_on += f"; at most {most:.2f} on {CONTROL_ROWS} control texts"
        return f"Text {self.number}: induction is at work: {named}; {rests_on}."

    def _undecided(self) -> list[Head]:
        """Induction heads that no score could take over their threshold here."""
        attention = self.scores.attention
        return [head for head in self.ranked if attention and attention.threshold[head.place] >= 1]

    def summary(self) -> Iterable[str]:
        yield tables.shortened(self.text)
        yield self.sentence()

    def as_json(self) -> dict[str, object]:
        """As results.json holds it; what was not measured for lack of repeats is left out."""
        return {
            **{key: getattr(self, key) for key in ("text", "tokens", "queries")},
            "induction_at_work": [str(head) for head in self.induction_at_work],
            "ranked": [str(head) for head in self.ranked],
            "heads": [{key: value for key, value in asdict(head).items() if value is not None} for head in self.heads],
        }


@dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class InductionHeads(Analysis):
    """The induction heads of a model.

    `heads`: every head, layer by layer; `induction_heads`: those with that verdict, highest score first; `texts`: what
    they do on each text; `metrics`: agreement with `labels`, None without labels; `ablation`: the loss without the
    induction heads, None where it was not measured; `survey`: the arrays behind `heads`.
    """

    heads: tuple[HeadRow, ...]
    induction_heads: tuple[Head, ...]
    texts: tuple[TextResult, ...]
    survey: Survey
    labels: Labels | None
    metrics: Metrics | None
    ablation: Ablation | None

    def sentences(self) -> list[str]:
        """What was found, for a reader: the induction heads, the others, the texts, agreement with the labels."""
        exact = tables.exact_sentence(self.heads)
        found = [exact] if exact else []
        found += [tables.verdict_sentence(self.heads, self.ablation), tables.other_heads(self.heads)]
        if not self.survey.settled:
            detected = self.survey.found
            unsure = sorted(
                map(tuple, np.argwhere(detected.confidence < self.survey.sure)), key=detected.confidence.item
            )
            named = [f"{Head.at(*at)} {detected.verdict[at]} ({detected.confidence[at]:.3f})" for at in unsure]
            more = " …" if len(named) > 6 else ""
            found.append(f"Not certain after {self.survey.rows} rows: {', '.join(named[:6])}{more}")
        found += [text.sentence() for text in self.texts]
        if self.metrics and self.labels:
            found.append(f"{self.metrics.sentence()}\nLabels: {self.labels.about()}.")
        return found

    def summary(self) -> Iterable[str]:
        yield f"InductionHeads of {self.model.name}, {len(self.heads)} heads on {self.survey.rows} rows"
        yield from self.warnings()
        yield from self.sentences()
        yield f".table(), .figure(name), .page(), .save(folder); figures: {', '.join(self.figures)}"

    def rows(self) -> dict[str, dict[str, object]]:
        return {head.name: head.flat() for head in self.heads}

    @property
    def figures(self) -> list[str]:
        return [
            *("mosaic", "thresholds", "budget"),
            *(["precision_recall"] if self.labels and self.labels.heads and self.labels.complete else []),
            *(f"attention_{text.number:02d}" for text in self.texts),
            "effects",
            *(["ablation"] if self.ablation and self.ablation.effects else []),
        ]

    def specified(self, names: Sequence[str]) -> Iterator[tuple[str, Figure]]:
        return ((name, _figure_of(self, name)) for name in names)

    def page(self) -> str:
        said = [tables.verdict_sentence(self.heads, self.ablation), *self.warnings()]
        if self.metrics:
            said.append(self.metrics.sentence())
        shown = dict(self.specified([name for name in self.figures if page.takes(name)]))
        strongest = max(self.heads, key=lambda head: np.nan_to_num(head.prefix_matching)).name
        chosen = str(self.induction_heads[0]) if self.induction_heads else strongest
        return page.report(self.as_json(), "Induction heads of", chosen, said, _maps_on_page(self), shown)

    def content(self, written: Sequence[str]) -> dict[str, object]:
        return {
            "rows": self.survey.rows,
            "row_length": self.survey.length,
            "heads": [asdict(head) for head in self.heads],
            "induction_heads": [str(head) for head in self.induction_heads],
            "no_direct_path": self.survey.evidence.no_direct_path,
            "ablation": self.ablation.as_json() if self.ablation else None,
            "metrics": asdict(self.metrics) if self.metrics else None,
            "sequences": [text.as_json() for text in self.texts],
        }

    def save(self, folder: str | Path, *, pictures: bool = True, argv: Sequence[str] = ()) -> list[str]:
        """Write results.json, heads.csv and, with `pictures`, PNGs and report.html, whole or not at all; the names of
        the files. Raises UserError where the folder cannot be written. `argv`: the command of a script."""
        rows = list(self.rows().values())
        return self.write(folder, lambda staging: files.write_csv(staging / "heads.csv", rows), pictures, argv)


def find_induction_heads(
    model: Model, sequences: Sequence[str] = (), *, threshold: float | None = None, labels: str | None = None,
    ablate: bool | None = None, seed: int = 0, batch_size: int | None = None,
    earlier: object = None, progress: Progress = silent, hear: Callable[[Note], None] = ignore,
) -> InductionHeads:  # fmt: skip
    """Find the induction heads of `model`, and look at what they do on the texts of `sequences`.

    `threshold`: one number in [0, 1] for all heads in place of their own; `labels`: what to evaluate against, the name
    of a file or of a published set, "published", "causal" (measured now), "none", or None: the model's own, else what
    was published for its very weights; `ablate`: whether to measure the loss without the induction heads, None: where
    that takes less than a minute; `batch_size`: rows per forward pass, None: as many as help and fit; `earlier`: the
    content of an earlier results.json, whose ablation is used again where everything that could change it is the same;
    `progress(what, total)`: entered for each long step, told of each finished part; `hear`: told of each note at once.

    Raises UserError for a text longer than the model's context, for texts none of which has two tokens, for wrong
    labels, and where the model's vocabulary is too small for the battery. After Ctrl-C during the ablation, what was
    measured is returned and `missing` names the rest.
    """
    started, notes = time.monotonic(), Notes(hear)
    encoded = encode(model, sequences, notes)
    batch_size = rows_at_once(model, encoded, batch_size)
    options = {"seed": seed, "batch_size": batch_size}
    with notes.listening():
        # Labels come before the long work, so that a wrong file is said at once.
        measure = partial(causal_labels.measure_causal_effects, model, **options, progress=progress)
        truth = ground_truth.choose_labels(labels, model, lambda: measure().labels(), notes.say)
        measured = survey(model, **options, threshold=threshold, progress=progress)
        found = measured.found
        quality = _agreement(found, truth) if truth else None
        if measured.evidence.no_direct_path:
            notes.warn(f"no direct effect and no copying: {measured.evidence.no_direct_path}")
        direct = copying(model, measured)
        ablated = _ablate(model, measured, ablate, options, earlier, progress, notes)
        texts = tuple(
            _text(model, measured, number, text, ids, score_text(model, ids, **options, threshold=threshold))
            for number, text, ids in encoded
        )
    arguments: dict[str, object] = {"threshold": "dynamic" if threshold is None else threshold, **options}
    arguments |= {
        "labels": {"kind": truth.kind, "source": truth.source} if truth else "none",
        "ablate": ablated is not None,
    }
    return InductionHeads(
        model=model, provenance=Provenance.of(model, seed, started, arguments), notes=tuple(notes),
        missing=tuple(ablated.missing) if ablated else (), heads=_heads(measured, direct, ablated),
        induction_heads=tuple(Head.at(*place) for place in by_score(found.score) if found.induction[place]),
        texts=texts, survey=measured, labels=truth, metrics=quality, ablation=ablated,
    )  # fmt: skip


def _agreement(found: Detection, truth: Labels) -> Metrics:
    compared, detected, resampled = agreement.compared_with(found, truth)
    return agreement.evaluate(detected, found.score, resampled, truth, compared)


def _ablate(
    model: Model, measured: Survey, wanted: bool | None, options: Mapping[str, int], earlier: object,
    progress: Progress, notes: Notes,
) -> Ablation | None:  # fmt: skip
    """What the model loses without its induction heads; None where there are none, or where it was left out."""
    # Without an induction head there is nothing to take away, and no control to match.
    if wanted is False or not measured.found.induction.any():
        return None
    try:
        plan = ablation.AblationPlan(model, measured.found, **options)
    except UserError as error:  # the rest of the result is worth having all the same
        notes.warn(f"no ablation: {error}")
        return None
    if before := go_on_from(earlier, "ablation", plan, {False: ABLATION_METRICS}, notes):
        plan.go_on(before)
    if wanted is None and (seconds := plan.seconds()) > effects.UNASKED:
        notes.say(f"ablation left out: it would take about {seconds / 60:.0f} minutes; --ablate does it")
        return None
    ablated = ablation.ablate(plan, progress)
    for kind, why in ablated.impossible.items():
        notes.warn(f"no ablation by '{kind}': {why}")
    return ablated


def _heads(measured: Survey, direct: Floats, ablated: Ablation | None) -> tuple[HeadRow, ...]:
    """Every head with all that was measured of it; `direct`: its OV copying, [layers, heads]."""
    found, evidence = measured.found, measured.evidence
    columns = {
        **{key: getattr(found, key) for key in ("verdict", "confidence", "control", "threshold", "induction")},
        "prefix_matching": found.score,
        "prefix_matching_interval": pairs(found.low, found.high),
        **{kind: evidence.repeats.mean(kind) for kind in HEAD_TYPES if kind != "prefix_matching"},
        "copying": direct,
        **{f"budget_{part}": paid for part, paid in evidence.repeats.budget().items()},
    }
    exact = evidence.exact
    columns["total_effect_exact"] = ~np.isnan(exact).all(0) if exact is not None else np.zeros_like(found.induction)
    for kind, effect in (("total_effect", evidence.effect), ("direct_effect", evidence.direct)):
        columns |= {kind: effect.mean(0), f"{kind}_interval": pairs(*interval_over_rows(effect))}
    rows = []
    for row in tables.rows(HeadRow, columns):
        one = ablated and ablated.of([row.name], "mean", "loss_at_repeats")
        # The interval comes as a tuple from a measurement, as a list from an earlier results.json.
        low, high = one["interval"] if one else (None, None)
        lost = one["effect"] if one else None
        rows.append(replace(row, ablation_effect=lost, ablation_effect_interval=(low, high)))
    return tuple(rows)


def _text(model: Model, measured: Survey, number: int, text: str, ids: Ints, on_text: TextScores) -> TextResult:
    """What the heads do on one text; where no token repeats, the induction heads rank as on the battery."""
    # Where no token repeats there is neither score nor threshold: those columns stay None, not 0.
    columns: dict[str, NDArray[np.generic]] = {kind: on_text.scores.mean(kind) for kind in HEAD_TYPES}
    attention, found = on_text.attention, measured.found
    order = by_score(attention.score if attention else found.score)
    ranked = [place for place in order if found.induction[place]]
    if attention:
        columns |= {"control": attention.control, "threshold": attention.threshold, "attends": attention.attends}
        if on_text.highest is not None:
            columns["control_highest"] = on_text.highest
    at_work = (place for place in ranked if attention and attention.attends[place])
    return TextResult(
        number=number, text=text, tokens=tuple(model.strings(ids)), ids=ids, queries=on_text.queries,
        ranked=tuple(Head.at(*place) for place in ranked),
        induction_at_work=tuple(Head.at(*place) for place in at_work),
        heads=tables.rows(HeadOnText, columns), scores=on_text,
    )  # fmt: skip


# --- pictures ---


def _figure_of(found: InductionHeads, figure: str) -> Figure:
    """What one of `found.figures` shows."""
    name, detected, labels, ablated = found.model.name, found.survey.found, found.labels, found.ablation
    if figure.startswith("attention_"):
        number = int(figure.removeprefix("attention_"))
        return _attention_figure(found, next(text for text in found.texts if text.number == number))
    if figure == "precision_recall" and labels:
        return figures_heads.precision_recall_figure(detected, labels, f"{name}: detection against labels")
    if figure == "ablation" and ablated:
        return figures_heads.ablation_figure(ablated.effects, f"{name}: without its induction heads")
    if figure == "budget":
        paid = found.survey.evidence.repeats.budget()
        return figures_heads.budget_figure(detected, paid, f"{name}: where attention goes")
    if figure == "effects":
        rows = [asdict(head) for head in found.heads]
        return figures_heads.effect_figure(rows, f"{name}: looking like induction, and doing it")
    if figure == "thresholds":
        return figures_heads.threshold_figure(detected, f"{name}: each head against its own threshold")
    return figures_heads.mosaic_figure(detected, f"Induction heads of {name}")


def _attention_figure(found: InductionHeads, text: TextResult) -> Figure:
    """The strongest induction heads on a text, and the mean over the heads of the strongest one's layer."""
    model, attention = found.model, text.scores.attention
    strongest = text.ranked[:HEADS_DRAWN]
    layer = strongest[0].layer if strongest else model.n_layers - 1
    titles = []
    for head in strongest:
        said = "no token repeats here"
        if attention:
            score, threshold = attention.score[head.place], attention.threshold[head.place]
            said = f"prefix matching {score:.2f} (threshold {threshold:.2f})"
        titles.append(f"head {head}, {said}")
    titles.append(f"layer {layer}, mean over its {model.n_heads} heads")
    shown = patterns(model, text.ids, [*(head.place for head in strongest), (layer, None)])
    title = f"{model.name} on text {text.number}: {tables.shortened(text.text)}"
    panels = list(zip(titles, shown, strict=True))
    return figures_heads.token_figure("pattern", panels, text.tokens, text.scores.cells, title)


def _maps_on_page(found: InductionHeads) -> Iterator[page.TextMaps]:
    """What the page shows of each text. One at a time: it stops asking when it is full, and the maps are large."""
    for text in found.texts:
        cells, tokens = text.scores.cells, text.tokens
        places = figures_heads.drawn_places(len(tokens), cells)
        heads = [(head.layer, head.head) for head in text.heads]
        maps = np.stack(patterns(found.model, text.ids, heads, places))
        yield page.TextMaps(text.number, text.text, tokens, text.sentence(), cells, places, {"pattern": maps})
