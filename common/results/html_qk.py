"""What report.html shows of a layer's queries and keys on one text: arrays of `qk`, cut and named for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from common.attention.head import Head
from common.circuits.decomposition import Decomposition
from common.circuits.maps import Interaction
from common.results import html_figures
from common.results.html_report import TextMaps, drawn_places
from common.results.qk_plots import grouped

MOST_SOURCES = 40  # sources that stay legible in a figure that can be zoomed


def of_text(
    met: Interaction,
    split: Mapping[int, Decomposition | str],
    text: str,
    tokens: Sequence[str],
    cells: Sequence[tuple[int, int]],
) -> TextMaps:
    """Scores and patterns of every head of the layer, [head, place, place], and the decompositions of `split`."""
    places = drawn_places(len(tokens), cells)
    rows, columns = np.ix_(places, places)
    visible = met.rules.visible[0][rows, columns]
    scores = np.where(visible, met.scores[0][:, rows, columns], np.nan)
    pattern = np.where(visible, met.pattern[0][:, rows, columns], np.nan)
    figures = {}
    said = "No decomposition."
    for head, found in split.items():
        if isinstance(found, str):
            said = found
            continue
        said = _sentence(str(Head.at(met.layer, head)), found)
        names, terms = grouped(found.sources, found.terms, MOST_SOURCES)
        title = f"What the scores of head {Head.at(met.layer, head)} are made of"
        figures[title] = html_figures.decomposition(names, terms, title)
    return TextMaps(text, tokens, said, cells, places, {"scores": scores, "pattern": pattern}, figures)


def _sentence(head: str, found: Decomposition) -> str:
    """What was decomposed, and its largest term."""
    query, key, value = found.top(1)[0]
    return (
        f"Head {head} on its {found.kind} ({len(found.cells)}): ahead of the other tokens in sight by "
        f"{found.score_advantage:.2f} on average; the largest part, {value:.2f}, is {query} as a query "
        f"meeting {key} as a key."
    )
