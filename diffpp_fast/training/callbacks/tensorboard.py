"""TensorBoard: scalars, sample grids and warnings."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.training.callbacks.base import Callback


class TensorBoard(Callback):
    """Writes event files into `folder`; what an interrupted run wrote beyond the step of a resume is hidden.

    Raises ConfigurationError where TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        if find_spec("tensorboard") is None:
            raise ConfigurationError(
                "logging.tensorboard needs TensorBoard: pip install tensorboard, or set logging.tensorboard=false"
            )
        self.folder = folder
        self.writer: Any = None

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

    def on_end(self, step: int) -> None:
        if self.writer is not None:
            self.writer.close()
