"""Updates that were skipped and rewards that don't serve: counted on the device, told with the logs, a run's end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.training.batches import Batches
from diffpp_fast.training.distributed import World

#: Samples or prompts that are named in a message.
SHOWN = 4


class SkippedUpdates:
    """Counts one role's updates that were skipped in a row, and how that began. Only reading computes and waits.

    Args:
        role: "generator" or "fake".
        batches: of the run.
        reward: the name of the reward that the role's updates have, if they have one.
        row: how many were skipped in a row before this session of the run.
        first_sample: the number of the first sample of the update with which that row began.
    """

    def __init__(
        self, role: str, batches: Batches, reward: str | None = None, row: int = 0, first_sample: int = 0
    ) -> None:
        self.role, self.batches, self.reward, self.world = role, batches, reward, batches.world
        self._row, self._first = row, first_sample
        self._rewards: torch.Tensor | None = None  # of this process's samples in that update
        self._noted: list[tuple[torch.Tensor, int, torch.Tensor | None]] = []
        self._updates = self._skipped = 0  # since the last share

    def note(self, norm: torch.Tensor, first_sample: int, rewards: torch.Tensor | None = None) -> None:
        """Takes in an update.

        Args:
            norm: of its gradient, a scalar on the device; not finite where the update was skipped.
            first_sample: the number of its first sample.
            rewards: of this process's samples, [B] on the device, if the update had any.
        """
        self._noted.append((norm, first_sample, rewards))

    def row(self) -> int:
        """Return how many of the last updates in a row were skipped; the same in all processes, as the norms are."""
        self._read()
        return self._row

    def record(self) -> tuple[int, int]:
        """Return what a resumed run goes on from: `row` and `first_sample`."""
        return self.row(), self._first

    def take_share(self) -> float | None:
        """Return the share of skipped ones among the updates since the last call; None where there were none."""
        self._read()
        share = self._skipped / self._updates if self._updates else None
        self._updates = self._skipped = 0
        return share

    def explain(self, step: int) -> str:
        """Say which updates were skipped, and on which prompts that began (collective)."""
        row, first = self.record()
        prompts = self.batches.prompts(self.batches.whole(first))
        bad = [prompts[place] for place in self._undefined_places()]
        counted = "the last update was" if row == 1 else f"the last {row} updates were"
        said = f"{self.role}, after step {step}: {counted} skipped, for the gradient is not finite. "
        if bad and self.reward is not None:
            said += f"{self.reward} is not finite for {len(bad)} of {len(prompts)} samples: {_some(bad)}"
        else:
            said += f"It began with samples {first} to {first + len(prompts) - 1}, prompts: {_some(prompts)}"
        return f"{said}. No weight was changed by them."

    def _read(self) -> None:
        if not self._noted:
            return
        noted, self._noted = self._noted, []
        finite = torch.stack([norm for norm, _, _ in noted]).isfinite().tolist()
        for applied, (_, first_sample, rewards) in zip(finite, noted, strict=True):
            self._row = 0 if applied else self._row + 1
            if self._row == 1:
                self._first, self._rewards = first_sample, rewards
        self._updates += len(noted)
        self._skipped += finite.count(False)

    def _undefined_places(self) -> list[int]:
        """Places in the row's first whole batch whose reward was not finite (collective)."""
        if self._rewards is None:
            return []
        share = len(self._rewards)
        flags = torch.zeros(self.world.size * share, dtype=torch.int64, device=self.world.device)
        flags[self.world.rank * share : (self.world.rank + 1) * share] = ~self._rewards.isfinite()
        return [place for place, flag in enumerate(self.world.sum(flags).tolist()) if flag]


class RewardWatch:
    """Counts samples whose reward is not finite and names them, with their prompts, in warnings.

    A scorer is told of at the first log with such a sample, and again each time that their number is tenfold.

    Args:
        name: of the run's reward, or None.
        optimised: whether the generator gets its gradient.
        world: the processes.
        prompts_of: sample numbers, int64 [N] on the CPU -> their prompts.
        warn: is called with a warning's name and its message.
        before: a checkpoint's record, with what `record` gave; empty for a run that begins.
    """

    def __init__(
        self,
        name: str | None,
        optimised: bool,
        world: World,
        prompts_of: Callable[[torch.Tensor], Sequence[str]],
        warn: Callable[[str, str], None],
        before: Mapping[str, Any],
    ) -> None:
        self.name, self.world, self.prompts_of, self.warn = name, world, prompts_of, warn
        # A checkpoint without the entry is of a version that ended such a run at its first update.
        self._has_gradient = not optimised or bool(before and before.get("reward_gradient", True))
        #: Whether the rewards of any of this process's samples were differentiable.
        self._seen = self._has_gradient
        #: By scorer: such samples so far, and how many there were when it was last told of.
        self._counts: dict[str, tuple[int, int]] = dict(before.get("undefined", {}))
        self._firsts: list[int] = []

    def record(self) -> dict[str, Any]:
        """Return the counts that a resumed run goes on from."""
        return {"reward_gradient": self._seen, "undefined": self._counts}

    def note(self, first_sample: int, differentiable: bool) -> None:
        """Takes in an update of the generator.

        Args:
            first_sample: the number of its first sample.
            differentiable: whether the rewards of any of this process's samples were.
        """
        self._firsts.append(first_sample)
        self._seen = self._seen or differentiable

    def judge(self, scalar: str, given: torch.Tensor) -> None:
        """Warns of what a scorer gave the samples of the updates that were noted since the last `judge_log`.

        Args:
            scalar: what is logged of it: `generator/reward`, or with a slash and a name behind it a mixture's part.
            given: [updates, samples].
        """
        updates, places = (~given.isfinite()).nonzero(as_tuple=True)
        part = scalar.removeprefix("generator/reward").strip("/")
        name = f"{self.name}, {part}" if part else str(self.name)
        if not len(updates) or not self._is_to_tell(name, len(updates)):
            return
        numbers = torch.tensor(self._firsts)[updates[:SHOWN]] + places[:SHOWN]
        named = [
            f"sample {number} {prompt!r}" for number, prompt in zip(numbers, self.prompts_of(numbers), strict=True)
        ]
        more = f" and {len(updates) - SHOWN} more" if len(updates) > SHOWN else ""
        self.warn(
            "reward-undefined",
            f"{name} is not finite for {len(updates)} of the last {given.numel()} samples, {self._counts[name][0]} so "
            f"far: {', '.join(named)}{more}. They are in no mean, and a reward that is not finite gives the generator "
            "no gradient.",
        )

    def judge_log(self, scalars: Mapping[str, float], step: int, *, first: bool, enough: bool) -> None:
        """Looks at a log, after `judge` (collective).

        Args:
            scalars: of the log.
            step: updates of the generator so far.
            first: whether it is the run's first log.
            enough: whether there were enough samples to say that a reward without gradient has none.

        Raises ConfigurationError for such a reward.
        """
        self._firsts.clear()
        if self.name is None:
            return
        share = scalars.get("generator/reward_undefined", 0.0)
        if share > 0.0 and self.name not in self._counts and self._is_to_tell(f"the gradient of {self.name}", 1):
            self.warn(
                "reward-undefined",
                f"the gradient of {self.name} is not finite for {share:.2%} of the last samples, though the reward is: "
                "they give the generator none.",
            )
        self.judge_gradient(step, first=first, enough=enough)

    def judge_gradient(self, step: int, *, first: bool, enough: bool) -> None:
        """The part of `judge_log` that needs no log."""
        if self._has_gradient or self.name is None or not step:
            return
        self._has_gradient = self._seen = self.world.any(self._seen)
        if self._has_gradient:
            return
        said = f"{self.name} has no gradient by the images for any sample so far"
        if enough:
            raise ConfigurationError(f"{said}: it must be differentiable, or its scale 0")
        if first:
            self.warn("reward-without-gradient", f"{said}. More than training.skip_limit such updates end the run.")

    def _is_to_tell(self, name: str, more: int) -> bool:
        before, told = self._counts.get(name, (0, 0))
        count = before + more
        tell = count >= 10 * told
        self._counts[name] = (count, count if tell else told)
        return tell


def _some(prompts: Sequence[str]) -> str:
    """Enough of them to find the trouble."""
    shown = ", ".join(repr(prompt) for prompt in prompts[:SHOWN])
    return f"{shown} and {len(prompts) - SHOWN} more" if len(prompts) > SHOWN else shown
