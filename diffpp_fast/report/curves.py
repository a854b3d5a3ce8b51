"""Curves: which scalars stand in one diagram, and how it is drawn, as SVG for the page and as PNG beside it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from diffpp_fast.report.runs import RunRecord, Scalar, Warned
from diffpp_fast.training.watch import standard_rules

#: Points of a curve; more logs are drawn in groups of equal size.
MOST_POINTS = 300
#: Beyond this ratio of the largest value to the smallest an axis is logarithmic.
LOG_RATIO = 50.0
#: Inches: a diagram, and its margins for the numbers and names of its axes and the marks of warnings.
WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 4.6, 2.6, 0.78, 0.12, 0.46, 0.2
#: Diagrams in a row of a PNG, and the inches that a title and the legend of the runs take there.
COLUMNS, TITLE, LEGEND = 3, 0.3, 0.4
#: Line styles tell the scalars of one diagram apart; runs have colours.
STYLES: tuple[Any, ...] = ("-", (0, (4, 1.5)))
#: The prefix of a mixture's parts in the log.
PART = "generator/reward/"
#: Colours of text and of grid lines on white; the page inverts lightness where it is dark.
TEXT, LINE = "#202020", "#c8c8c8"
#: The runs' colours: Okabe and Ito's and a few more, distinguishable with every kind of colour vision, inverted too.
RUNS = ("#0072b2", "#d55e00", "#00805c", "#b1558c", "#8a6d00", "#2b97d0", "#6b6b6b", "#7a3fb0")


class Panel(NamedTuple):
    """One diagram.

    Attributes:
        title, unit: of the diagram and its vertical axis.
        scalars: the names in the log, and how each is called where there are several.
        note: how to read it.
        reference: a constant of each run to compare with.
    """

    title: str
    unit: str
    scalars: Mapping[str, str]
    note: str
    reference: str | None = None


# fmt: off
REWARD = (
    Panel("Optimised reward, sample grid", "reward", {"grid/reward": ""},
          "Averaged weights, always the same latents."),
    Panel("Held-out reward, sample grid", "reward", {"grid/held_out": ""},
          "Never optimised. It should rise with the optimised one."),
    Panel("Optimised reward, training samples", "reward", {"generator/reward": ""},
          "Mean over an update's samples."),
    Panel("Spread of the reward", "standard deviation", {"generator/reward_std": ""},
          "Over an update's samples. Towards 0: all alike, or a saturated reward."),
)
DIVERGENCE = (
    Panel("Score gap", "root mean square", {"generator/score_gap": ""},
          "Guided reference against the teaching assistant. It should settle."),
    Panel("Loss of the teaching assistant", "weighted mean square", {"fake/loss": ""},
          "On the generator's samples. Falling to 0: they have collapsed."),
    Panel("Loss of the generator", "half squared norm", {"generator/loss": ""},
          "Of the gradient on the sample: a size, not an objective."),
    Panel("Gradient on the sample", "norm per sample",
          {"generator/score_gradient_norm": "score", "generator/reward_gradient_norm": "reward"},
          "Before any clipping, the reward's with its scale."),
    Panel("Score against reward", "cosine", {"generator/gradient_cosine": ""},
          "Of the two parts of that gradient. Negative: they oppose each other."),
    Panel("Shortened rewards", "share of samples", {"generator/reward_clipped": ""},
          "By rewards.optimised.clip."),
    Panel("Gradient of the generator", "norm", {"generator/gradient_norm": ""},
          "Of all its weights, before clipping."),
    Panel("Gradient of the teaching assistant", "norm", {"fake/gradient_norm": ""},
          "Of all its weights, before clipping."),
    Panel("Latent mean", "latent", {"generator/x0_mean": ""},
          "Of the generator's samples; dashed: the reference's own.", "reference/x0_mean"),
    Panel("Latent spread", "standard deviation", {"generator/x0_std": ""},
          "Of the generator's samples; dashed: the reference's own.", "reference/x0_std"),
    Panel("Skipped updates", "share of updates",
          {"generator/updates_skipped": "generator", "fake/updates_skipped": "teaching assistant"},
          "Their gradient was not finite, and they changed nothing."),
)
# fmt: on


class Curve(NamedTuple):
    """The points of a scalar: of every group of `size` successive logs the mean, the lowest and the highest."""

    steps: list[float]
    values: list[float]
    lowest: list[float]
    highest: list[float]
    size: int


def reward_panels(runs: Sequence[RunRecord]) -> list[Panel]:
    """Return the diagrams of rewards that these runs have logged; each part of a mixture has its own."""
    parts = sorted({name for run in runs for name in run.scalars if name.startswith(PART)})
    own = [
        Panel(f"Part {name.removeprefix(PART)}", "reward", {name: ""}, "Of the optimised mixture.") for name in parts
    ]
    return _logged([*REWARD, *own], runs)


def divergence_panels(runs: Sequence[RunRecord]) -> list[Panel]:
    """Return the diagrams of divergence from the reference that these runs have logged."""
    skipped = any(any(run.scalars[name].values) for run in runs for name in run.scalars if "updates_skipped" in name)
    return _logged(DIVERGENCE if skipped else DIVERGENCE[:-1], runs)


def concerns(panel: Panel, warned: Warned) -> bool:
    """Whether a warning judges what is drawn; an unknown one concerns every panel."""
    read = {scalar for rule in standard_rules() if rule.name == warned.name for scalar in rule.reads}
    return not read or bool(read & panel.scalars.keys())


def scalars_of(panel: Panel, runs: Sequence[RunRecord]) -> list[Scalar]:
    """Return all that is drawn in a diagram."""
    return [run.scalars[name] for run in runs for name in panel.scalars if name in run.scalars]


def thin(scalar: Scalar) -> Curve:
    """Return at most `MOST_POINTS` points. Up to as many logs nothing is averaged."""
    size = -(-len(scalar.steps) // MOST_POINTS)
    starts = range(0, len(scalar.steps), size)
    steps = [scalar.steps[start : start + size] for start in starts]
    values = [scalar.values[start : start + size] for start in starts]
    return Curve([*map(fmean, steps)], [*map(fmean, values)], [*map(min, values)], [*map(max, values)], size)


def draw_svg(panel: Panel, runs: Sequence[RunRecord]) -> bytes:
    """Return one diagram as an SVG document without a background."""
    file = io.BytesIO()
    with _style():
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        _figure([panel], runs).savefig(file, format="svg", transparent=True, metadata=nothing)
    return file.getvalue()


def write_png(path: Path, panels: Sequence[Panel], runs: Sequence[RunRecord]) -> None:
    """Write all diagrams of a section, with their titles and a legend of the runs."""
    from matplotlib.lines import Line2D

    with _style():
        figure = _figure(panels, runs, titles=True)
        lines = [Line2D([], [], color=colour, label=run.name) for run, colour in zip(runs, RUNS, strict=False)]
        figure.legend(handles=lines, loc="upper left", ncols=len(lines), fontsize=9)
        figure.savefig(path, dpi=110)


def _logged(panels: Sequence[Panel], runs: Sequence[RunRecord]) -> list[Panel]:
    return [panel for panel in panels if scalars_of(panel, runs)]


def _style() -> Any:
    """Return the context in which figures are made and written. Names of runs and scalars are no formulas."""
    import matplotlib

    return matplotlib.rc_context({
        "axes.axisbelow": True, "axes.edgecolor": LINE, "axes.grid": True, "axes.labelcolor": TEXT,
        "axes.spines.right": False, "axes.spines.top": False, "font.size": 8, "grid.color": LINE,
        "grid.linewidth": 0.6, "legend.frameon": False, "lines.linewidth": 1.3, "lines.markersize": 3,
        "svg.fonttype": "none", "svg.hashsalt": "diffpp_fast", "text.color": TEXT, "text.parse_math": False,
        "xtick.color": LINE, "xtick.labelcolor": TEXT, "ytick.color": LINE,
        "ytick.labelcolor": TEXT,
    })  # fmt: skip


def _figure(panels: Sequence[Panel], runs: Sequence[RunRecord], *, titles: bool = False) -> Any:
    """Return a figure of all panels. Margins are given: a layout that is computed takes several times as long."""
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    top = TOP + TITLE * titles
    width, height = WIDTH * columns, (HEIGHT + TITLE * titles) * rows + LEGEND * titles
    figure = Figure(figsize=(width, height))
    axes = list(figure.subplots(rows, columns, squeeze=False, gridspec_kw={
        "left": LEFT / width, "right": 1 - RIGHT / width, "wspace": (LEFT + RIGHT) / (WIDTH - LEFT - RIGHT),
        "bottom": BOTTOM / height, "top": 1 - (top + LEGEND * titles) / height,
        "hspace": (BOTTOM + top) / (HEIGHT - BOTTOM - TOP),
    }).flat)  # fmt: skip
    for axis, panel in zip(axes, panels, strict=False):
        _draw(axis, panel, runs)
        if titles:
            axis.set_title(panel.title, fontsize=9, pad=12)
    for axis in axes[len(panels) :]:
        axis.remove()
    return figure


def _draw(axis: Any, panel: Panel, runs: Sequence[RunRecord]) -> None:
    drawn = [value for run, colour in zip(runs, RUNS, strict=False) for value in _add(axis, panel, run, colour)]
    logarithmic = min(drawn) > 0 and max(drawn) > LOG_RATIO * min(drawn)
    axis.set_yscale("log" if logarithmic else "linear")
    axis.set_ylabel(panel.unit + (", logarithmic" if logarithmic else ""))
    axis.set_xlabel("step (updates of the generator)")
    axis.locator_params(axis="x", integer=True, nbins=5)
    if logarithmic:  # whose numbers are formulas otherwise
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
    else:
        axis.locator_params(axis="y", nbins=5)
    if len(panel.scalars) > 1:
        for style, label in zip(STYLES, panel.scalars.values(), strict=False):
            axis.plot([], [], color=TEXT, linestyle=style, label=label)
        axis.legend(loc="lower left", bbox_to_anchor=(0, 0.97), borderpad=0, ncols=len(panel.scalars), fontsize=7)


def _add(axis: Any, panel: Panel, run: RunRecord, colour: str) -> list[float]:
    """Draw a run's curves, its reference and the marks of its warnings; return the values of the curves."""
    drawn: list[float] = []
    for style, name in zip(STYLES, panel.scalars, strict=False):
        if name in run.scalars:
            curve = thin(run.scalars[name])
            drawn += curve.values
            few = "o" if len(curve.steps) < 12 else None
            axis.plot(curve.steps, curve.values, color=colour, linestyle=style, marker=few)
            if curve.size > 1:
                axis.fill_between(curve.steps, curve.lowest, curve.highest, color=colour, alpha=0.2, linewidth=0)
    if panel.reference in run.scalars:
        axis.axhline(run.scalars[panel.reference].last, color=colour, linestyle=(0, (6, 3)), linewidth=1)
    for number, warned in enumerate(run.warnings, 1):
        if concerns(panel, warned):
            axis.axvline(warned.step, color=colour, linestyle=":", linewidth=1)
            place = {"transform": axis.get_xaxis_transform(), "ha": "center", "va": "bottom"}
            axis.text(warned.step, 1.0, f"▾{number}", color=colour, **place)
    return drawn
