"""The events that a listener to a run is told of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch


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
