"""Curves: inline SVG that takes its colours from the page, and PNG with colours of its own."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from diffpp_fast import install
from diffpp_fast.errors import ConfigurationError
from diffpp_fast.report.panels import Panel, concerns
from diffpp_fast.report.runs import RunRecord, Series

#: Points of a curve; more logs are drawn in groups of equal size.
MOST_POINTS = 300
#: Beyond this ratio of the largest value to the smallest an axis is logarithmic.
LOG_RATIO = 50.0
#: Inches: a diagram, and what is left of it for the numbers and names at its left and bottom, and above and beside it.
#: A layout that is computed takes several times as long.
SIZE = (4.6, 2.6)
LEFT, BOTTOM, TOP, RIGHT = 0.78, 0.46, 0.2, 0.12
#: Of a PNG: diagrams in a row, and what its titles and the legend at its top need.
COLUMNS, TITLE, LEGEND = 3, 0.3, 0.4
#: About so many numbers on an axis.
TICKS = 5
#: How the scalars of one diagram are told apart; runs have colours.
STYLES: tuple[Any, ...] = ("-", (0, (4, 1.5)))
#: By Okabe and Ito, distinguishable with every kind of colour vision; on white and on a dark page.
LIGHT = ("#0072b2", "#d55e00", "#00805c", "#b1558c", "#8a6d00", "#2b97d0", "#6b6b6b", "#7a3fb0")
DARK = ("#56b4e9", "#ff8c3f", "#2cc295", "#e79bc6", "#e8c22f", "#9ad3f5", "#a8a8a8", "#c39bf0")


class Colours(NamedTuple):
    text: str
    line: str
    runs: tuple[str, ...]


PRINTED = Colours("#202020", "#d0d0d0", LIGHT)
#: Colours that nothing else has, for `_inline` to find.
MARKED = Colours("#010203", "#010204", tuple(f"#0102{0x10 + place:02x}" for place in range(len(LIGHT))))


class Curve(NamedTuple):
    """What is drawn of a series: of every group of `size` successive logs the mean, the lowest and the highest."""

    steps: list[float]
    values: list[float]
    lowest: list[float]
    highest: list[float]
    size: int


def check_drawing() -> None:
    """Raises ConfigurationError where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise ConfigurationError(f"reports need matplotlib: {install.extra('report')}")


def thin(series: Series) -> Curve:
    """At most `MOST_POINTS` points. Nothing is smoothed where there are no more logs than that."""
    size = -(-len(series.steps) // MOST_POINTS)
    parts = [slice(start, start + size) for start in range(0, len(series.steps), size)]
    values = [series.values[part] for part in parts]
    steps = [series.steps[part] for part in parts]
    return Curve([_mean(part) for part in steps], [_mean(part) for part in values], [*map(min, values)],
                 [*map(max, values)], size)  # fmt: skip


def draw_inline(panel: Panel, runs: Sequence[RunRecord]) -> str:
    """One diagram as an `<svg>` element for the page, with the page's own colours."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    file = io.StringIO()
    # Ids depend on the salt and the content: two diagrams of a page must not share any.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": panel.title}):
        figure = Figure(figsize=SIZE)
        FigureCanvasSVG(figure)
        _draw(_axis(figure, 0.0, 0.0), panel, runs, MARKED, title=False)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    return _inline(file.getvalue(), f"{panel.title}, {panel.unit} by step")


def write_png(path: Path, panels: Sequence[Panel], runs: Sequence[RunRecord]) -> None:
    """All diagrams of a section."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    height = SIZE[1] + TITLE
    figure = Figure(figsize=(SIZE[0] * columns, height * rows + LEGEND))
    FigureCanvasAgg(figure)
    for place, panel in enumerate(panels):
        axis = _axis(figure, SIZE[0] * (place % columns), height * (rows - 1 - place // columns))
        _draw(axis, panel, runs, PRINTED, title=True)
    lines = [Line2D([], [], color=PRINTED.runs[place], label=run.name) for place, run in enumerate(runs)]
    legend = figure.legend(handles=lines, loc="upper left", ncols=len(lines), fontsize=9, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    figure.savefig(path, dpi=110)


def _axis(figure: Any, left: float, bottom: float) -> Any:
    """A diagram's axes in its place on a figure, from there in inches."""
    width, height = figure.get_size_inches()
    inner = (SIZE[0] - LEFT - RIGHT, SIZE[1] - BOTTOM - TOP)
    return figure.add_axes(((left + LEFT) / width, (bottom + BOTTOM) / height, inner[0] / width, inner[1] / height))


def _draw(axis: Any, panel: Panel, runs: Sequence[RunRecord], colours: Colours, *, title: bool) -> None:
    drawn: list[float] = []
    for run, colour in zip(runs, colours.runs, strict=False):
        for style, scalar in zip(STYLES, panel.scalars, strict=False):
            if scalar in run.scalars:
                curve = thin(run.scalars[scalar])
                drawn += curve.values
                few = "o" if len(curve.steps) < 12 else None
                axis.plot(curve.steps, curve.values, color=colour, linestyle=style, linewidth=1.3, marker=few, ms=3)
                if curve.size > 1:
                    axis.fill_between(curve.steps, curve.lowest, curve.highest, color=colour, alpha=0.2, linewidth=0)
        if panel.reference is not None and panel.reference in run.scalars:
            axis.axhline(run.scalars[panel.reference].last, color=colour, linestyle=(0, (6, 3)), linewidth=1)
        for number, warned in enumerate(run.warnings, 1):
            if concerns(panel, warned):
                axis.axvline(warned.step, color=colour, linestyle=":", linewidth=1)
                axis.text(
                    warned.step, 1.0, f"▾{number}", color=colour, transform=axis.get_xaxis_transform(),
                    ha="center", va="bottom", fontsize=8,
                )  # fmt: skip
    logarithmic = min(drawn) > 0 and max(drawn) > LOG_RATIO * min(drawn)
    axis.set_yscale("log" if logarithmic else "linear")
    axis.set_ylabel(panel.unit + (", logarithmic" if logarithmic else ""), color=colours.text, fontsize=8)
    axis.set_xlabel("step (updates of the generator)", color=colours.text, fontsize=8)
    if title:
        axis.set_title(panel.title, color=colours.text, fontsize=9, pad=12, parse_math=False)
    axis.tick_params(labelsize=8, labelcolor=colours.text, color=colours.line, which="both")
    axis.xaxis.get_major_locator().set_params(integer=True, nbins=TICKS)
    if not logarithmic:
        axis.yaxis.get_major_locator().set_params(nbins=TICKS)
    axis.grid(color=colours.line, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(colours.line)
    if len(panel.scalars) > 1:
        _add_legend(axis, panel, colours)


def _add_legend(axis: Any, panel: Panel, colours: Colours) -> None:
    """Above the curves, of the scalars alone: which run has which colour stands above all diagrams."""
    from matplotlib.lines import Line2D

    lines = [
        Line2D([], [], color=colours.text, linestyle=style, linewidth=1.3, label=label)
        for style, label in zip(STYLES, panel.scalars.values(), strict=False)
    ]
    place = {"loc": "lower left", "bbox_to_anchor": (0.0, 0.97), "borderpad": 0.0, "ncols": len(lines)}
    axis.legend(handles=lines, fontsize=7, frameon=False, labelcolor=colours.text, **place)


def _inline(svg: str, label: str) -> str:
    """The element alone, without sizes, unneeded ids and what refers elsewhere, its colours and fonts the page's."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r' id="[A-Za-z.0-9]+_\d+"', "", svg)
    svg = re.sub(r"font-family: [^;\"]*; ", "", svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    svg = re.sub(r"<svg [^>]*>", "", svg, count=1)
    svg = f'<svg {box[0]} role="img" aria-label="{escape(label)}">{svg}'
    svg = svg.replace(MARKED.text, "currentColor").replace(MARKED.line, "var(--line)")
    for place, colour in enumerate(MARKED.runs):
        svg = svg.replace(colour, f"var(--run-{place})")
    return svg


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
