"""The numbers of a report: last values and their differences, and where a step's time went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

from diffpp_fast.report.runs import RunRecord
from diffpp_fast.training.watch import LEVEL, Series

#: What stands in the table of last values, if it was logged.
SHOWN = {
    "grid/reward": "optimised reward, sample grid",
    "grid/held_out": "held-out reward, sample grid",
    "generator/reward": "optimised reward, training samples",
    "generator/reward_std": "its standard deviation",
    "generator/score_gap": "score gap",
    "fake/loss": "loss of the teaching assistant",
    "generator/loss": "loss of the generator",
    "generator/score_gradient_norm": "score's gradient on the sample",
    "generator/reward_gradient_norm": "reward's gradient on the sample",
    "generator/gradient_cosine": "their cosine",
    "generator/gradient_norm": "gradient of the generator",
    "fake/gradient_norm": "gradient of the teaching assistant",
    "generator/x0_mean": "latent mean",
    "generator/x0_std": "latent spread",
    "reference/x0_mean": "latent mean of the reference",
    "reference/x0_std": "latent spread of the reference",
    "samples_per_second": "samples per second",
}
#: A difference is told from noise beyond this many standard deviations.
DEVIATIONS = 2.0
#: The parts of `effects`, by whether a run has reward and guidance.
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
    """Where the time of a run's steps went.

    Attributes:
        phases: seconds per step, the largest first; they add up to the whole.
        slowest: the same of the slowest process, where there are several.
        logs: how many the means are of.
        skipped: how many logs were left out: warm-up, and the first of every session, which has what is done once.
        speed: samples per second, the median of these logs.
        memory: GiB by name, the most that was logged.
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
    """How a scalar differs between two runs by one part of the method: with the other part, and without it."""

    part: str
    scalar: str
    with_other: float
    without_other: float


def difference(first: RunRecord, other: RunRecord, scalar: str) -> Difference | None:
    """None where one of them has not logged the scalar."""
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
    """What reward and guidance do to the rewards on the sample grid, where all four runs with and without are there."""
    by_parts: dict[tuple[bool, bool], RunRecord] = {}
    for run in runs:
        by_parts[run.config.get(REWARD, 0.0) != 0.0, run.config.get(GUIDANCE, 1.0) != 1.0] = run
    if len(by_parts) < 4 or len(runs) != 4:
        return []
    effects = []
    for scalar in ("grid/reward", "grid/held_out"):
        if all(scalar in run.scalars for run in runs):
            last = {parts: run.scalars[scalar].last for parts, run in by_parts.items()}
            full, reward, guidance, neither = (
                last[parts] for parts in ((True, True), (True, False), (False, True), (False, False))
            )
            effects.append(Effect("the reward's gradient", scalar, full - guidance, reward - neither))
            effects.append(Effect("guidance", scalar, full - reward, guidance - neither))
    return effects


def budget_of(run: RunRecord) -> Budget | None:
    """None where no times were logged. Where every log would be left out, the last one counts."""
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
    return Budget(
        _means(kept, of_slowest=False),
        _means(kept, of_slowest=True),
        len(kept),
        skipped,
        _median([record.get("samples_per_second") for record, _ in kept]),
        _memory(timed),
    )


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


def _memory(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    most: dict[str, float] = {}
    for record in records:
        for name, value in record.items():
            if name.startswith("memory/") and value is not None:
                most[name] = max(most.get(name, 0.0), value)
    return most


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
