"""report.html: one page per run that opens offline from a file, its pictures inside it.

1. Figures are those of the PNG files, as SVG (`picture`). Over them the page says values and follows clicks.
2. Maps (patterns, scores) are cut to the tokens drawn and packed: the cells at and below the diagonal, each a 16-bit
   whole number of 1/32767 of the map's largest absolute value, in base64. A pattern so packed is off by less than
   0.00002. The page unpacks a head's maps when the head is chosen, and paints them behind their axes.
3. Everything that comes from a text, a tokenizer or a model's name is data: escaped for HTML; inside the JSON with no
   `<`, `>` or `&`, so that nothing in it ends the script element. A content security policy lets the page's own script
   run, by its hash, and lets it load nothing.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import Template
from typing import cast

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex

from common.heads.statistics import Floats
from common.results.figures_heads import UNITS, Places, Row, drawn_cells, map_panel, name_of, number, numbers, side_of
from common.results.files import jsonable
from common.results.picture import Picture, picture
from common.results.spec import Figure, Heatmap, Scale

FILE = "report.html"
MOST_TEXTS = 24  # texts in one page
MOST_PACKED = 8_000_000  # characters of packed maps in one page
LONGEST_TOKEN = 16  # characters of a token on an axis; hovering shows more of it
LONGEST_SAID = 60  # characters of a token where one hovers
FULL = 32767
MISSING = -32768
COLOURS = 128  # steps of a map's colours: the eye tells no more apart
HERE = Path(__file__).parent

# Start of a figure's name -> heading and hint of its section. Figures of other names are not on the page: what they
# show of a text, the page shows of every head.
SECTIONS = {
    "mosaic": ("Every head", "A square per head; darker: more prefix matching, the attention paid to the tokens after "
               "earlier copies. Hover for its numbers; click for its patterns. A score says where a head looks, not "
               "what it does with it."),
    "effects": ("Looking like induction, and doing it", "A mark per head: prefix matching against what the head does "
                "to the logit of the token that comes again. Far to the right near 0: looks, does nothing."),
    "ablation": ("Without its induction heads", "How much worse the model predicts. Random heads of the same layers "
                 "should change nothing."),
    "thresholds": ("Each head against its own threshold", "The threshold comes from rows without a repeat."),
    "budget": ("Where attention goes", "The parts of each bar sum to 1."),
    "circuits": ("What the weights say", "Scores of tokens by themselves, without a text around them."),
    "composition": ("Which earlier heads the layer reads", "Compared with random rotations of the same weights."),
    "parts": ("One part of a head replaced", "What matters of a head: its query, its key, its pattern or its values."),
    "paths": ("Paths into the head", "One input of the head is made to see an earlier head at its mean."),
}  # fmt: skip


@dataclass(frozen=True)
class TextMaps:
    """What the page shows of one text.

    Its `number`, from 1, the `text`, its `tokens`, and a sentence `said` of it; `cells`: its induction cells (query,
    key); `places`: the positions drawn, BOS first (`figures_heads.drawn_places`); `maps`: kind ("scores", "pattern")
    -> [head, place, place], NaN where a query may not see; `figures`: further figures of the text.
    """

    number: int
    text: str
    tokens: Sequence[str]
    said: str
    cells: Places
    places: Sequence[int]
    maps: Mapping[str, Floats]
    figures: Sequence[Figure] = ()


def report(
    results: Row, what: str, chosen: str, said: Sequence[str], texts: Iterable[TextMaps], figures: Mapping[str, Figure]
) -> str:
    """The page: what was found, maps of every head on every text, and figures.

    `results`: as for results.json; `what`: its title but for the model's name; `chosen`: the head shown first; `said`:
    sentences on the whole; `texts`: with maps of all heads of `results`, in their order; `figures`: by name, those that
    `SECTIONS` names are shown.
    """
    results = jsonable(results)
    heads, (shown, left_out) = results["heads"], affordable(texts, len(results["sequences"]))
    panels: dict[str, object] = {}

    def placed(key: str, figure: Figure) -> str:
        made = picture(figure)
        panels[key] = made.panels
        return _framed(key, made, figure.title)

    sections = {}
    for start, (title, hint) in SECTIONS.items():
        inside = [placed(_id(name), figure) for name, figure in figures.items() if name.split("_")[0] == start]
        if inside:
            beside = '<table id="numbers"></table>' if start == "mosaic" else ""
            sections[start] = _section(title, hint, "".join(inside) + beside)
    above = [*map(_paragraph, said), sections.pop("mosaic", "")]
    maps = [_live_maps(text, one) for text, one in enumerate(shown)]
    further = [
        "".join(placed(f"text-{text}-figure-{place}", figure) for place, figure in enumerate(one.figures))
        for text, one in enumerate(shown)
    ]
    on_texts = [_text_section(text, one, maps[text][0] + further[text]) for text, one in enumerate(shown)]
    if left_out:
        on_texts.append(_paragraph(f"{left_out} further texts are left out here; results.json has them.", "hint"))
    data = {
        "units": UNITS,
        "heads": [{"name": name_of(head), "line": _line(head), "numbers": numbers(head)} for head in heads],
        "chosen": [name_of(head) for head in heads].index(chosen),
        "figures": panels,
        "texts": [content for _, content in maps],
    }
    script = (HERE / "page.js").read_text(encoding="utf-8")
    filled = {
        "policy": policy([script]),
        "title": html.escape(f"{what} {results['model']['name']}"),
        "provenance": html.escape(_provenance(results)),
        "body": "\n".join(
            [*above, _chooser(heads), f'<div class="texts">{"".join(on_texts)}</div>', *sections.values()]
        ),
        "data": in_script(data),
        "script": script,
    }
    return Template((HERE / "page.html").read_text(encoding="utf-8")).substitute(filled)


def takes(name: str) -> bool:
    """Whether a figure of this name is shown on the page."""
    return name.split("_")[0] in SECTIONS


def save_page(page: str, folder: Path) -> None:
    """Write the page as `FILE` into `folder`; what UTF-8 cannot hold becomes a question mark."""
    (folder / FILE).write_text(page, encoding="utf-8", errors="replace")


# --- data for the scripts ---


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


def pack(maps: Floats) -> dict[str, object]:
    """Maps [head, place, place] as {`scale`: per head, `codes`: base64}; see the module's first step. NaN is kept."""
    row, column = np.tril_indices(maps.shape[1])
    cells = maps[:, row, column]
    seen = np.isfinite(cells)
    # A map of zeros gets the smallest scale there is: dividing by it gives zeros again.
    scale = np.maximum(np.abs(np.where(seen, cells, 0.0)).max(1), np.finfo(np.float32).tiny)
    codes = np.where(seen, np.rint(np.where(seen, cells, 0.0) / scale[:, None] * FULL), MISSING).astype("<i2")
    return {"scale": scale.tolist(), "codes": base64.b64encode(codes.tobytes()).decode("ascii")}


def in_script(content: object) -> str:
    """JSON that may stand inside a script element: ASCII alone, with no `<`, `>` or `&` in it."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def policy(scripts: Iterable[str]) -> str:
    """A content security policy under which these scripts run, and no other, and nothing is fetched."""
    hashes = (base64.b64encode(hashlib.sha256(one.encode("utf-8")).digest()).decode("ascii") for one in scripts)
    allowed = " ".join(f"'sha256-{one}'" for one in hashes)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"


def _provenance(results: Row) -> str:
    model, versions = results["model"], results["versions"]
    return (
        f"{model['name']}: {model['source']}; weights {str(model['fingerprint'])[:16]}; seed {results['seed']}; "
        f"{results['dtype']} on {results['device']}; TransformerLens {versions['transformer-lens']}, "
        f"torch {versions['torch']}"
    )


def _line(head: Row) -> str:
    """One head in one line."""
    verdict = head.get("verdict", "induction" if head["induction"] else "none")
    kind = "fits none of these types" if verdict == "none" else f"{verdict} head"
    return f"Head {name_of(head)}: {kind}, prefix matching {number(head['prefix_matching'])}"


def _live_maps(text: int, one: TextMaps) -> tuple[str, dict[str, object]]:
    """The axes of a text's maps as HTML, and for the script the text: its tokens, its cells counted in drawn places,
    and of each kind its packed maps and how to paint them."""
    tokens = [one.tokens[place] for place in one.places]
    short = [_shortened(token, LONGEST_TOKEN) for token in tokens]
    cells = drawn_cells(one.cells, one.places)
    side = max(4.8, side_of(len(tokens)))  # short texts larger than on paper: cells are hovered over
    frames, kinds = [], {}
    for kind, maps in one.maps.items():
        panel = map_panel(kind, maps[0], short, cells)
        heatmap = cast(Heatmap, panel.elements[0])
        # The script paints behind the axes, and writes its numbers where the colour bar's label has an empty line.
        scale = replace(heatmap.scale, label=f"\n{heatmap.scale.label}")
        blank = replace(heatmap, values=np.full_like(heatmap.values, np.nan), scale=scale)
        figure = Figure("", [[replace(panel, elements=[blank, *panel.elements[1:]])]], side + 0.4, side)
        made = picture(figure, numbered=False)
        bos = heatmap.bos or scale
        kinds[kind] = {**pack(maps), "box": made.panels[0]["box"], "bar": made.bars[0], "signed": scale.low < 0,
                       "colours": _colours(scale), "bos": _colours(bos)}  # fmt: skip
        frames.append(f"<figure><figcaption></figcaption>{_framed(f'text-{text}-{kind}', made, kind)}</figure>")
    said = [_shortened(token, LONGEST_SAID) for token in tokens]
    return "".join(frames), {"labels": said, "places": list(one.places), "cells": cells, "maps": kinds}


def _colours(scale: Scale) -> list[str]:
    return [to_hex(colour) for colour in colormaps[scale.colours](np.linspace(0.0, 1.0, COLOURS))]


# --- HTML; what is not written here is escaped here ---


def _shortened(token: str, most: int) -> str:
    return token if len(token) <= most else token[: most - 1] + "…"


def _id(name: str) -> str:
    """A figure's name as the id of its element: without dots, which a CSS selector would read as a class."""
    return name.replace(".", "-")


def _paragraph(text: str, css: str = "") -> str:
    return f"<p{css and f' class={css}'}>{html.escape(text)}</p>"


def _section(title: str, hint: str, inside: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{_paragraph(hint, 'hint')}{_div('side', inside)}</section>"


def _framed(key: str, made: Picture, title: str) -> str:
    image = f'<img src="{made.image}" alt="{html.escape(title)}">'
    return _div("figure", f'<div class="drawn" id="{html.escape(key)}" style="width:{made.width}px">{image}</div>')


def _div(css: str, *inside: str) -> str:
    return f'<div class="{css}">{"".join(inside)}</div>'


def _chooser(heads: Sequence[Row]) -> str:
    options = "".join(f'<option value="{place}">{name_of(head)}</option>' for place, head in enumerate(heads))
    return (
        '<section><h2>One head on each text</h2><p class="choose"><label>Head <select id="head">'
        f'{options}</select></label> <span id="chosen" aria-live="polite"></span></p>'
        "<p class=hint>A row per query, a column per key. Outlined: induction cells, the tokens after earlier copies "
        "of the query. The BOS column stands apart: most heads rest there. Blank: a query may not see it. "
        "Hover for values.</p></section>"
    )


def _text_section(text: int, one: TextMaps, inside: str) -> str:
    return (
        f'<section class="text"><h3>Text {one.number}</h3>{_tokens(one)}{_paragraph(one.said)}'
        f"{_cut(one)}{_div('side', inside)}</section>"
    )


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
