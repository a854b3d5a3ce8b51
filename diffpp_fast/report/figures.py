"""The figures of a report: differences of last values, and where a step's time went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

from diffpp_fast.report.runs import RunRecord
from diffpp_fast.training.watch import LEVEL, Series

#: A difference is told from noise beyond this many standard deviations.
DEVIATIONS = 2.0
#: The keys of the configuration that `effects_of` is about.
REWARD, GUIDANCE = "rewards.optimised.scale", "method.guidance_scale"


class Difference(NamedTuple):
    """The difference of a run's last value from the first run's.

    Attributes:
        value: the difference.
        noise: the standard deviation of such a difference between two logs, about its trend; None of too few logs.
    """

    value: float
    noise: float | None

    @property
    def is_noise(self) -> bool:
        return self.noise is not None and abs(self.value) <= DEVIATIONS * self.noise


class Budget(NamedTuple):
    """The time and memory that a run's steps took.

    Attributes:
        phases: mean seconds per step, the largest first; they add up to the whole.
        slowest: the slowest process's, where there are several.
        logs: the number of logs that the means are over.
        skipped: the number left out: warm-up, and the first of every session, which has what is done once.
        speed: samples per second, the median of these logs.
        memory: the largest GiB that was logged, by name.
    """

    phases: dict[str, float]
    slowest: dict[str, float]
    logs: int
    skipped: int
    speed: float | None
    memory: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.phases.values())

    def share(self, phase: str) -> float:
        """Return a phase's share of the whole step."""
        return self.phases[phase] / self.total if self.total else 0.0


class Effect(NamedTuple):
    """The effect of one part of the method on a scalar: with the other part, and without it."""

    part: str
    scalar: str
    with_other: float
    without_other: float


def difference(first: RunRecord, other: RunRecord, scalar: str) -> Difference | None:
    """Return how the other run's last value differs from the first run's; None where one has not logged the scalar."""
    if scalar not in first.scalars or scalar not in other.scalars:
        return None
    one, two = first.scalars[scalar], other.scalars[scalar]
    # Runs with the same addresses have the same samples at a step: most of the noise is common to both.
    known = dict(zip(one.steps, one.values, strict=True))
    paired = [value - known[step] for step, value in zip(two.steps, two.values, strict=True) if step in known]
    noise = None
    if len(paired) >= LEVEL:
        series = Series()
        for value in paired:
            series.add(value)
        noise = series.noise
    return Difference(two.last - one.last, noise)


def effects_of(runs: Sequence[RunRecord]) -> list[Effect]:
    """Return what reward and guidance do to the grid's rewards; nothing unless there are all four runs, with each
    part and without."""
    by_parts = {(run.config.get(REWARD, 0.0) != 0.0, run.config.get(GUIDANCE, 1.0) != 1.0): run.scalars for run in runs}
    if len(by_parts) < 4 or len(runs) != 4:
        return []
    effects = []
    for name in ("grid/reward", "grid/held_out"):
        if all(name in run.scalars for run in runs):
            last = {parts: scalars[name].last for parts, scalars in by_parts.items()}
            full, reward, guidance = last[True, True], last[True, False], last[False, True]
            neither = last[False, False]
            effects.append(Effect("the reward's gradient", name, full - guidance, reward - neither))
            effects.append(Effect("guidance", name, full - reward, guidance - neither))
    return effects


def budget_of(run: RunRecord) -> Budget | None:
    """Return a run's budget; None where no times were logged. If every log would be left out, the last one counts."""
    timed = [record for record in run.records if any(name.startswith("time/") for name in record)]
    if not timed:
        return None
    begins = {session.get("first_step", 0) for session in run.sessions} | {0}
    kept = []
    for before, record in pairwise(timed):
        first, last = before["step"], record["step"]
        if first >= 0 and not any(first <= begin < last for begin in begins):
            kept.append((record, last - first))
    skipped = len(timed) - len(kept)
    if not kept:
        kept, skipped = [(timed[-1], 1)], len(timed) - 1
    speeds = [value for record, _ in kept if (value := record.get("samples_per_second")) is not None]
    memory: dict[str, float] = {}
    for name, value in (item for record in timed for item in record.items()):
        if name.startswith("memory/") and value is not None:
            memory[name] = max(memory.get(name, 0.0), value)
    means, slowest = (_means(kept, of_slowest=slowest) for slowest in (False, True))
    return Budget(means, slowest, len(kept), skipped, median(speeds) if speeds else None, memory)


def _means(kept: Sequence[tuple[Mapping[str, Any], int]], *, of_slowest: bool) -> dict[str, float]:
    """By phase, weighted by the steps that a log is of; a phase that a log does not name took no time in it."""
    whole = sum(length for _, length in kept)
    sums: dict[str, float] = {}
    for record, length in kept:
        for name, value in record.items():
            if name.startswith("time/") and name.endswith("_max") == of_slowest and value is not None:
                phase = name.removeprefix("time/").removesuffix("_max")
                sums[phase] = sums.get(phase, 0.0) + value * length / whole
    return dict(sorted(sums.items(), key=lambda item: -item[1]))
