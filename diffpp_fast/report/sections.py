"""The sections of a page, each from what was read and computed to markup."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from diffpp_fast.report import figures
from diffpp_fast.report.drawing import MOST_POINTS, draw_inline
from diffpp_fast.report.markup import Markup, element, join, row, table
from diffpp_fast.report.panels import Panel
from diffpp_fast.report.pictures import EXACT_PIXELS, MOST_PIXELS, MOST_PROMPTS, Column, Sheet, data_uri
from diffpp_fast.report.runs import RunRecord
from diffpp_fast.report.style import PHASES

#: Widths of a picture on the page, in CSS pixels.
SMALLEST, LARGEST = 96, 192
#: Where a run has no such value.
NOTHING = "\N{EN DASH}"


def section(name: str, title: str, *children: object) -> Markup:
    return element("section", element("h2", title), *children, id=name)


def chip(place: int) -> Markup:
    """A run's colour."""
    return element("span", class_="chip", style=f"background: var(--run-{place})")


def named(runs: Sequence[RunRecord]) -> Markup:
    """The runs with their colours and how they stand."""
    items = [element("li", chip(place), element("b", run.name), f": {run.status}") for place, run in enumerate(runs)]
    return element("ul", *items, class_="runs")


def tiles(run: RunRecord) -> Markup:
    """One run at a glance."""
    facts: list[tuple[str, str]] = [("steps", "none" if run.step is None else str(max(run.step, 0)))]
    for scalar, label in (("grid/reward", "optimised reward"), ("grid/held_out", "held-out reward")):
        if scalar in run.scalars:
            values = run.scalars[scalar].values
            facts.append((f"{label}, first to last grid", f"{number(values[0])} → {number(values[-1])}"))
    budget = figures.budget_of(run)
    if budget is not None:
        facts.append(("seconds per step", number(budget.total)))
        if budget.speed is not None:
            facts.append(("samples per second", number(budget.speed)))
    facts.append(("warnings", str(len(run.warnings))))
    return element(
        "div",
        *(element("div", element("b", value), element("span", label, class_="unit"), class_="tile")
          for label, value in facts),
        class_="tiles",
    )  # fmt: skip


def notes(runs: Sequence[RunRecord]) -> Markup:
    items = [element("li", chip(place), note) for place, run in enumerate(runs) for note in run.notes]
    return section("notes", "Left out", element("ul", *items)) if items else Markup()


def warnings(runs: Sequence[RunRecord]) -> Markup:
    rows = [
        row(join(chip(place), f"▾{count}"), str(warned.step), element("code", warned.name), warned.message)
        for place, run in enumerate(runs)
        for count, warned in enumerate(run.warnings, 1)
    ]
    if not rows:
        return section("warnings", "Warnings", element("p", "The watch raised none."))
    said = "What the watch raised while the runs went, marked by number on the curves that it judged."
    return section(
        "warnings", "Warnings", element("p", said, class_="warning"), table(("", "step", "warning", "message"), rows)
    )


def curves(name: str, title: str, panels: Sequence[Panel], runs: Sequence[RunRecord]) -> Markup:
    if not panels:
        return section(name, title, element("p", "Nothing of this was logged."))
    drawn = [
        element(
            "figure", element("h3", panel.title), Markup(draw_inline(panel, runs)),
            element("p", " ".join([panel.note, *_undefined(panel, runs)]), class_="note"), class_="panel",
        )
        for panel in panels
    ]  # fmt: skip
    legend = [element("span", chip(place), run.name) for place, run in enumerate(runs)]
    return section(
        name, title, element("p", *legend, class_="legend"), element("p", _how_drawn(panels, runs), class_="note"),
        element("div", *drawn, class_="panels"),
    )  # fmt: skip


def _undefined(panel: Panel, runs: Sequence[RunRecord]) -> list[str]:
    missing = sum(run.scalars[name].undefined for run in runs for name in panel.scalars if name in run.scalars)
    return [f"Left out: {missing} that are not finite."] if missing else []


def _how_drawn(panels: Sequence[Panel], runs: Sequence[RunRecord]) -> str:
    logs = max(len(run.scalars[name].steps) for panel in panels for run in runs for name in panel.scalars
               if name in run.scalars)  # fmt: skip
    shown = "Every log is a point; nothing is smoothed. A log holds the mean over its steps."
    if logs > MOST_POINTS:
        shown = (
            f"Curves of more than {MOST_POINTS} logs are drawn in groups of as many successive logs as it takes: "
            "the line is a group's mean, the shade its lowest and highest. A log itself holds the mean over its steps."
        )
    return f"{shown} Steps up to 0 are the teaching assistant's warm-up."


def pictures(sheets: Sequence[Sheet]) -> Markup:
    if not sheets:
        return section("pictures", "Before and after", element("p", "No sample grid can be shown."))
    said = (
        "The first and the last sample grid: averaged weights, at latents that are always the same. Pictures of more "
        f"than {EXACT_PIXELS} pixels are shown as JPEG of at most {MOST_PIXELS}; the run's grids/ has them whole."
    )
    return section("pictures", "Before and after", element("p", said, class_="note"), *map(_sheet, sheets))


def _sheet(sheet: Sheet) -> Markup:
    width = min(max(sheet.columns[0].pictures[0].width, SMALLEST), LARGEST)
    cards = [
        element(
            "figure", element("figcaption", prompt),
            element("div", *(_picture(column, place, prompt) for column in sheet.columns), class_="row"),
            class_="card",
        )
        for place, prompt in enumerate(sheet.prompts[:MOST_PROMPTS])
    ]  # fmt: skip
    more = len(sheet.prompts) - MOST_PROMPTS
    rest = element("p", f"{more} more prompts are in the grids.", class_="note") if more > 0 else Markup()
    return join(element("div", *cards, class_="cards", style=f"--picture: {width}px"), rest)


def _picture(column: Column, place: int, prompt: str) -> Markup:
    lines = [*([column.run] if column.run else []), f"step {column.step}"]
    colour = None if column.place is None else f"border-color: var(--run-{column.place})"
    image = element("img", src=data_uri(column.pictures[place]), alt=f"{prompt} ({', '.join(lines)})", style=colour)
    return element("div", image, *(element("span", line) for line in lines))


def last_values(runs: Sequence[RunRecord]) -> Markup:
    """Show one run's first and last values; of several the last ones, with their differences from the first run's."""
    shown = {name: label for name, label in figures.SHOWN.items() if any(name in run.scalars for run in runs)}
    if not shown:
        return section("values", "Last values", element("p", "Nothing was logged."))
    rows = [row(join(label, " ", element("code", name)), *_values(name, runs)) for name, label in shown.items()]
    if len(runs) == 1:
        return section("values", "First and last values", table(("", "first", "last"), rows, class_="number"))
    head = ("", *(join(chip(place), run.name) for place, run in enumerate(runs)))
    said = (
        f"The last logged value of each run; below it the difference from {runs[0].name}. One that is within "
        f"{figures.DEVIATIONS:g} standard deviations of what differs between the two runs from log to log (about its "
        "trend, by the steps that both have logged) is marked ≈: a single log does not show it. With fewer than ten "
        "such steps there is no mark."
    )
    given = [
        row(join(label, " ", element("code", key)), *(cell(run.config.get(key, absent)) for run in runs))
        for key, label, absent in (
            (figures.REWARD, "scale of the reward", "none"), (figures.GUIDANCE, "guidance", "unknown"))
    ]  # fmt: skip
    return section(
        "values", "Side by side", element("p", said, class_="note"), table(head, [*given, *rows], class_="number"),
        _effects(runs),
    )  # fmt: skip


def _values(name: str, runs: Sequence[RunRecord]) -> list[Markup]:
    if len(runs) == 1:
        series = runs[0].scalars[name]
        return [_value(series.values[0], series.steps[0]), _value(series.last, series.steps[-1])]
    cells = []
    for run in runs:
        if name not in run.scalars:
            cells.append(cell(NOTHING))
            continue
        series = run.scalars[name]
        found = None if run is runs[0] else figures.difference(runs[0], run, name)
        said = Markup()
        if found is not None:
            told = f"{'≈ ' if found.is_noise else ''}{found.value:+.3g}" if found.value else "equal"
            said = element("span", told, class_="unit")
        cells.append(_value(series.last, series.steps[-1], said))
    return cells


def _value(value: float, step: int, below: Markup | None = None) -> Markup:
    return element("td", number(value), below or Markup(), title=f"{value!r} at step {step}")


def _effects(runs: Sequence[RunRecord]) -> Markup:
    effects = figures.effects_of(runs)
    if not effects:
        return Markup()
    rows = [
        row(join(effect.part, " on ", element("code", effect.scalar)), f"{effect.with_other:+.4g}",
            f"{effect.without_other:+.4g}", f"{effect.with_other - effect.without_other:+.4g}")
        for effect in effects
    ]  # fmt: skip
    said = (
        "Differences of the last sample grids. Guidance is itself an implicit reward, so it may move the reward "
        "without the reward's gradient; where the two parts do the same work, each does less beside the other."
    )
    head = ("effect of", "with the other part", "without it", "difference")
    return join(element("h3", "What each part does"), element("p", said, class_="note"),
                table(head, rows, class_="number"))  # fmt: skip


def budgets(runs: Sequence[RunRecord]) -> Markup:
    """Where the time of a step went, and memory."""
    found = [(place, run, budget) for place, run in enumerate(runs) if (budget := figures.budget_of(run)) is not None]
    if not found:
        return section("time", "Time of a step", element("p", "No times were logged."))
    said = (
        "Means per step of all logs but the warm-up's and the first of every session, which hold what is done once. "
        "The phases add up to the time that passed; several processes are averaged."
    )
    names = list(dict.fromkeys(name for _, _, budget in found for name in budget.phases))
    colours = {name: f"background: var(--phase-{place % len(PHASES)})" for place, name in enumerate(names)}
    rows = [
        row(join(element("span", class_="chip", style=colours[name]), name),
            *(_phase(budget, name) for _, _, budget in found))
        for name in names
    ]  # fmt: skip
    rows.append(row(element("b", "whole step"), *(cell(element("b", number(budget.total))) for _, _, budget in found)))
    head = ("seconds per step", *(join(chip(place), run.name) for place, run, _ in found))
    return section(
        "time",
        "Time of a step",
        element("p", said, class_="note"),
        *(_bar(place, run, budget, colours) for place, run, budget in found),
        table(head, rows, class_="number"),
    )


def _bar(place: int, run: RunRecord, budget: figures.Budget, colours: Mapping[str, str]) -> Markup:
    """A run's step as a bar of its phases, and what is to be known of it."""
    parts = [
        element("span", style=f"flex: {budget.share(name):.6f}; {colours[name]}", title=f"{name}: {number(seconds)} s")
        for name, seconds in budget.phases.items()
    ]
    facts = [f"{budget.logs} logs, {budget.skipped} left out"]
    if budget.speed is not None:
        facts.append(f"{number(budget.speed)} samples/s (median)")
    facts += [f"{name} {number(most)} GiB at most" for name, most in sorted(budget.memory.items())]
    return join(
        element("h3", chip(place), run.name),
        element("div", *parts, class_="bar"),
        element("p", "; ".join(facts), class_="note"),
    )


def _phase(budget: figures.Budget, name: str) -> Markup:
    if name not in budget.phases:
        return cell(NOTHING)
    share = f"{budget.share(name):.1%}"
    if name in budget.slowest:
        share += f", slowest process {number(budget.slowest[name])}"
    return element("td", number(budget.phases[name]), element("span", share, class_="unit"))


def configurations(runs: Sequence[RunRecord]) -> Markup:
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    if not keys:
        return section("configuration", "Configuration", element("p", "No config.yaml can be read."))
    different = [key for key in keys if len({repr(run.config.get(key)) for run in runs}) > 1]
    head = ("key", *(join(chip(place), run.name) for place, run in enumerate(runs)))
    marked = [_setting(key, runs, "changed") for key in different]
    alike = [_setting(key, runs[:1], None) for key in keys if key not in different]
    every = element("details", element("summary", f"{len(alike)} keys, the same in all" if len(runs) > 1 else
                                       f"{len(alike)} keys, with defaults"),
                    table(("key", "value"), alike, class_="wide"))  # fmt: skip
    if len(runs) == 1:
        return section("configuration", "Configuration", every)
    if not marked:
        return section("configuration", "Configuration", element("p", "The runs have the same configuration."), every)
    said = element("p", "What differs between the runs:")
    return section("configuration", "Configuration", said, table(head, marked, class_="wide"), every)


def _setting(key: str, runs: Sequence[RunRecord], class_: str | None) -> Markup:
    values = [element("code", _written(run.config[key])) if key in run.config else NOTHING for run in runs]
    return row(element("code", key), *values, class_=class_)


def sessions(runs: Sequence[RunRecord]) -> Markup:
    """With which code, on what and when each part of the runs was computed."""
    rows = []
    for place, run in enumerate(runs):
        for session in run.sessions:
            code = f"diffpp_fast {session.get('diffpp_fast', '')}, commit {session.get('commit') or 'unknown'}"
            code += ", with changes" if session.get("dirty") == "yes" else ""
            packages = {"python": session.get("python"), **session.get("packages", {}), "cuda": session.get("cuda")}
            rows.append(
                row(
                    join(chip(place), run.name),
                    f"{session.get('began', '')} to {session.get('ended') or 'an end that is not recorded'}"
                    f"{_duration(session)}",
                    f"{session.get('first_step')} to {_or_unknown(session.get('last_step'))}",
                    f"{session.get('processes')} on {session.get('device')}, {session.get('threads')} CPU threads; "
                    f"{session.get('platform')}",
                    code,
                    ", ".join(f"{name} {version}" for name, version in packages.items() if version),
                )
            )
    if not rows:
        return section("sessions", "Code and machine", element("p", "No environment.json was written by these runs."))
    head = ("run", "when", "steps", "processes", "code", "versions")
    return section("sessions", "Code and machine", table(head, rows, class_="wide"))


def _duration(session: dict[str, Any]) -> str:
    try:
        seconds = (datetime.fromisoformat(session["ended"]) - datetime.fromisoformat(session["began"])).total_seconds()
    except (KeyError, TypeError, ValueError):
        return ""
    return f" ({int(seconds // 3600)}:{int(seconds // 60) % 60:02d}:{int(seconds) % 60:02d})"


def _or_unknown(value: object) -> object:
    return "?" if value is None else value


def _written(value: Any) -> str:
    """As YAML has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def cell(value: object) -> Markup:
    return element("td", value)


def number(value: float) -> str:
    return f"{value:.4g}"
