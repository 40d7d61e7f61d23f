"""report.html: one page per run that opens offline from a file, with Plotly inside it.

1. Maps (patterns, scores) are cut to the tokens drawn and packed: the cells at and below the diagonal, each a 16-bit
   whole number of 1/32767 of the map's largest absolute value, in base64. A pattern so packed is off by less than
   0.00002. The page unpacks a head's maps when the head is chosen.
2. Figures that do not change are made here (`html_figures`); html_report.js draws them.
3. Everything that comes from a text, a tokenizer or a model's name is data: escaped for HTML; inside the JSON with no
   `<`, `>` or `&`, so that nothing in it ends the script element; in figures with nothing that Plotly reads as a tag.
   A content security policy lets the page's own two scripts run, by their hashes, and lets it load nothing.

Plotly, because one library draws heatmaps, scatters and intervals, all with values on hovering. CircuitsVis shows
attention only, and a page of its own has no way to tie a pattern to a click in another figure.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from common.attention.head import Head
from common.heads.statistics import Floats
from common.results import html_figures, plots
from common.results.files import jsonable

FILE = "report.html"
MOST_TEXTS = 24  # texts in one page
MOST_PACKED = 8_000_000  # characters of packed maps in one page
FULL = 32767
MISSING = -32768
HERE = Path(__file__).parent

KINDS: dict[str, dict[str, Any]] = {
    "pattern": {"title": "Pattern", "unit": "attention", "signed": False, "colours": plots.ATTENTION,
                "bos": plots.RESTING},
    "scores": {"title": "Scores", "unit": "score before softmax", "signed": True, "colours": "PRGn_r",
               "bos": "PRGn_r"},
}  # fmt: skip


@dataclass(frozen=True)
class TextMaps:
    """What the page shows of one text.

    `text`, its `tokens`, and a sentence `said` of it; `cells`: its induction cells (query, key); `places`: the
    positions drawn, BOS first (`drawn_places`); `maps`: kind -> [head, place, place], NaN where a query may not see;
    `figures`: further figures, by title.
    """

    text: str
    tokens: Sequence[str]
    said: str
    cells: Sequence[tuple[int, int]]
    places: Sequence[int]
    maps: Mapping[str, Floats]
    figures: Mapping[str, html_figures.Figure] = field(default_factory=dict)


def drawn_places(length: int, cells: Sequence[tuple[int, int]]) -> list[int]:
    """BOS and the positions of the text that are drawn: all, or the stretch with most induction cells."""
    window = plots.attention_window(length, cells)
    return [0, *(place for place in range(*window.indices(length)) if place > 0)]


def induction_page(results: Mapping[str, Any], said: Sequence[str], texts: Iterable[TextMaps]) -> str:
    """The page of the first script: mosaic, patterns of every head on every text, effects, ablation.

    `results`: as for results.json; `said`: sentences on the whole; `texts`: with maps of all heads, layer by layer.
    """
    results = jsonable(results)
    heads = results["heads"]
    measured = results["ablation"] or {"effects": []}
    figures = {"mosaic": html_figures.mosaic(heads), "effects": html_figures.effects(heads)}
    figures |= {f"ablation-{kind}": one for kind in ("mean", "knockout")
                if (one := html_figures.ablation(measured, kind))}  # fmt: skip
    shown, left_out = affordable(texts, len(results["sequences"]))
    body = [
        *(_paragraph(sentence) for sentence in said),
        _section("Every head", "A square per head; darker: more prefix matching, the attention paid to the tokens "
                 "after earlier copies. Outlined in vermilion: induction heads. Hover for its numbers; click for"
                 " its patterns. A score says where a head looks, not what it does with it.", ["mosaic"],
                 '<table id="numbers"></table>'),
        _chooser(heads),
        _text_sections(shown, left_out),
        _section("Looking like induction, and doing it", "A mark per head: prefix matching against what the head does "
                 "to the logit of the token that comes again. Circles: induction heads, triangles: suppression heads, "
                 "diamonds: heads that attend only, squares: others. Far to the right near 0: looks, does nothing.",
                 ["effects"]),
    ]  # fmt: skip
    if taken := [key for key in figures if key.startswith("ablation")]:
        hint = "How much worse the model predicts. Random heads of the same layers should change nothing."
        body.append(_section("Without its induction heads", hint, taken))
    ranked = results["induction_heads"] or [_name(max(heads, key=lambda head: head["prefix_matching"] or 0.0))]
    return _page(results, "Induction heads of", body, figures, heads, ranked[0], shown)


def qk_page(results: Mapping[str, Any], chosen: int, said: Sequence[str], texts: Iterable[TextMaps]) -> str:
    """The page of the second script: scores and pattern of every head of the layer, and the decompositions.

    `chosen`: the head shown first; `texts`: with maps of all heads of the layer.
    """
    results = jsonable(results)
    shown, left_out = affordable(texts, len(results["sequences"]))
    body = [*(_paragraph(sentence) for sentence in said), _chooser(results["heads"]), _text_sections(shown, left_out)]
    return _page(
        results,
        f"Layer {results['layer']} of",
        body,
        {},
        results["heads"],
        str(Head.at(results["layer"], chosen)),
        shown,
    )


def save(page: str, folder: Path) -> None:
    """Write the page as `FILE` into `folder`; what UTF-8 cannot hold becomes a question mark."""
    (folder / FILE).write_text(page, encoding="utf-8", errors="replace")


def affordable(texts: Iterable[TextMaps], count: int) -> tuple[list[TextMaps], int]:
    """The first of `count` texts, as many as one page holds, and how many are left out."""
    shown: list[TextMaps] = []
    room = MOST_PACKED
    for one in texts:
        room -= sum(packed_size(maps) for maps in one.maps.values())
        if shown and (room < 0 or len(shown) == MOST_TEXTS):
            break
        shown.append(one)
    return shown, count - len(shown)


def packed_size(maps: Floats) -> int:
    """Characters that `pack` makes of maps [head, place, place]."""
    heads, places, _ = maps.shape
    return -(-heads * places * (places + 1) // 3) * 4


def pack(maps: Floats) -> dict[str, Any]:
    """Maps [head, place, place] as {`scale`: per head, `codes`: base64}; see the module's first step. NaN is kept."""
    row, column = np.tril_indices(maps.shape[1])
    cells = maps[:, row, column]
    known = np.isfinite(cells)
    scale = np.maximum(np.abs(np.where(known, cells, 0.0)).max(1), np.finfo(np.float32).tiny)
    codes = np.where(known, np.rint(np.where(known, cells, 0.0) / scale[:, None] * FULL), MISSING).astype("<i2")
    return {"scale": scale.tolist(), "codes": base64.b64encode(codes.tobytes()).decode("ascii")}


def in_script(content: Any) -> str:
    """JSON that may stand inside a script element: ASCII alone, with no `<`, `>` or `&` in it."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _page(
    results: Mapping[str, Any], what: str, body: Sequence[str], figures: Mapping[str, html_figures.Figure],
    heads: Sequence[Mapping[str, Any]], chosen: str, texts: Sequence[TextMaps],
) -> str:  # fmt: skip
    from plotly.offline import get_plotlyjs

    figures = {**figures, **{key: figure for key, _, figure in _further(texts)}}
    data = {
        "mark": plots.MARK,
        "kinds": {kind: {**one, **{key: html_figures.colours(one[key]) for key in ("colours", "bos")}}
                  for kind, one in KINDS.items()},
        "heads": [{"name": _name(head), "layer": head["layer"], "head": head["head"], "line": _line(head),
                   "numbers": html_figures.numbers(head)}
                  for head in heads],
        "chosen": [_name(head) for head in heads].index(chosen),
        "figures": figures,
        "texts": [_text_data(one) for one in texts],
    }  # fmt: skip
    scripts = get_plotlyjs(), (HERE / "html_report.js").read_text(encoding="utf-8")
    return Template((HERE / "html_report.html").read_text(encoding="utf-8")).substitute(
        policy=policy(scripts),
        title=html.escape(f"{what} {results['model']['name']}"),
        provenance=html.escape(_provenance(results)),
        body="\n".join(body),
        data=in_script(data),
        plotly=scripts[0],
        script=scripts[1],
    )


def policy(scripts: Iterable[str]) -> str:
    """A content security policy under which these scripts run, and no other, and nothing is fetched."""
    hashes = (base64.b64encode(hashlib.sha256(one.encode("utf-8")).digest()).decode("ascii") for one in scripts)
    allowed = " ".join(f"'sha256-{one}'" for one in hashes)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"


def _provenance(results: Mapping[str, Any]) -> str:
    model, versions = results["model"], results["versions"]
    return (
        f"{model['name']}: {model['source']}; weights {str(model['fingerprint'])[:16]}; seed {results['seed']}; "
        f"{results['dtype']} on {results['device']}; TransformerLens {versions['transformer-lens']}, "
        f"torch {versions['torch']}"
    )


def _name(head: Mapping[str, Any]) -> str:
    return str(Head.at(head["layer"], head["head"]))


def _line(head: Mapping[str, Any]) -> str:
    """One head in one line."""
    verdict = head.get("verdict", "induction" if head["induction"] else "none")
    kind = "no kind named here" if verdict == "none" else f"{verdict} head"
    return f"Head {_name(head)}: {kind}, prefix matching {html_figures.number(head['prefix_matching'])}"


def _text_data(one: TextMaps) -> dict[str, Any]:
    """A text for the script: labels escaped for Plotly, cells counted in drawn places, maps packed."""
    at = {place: index for index, place in enumerate(one.places)}
    tokens = [one.tokens[place] for place in one.places]
    return {
        "labels": [html_figures.label(token) for token in tokens],
        "short": [html_figures.label(token, html_figures.LONGEST_LABEL) for token in tokens],
        "places": list(one.places),
        "cells": [[at[query], at[key]] for query, key in one.cells if query in at and key in at],
        "maps": {kind: pack(maps) for kind, maps in one.maps.items()},
    }


def _further(texts: Sequence[TextMaps]) -> Iterator[tuple[str, int, html_figures.Figure]]:
    """Each text's further figures: the id of its element, the number of the text, the figure."""
    for number, one in enumerate(texts):
        for place, figure in enumerate(one.figures.values()):
            yield f"text-{number}-figure-{place}", number, figure


# --- HTML; what is not written here is escaped here ---


def _paragraph(text: str, css: str = "") -> str:
    return f"<p{css and f' class={css}'}>{html.escape(text)}</p>"


def _section(title: str, hint: str, figures: Iterable[str], beside: str = "") -> str:
    inside = "".join(f'<div class="figure" id="{figure}"></div>' for figure in figures)
    shown = f'<div class="side">{inside}{beside}</div>'
    return f"<section><h2>{html.escape(title)}</h2>{_paragraph(hint, 'hint')}{shown}</section>"


def _chooser(heads: Sequence[Mapping[str, Any]]) -> str:
    options = "".join(f'<option value="{place}">{_name(head)}</option>' for place, head in enumerate(heads))
    return (
        '<section><h2>One head on each text</h2><p class="choose"><label>Head <select id="head">'
        f'{options}</select></label> <span id="chosen" aria-live="polite"></span></p>'
        "<p class=hint>A row per query, a column per key. Outlined: induction cells, the tokens after earlier copies "
        "of the query. The BOS column stands apart: most heads rest there. Blank: a query may not see it. "
        "Hover for values.</p></section>"
    )


def _text_sections(texts: Sequence[TextMaps], left_out: int) -> str:
    sections = []
    for number, one in enumerate(texts):
        ids = [f"text-{number}-{kind}" for kind in one.maps] + [key for key, of, _ in _further(texts) if of == number]
        inside = "".join(f'<div class="figure" id="{key}"></div>' for key in ids)
        sections.append(
            f'<section class="text"><h3>Text {number + 1}</h3>{_tokens(one)}{_paragraph(one.said)}'
            f'{_cut(one)}<div class="side">{inside}</div></section>'
        )
    if left_out:
        sections.append(_paragraph(f"{left_out} further texts are left out here; results.json has them.", "hint"))
    return f'<div class="texts">{"".join(sections)}</div>'


def _tokens(one: TextMaps) -> str:
    """The tokens in order; those with an induction cell as a query are framed."""
    queries = {query for query, _ in one.cells}
    items = (
        f"<li{' class=repeat' if place in queries else ''}><bdi>{html.escape(token)}</bdi></li>"
        for place, token in enumerate(one.tokens)
    )
    return f'<ol class="tokens">{"".join(items)}</ol>'


def _cut(one: TextMaps) -> str:
    if len(one.places) == len(one.tokens):
        return ""
    drawn = f"The maps show tokens {one.places[1]} to {one.places[-1]} of {len(one.tokens) - 1}, and BOS."
    return _paragraph(drawn, "hint")
