"""The terminal: one line that says how far the run is, how fast, and how long it still takes."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffpp_fast.terminal import printable, say
from diffpp_fast.training.callbacks.base import Callback

#: What the terminal shows of the scalars, and under which name. What does not fit into its width is cut at the end.
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
