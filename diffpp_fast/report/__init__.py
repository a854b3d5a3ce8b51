"""Floor 6: runs as one page. The page is `page.html.jinja`, and its curves and pictures are also PNGs beside it."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from diffpp_fast import install
from diffpp_fast.errors import ConfigurationError
from diffpp_fast.report import curves, figures, pictures
from diffpp_fast.report.runs import RunRecord, find_runs, is_run, read_runs
from diffpp_fast.training.durable import write_whole
from diffpp_fast.user_paths import refuse_no_folder
from diffpp_fast.version import __version__

__all__ = ["check_drawing", "find_runs", "is_run", "make_page", "refuse_foreign_report", "write_report"]

#: The beginning of every report's page, by which a file is known as one.
TITLE = "<title>diffpp_fast: "


def check_drawing() -> None:
    """Raise ConfigurationError where a package is missing that reports need."""
    missing = [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]
    if missing:
        raise ConfigurationError(f"reports need {' and '.join(missing)}: {install.extra('train')}")


def write_report(folders: Sequence[Path], output: Path) -> Path:
    """Write a page on the runs in `folders`, all compared with the first, and return its path.

    Beside the page, which needs no other file, lie NAME-reward.png, NAME-divergence.png and NAME-pictures.png, as far
    as there is something to show.

    Raises ConfigurationError for a folder that is given twice, too many of them, and where jinja2 or matplotlib is
    missing.
    """
    check_drawing()
    if len(folders) > len(curves.RUNS):
        raise ConfigurationError(f"{len(folders)} runs are too many for one page: at most {len(curves.RUNS)}")
    refuse_foreign_report(output)
    runs = read_runs(folders)
    sheets = pictures.sheets_of(runs)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, make_page(runs, sheets))
    for name, panels in (("reward", curves.reward_panels(runs)), ("divergence", curves.divergence_panels(runs))):
        if panels:
            curves.write_png(output.with_name(f"{output.stem}-{name}.png"), panels, runs)
    if sheets:
        pictures.write_png(output.with_name(f"{output.stem}-pictures.png"), sheets[0])
    return output


def refuse_foreign_report(output: Path) -> None:
    """Raise ConfigurationError where a report would replace a file that is none."""
    if output.is_dir():
        raise ConfigurationError(f"--output {output}: it is a folder; name a file")
    refuse_no_folder("report into", output.parent)
    beside = [output.with_name(f"{output.stem}-{name}.png") for name in ("reward", "divergence", "pictures")]
    try:
        own = TITLE in output.read_bytes()[:4096].decode("utf-8", "replace")
        foreign = [] if own else [output]
    except FileNotFoundError:
        foreign = [path for path in beside if path.exists()]
    if foreign:
        raise ConfigurationError(f"--output {output}: {foreign[0]} exists and is no report: choose another file")


def make_page(runs: Sequence[RunRecord], sheets: Sequence[pictures.Sheet]) -> str:
    """Return the whole page. `sheets` comes from `pictures.sheets_of`, which adds its notes to the runs."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number="{:.4g}".format, yaml=_as_yaml, duration=_duration)
    environment.globals.update(curves=curves, figures=figures, pictures=pictures, data_uri=_data_uri)
    budgets = {place: budget for place, run in enumerate(runs) if (budget := figures.budget_of(run)) is not None}
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    return environment.get_template("page.html.jinja").render(
        runs=runs,
        sheets=sheets,
        budgets=budgets,
        phases=list(dict.fromkeys(phase for budget in budgets.values() for phase in budget.phases)),
        keys=keys,
        changed=[key for key in keys if len({repr(run.config.get(key)) for run in runs}) > 1],
        version=__version__,
        now=datetime.now(timezone.utc),
    )


def _data_uri(kind: str, data: bytes) -> str:
    """Return a file as an address that holds it, so that the page needs no other."""
    return f"data:{kind};base64,{b64encode(data).decode()}"


def _as_yaml(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _duration(session: dict[str, Any]) -> str:
    """Return how long a session went, " (1:02:03)"; "" where its end was not recorded."""
    try:
        seconds = (datetime.fromisoformat(session["ended"]) - datetime.fromisoformat(session["began"])).total_seconds()
    except (KeyError, TypeError, ValueError):
        return ""
    return f" ({int(seconds // 3600)}:{int(seconds // 60) % 60:02d}:{int(seconds) % 60:02d})"
