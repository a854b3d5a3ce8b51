"""The speed-ups as a picture: one dot per provider and case, one panel per dtype and number of threads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.providers import EAGER
from benchmarks.results import Group, dtype_name, speed_up
from benchmarks.run import COPY

#: Distinguishable with every kind of colour vision.
COLOURS = {"compile": "#e69f00", "cpu": "#0072b2", "triton": "#009e73", "cuda": "#cc79a7", "reference": "#999999"}
#: Inches.
PANEL_WIDTH, NAMES_WIDTH, ROW_HEIGHT, FRAME_HEIGHT = 3.4, 3.4, 0.22, 1.4

#: As many labels as a panel is wide enough for.
MOST_TICKS = 7


def available() -> bool:
    """Whether matplotlib can be imported."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def write_plot(path: Path, groups: Sequence[Group], device_name: str) -> None:
    """A PNG. Needs matplotlib; its global state and that of pyplot stay as they are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    panels = list(dict.fromkeys((dtype_name(group[0]), group[0].threads) for group in groups))
    names = list(dict.fromkeys(group[0].case.name for group in groups))
    ops = {group[0].case.name: group[0].case.op for group in groups}
    figure = Figure(
        figsize=(NAMES_WIDTH + PANEL_WIDTH * len(panels), FRAME_HEIGHT + ROW_HEIGHT * len(names)), layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    seen: dict[str, None] = {}
    for axis, (dtype, threads) in zip(axes, panels, strict=True):
        for group in groups:
            if (dtype_name(group[0]), group[0].threads) == (dtype, threads):
                row = names.index(group[0].case.name)
                for provider, ratio in _ratios(group).items():
                    seen[provider] = None
                    axis.plot(ratio, row, "o", color=COLOURS[provider], markersize=6, alpha=0.9)
        _style(axis, f"{dtype}, {threads} thread{'s' * (threads > 1)}", names, ops)
    axes[0].set_yticks(range(len(names)), names, fontsize=8)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    figure.supxlabel("speed-up over eager (logarithmic; right of the line is faster)", fontsize=9)
    figure.suptitle(device_name, fontsize=10)
    dots = [Line2D([], [], marker="o", linestyle="", color=COLOURS[name], label=name) for name in seen]
    figure.legend(handles=dots, loc="outside upper right", ncols=len(dots), fontsize=9, frameon=False)
    figure.savefig(path, dpi=120)


def write_bars(path: Path, ratios: Mapping[str, float], title: str) -> None:
    """Write a PNG of speed-ups, one bar for each name. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = NAMES_WIDTH + PANEL_WIDTH, FRAME_HEIGHT + 2 * ROW_HEIGHT * len(ratios)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axis: Any = figure.subplots()
    bars = axis.barh(list(ratios), list(ratios.values()), color="#0072b2", height=0.6)
    axis.bar_label(bars, [f"{ratio:.2f}x" for ratio in ratios.values()], padding=3, fontsize=8)
    axis.axvline(1.0, color="black", linewidth=1)
    axis.invert_yaxis()
    axis.set_title(title, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _ratios(group: Group) -> dict[str, float]:
    """The speed-up over eager by provider."""
    eager = next(record for record in group if record.provider == EAGER)
    ratios = {record.provider: speed_up(eager, record) for record in group if record.provider not in (EAGER, COPY)}
    return {name: ratio for name, ratio in ratios.items() if ratio is not None}


def _style(axis: Any, title: str, names: Sequence[str], ops: dict[str, str]) -> None:
    from matplotlib.ticker import LogLocator

    axis.set_title(title, fontsize=9)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(LogLocator(base=2, numticks=MOST_TICKS))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.2g}x")
    axis.axvline(1.0, color="black", linewidth=1)
    axis.grid(axis="both", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    for row in range(1, len(names)):
        if ops[names[row]] != ops[names[row - 1]]:
            axis.axhline(row - 0.5, color="#888888", linewidth=0.8)
