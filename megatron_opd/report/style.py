"""How figures look: colours that colour-blind readers can tell apart, a dash for each further six groups, legends outside, sheets of panels.

A panel is drawn alone for the page, which arranges panels by its width, and on a sheet with others as PNG and SVG.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

# Okabe and Ito 2008, Color Universal Design, without black and yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1.2, 1, 1.2)))
MARKERS = "osD^vP"
GREY = "#7f7f7f"
# Colours that the page replaces by its own, which follow light and dark.
INK, LINE = "#1a1b1c", "#c8c9ca"
_RC: Any = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": LINE, "grid.linewidth": 0.6, "axes.axisbelow": True,
    "axes.edgecolor": INK, "axes.labelcolor": INK, "axes.titlecolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK,
    "font.size": 9, "axes.titlesize": 9.5, "axes.titlelocation": "left",
    "text.parse_math": False,  # labels are people's names of things: "$\\frac$" is no formula
    "svg.fonttype": "path", "svg.hashsalt": "megatron_opd",
}  # fmt: skip
_LEGEND_INCHES = 0.075  # a character of a legend, with room
LONGEST_LABEL = 30


@dataclass(frozen=True)
class Mark:
    """How a group is drawn: label, colour, dash and marker."""

    label: str
    colour: str
    dash: Any = "-"
    marker: str = "o"


@dataclass(frozen=True)
class Panel:
    """`draw` is called with the axes, which have the title; width and height in inches."""

    title: str
    draw: Callable[[Any], None]
    width: float = 4.3
    height: float = 2.8


@dataclass(frozen=True)
class Plot:
    """Panels that share a legend; `name`: of its files; `note`: what one must know to read it."""

    name: str
    title: str
    panels: list[Panel]
    legend: list[Mark] = field(default_factory=list)
    note: str = ""
    columns: int = 3


def marks_of(labels: Sequence[str]) -> dict[str, Mark]:
    """A mark for each label: six colours, then the same with another dash and marker."""
    return {
        label: Mark(label, COLOURS[number % 6], DASHES[number // 6 % len(DASHES)], MARKERS[number // 6 % len(MARKERS)])
        for number, label in enumerate(labels)
    }


def plain_ticks(axis: Any, base: int) -> None:
    """Numbers as ticks of a logarithmic axis, and no small ones between: matplotlib's own are formulas."""
    low, high = axis.get_view_interval()
    between = (1.0, 2.0, 5.0) if base == 10 and high < 30 * low else (1.0,)  # a decade may lie between two powers
    axis.set_major_locator(LogLocator(base, between, numticks=6))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def few_ticks(axis: Any) -> None:
    axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))


def short_labels(labels: Sequence[str], most: int = LONGEST_LABEL) -> list[str]:
    """Labels of at most so many characters, the middle of long ones left out; numbered where that makes two the same."""
    cut = []
    for label in (" ".join(label.split()) or "(no name)" for label in labels):
        half = (most - 1) // 2
        cut.append(label if len(label) <= most else f"{label[: most - 1 - half]}…{label[-half:]}")
    return [f"{label} ({number})" if cut.count(label) > 1 else label for number, label in enumerate(cut, 1)]


def sheet(plot: Plot) -> Figure:
    """All panels of a plot, the legend below them."""
    columns = min(plot.columns, len(plot.panels))
    rows = [plot.panels[start : start + columns] for start in range(0, len(plot.panels), columns)]
    heights = [max(panel.height for panel in row) for row in rows]
    width = columns * max(panel.width for panel in plot.panels)
    labels = short_labels([mark.label for mark in plot.legend], 40)
    per_row = max(1, int((width - 0.3) / (0.55 + _LEGEND_INCHES * max(map(len, labels), default=1))))
    legend_height = 0.25 + 0.2 * -(-len(labels) // per_row) if labels else 0.0
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(width, sum(heights) + legend_height), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(len(rows), columns, height_ratios=heights)
        for number, panel in enumerate(plot.panels):
            _draw(panel, figure.add_subplot(grid[number // columns, number % columns]))
        if labels:
            handles = [Line2D([], [], color=m.colour, linestyle=m.dash, marker=m.marker, markersize=4, linewidth=1.6) for m in plot.legend]
            figure.legend(handles, labels, loc="outside lower center", ncols=min(per_row, len(labels)), frameon=False)
    return figure


def single(panel: Panel) -> Figure:
    """A panel alone."""
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(panel.width, panel.height), layout="constrained")
        FigureCanvasAgg(figure)
        _draw(panel, figure.add_subplot())
    return figure


def _draw(panel: Panel, axes: Any) -> None:
    panel.draw(axes)
    axes.set_title(short_labels([panel.title], 54)[0])
    axes.tick_params(length=2.5)


def _settle(figure: Figure) -> None:
    """Lay the figure out, once for all files: matplotlib would do it anew, and draw twice, for each."""
    if (engine := figure.get_layout_engine()) is not None:
        engine.execute(figure)
        figure.set_layout_engine("none")


def image(figure: Figure, kind: str) -> bytes:
    """The file of a figure, "png" or "svg"; the same for the same data."""
    file = io.BytesIO()
    with matplotlib.rc_context(_RC):
        _settle(figure)
        options: dict[str, Any] = {"dpi": 130} if kind == "png" else {"metadata": {"Date": None, "Creator": None}}
        figure.savefig(file, format=kind, facecolor="white", **options)
    return file.getvalue()


def inline(figure: Figure, prefix: str) -> str:
    """The figure as an <svg> element of a page: its ids begin with `prefix`, ink and lines follow the page, nothing lies behind it."""
    file = io.StringIO()
    with matplotlib.rc_context(_RC):
        _settle(figure)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)  # the page has the style
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{prefix}", text)
    text = text.replace(INK, "currentColor").replace(LINE, "var(--line)")
    text = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>',
        r'<svg viewBox="\1" xmlns:xlink="http://www.w3.org/1999/xlink" aria-hidden="true">',
        text,
        count=1,
    )
    return re.sub(r' d="[^"]*"', lambda path: re.sub(r"(?<=\d\.\d)\d+", "", path[0]), text).replace("\n", " ")
