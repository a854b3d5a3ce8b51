"""Interleaved timing: every contender in every round, so that a slow minute of the machine is everybody's."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, Protocol

ROUNDS = 20
LEAST_ROUNDS = 5
#: A contender that is slower than the time per round may stretch the whole measurement by this factor.
STRETCH = 4.0
#: Seconds of warm-up per contender, and the least number of calls.
WARM_UP, LEAST_CALLS = 0.02, 3


class Contender(NamedTuple):
    """Something to time: `call` does its work once, `context` is entered around many calls."""

    name: str
    call: Callable[[], object]
    context: Callable[[], AbstractContextManager[object]] = nullcontext


class Clock(Protocol):
    """Seconds from the start to the end of the work that a function starts."""

    def __call__(self, work: Callable[[], None]) -> float: ...


@dataclass(frozen=True)
class Timing:
    """Seconds per call: one sample per round, the mean of that round's calls."""

    samples: tuple[float, ...]
    calls: int  # per round

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.samples) == 1:
            return self.samples[0], self.samples[0]
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high

    @property
    def spread(self) -> float:
        """The interquartile range as a part of the median."""
        low, high = self.quartiles
        return (high - low) / self.median


def wall_clock(work: Callable[[], None]) -> float:
    """The clock of a machine that has finished when the call returns."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def interleave(contenders: Sequence[Contender], min_time: float, clock: Clock = wall_clock) -> dict[str, Timing]:
    """Times the contenders by turns.

    The order is fixed, and every round begins with the next contender, so that each follows each place.

    Args:
        contenders: with distinct names.
        min_time: seconds per contender over all rounds. A slow one takes longer, for there are at least
            `LEAST_ROUNDS` rounds.
        clock: how long a block of calls took.
    """
    with _no_collection():
        once = {contender.name: _warm_up(contender, clock) for contender in contenders}
        calls = {name: max(1, math.ceil(min_time / ROUNDS / seconds)) for name, seconds in once.items()}
        rounds = _rounds(sum(calls[name] * once[name] for name in once), STRETCH * min_time * len(contenders))
        samples: dict[str, list[float]] = {name: [] for name in once}
        for first in range(rounds):
            for place in range(len(contenders)):
                contender = contenders[(first + place) % len(contenders)]
                count = calls[contender.name]
                samples[contender.name].append(_time_calls(contender, count, clock) / count)
    return {name: Timing(tuple(values), calls[name]) for name, values in samples.items()}


def _warm_up(contender: Contender, clock: Clock) -> float:
    """Seconds per call when warm."""
    times: list[float] = []
    while len(times) < LEAST_CALLS or (sum(times) < WARM_UP and len(times) < 1000):
        times.append(_time_calls(contender, 1, clock))
    return max(statistics.median(times), 1e-9)


def _time_calls(contender: Contender, count: int, clock: Clock) -> float:
    def work() -> None:
        for _ in range(count):
            contender.call()

    with contender.context():
        return clock(work)


def _rounds(seconds_per_round: float, budget: float) -> int:
    return max(LEAST_ROUNDS, min(ROUNDS, int(budget / seconds_per_round)))


@contextmanager
def _no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
