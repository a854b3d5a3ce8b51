"""Weights & Biases: scalars, sample grids and warnings of one run, also without a network."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.training.callbacks.base import Callback
from diffpp_fast.training.config import Config, WandBSection


class WandB(Callback):
    """One W&B run per output folder: its id lies in `wandb/run_id` there, so that a resumed run goes on with it.

    Raises ConfigurationError where the package is missing, and in `on_start` where nobody has logged in. Where W&B
    can't be reached, `on_start` raises its CommError, which costs a run its listener only.
    """

    def __init__(self, settings: WandBSection, config: Config) -> None:
        if find_spec("wandb") is None:
            raise ConfigurationError(
                "logging.wandb needs the package wandb: pip install wandb, or set logging.wandb=null"
            )
        self.settings = settings
        self.config = config
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

        self.run.log({"step": step, "grid": Image(pixels.numpy())})

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
