"""Diffusion times: which ones are drawn, how often, and how an address makes one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, Protocol

import torch

from diffpp_fast.noise import Noise
from diffpp_fast.schedule import NoiseSchedule

#: A draw is one word of 32 bits.
WORDS = 2**32
#: A distribution with less of its mass than this on the range of times was meant for another schedule.
LEAST_MASS = 0.01
#: The same for the interval of a generator's step, which may be one time of many; with less, its own are no longer told
#: apart in float64.
LEAST_OF_STEP = 1e-6


class TimeDistribution(Protocol):
    """How often each diffusion time is drawn."""

    def cumulative(self, schedule: NoiseSchedule) -> torch.Tensor:
        """Return the probabilities of a time below 0, 1, ..., T: float64 [T + 1], rising, within [0, 1]."""


@dataclass(frozen=True)
class Uniform:
    """Every time equally often."""

    def cumulative(self, schedule: NoiseSchedule) -> torch.Tensor:
        return _edges(schedule)


@dataclass(frozen=True)
class _FromNormal:
    """A normal number of this mean and standard deviation decides the time."""

    mean: float
    std: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.mean) or not 0.0 < self.std < math.inf:
            got = f"mean {self.mean} and std {self.std}"
            raise ValueError(f"a distribution of times needs a finite mean and a std above 0, got {got}")


@dataclass(frozen=True)
class LogNormal(_FromNormal):
    """ln(sigma / alpha) is normal with this mean and standard deviation, as EDM and Diff-Instruct draw it (-1.2, 1.2).

    A time gets the mass between the points midway, in ln(sigma / alpha), to its neighbours. Times at which alpha or
    sigma is 0 are never drawn.
    """

    def cumulative(self, schedule: NoiseSchedule) -> torch.Tensor:
        levels = (schedule.sigmas / schedule.alphas).log()
        inner = levels.isfinite().nonzero().flatten()
        if len(inner) < 2:
            raise ValueError("a log-normal distribution needs at least two times with alpha and sigma above 0")
        first, last = int(inner[0]), int(inner[-1])
        known = levels[first : last + 1]
        middles = (known[1:] + known[:-1]) / 2
        edges = torch.empty(len(schedule) + 1, dtype=torch.float64)
        edges[first + 1 : last + 1] = middles
        # The outer cells reach as far outwards as inwards.
        edges[: first + 1] = 2 * known[0] - middles[0]
        edges[last + 1 :] = 2 * known[-1] - middles[-1]
        return torch.special.ndtr((edges - self.mean) / self.std)


@dataclass(frozen=True)
class LogitNormal(_FromNormal):
    """floor(T sigmoid(n)) with n normal of this mean and standard deviation, as in Stable Diffusion 3 (0, 1)."""

    def cumulative(self, schedule: NoiseSchedule) -> torch.Tensor:
        return torch.special.ndtr((_edges(schedule).logit() - self.mean) / self.std)


@dataclass(frozen=True)
class Shifted:
    """floor(T s u / (1 + (s - 1) u)) with u uniform, s = `shift`, as flow models do at high resolution; 1: uniform."""

    shift: float

    def __post_init__(self) -> None:
        if not 0.0 < self.shift < math.inf:
            raise ValueError(f"the shift of a distribution of times must be above 0 and finite, got {self.shift}")

    def cumulative(self, schedule: NoiseSchedule) -> torch.Tensor:
        edges = _edges(schedule)
        return edges / (self.shift - (self.shift - 1.0) * edges)


#: Which times a loss draws for the sample of a generator's call at t_k, after which the next is at t_(k+1), or 0: all;
#: [t_(k+1), t_k), the "separate" intervals of TDM (arXiv 2503.06674); or [t_(k+1), T), its other choice.
TimeIntervals = Literal["whole", "separate", "nested"]

#: By the names that configurations have for them.
DISTRIBUTIONS: Mapping[str, type] = {
    "uniform": Uniform,
    "log_normal": LogNormal,
    "logit_normal": LogitNormal,
    "shifted": Shifted,
}


class Times:
    """The diffusion times that a loss draws.

    Args:
        name: of the range, for messages.
        schedule: of the noise.
        t_range: times [low, high); None is the whole schedule.
        distribution: over these times, what lies outside cut off; None is uniform.

    Raises ValueError for a range that is empty or not within the schedule, and for a distribution that hardly ever
    gives one of its times.
    """

    def __init__(
        self,
        name: str,
        schedule: NoiseSchedule,
        t_range: tuple[int, int] | None,
        distribution: TimeDistribution | None = None,
    ) -> None:
        low, high = (0, len(schedule)) if t_range is None else t_range
        if not (isinstance(low, int) and isinstance(high, int)):
            raise ValueError(f"{name} must be two whole numbers [low, high) of timesteps, got [{low}, {high})")
        if not 0 <= low < high <= len(schedule):
            raise ValueError(f"{name} must lie within [0, {len(schedule)}) and be non-empty, got [{low}, {high})")
        self.name = name
        self.range = low, high
        self._thresholds: dict[torch.device, torch.Tensor] = {}
        if distribution is not None and not isinstance(distribution, Uniform):
            self._thresholds[torch.device("cpu")] = self._table(distribution, schedule)

    def draw(self, noise: Noise, steps: torch.Tensor | None = None) -> torch.Tensor:
        """[B] int64, from element 0 of each sample: the first time below which the word's share of the mass lies.

        Args:
            noise: of B samples.
            steps: int64 [B], of the generator, whose samples they are; read by `StepTimes`.
        """
        low, high = self.range
        if not self._thresholds:
            return noise.integers(low, high)
        words = noise.integers(0, WORDS)
        if words.device not in self._thresholds:
            self._thresholds[words.device] = self._thresholds[torch.device("cpu")].to(words.device)
        return low + torch.searchsorted(self._thresholds[words.device], words, right=True)

    def possible(self) -> torch.Tensor:
        """The times that can be drawn at all, [n] int64, on the CPU."""
        t = torch.arange(*self.range)
        if not self._thresholds:
            return t
        thresholds = self._thresholds[torch.device("cpu")]
        return t[thresholds.diff(prepend=thresholds.new_zeros(1)) > 0]

    def _table(
        self, distribution: TimeDistribution, schedule: NoiseSchedule, least: float = LEAST_MASS
    ) -> torch.Tensor:
        """The words below which a time of the range, or one before it, is meant: int64, compared exactly anywhere."""
        low, high = self.range
        below = distribution.cumulative(schedule).to("cpu", torch.float64)
        if below.shape != (len(schedule) + 1,) or not below.isfinite().all() or not (below.diff() >= 0.0).all():
            raise ValueError(f"{distribution}: cumulative must give {len(schedule) + 1} finite numbers that never fall")
        mass = float(below[high] - below[low])
        if not mass >= least:
            raise ValueError(f"{distribution} has only {mass:.1e} of its mass on {self.name} [{low}, {high})")
        return ((below[low + 1 : high + 1] - below[low]) / mass * WORDS).ceil().to(torch.int64)


class StepTimes(Times):
    """The times that a loss draws for samples of a generator's steps, each in its step's interval.

    Args:
        name, schedule, t_range, distribution: as of `Times`; cut off at the ends of each interval.
        timesteps: of the generator's calls, falling.
        steps: those that a loss is of.
        nested: every interval goes on to the schedule's end.

    Raises ValueError as `Times`, and for a step that the range leaves no time.
    """

    def __init__(
        self,
        name: str,
        schedule: NoiseSchedule,
        t_range: tuple[int, int] | None,
        distribution: TimeDistribution | None,
        timesteps: Sequence[int],
        steps: Sequence[int],
        *,
        nested: bool,
    ) -> None:
        super().__init__(name, schedule, t_range, distribution)
        tables, lows = [torch.empty(0, dtype=torch.int64)] * len(timesteps), [0] * len(timesteps)
        for step in steps:
            below = timesteps[step + 1] if step + 1 < len(timesteps) else 0
            above = len(schedule) if nested else timesteps[step]
            low, high = max(below, self.range[0]), min(above, self.range[1])
            if low >= high:
                raise ValueError(
                    f"{name} [{self.range[0]}, {self.range[1]}) holds no time of [{below}, {above}), in which those of "
                    f"the call at {timesteps[step]} lie"
                )
            part = Times(f"{name} for the call at {timesteps[step]}", schedule, (low, high))
            tables[step], lows[step] = part._table(distribution or Uniform(), schedule, LEAST_OF_STEP), low
        self._intervals = [(low, table) for low, table in zip(lows, tables, strict=True) if len(table)]
        starts = list(accumulate((len(table) for table in tables), initial=0))[:-1]
        # One row of words after another, so that a single search serves all steps.
        rows = torch.cat([table + step * WORDS for step, table in enumerate(tables)])
        self._rows = {torch.device("cpu"): (rows, torch.tensor(lows) - torch.tensor(starts))}

    def draw(self, noise: Noise, steps: torch.Tensor | None = None) -> torch.Tensor:
        """As `Times.draw`; raises ValueError without `steps`."""
        if steps is None:
            raise ValueError(f"{self.name}: times follow the generator's steps, and the samples' are not known")
        words = noise.integers(0, WORDS)
        if words.device not in self._rows:
            rows, first = self._rows[torch.device("cpu")]
            self._rows[words.device] = rows.to(words.device), first.to(words.device)
        rows, first = self._rows[words.device]
        return first[steps] + torch.searchsorted(rows, words + steps * WORDS, right=True)

    def possible(self) -> torch.Tensor:
        """The times that can be drawn for one step or another, as `Times.possible`."""
        drawn = [
            low + (table.diff(prepend=table.new_zeros(1)) > 0).nonzero().flatten() for low, table in self._intervals
        ]
        return torch.cat(drawn).unique()


def _edges(schedule: NoiseSchedule) -> torch.Tensor:
    """t / T for t = 0, ..., T."""
    return torch.arange(len(schedule) + 1, dtype=torch.float64) / len(schedule)
