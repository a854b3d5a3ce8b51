"""Which part of a training step runs from when on: marks of time, or of counted operations."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

NOISE_AND_SCORES = "noise and scores"
#: In the order in which a step begins them. What lies between networks is `NOISE_AND_SCORES`.
GENERATOR_PHASES = (
    "generator",
    "fake",
    "reference",
    NOISE_AND_SCORES,
    "decode",
    "reward",
    "reward backward",
    "decode backward",
    "backward",
    "update",
)
FAKE_PHASES = ("generator", "fake", NOISE_AND_SCORES, "backward", "update")
#: By the network that the step updates.
PHASES = {"generator": GENERATOR_PHASES, "fake": FAKE_PHASES}
ROLES = tuple(PHASES)
WHOLE = "whole"

#: A moment: seconds, an event on the device, operations so far; and the amount between two of them.
Now = Callable[[], Any]
Between = Callable[[Any, Any], float]


def no_time() -> None:
    """Where nothing is measured."""


class Marks:
    """Begins phases, each of which ends where the next one begins.

    Args:
        now: what a moment is.
    """

    def __init__(self, now: Now = no_time) -> None:
        self._now = now
        self._marks: list[tuple[str, Any]] = []

    def begin(self, phase: str) -> None:
        self._marks.append((phase, self._now()))

    def end(self) -> None:
        self.begin("")

    def spans(self, between: Between) -> dict[str, float]:
        """The sum of every phase's spans, and that of all."""
        spans = dict.fromkeys((phase for phase, _ in self._marks[:-1]), 0.0)
        for (phase, start), (_, end) in itertools.pairwise(self._marks):
            spans[phase] += between(start, end)
        return {**spans, WHOLE: between(self._marks[0][1], self._marks[-1][1])}


def seconds(device: torch.device) -> tuple[Now, Between]:
    """Time as the device sees it. On CUDA nothing waits before `between` is asked, after a synchronisation."""
    if device.type != "cuda":
        return time.perf_counter, lambda start, end: float(end - start)
    return _recorded, lambda start, end: float(start.elapsed_time(end)) * 1e-3


def operations(total: Callable[[], int]) -> tuple[Now, Between]:
    """Operations counted so far."""
    return total, lambda start, end: float(end - start)


def _recorded() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def every_phase() -> Iterator[tuple[str, str]]:
    """Role and phase, the whole first of each role."""
    for role, phases in PHASES.items():
        yield from ((role, phase) for phase in (WHOLE, *phases))
