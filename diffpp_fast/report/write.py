"""A report: the page, and its curves and pictures as PNGs beside it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.report import drawing, pictures, sections
from diffpp_fast.report.markup import Markup, element
from diffpp_fast.report.panels import divergence_panels, reward_panels
from diffpp_fast.report.runs import RunRecord, read_runs
from diffpp_fast.report.style import style_sheet
from diffpp_fast.training.durable import write_whole
from diffpp_fast.version import __version__

#: How a report's page begins, by which it is known again.
TITLE = "<title>diffpp_fast: "


def write_report(folders: Sequence[Path], output: Path) -> Path:
    """Writes what the runs in `folders` have logged, all compared with the first.

    Beside the page, which needs no other file, lie NAME-reward.png, NAME-divergence.png and NAME-pictures.png, as far
    as there is something to show.

    Raises ConfigurationError for a folder that is given twice, too many of them, and where matplotlib is missing.
    """
    drawing.check_drawing()
    if len(folders) > len(drawing.LIGHT):
        raise ConfigurationError(f"{len(folders)} runs are too many for one page: at most {len(drawing.LIGHT)}")
    refuse_foreign_report(output)
    runs = read_runs(folders)
    sheets = pictures.sheets_of(runs)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, make_page(runs, sheets))
    for name, panels in (("reward", reward_panels(runs)), ("divergence", divergence_panels(runs))):
        if panels:
            drawing.write_png(output.with_name(f"{output.stem}-{name}.png"), panels, runs)
    if sheets:
        pictures.write_png(output.with_name(f"{output.stem}-pictures.png"), sheets[0])
    return output


def refuse_foreign_report(output: Path) -> None:
    """Raise ConfigurationError where a report would replace what is none."""
    if output.is_dir():
        raise ConfigurationError(f"--output {output}: it is a folder; name a file")
    beside = [output.with_name(f"{output.stem}-{name}.png") for name in ("reward", "divergence", "pictures")]
    try:
        own = TITLE in output.read_bytes()[:4096].decode("utf-8", "replace")
        foreign = [] if own else [output]
    except FileNotFoundError:
        foreign = [path for path in beside if path.exists()]
    if foreign:
        raise ConfigurationError(f"--output {output}: {foreign[0]} exists and is no report: choose another file")


def make_page(runs: Sequence[RunRecord], sheets: Sequence[pictures.Sheet]) -> str:
    """The whole page. `sheets`: of `pictures.sheets_of`, which adds its notes to the runs."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs side by side"
    parts = {
        "Side by side" if len(runs) > 1 else "Values": sections.last_values(runs),
        "Warnings": sections.warnings(runs),
        "Rewards": sections.curves("rewards", "Rewards", reward_panels(runs), runs),
        "Before and after": sections.pictures(sheets),
        "Divergence": sections.curves("divergence", "Divergence from the reference", divergence_panels(runs), runs),
        "Time": sections.budgets(runs),
        "Configuration": sections.configurations(runs),
        "Code and machine": sections.sessions(runs),
    }
    ids = ("values", "warnings", "rewards", "pictures", "divergence", "time", "configuration", "sessions")
    links = [element("a", label, href=f"#{target}") for label, target in zip(parts, ids, strict=True)]
    written = f"Written {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC by diffpp_fast {__version__}."
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"diffpp_fast: {title}"),
        element("style", Markup(style_sheet())),
    )
    body = element(
        "body",
        element("h1", title),
        sections.named(runs),
        element("nav", *links),
        sections.tiles(runs[0]) if len(runs) == 1 else Markup(),
        *parts.values(),
        sections.notes(runs),
        element("p", written, class_="note"),
    )
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"
