"""Named warnings about a run that goes wrong, from the scalars that it logs.

docs/monitoring.md says of every warning what it means and what to do. The rules compare medians, which single bad logs
do not move, with levels that the run itself or its reference has set. Beyond its own threshold a rule asks that the
difference be larger than the scalar's noise explains, so that small batches and frequent logs raise no false alarm.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import islice, pairwise
from pathlib import Path
from statistics import median, stdev

from diffpp_fast.training.callbacks import Callback, read_records

#: How a scalar stands now: the median of this many logs. Up to two outliers among them do not move it.
RECENT = 5
#: A level that a run has had: the median of this many logs in a row. Nothing is judged before there is one.
LEVEL = 10
#: The noise of a scalar is estimated from the differences of this many successive logs.
NOISE = 50
#: A difference counts beyond this many times the noise of one log. Medians of 5 logs have a standard error of half of
#: it, and the extreme levels of a long run lie 1.5 away: noise alone gets there less than once in 30 thousand logs.
NOISES = 5.0
#: An episode ends after this many logs in a row without trouble; then the same warning may be raised again.
CLEAR = 5

logger = logging.getLogger(__name__)


class Watch(Callback):
    """Raises each rule's warning once per episode: into the program's log and to `tell`.

    Args:
        tell: called with step, name and message; hands them to the run's callbacks (`on_warning`).
        history: metrics.jsonl, read when a run resumes, so that levels and episodes go on as if it had not stopped.
        rules: what to look for.
    """

    def __init__(
        self, tell: Callable[[int, str, str], None], history: Path | None = None, rules: Sequence[Rule] | None = None
    ) -> None:
        self.tell = tell
        self.history = history
        self.rules = standard_rules() if rules is None else rules
        #: Per rule, the logs that the episode it is in may still go without trouble; 0 outside of one.
        self._patience = [0] * len(self.rules)

    def on_start(self, step: int, steps: int) -> None:
        for record in read_records(self.history) if self.history is not None else []:
            if record["step"] <= step:
                self._judge({name: value for name, value in record.items() if isinstance(value, int | float)})

    def on_log(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, message in self._judge(scalars):
            logger.warning("step %d: %s: %s", step, name, message)
            self.tell(step, name, message)

    def _judge(self, scalars: Mapping[str, float]) -> list[tuple[str, str]]:
        """The warnings that this log begins."""
        begun = []
        for place, rule in enumerate(self.rules):
            if not all(math.isfinite(scalars.get(name, math.nan)) for name in rule.reads):
                continue
            message = rule.judge(scalars)
            if message is None:
                self._patience[place] = max(0, self._patience[place] - 1)
                continue
            if not self._patience[place]:
                begun.append((rule.name, message))
            self._patience[place] = CLEAR
        return begun


class Rule(ABC):
    """One thing that can go wrong.

    Attributes:
        name: of the warning.
        reads: the scalars that it judges; a log without one of them, or in which one is not finite, is passed over.
    """

    name: str
    reads: tuple[str, ...]

    @abstractmethod
    def judge(self, scalars: Mapping[str, float]) -> str | None:
        """Takes a log in. What is wrong and what to do about it, or None while all is well."""


class Series:
    """One scalar's past, as rules look at it."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=NOISE + 1)
        #: The first, the lowest and the highest level; None before there are `LEVEL` values.
        self.start: float | None = None
        self.lowest = math.inf
        self.highest = -math.inf

    def add(self, value: float) -> None:
        self._last.append(value)
        if len(self._last) >= LEVEL:
            level = self._median_of(LEVEL)
            self.start = level if self.start is None else self.start
            self.lowest, self.highest = min(self.lowest, level), max(self.highest, level)

    @property
    def recent(self) -> float:
        return self._median_of(RECENT)

    @property
    def noise(self) -> float:
        """The standard deviation of single values about their trend, estimated so that outliers and jumps hardly count:
        from the median absolute deviation of successive differences, which for normal noise is 0.954 of it."""
        differences = [after - before for before, after in pairwise(self._last)]
        centre = median(differences)
        return median(abs(difference - centre) for difference in differences) / 0.954

    def _median_of(self, count: int) -> float:
        return median(islice(reversed(self._last), count))


class LevelChange(Rule):
    """A positive scalar that has gone far from the lowest (or highest) level that it had.

    Args:
        name: of the warning.
        scalar: which is judged, by ratios.
        factor: above 1: it has risen to that many times its lowest level; below 1: fallen to that part of its highest.
        advice: what that means and what to do.
    """

    def __init__(self, name: str, scalar: str, *, factor: float, advice: str) -> None:
        self.name, self.reads, self.factor, self.advice = name, (scalar,), factor, advice
        self.series = Series()

    def judge(self, scalars: Mapping[str, float]) -> str | None:
        (scalar,) = self.reads
        self.series.add(_log(scalars[scalar]))
        if self.series.start is None:
            return None
        rising = self.factor > 1
        level = self.series.lowest if rising else self.series.highest
        change = self.series.recent - level
        if (change if rising else -change) <= max(abs(math.log(self.factor)), NOISES * self.series.noise):
            return None
        return (
            f"{scalar} is {math.exp(self.series.recent):.3g}, {math.exp(change):.2g} times the "
            f"{'lowest' if rising else 'highest'} level that it had ({math.exp(level):.3g}). {self.advice}"
        )


class LatentSpread(Rule):
    """Latents whose spread has left that of the reference (or of the run's own start, where that is not known).

    A generator may begin with another spread, as one call of a diffusion model blurs. What it has reached by itself is
    therefore expected of it, not more.
    """

    reads = ("generator/x0_std",)

    def __init__(self, name: str, *, factor: float, advice: str) -> None:
        self.name, self.factor, self.advice = name, factor, advice
        self.series = Series()

    def judge(self, scalars: Mapping[str, float]) -> str | None:
        self.series.add(_log(scalars["generator/x0_std"]))
        if self.series.start is None:
            return None
        known = "reference/x0_std" in scalars
        expected = _log(scalars["reference/x0_std"]) if known else self.series.start
        limit = max(abs(math.log(self.factor)), NOISES * self.series.noise)
        if self.factor < 1:
            wrong = self.series.recent < min(expected, self.series.highest) - limit
        else:
            wrong = self.series.recent > max(expected, self.series.lowest) + limit
        if not wrong:
            return None
        return (
            f"the latents' spread is {math.exp(self.series.recent):.3g}, "
            f"{'the reference has' if known else 'at the start it was'} {math.exp(expected):.3g}. {self.advice}"
        )


class LatentMean(Rule):
    """Latents whose mean has left that of the reference (or of the run's own start), in units of their spread.

    Args:
        distance: further off than the run has been when it was nearest.
    """

    name = "latents-drifting"
    reads = ("generator/x0_mean", "generator/x0_std")

    def __init__(self, *, distance: float) -> None:
        self.distance = distance
        self.means, self.spreads = Series(), Series()
        self.nearest = math.inf

    def judge(self, scalars: Mapping[str, float]) -> str | None:
        self.means.add(scalars["generator/x0_mean"])
        self.spreads.add(scalars["generator/x0_std"])
        if self.means.start is None or self.spreads.start is None:
            return None
        known = "reference/x0_mean" in scalars and "reference/x0_std" in scalars
        expected = scalars["reference/x0_mean"] if known else self.means.start
        unit = scalars["reference/x0_std"] if known else self.spreads.start
        off = abs(self.means.recent - expected)
        self.nearest = min(self.nearest, off)
        if off <= self.nearest + max(self.distance * unit, NOISES * self.means.noise):
            return None
        return (
            f"the latents' mean is {self.means.recent:.3g}, {'the reference has' if known else 'at the start it was'} "
            f"{expected:.3g} with a spread of {unit:.3g}. {_HACKING_ADVICE}"
        )


class RewardHacking(Rule):
    """On the sample grids the optimised reward has risen since the held-out one was at its best, and that has fallen.

    Both are medians of three grids. Their noise is that of the grids' differences.
    """

    name = "reward-hacking"
    reads = ("grid/reward", "grid/held_out")
    #: Grids in a median; twice as many are needed for two medians that share none.
    GRIDS = 3

    def __init__(self) -> None:
        self.rewards, self.held_out = _Grids(self.GRIDS), _Grids(self.GRIDS)
        #: The best median of the held-out reward, and what the optimised one was then.
        self.best, self.reward_then = -math.inf, math.nan

    def judge(self, scalars: Mapping[str, float]) -> str | None:
        self.rewards.add(scalars["grid/reward"])
        self.held_out.add(scalars["grid/held_out"])
        if len(self.held_out.all) < self.GRIDS:
            return None
        reward, held_out = self.rewards.recent, self.held_out.recent
        if held_out > self.best:
            self.best, self.reward_then = held_out, reward
        if len(self.held_out.all) < 2 * self.GRIDS:
            return None
        fallen, risen = self.best - held_out, reward - self.reward_then
        if fallen <= NOISES * self.held_out.noise or risen <= self.rewards.noise:
            return None
        return (
            f"since its best the held-out reward has fallen from {self.best:.4g} to {held_out:.4g} while the optimised "
            f"one rose from {self.reward_then:.4g} to {reward:.4g}. {_HACKING_ADVICE}"
        )


class UpdatesSkipped(Rule):
    """Too large a share of the updates was skipped because a gradient was not finite.

    Args:
        share: of the updates of the last `logs` logs; logs that are still to come count as good.
    """

    name = "updates-skipped"

    def __init__(self, role: str, *, share: float, logs: int) -> None:
        self.role, self.share = role, share
        self.reads = (f"{role}/updates_skipped",)
        self.last: deque[float] = deque([0.0] * logs, maxlen=logs)

    def judge(self, scalars: Mapping[str, float]) -> str | None:
        self.last.append(scalars[self.reads[0]])
        share = sum(self.last) / len(self.last)
        if share <= self.share:
            return None
        return (
            f"{share:.0%} of the {self.role}'s updates in the last {len(self.last)} logs were skipped: their gradients "
            f"were not finite. Lower optimizers.{self.role}.lr, or look for samples at which a network or the reward "
            "overflows."
        )


def standard_rules() -> list[Rule]:
    """The rules of docs/monitoring.md, which gives reasons for the numbers."""
    rules: list[Rule] = [
        LevelChange(
            "fake-diverging",
            "fake/loss",
            factor=3.0,
            advice="The teaching assistant no longer follows the generator. Raise method.fake_rounds, or lower "
            "optimizers.generator.lr or optimizers.fake.lr.",
        )
    ]
    for role in ("generator", "fake"):
        rules += [
            LevelChange(
                f"{role}-gradient-exploding",
                f"{role}/gradient_norm",
                factor=10.0,
                advice=f"Set or lower optimizers.{role}.clip, or lower optimizers.{role}.lr.",
            ),
            LevelChange(
                f"{role}-gradient-vanishing",
                f"{role}/gradient_norm",
                factor=0.01,
                advice="Its network hardly learns any more: look at the sample grid, at generator/score_gap and at "
                "generator/reward_gradient_norm.",
            ),
            UpdatesSkipped(role, share=0.05, logs=20),
        ]
    return [
        *rules,
        LatentSpread("latents-collapsing", factor=1 / 1.5, advice=_COLLAPSE_ADVICE),
        LatentSpread("latents-spreading", factor=1.5, advice=_HACKING_ADVICE),
        LatentMean(distance=0.25),
        RewardHacking(),
    ]


_COLLAPSE_ADVICE = (
    "The samples lose contrast and variety. Go back to a checkpoint before, and lower optimizers.generator.lr or raise "
    "method.fake_rounds."
)
_HACKING_ADVICE = (
    "The reward may be leading away from the reference. Go back to a checkpoint before, and lower "
    "rewards.optimised.scale or set rewards.optimised.clip."
)


class _Grids:
    """One reward on all grids so far; there are few of them."""

    def __init__(self, recent: int) -> None:
        self.all: list[float] = []
        self._recent = recent

    def add(self, value: float) -> None:
        self.all.append(value)

    @property
    def recent(self) -> float:
        return median(self.all[-self._recent :])

    @property
    def noise(self) -> float:
        """The noise as in `Series`, by the standard deviation: a few values' median deviation says too little."""
        return stdev(after - before for before, after in pairwise(self.all[-NOISE:])) / math.sqrt(2)


def _log(value: float) -> float:
    """The logarithm, of 0 as of the smallest positive number."""
    return math.log(max(value, 5e-324))
