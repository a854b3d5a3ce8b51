"""One way to write results: rows as CSV, tables for the terminal and in Markdown, and pictures."""

from __future__ import annotations

import argparse
import csv
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.timing import Provenance, Timing
from diffpp_fast.errors import ConfigurationError
from diffpp_fast.spreadsheet import cells

#: Marks a row in which fused code loses to eager or compiled code.
SLOWER = "slower"
#: Titles of columns that hold words and not figures.
WORDS = ("case", "op", "dtype", "backend", "provider", "block", "loop", "kernel", "GPU", "is", "of", "")
#: Distinguishable with every kind of colour vision.
COLOURS = {"compile": "#e69f00", "cpu": "#0072b2", "triton": "#009e73", "cuda": "#cc79a7", "reference": "#999999"}
#: Inches.
PANEL_WIDTH, NAMES_WIDTH, ROW_HEIGHT, FRAME_HEIGHT = 3.4, 3.4, 0.22, 1.4
#: As many labels as a panel is wide enough for.
MOST_TICKS = 7


@dataclass(frozen=True)
class Outcome:
    """How far somebody who is measured has come."""

    provider: str
    wrong: str | None = None  # what the gate found: nothing was timed
    left_out: str | None = None  # why the provider could not take part

    @property
    def status(self) -> str:
        if self.wrong is not None:
            return f"wrong: {self.wrong}"
        return "ok" if self.left_out is None else f"left out: {self.left_out}"


class Table(NamedTuple):
    """Rows of cells, the header first."""

    rows: Sequence[Sequence[str]]
    title: str = ""


class Place(NamedTuple):
    """Where results go: files beginning with `stem`, and a page between two lines that name subject and kind."""

    stem: Path
    page: Path | None
    subject: str
    kind: str

    @property
    def markers(self) -> tuple[str, str]:
        begin, end = (f"<!-- python -m benchmarks {self.subject}, {self.kind}: {edge} -->" for edge in ("begin", "end"))
        return begin, end

    def check(self) -> None:
        """Make the folder. Raises ConfigurationError unless it can be one and the page has a place for the tables."""
        if self.page is not None:
            try:
                text = self.page.read_text(encoding="utf-8")
            except OSError as error:
                raise ConfigurationError(f"--docs {self.page}: {error.strerror}") from error
            begin, end = self.markers
            if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
                raise ConfigurationError(
                    f"--docs {self.page}: the tables need a place; write these two lines where they are to be:\n"
                    f"{begin}\n{end}"
                )
        folder = self.stem.parent
        if folder.exists() and not folder.is_dir():
            raise ConfigurationError(f"--out {folder}: it is a file; name a folder")
        folder.mkdir(parents=True, exist_ok=True)

    def write(
        self,
        rows: Sequence[Mapping[str, Any]],
        columns: Sequence[str],
        parts: Sequence[str | Table],
        origin: Provenance,
    ) -> list[Path]:
        """Write CSV and Markdown, the latter into the page too. Return the paths. What was not measured is empty."""
        paths = [self.stem.with_suffix(suffix) for suffix in (".csv", ".md")]
        write_csv(paths[0], rows, columns, origin)
        text = "\n".join([str(origin), *(part if isinstance(part, str) else markdown(part) for part in parts if part)])
        paths[1].write_text(text, encoding="utf-8")
        if self.page is not None:
            begin, end = self.markers
            head, rest = self.page.read_text(encoding="utf-8").split(begin)
            self.page.write_text(f"{head}{begin}\n{text.strip()}\n{end}{rest.split(end)[1]}", encoding="utf-8")
            paths.append(self.page)
        return paths


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str], origin: Provenance) -> None:
    """Write rows, each with its origin, as a table of text and numbers."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, (*columns, *Provenance._fields), lineterminator="\n")
        writer.writeheader()
        writer.writerows(cells({**row, **origin._asdict()}) for row in rows)


def markdown(table: Table) -> str:
    header, *body = table.rows
    rule = ["---" if title in WORDS else "---:" for title in header]
    title = f"{table.title}\n\n" if table.title else ""
    return title + "".join(f"| {' | '.join(row)} |\n" for row in (header, rule, *body))


def text(table: Table) -> str:
    """Return the table for a terminal."""
    columns = []
    for column in zip(*table.rows, strict=True):
        align = str.ljust if column[0] in WORDS else str.rjust
        columns.append([align(cell, max(map(len, column))) for cell in column])
    lines = ("  ".join(row).rstrip() for row in zip(*columns, strict=True))
    return "\n".join([*([table.title] if table.title else []), *lines])


def bullets(sentences: Sequence[str]) -> str:
    return "".join(f"- {sentence}\n" for sentence in sentences)


# Cells


def dtypes(text: str) -> list[torch.dtype]:
    """Return the dtypes that an option names, separated by commas."""
    found = [dtype for name in text.split(",") if isinstance(dtype := getattr(torch, name, None), torch.dtype)]
    if len(found) < len(text.split(",")):
        raise argparse.ArgumentTypeError(f"must be names of dtypes, separated by commas, got {text!r}")
    return found


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def threads_name(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def figure(value: float | None, unit: float = 1.0) -> str:
    """Return a number for a CSV file; empty for None."""
    return "" if value is None else f"{value * unit:.5g}"


def shown(value: float | None, specification: str, unit: float = 1.0) -> str:
    """Return a number for a table; a dash for None."""
    return "-" if value is None else format(value * unit, specification)


def milliseconds(timing: Timing | None) -> str:
    if timing is None:
        return "-"
    value = 1e3 * timing.median
    return f"{value:.0f}" if value >= 100.0 else f"{value:#.3g}".rstrip(".")


def times(timing: Timing) -> dict[str, Any]:
    """Return the columns of a CSV file that tell a time."""
    low, high = timing.quartiles
    named = {"median_ms": timing.median, "quartile1_ms": low, "quartile3_ms": high}
    return {**{name: figure(value, 1e3) for name, value in named.items()}, "rounds": len(timing.samples)}


def ratio(base: Timing | None, timing: Timing | None) -> float | None:
    """Return how many times faster than the base something is; None where one of them was not timed."""
    return None if base is None or timing is None else base.median / timing.median


def loses(*ratios: float | None) -> bool:
    """Say whether any of the speed-ups is below 1."""
    return any(each is not None and each < 1.0 for each in ratios)


# Pictures


def can_plot() -> bool:
    """Whether matplotlib can be imported."""
    return importlib.util.find_spec("matplotlib") is not None


def write_dots(path: Path, dots: Sequence[tuple[str, str, str, Mapping[str, float]]], title: str) -> None:
    """Write a PNG of speed-ups over eager: one dot per provider and case, one panel per dtype and number of threads.

    Args:
        path: of the PNG.
        dots: panel, case, group of cases and speed-ups by provider.
        title: of the picture.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator

    panels, names = list(dict.fromkeys(dot[0] for dot in dots)), list(dict.fromkeys(dot[1] for dot in dots))
    groups = {name: group for _, name, group, _ in dots}
    figure = _figure(NAMES_WIDTH + PANEL_WIDTH * len(panels), FRAME_HEIGHT + ROW_HEIGHT * len(names))
    axes: Any = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    seen: dict[str, None] = {}
    for panel, name, _, ratios in dots:
        for provider, value in ratios.items():
            seen[provider] = None
            axis = axes[panels.index(panel)]
            axis.plot(value, names.index(name), "o", color=COLOURS[provider], markersize=6, alpha=0.9)
    for axis, panel in zip(axes, panels, strict=True):
        axis.set_title(panel, fontsize=9)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_locator(LogLocator(base=2, numticks=MOST_TICKS))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:.2g}x")
        axis.grid(axis="both", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        _style(axis)
        for row in range(1, len(names)):
            if groups[names[row]] != groups[names[row - 1]]:
                axis.axhline(row - 0.5, color="#888888", linewidth=0.8)
    axes[0].set_yticks(range(len(names)), names, fontsize=8)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    figure.supxlabel("speed-up over eager (logarithmic; right of the line is faster)", fontsize=9)
    figure.suptitle(title, fontsize=10)
    handles = [Line2D([], [], marker="o", linestyle="", color=COLOURS[name], label=name) for name in seen]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), fontsize=9, frameon=False)
    figure.savefig(path, dpi=120)


def write_bars(path: Path, ratios: Mapping[str, float], title: str) -> None:
    """Write a PNG of speed-ups, one bar for each name."""
    figure = _figure(NAMES_WIDTH + PANEL_WIDTH, FRAME_HEIGHT + 2 * ROW_HEIGHT * len(ratios))
    axis: Any = figure.subplots()
    bars = axis.barh(list(ratios), list(ratios.values()), color="#0072b2", height=0.6)
    axis.bar_label(bars, [f"{value:.2f}x" for value in ratios.values()], padding=3, fontsize=8)
    axis.invert_yaxis()
    axis.set_title(title, fontsize=9)
    _style(axis)
    figure.savefig(path, dpi=120)


def _figure(width: float, height: float) -> Any:
    """Return a figure that leaves matplotlib's global state and that of pyplot as they are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _style(axis: Any) -> None:
    axis.axvline(1.0, color="black", linewidth=1)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
