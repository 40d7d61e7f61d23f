"""What a figure shows, complete and without a backend.

`figures_heads` and `figures_circuits` decide it; `draw` (matplotlib) shows it in files, notebooks and report.html.
Colours are names that matplotlib knows: "#D55E00", or "0.45" for a grey. A text may have several lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from common.heads.statistics import Floats

# Okabe and Ito's palette: told apart by colour-blind readers, and in print
MARK = "#D55E00"
BLUE = "#0072B2"
LONGEST_TICK = 28  # characters of a label on an axis: our own are no longer, tokens may be

Stroke = Literal["-", "--", ":"]
Corner = Literal["below", "above", "lower right", "lower left", "upper left"]


@dataclass(frozen=True)
class Scale:
    """Colours from `low` to `high`, by a colour map of matplotlib's. `beyond`: cells may lie outside, which the colour
    bar shows with arrows."""

    colours: str
    low: float
    high: float
    label: str
    beyond: bool = False


@dataclass(frozen=True)
class Outline:
    """A frame around one cell; `name` stands in its corner."""

    row: int
    column: int
    colour: str = MARK
    line: Stroke = "-"
    name: str = ""


@dataclass(frozen=True)
class Heatmap:
    """A matrix [row, column], the first row on top; NaN stays blank.

    `texts` are written into cells ("" for none), in bold where `bold`; `hover` says what a cell is (by default its row,
    column and value); `heads`: the head a cell stands for; all [row, column]. `bos`: the scale of the first column,
    where it has one of its own. `gaps`: white lines between cells.
    """

    values: Floats
    scale: Scale
    outlines: Sequence[Outline] = ()
    texts: NDArray[np.str_] | None = None
    bold: NDArray[np.bool_] | None = None
    hover: NDArray[np.object_] | None = None
    heads: NDArray[np.object_] | None = None
    bos: Scale | None = None
    gaps: bool = False


@dataclass(frozen=True)
class Marks:
    """A mark per (x, y). `shape`: circle, square, triangle-down, triangle-up, diamond or tick (a short upright line).

    Either all have one `colour`, or `values` are coloured by `scale`. `ends`: low and high end of an interval along x.
    `names` ("" for none) are written beside marks, on the right where `right`; `heads`: the head a mark stands for.
    """

    x: Sequence[float]
    y: Sequence[float]
    shape: str
    colour: str = "0.2"
    size: float = 6.0
    filled: bool = True
    values: Sequence[float] | None = None
    scale: Scale | None = None
    ends: tuple[Sequence[float], Sequence[float]] | None = None
    names: Sequence[str] = ()
    right: Sequence[bool] = ()
    hover: Sequence[str] = ()
    heads: Sequence[str] = ()


@dataclass(frozen=True)
class Line:
    """A line through (x, y), broken where NaN; `steps`: y holds until the next x."""

    x: Sequence[float]
    y: Sequence[float]
    colour: str
    steps: bool = False


@dataclass(frozen=True)
class Bars:
    """Lying bars at y = 0, 1, …, from `left` on; parts of one bar are several Bars."""

    left: Floats
    width: Floats
    colour: str


@dataclass(frozen=True)
class Rule:
    """A line across the panel where `axis` ("x" or "y") is `low`; up to `high`, a band behind everything."""

    axis: str
    low: float
    high: float | None = None
    colour: str = "0.7"


Element = Heatmap | Marks | Line | Bars | Rule


@dataclass(frozen=True)
class Axis:
    """`ticks` stand at `at`, by default at 0, 1, …; without them the backend chooses numbers. `limits`: (left, right)
    or (bottom, top). `turned`: ticks upright. `linear_to`: logarithmic beyond ± that number."""

    label: str = ""
    ticks: Sequence[str] | None = None
    at: Sequence[float] | None = None
    limits: tuple[float, float] | None = None
    turned: bool = False
    grid: bool = False
    linear_to: float | None = None

    @property
    def places(self) -> Sequence[float]:
        """Where the ticks stand."""
        return range(len(self.ticks or ())) if self.at is None else self.at


@dataclass(frozen=True)
class Panel:
    """One pair of axes. `square`: cells are as wide as high; `headings`: (x, text) along its upper edge."""

    x: Axis
    y: Axis
    elements: Sequence[Element]
    title: str = ""
    square: bool = False
    headings: Sequence[tuple[float, str]] = ()

    @property
    def scale(self) -> Scale | None:
        """What the panel's one colour bar shows, if it has one."""
        return next((one.scale for one in self.elements if isinstance(one, (Heatmap, Marks)) and one.scale), None)


@dataclass(frozen=True)
class Entry:
    """A line of the legend. `shape`: one of a mark's, or frame, patch or line."""

    text: str
    shape: str
    colour: str
    line: Stroke = "-"
    filled: bool = True


@dataclass(frozen=True)
class Figure:
    """Rows of panels; None leaves a place free. `width`, `height`: inches; `heights`: shares of the rows.

    `legend_at`: "below" the panels, "above" them, or a corner of the only panel, such as "lower right".
    """

    title: str
    panels: Sequence[Sequence[Panel | None]]
    width: float
    height: float
    legend: Sequence[Entry] = ()
    legend_at: Corner = "below"
    legend_columns: int = 1
    caption: str = ""
    heights: Sequence[float] | None = None
