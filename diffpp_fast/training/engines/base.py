"""What a training loop may do to a trained network."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
from torch import nn


class Engine(Protocol):
    """A trained network with its optimizer and its average, in one process or spread over many.

    Methods marked collective must be called by all processes, in the same order.

    Attributes:
        role: "generator" or "fake".
        network: the module that is called; what an engine has to do before and after is hooked to it in place.
        parameters: those that are trained, by their name in `network.state_dict()`.
        updates: asked for so far, skipped ones included.
    """

    role: str
    network: nn.Module
    parameters: Mapping[str, nn.Parameter]
    updates: int

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next update."""

    @property
    def applied(self) -> int:
        """Updates so far that were not skipped, those before a resume included; waits for the device (collective)."""

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Adds a micro-batch's gradient (collective).

        Args:
            loss: this micro-batch's share of the process's mean loss: its mean times its part of the samples.
                Gradients are averaged over the processes.
            last: whether it is the update's last micro-batch.
        """

    def step(self) -> torch.Tensor:
        """Clips or normalises the gradient, updates weights and average, and drops it (collective).

        Returns the norm of the whole gradient before that: float32, a scalar on the device, the same in all
        processes. If it is infinite or NaN, weights, optimizer and average are as they were, and only then.
        """

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the network computes with the averages, where they are kept (collective)."""

    def write(self, folder: Path) -> None:
        """Writes weights, optimizer and averages, float32 tensors by name, for any engine to read (collective).

        Raises OSError in all processes if one can't.
        """

    def read(self, folder: Path) -> None:
        """Goes back to what any engine has written, in whatever number of processes (collective).

        Raises CheckpointError in all processes if one can't.
        """

    def full_state(self, averaged: bool) -> dict[str, torch.Tensor] | None:
        """`network.state_dict()` with whole float32 weights, or their averages, on the CPU; None except on rank 0
        (collective)."""
