"""Listeners to a run: metrics.jsonl, environment.json, TensorBoard, Weights & Biases and the terminal."""

from __future__ import annotations

from pathlib import Path

from diffpp_fast.training.callbacks.base import Callback
from diffpp_fast.training.callbacks.environment import Environment, describe_environment, read_sessions
from diffpp_fast.training.callbacks.json_lines import JsonLines, read_records
from diffpp_fast.training.callbacks.progress import Progress
from diffpp_fast.training.callbacks.tensorboard import TensorBoard
from diffpp_fast.training.callbacks.wandb import WandB
from diffpp_fast.training.config import Config

__all__ = [
    "Callback",
    "Environment",
    "JsonLines",
    "Progress",
    "TensorBoard",
    "WandB",
    "describe_environment",
    "read_records",
    "read_sessions",
    "standard_callbacks",
]


def standard_callbacks(config: Config) -> list[Callback]:
    """Those that the configuration asks for; they write into its output folder once the run starts.

    Raises ConfigurationError for a package that is missing.
    """
    output = Path(config.output)
    callbacks: list[Callback] = [JsonLines(output / "metrics.jsonl")]
    if config.logging.tensorboard:
        callbacks.append(TensorBoard(output / "tensorboard"))
    if config.logging.wandb is not None:
        callbacks.append(WandB(config.logging.wandb, config))
    # Last, so that nothing that the others say at the start breaks into its line.
    return [*callbacks, Progress()]
