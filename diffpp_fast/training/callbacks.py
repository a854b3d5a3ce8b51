"""Listeners to a run: metrics.jsonl, environment.json, TensorBoard, Weights & Biases and the terminal."""

from __future__ import annotations

import json
import logging
import math
import platform
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from diffpp_fast import install
from diffpp_fast.errors import ConfigurationError
from diffpp_fast.provenance import commit, device_name, package_version
from diffpp_fast.terminal import printable, say
from diffpp_fast.training.config import Config, WandBSection
from diffpp_fast.training.distributed import World
from diffpp_fast.training.durable import write_whole
from diffpp_fast.training.layout import cells_of, columns_of
from diffpp_fast.version import __version__


class Callback:
    """Listens to a run; override what you need.

    What a method raises is told once as a warning, and the run goes on; only a UserError of `on_start` ends it.

    Steps count the generator's updates. Rounds of the fake score before the first of them have negative numbers, so
    that the last warm-up round is step 0.
    """

    def on_start(self, step: int, steps: int) -> None:
        """The run begins at `step` (above the first one after a resume) and ends at `steps`."""

    def on_step(self, step: int) -> None:
        """A step is complete."""

    def on_log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Means since the last call, at every `log_every`-th step; also what was measured on a sample grid."""

    def on_warning(self, step: int, name: str, message: str) -> None:
        """`training.watch` found something wrong. `name` is one of its rules, `message` says what was seen."""

    def on_grid(self, step: int, pixels: torch.Tensor, path: Path) -> None:
        """A sample grid [H, W, 3] uint8, saved at `path`."""

    def on_checkpoint(self, step: int, path: Path) -> None:
        """A checkpoint is complete."""

    def on_end(self, step: int) -> None:
        """The run has ended, was interrupted or failed, after `step`."""


class JsonLines(Callback):
    """One line per log and per warning in a file; lines from beyond the step where a run resumes are dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_start(self, step: int, steps: int) -> None:
        kept = [json.dumps(record) + "\n" for record in read_records(self.path) if record["step"] <= step]
        write_whole(self.path, "".join(kept))

    def on_log(self, step: int, scalars: Mapping[str, float]) -> None:
        # JSON has no NaN.
        self._write(step, {name: value if math.isfinite(value) else None for name, value in scalars.items()})

    def on_warning(self, step: int, name: str, message: str) -> None:
        self._write(step, {"warning": name, "message": message})

    def _write(self, step: int, values: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl as far as they are whole: a kill leaves an unfinished one; no file, no lines."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if line.endswith("\n") and isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


#: Whose versions change what a run computes or how fast.
PACKAGES = ("torch", "triton", "numpy", "diffusers", "transformers", "deepspeed", "bitsandbytes", "peft")

logger = logging.getLogger(__name__)


class Environment(Callback):
    """One session for every part of a run, from its start or a resume to its end; earlier ones stay.

    A session that was killed, or that is still going, has null as `ended` and `last_step`.

    Args:
        path: of the file.
        facts: what there is to say of a session besides when it was and from which step to which, as JSON has it.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self.path = path
        self.facts = facts
        self.session: dict[str, Any] | None = None

    def on_start(self, step: int, steps: int) -> None:
        times = {"began": _now(), "ended": None, "first_step": step, "last_step": None, "steps": steps}
        self.session = {**times, **self.facts}
        self._write([*read_sessions(self.path), self.session])

    def on_end(self, step: int) -> None:
        if self.session is None:
            return
        before = read_sessions(self.path)[:-1]
        self.session |= {"ended": _now(), "last_step": step}
        try:
            self._write([*before, self.session])
        except OSError as error:  # a full disk may be what ends the run: that is to be said, not this
            logger.warning("can't write %s: %s", self.path, error.strerror)

    def _write(self, sessions: Sequence[Mapping[str, Any]]) -> None:
        write_whole(self.path, json.dumps({"sessions": sessions}, indent=2) + "\n")


def describe_environment(world: World, grid_prompts: Sequence[str]) -> dict[str, Any]:
    """The facts of a session. `grid_prompts`: of its sample grids, row by row."""
    name, dirty = commit()
    return {
        "processes": world.size,
        "device": device_name(world.device),
        "threads": torch.get_num_threads(),
        "commit": name,
        "dirty": dirty,
        "diffpp_fast": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda": torch.version.cuda or "",
        "packages": {name: version for name in PACKAGES if (version := package_version(name))},
        "grid_prompts": list(grid_prompts),
    }


def read_sessions(path: Path) -> list[dict[str, Any]]:
    """The sessions so far, oldest first; none where the file is missing or damaged."""
    try:
        sessions = json.loads(path.read_text(encoding="utf-8"))["sessions"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [session for session in sessions if isinstance(session, dict)] if isinstance(sessions, list) else []


def _now() -> str:
    """ISO 8601, UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class TensorBoard(Callback):
    """Writes event files into `folder`; what an interrupted run wrote beyond the step of a resume is hidden.

    Args:
        folder: of the event files.
        prompts: of the sample grids, row by row; they stand in a table under Text.

    Raises ConfigurationError where TensorBoard is not installed.
    """

    def __init__(self, folder: Path, prompts: Sequence[str] = ()) -> None:
        if find_spec("tensorboard") is None:
            raise ConfigurationError(
                f"logging.tensorboard needs TensorBoard: {install.extra('train')}, or set logging.tensorboard=false"
            )
        self.folder = folder
        self.prompts = list(prompts)
        self.writer: Any = None
        self._told = False

    def on_start(self, step: int, steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.folder), purge_step=step + 1)

    def on_log(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)

    def on_warning(self, step: int, name: str, message: str) -> None:
        self.writer.add_text(f"warning/{name}", message, step)

    def on_grid(self, step: int, pixels: torch.Tensor, path: Path) -> None:
        self.writer.add_image("grid", pixels, step, dataformats="HWC")
        # They change with a resume at most: once in a session.
        if self.prompts and not self._told:
            self.writer.add_text("grid/prompts", _as_table(self.prompts), step)
            self._told = True

    def on_end(self, step: int) -> None:
        if self.writer is not None:
            self.writer.close()


def _as_table(prompts: Sequence[str]) -> str:
    """Return prompts as a table in Markdown with the cells of their pictures."""
    columns = columns_of(len(prompts))
    cells = [prompt.replace("|", "\\|").replace("\n", " ") for prompt in prompts]
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    lines = [[""] * columns, ["---"] * columns, *([*row, *[""] * (columns - len(row))] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


#: W&B shows no more pictures than this under one name and step.
WANDB_IMAGES = 108


class WandB(Callback):
    """One W&B run per output folder: its id lies in `wandb/run_id` there, so that a resumed run goes on with it.

    Args:
        settings: of the configuration.
        config: the run's.
        prompts: of the sample grids, row by row: the captions of their pictures.

    Raises ConfigurationError where the package is missing, and in `on_start` where nobody has logged in. Where W&B
    can't be reached, `on_start` raises its CommError, which costs a run its listener only.
    """

    def __init__(self, settings: WandBSection, config: Config, prompts: Sequence[str] = ()) -> None:
        if find_spec("wandb") is None:
            raise ConfigurationError(
                f"logging.wandb needs the package wandb: {install.extra('wandb')}, or set logging.wandb=null"
            )
        self.settings = settings
        self.config = config
        self.prompts = list(prompts)
        self.run: Any = None

    def on_start(self, step: int, steps: int) -> None:
        import wandb

        output, settings = Path(self.config.output), self.settings
        try:
            self.run = wandb.init(
                id=_run_id(output / "wandb"),
                resume="allow",
                project=settings.project,
                name=settings.name,
                group=settings.group,
                mode=settings.mode,
                dir=str(output),
                config=self.config.model_dump(mode="json"),
                # Capturing the terminal would break the live line up, and W&B's summary would repeat every scalar.
                settings=wandb.Settings(console="off", quiet=True),
            )
        except wandb.Error as error:
            if isinstance(error, wandb.errors.CommError) and not isinstance(error, wandb.errors.AuthenticationError):
                raise
            raise ConfigurationError(
                f"logging.wandb: {error}. Log in with `wandb login`, or set logging.wandb.mode=offline"
            ) from None
        # W&B's own step only rises; ours begins below zero and goes back when a run resumes.
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("*", step_metric="step")

    def on_log(self, step: int, scalars: Mapping[str, float]) -> None:
        self.run.log({"step": step, **scalars})

    def on_warning(self, step: int, name: str, message: str) -> None:
        self.run.alert(title=name, text=f"step {step}: {message}", level="WARN")

    def on_grid(self, step: int, pixels: torch.Tensor, path: Path) -> None:
        from wandb import Image

        if not self.prompts:
            self.run.log({"step": step, "grid": Image(pixels.numpy())})
            return
        pictures = zip(cells_of(pixels, len(self.prompts)), self.prompts, strict=True)
        shown = [Image(picture.numpy(), caption=prompt) for picture, prompt in islice(pictures, WANDB_IMAGES)]
        self.run.log({"step": step, "grid": shown})

    def on_end(self, step: int) -> None:
        if self.run is not None:
            self.run.finish()


def _run_id(folder: Path) -> str:
    """The id that this folder's run has had so far, or a new one."""
    file = folder / "run_id"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(secrets.token_hex(4), encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()


#: Scalars that the terminal shows, and under which name. A line that does not fit into its width is cut at the end.
SHOWN = {
    "generator/reward": "reward",
    "grid/held_out": "held-out",
    "fake/loss": "fake loss",
    "generator/score_gap": "score gap",
}


class Progress(Callback):
    """One live line on a terminal; elsewhere, in a file say, one plain line per log."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.task: Any = None
        #: The last known figures: a grid brings some, a log others.
        self.known: dict[str, float] = {}

    def on_start(self, step: int, steps: int) -> None:
        self.first, self.steps, self.began = step, steps, time.monotonic()
        if sys.stdout is None or not sys.stdout.isatty():
            return
        from rich import progress
        from rich.table import Column

        self.bar = progress.Progress(
            progress.BarColumn(bar_width=8, table_column=Column(width=8)),
            # The rest of the terminal's width, and no second line.
            progress.TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
            expand=True,
            # Where stderr goes elsewhere, what is said there is not for this terminal.
            redirect_stderr=sys.stderr is not None and sys.stderr.isatty(),
        )
        self.bar.start()
        self.task = self.bar.add_task(self._line(step), total=steps, completed=max(step, 0))

    def on_step(self, step: int) -> None:
        if step <= 0:  # a warm-up round takes less time than a step
            self.first, self.began = step, time.monotonic()
        if self.bar is not None:
            self.bar.update(self.task, completed=max(step, 0), description=self._line(step))

    def on_log(self, step: int, scalars: Mapping[str, float]) -> None:
        self.known.update(scalars)
        if self.bar is None:
            print(self._line(step), flush=True)
        else:
            self.bar.update(self.task, description=self._line(step))

    def on_grid(self, step: int, pixels: torch.Tensor, path: Path) -> None:
        self._say(f"grid: {path}")

    def on_checkpoint(self, step: int, path: Path) -> None:
        self._say(f"checkpoint: {path}")

    def on_end(self, step: int) -> None:
        if self.bar is not None:
            self.bar.stop()

    def _line(self, step: int) -> str:
        if step < 0:
            place = f"warming the fake score up, {-step} to go"
        else:
            place = f"step {step}/{self.steps}  {self._time_left(step)}"
        speed = self.known.get("samples_per_second")
        figures = [] if speed is None else [f"{speed:.3g} images/s"]
        figures += [f"{label} {self.known[name]:.4g}" for name, label in SHOWN.items() if name in self.known]
        return "  ".join([place, *figures])

    def _time_left(self, step: int) -> str:
        if step <= self.first:
            return "time left unknown"
        left = (time.monotonic() - self.began) / (step - self.first) * (self.steps - step)
        return f"{int(left // 3600)}:{int(left // 60) % 60:02d}:{int(left) % 60:02d} left"

    def _say(self, sentence: str) -> None:
        if self.bar is None:
            say(sentence)
        else:
            self.bar.console.print(printable(sentence), highlight=False, markup=False, soft_wrap=True)


def standard_callbacks(config: Config, grid_prompts: Sequence[str] = ()) -> list[Callback]:
    """Return the listeners that a configuration asks for; they write into its output folder once the run starts.

    Args:
        config: the run's.
        grid_prompts: of its sample grids, row by row.

    Raises ConfigurationError for a package that is missing.
    """
    output = Path(config.output)
    callbacks: list[Callback] = [JsonLines(output / "metrics.jsonl")]
    if config.logging.tensorboard:
        callbacks.append(TensorBoard(output / "tensorboard", grid_prompts))
    if config.logging.wandb is not None:
        callbacks.append(WandB(config.logging.wandb, config, grid_prompts))
    # Last, so that nothing that the others say at the start breaks into its line.
    return [*callbacks, Progress()]
