"""The content of a run's folder, read leniently: the run may still be going, or have been killed at any moment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.training.callbacks import read_records, read_sessions
from diffpp_fast.training.controls import NAMES
from diffpp_fast.training.state import flat
from diffpp_fast.training.yaml_files import YamlError, read_yaml
from diffpp_fast.user_paths import real_path

METRICS = "metrics.jsonl"


class Scalar(NamedTuple):
    """One scalar of the log: its finite values in the order of their steps, and how many others there were."""

    steps: list[int]
    values: list[float]
    undefined: int

    @property
    def last(self) -> float:
        return self.values[-1]


class Warned(NamedTuple):
    """A warning of the run's watch."""

    step: int
    name: str
    message: str


class GridFile(NamedTuple):
    """A sample grid, and its prompts row by row; None where they were not recorded."""

    step: int
    path: Path
    prompts: tuple[str, ...] | None


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder shows it.

    Attributes:
        folder, name: where it is, and its name in the report.
        config: values by keys with dots; empty where no configuration can be read.
        records: the lines of metrics.jsonl that hold scalars.
        scalars: the scalars that have a finite value.
        warnings: the watch's, in order.
        grids: the sample grids, in order of their steps.
        sessions: see `callbacks.Environment`; runs that are older than it have none.
        notes: what was left out of the report, and why.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    records: list[dict[str, Any]]
    scalars: dict[str, Scalar]
    warnings: list[Warned]
    grids: list[GridFile]
    sessions: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)

    @property
    def step(self) -> int | None:
        """The last step that was logged."""
        return max((record["step"] for record in self.records), default=None)

    @property
    def logged_at(self) -> datetime:
        """When the last line was logged, UTC."""
        return datetime.fromtimestamp((self.folder / METRICS).stat().st_mtime, timezone.utc)


def is_run(folder: Path) -> bool:
    """Whether a trainer has begun to write there."""
    return (folder / METRICS).is_file()


def find_runs(folder: Path) -> list[Path]:
    """Return the folder itself if it is a run's, else the runs that `diffpp-fast controls` has put into it.

    Raises ConfigurationError where there is neither.
    """
    if is_run(folder):
        return [folder]
    found = [folder / name for name in NAMES if is_run(folder / name)]
    if not found:
        reason = f"it holds no {METRICS}, nor runs of controls" if folder.is_dir() else "there is no such folder"
        raise ConfigurationError(f"{folder} is no run: {reason}")
    return found


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Read each folder's run. Raises ConfigurationError for a folder that is given twice."""
    places = [real_path(folder) for folder in folders]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise ConfigurationError(f"{folders[number]} is given twice")
    return [_read(folder, name) for folder, name in zip(folders, _names(places), strict=True)]


def _names(places: Sequence[Path]) -> list[str]:
    """Return the ends of the paths, as long as it takes to tell them apart."""
    for count in range(1, max(len(place.parts) for place in places)):
        names = ["/".join(place.parts[-count:]) for place in places]
        if len(set(names)) == len(names):
            return names
    return [str(place) for place in places]


def _read(folder: Path, name: str) -> RunRecord:
    # Before the lines are read: what a run adds in between is then not taken for damage.
    text = (folder / METRICS).read_text(encoding="utf-8", errors="replace")
    lines = read_records(folder / METRICS)
    notes = _damage(text, len(lines))
    config = _read_config(folder / "config.yaml", notes)
    records = [line for line in lines if "warning" not in line]
    warnings = [
        Warned(line["step"], str(line["warning"]), str(line.get("message", ""))) for line in lines if "warning" in line
    ]
    sessions = read_sessions(folder / "environment.json")
    grids = _grids(folder / "grids", sessions)
    return RunRecord(folder, name, config, records, _scalars(records), warnings, grids, sessions, notes)


def _damage(text: str, whole: int) -> list[str]:
    """Return notes about a metrics.jsonl of which `whole` lines could be read."""
    damaged = sum(bool(line.strip()) for line in text.splitlines()) - whole
    if damaged <= 0:
        return []
    if damaged == 1 and not text.endswith("\n"):
        return [f"the last line of {METRICS} is not whole (the run is writing it, or was killed): it is left out"]
    return [f"{damaged} lines of {METRICS} are damaged: they are left out"]


def _read_config(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        data = read_yaml(path)
    except (OSError, YamlError) as error:
        notes.append(f"config.yaml can't be read: {error}")
        return {}
    return dict(flat(data)) if isinstance(data, dict) else {}


def _scalars(records: Sequence[dict[str, Any]]) -> dict[str, Scalar]:
    scalars: dict[str, Scalar] = {}
    undefined: dict[str, int] = {}
    for record in records:
        for name, value in record.items():
            if isinstance(value, int | float) and math.isfinite(value):
                series = scalars.setdefault(name, Scalar([], [], 0))
                series.steps.append(record["step"])
                series.values.append(float(value))
            else:
                undefined[name] = undefined.get(name, 0) + 1
    return {
        name: series._replace(undefined=undefined.get(name, 0)) for name, series in scalars.items() if name != "step"
    }


def _grids(folder: Path, sessions: Sequence[dict[str, Any]]) -> list[GridFile]:
    found = []
    for path in folder.glob("step_*.png"):
        digits = path.stem.removeprefix("step_")
        if digits.isdigit():
            found.append(GridFile(int(digits), path, _prompts_of(int(digits), sessions)))
    return sorted(found)


def _prompts_of(step: int, sessions: Sequence[dict[str, Any]]) -> tuple[str, ...] | None:
    """Return the prompts of the last session that can have drawn the grid: a resumed one draws none where it begins."""
    drew = [session for session in sessions if session.get("first_step", 0) < step] or sessions[:1]
    prompts = drew[-1].get("grid_prompts") if drew else None
    return tuple(map(str, prompts)) if isinstance(prompts, list) and prompts else None
