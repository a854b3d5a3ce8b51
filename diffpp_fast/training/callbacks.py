"""What a run tells while it goes on, and the standard listeners: metrics.jsonl, TensorBoard and the terminal."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


class Callback:
    """Listens to a run; override what you need.

    Steps count the generator's updates. Rounds of the fake score before the first of them have negative numbers, so
    that the last warm-up round is step 0.
    """

    def on_start(self, step: int, steps: int) -> None:
        """The run begins at `step` (above the first one after a resume) and ends at `steps`."""

    def on_step(self, step: int) -> None:
        """A step is complete."""

    def on_log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Means since the last call, at every `log_every`-th step; also what was measured on a sample grid."""

    def on_grid(self, step: int, pixels: torch.Tensor, path: Path) -> None:
        """A sample grid [H, W, 3] uint8, saved at `path`."""

    def on_checkpoint(self, step: int, path: Path) -> None:
        """A checkpoint is complete."""

    def on_end(self, step: int) -> None:
        """The run has ended, was interrupted or failed, after `step`."""


class JsonLines(Callback):
    """One line per `on_log` in a file; lines from beyond the step where a run resumes are dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_start(self, step: int, steps: int) -> None:
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        kept = [line for line in lines if _step(line) <= step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(kept))
        os.replace(partial, self.path)

    def on_log(self, step: int, scalars: Mapping[str, float]) -> None:
        with self.path.open("a") as file:
            # JSON has no NaN.
            finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
            file.write(json.dumps({"step": step, **finite}) + "\n")


def _step(line: str) -> float:
    """The step of a line; beyond all steps for the unfinished line that a kill leaves."""
    try:
        return int(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


class TensorBoard(Callback):
    """Scalars and sample grids for TensorBoard."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer: Any = None

    def on_start(self, step: int, steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.folder), purge_step=step + 1)

    def on_log(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)

    def on_grid(self, step: int, pixels: torch.Tensor, path: Path) -> None:
        self.writer.add_image("grid", pixels, step, dataformats="HWC")

    def on_end(self, step: int) -> None:
        if self.writer is not None:
            self.writer.close()


#: What the terminal shows of the scalars, and under which name.
SHOWN = {
    "fake/loss": "fake loss",
    "generator/loss": "generator loss",
    "generator/reward": "reward",
    "grid/reward": "grid reward",
    "grid/held_out": "grid held-out",
}


class Progress(Callback):
    """One live line on a terminal, with the time left; elsewhere one plain line per `on_log`."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.figures = ""

    def on_start(self, step: int, steps: int) -> None:
        self.first, self.steps, self.began = step, steps, time.monotonic()
        if not sys.stdout.isatty():
            return
        from rich import progress

        self.bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=8),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[figures]}"),
        )
        self.bar.start()
        self.task = self.bar.add_task("", total=steps, completed=max(step, 0), figures="")

    def on_step(self, step: int) -> None:
        if step <= 0:  # a warm-up round takes less time than a step
            self.first, self.began = step, time.monotonic()
        if self.bar is not None:
            description = "" if step > 0 else f"warming the fake score up, {-step} rounds to go"
            self.bar.update(self.task, completed=max(step, 0), description=description, figures=self.figures)

    def on_log(self, step: int, scalars: Mapping[str, float]) -> None:
        figures = [f"{label} {scalars[name]:.4g}" for name, label in SHOWN.items() if name in scalars]
        self.figures = "  ".join(figures) or self.figures
        if self.bar is None:
            print(f"step {step}/{self.steps}  {self._time_left(step)}  {self.figures}", flush=True)

    def on_grid(self, step: int, pixels: torch.Tensor, path: Path) -> None:
        self._say(f"grid: {path}")

    def on_checkpoint(self, step: int, path: Path) -> None:
        self._say(f"checkpoint: {path}")

    def on_end(self, step: int) -> None:
        if self.bar is not None:
            self.bar.stop()

    def _time_left(self, step: int) -> str:
        if step <= self.first:
            return "time left unknown"
        left = (time.monotonic() - self.began) / (step - self.first) * (self.steps - step)
        return f"{int(left // 3600)}:{int(left // 60) % 60:02d}:{int(left) % 60:02d} left"

    def _say(self, sentence: str) -> None:
        if self.bar is None:
            print(sentence, flush=True)
        else:
            self.bar.console.print(sentence, highlight=False, soft_wrap=True)
