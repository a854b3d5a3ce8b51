"""A watch over a run's reward: samples for which it is not finite, and a reward that has no gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.training.distributed import World
from diffpp_fast.training.rewards import LatentReward

#: Samples that are named in a message.
SHOWN = 4


class RewardWatch:
    """Counts samples whose reward is not finite and names them, with their prompts, in warnings.

    A scorer is told of at the first log with such a sample, and again each time that their number is tenfold.

    Args:
        reward: of the run, or None.
        optimised: whether the generator gets its gradient.
        world: the processes.
        prompts_of: sample numbers, int64 [N] on the CPU -> their prompts.
        warn: is called with a warning's name and its message.
        before: a checkpoint's record, with what `record` gave; empty for a run that begins.
    """

    def __init__(
        self,
        reward: LatentReward | None,
        optimised: bool,
        world: World,
        prompts_of: Callable[[torch.Tensor], Sequence[str]],
        warn: Callable[[str, str], None],
        before: Mapping[str, Any],
    ) -> None:
        self.reward, self.world, self.prompts_of, self.warn = reward, world, prompts_of, warn
        # A checkpoint without the entry is of a version that ended such a run at its first update.
        self._has_gradient = not optimised or bool(before and before.get("reward_gradient", True))
        #: By scorer: such samples so far, and how many there were when it was last told of.
        self._counts: dict[str, tuple[int, int]] = dict(before.get("undefined", {}))
        self._firsts: list[int] = []

    def record(self) -> dict[str, Any]:
        """Return the counts that a resumed run goes on from."""
        seen = self._has_gradient or (self.reward is not None and self.reward.has_gradient)
        return {"reward_gradient": seen, "undefined": self._counts}

    def note(self, first_sample: int) -> None:
        """Takes in an update of the generator by the number of its first sample."""
        self._firsts.append(first_sample)

    def judge(self, scalar: str, given: torch.Tensor) -> None:
        """Warns of what a scorer gave the samples of the updates that were noted since the last `judge_log`.

        Args:
            scalar: what is logged of it: `generator/reward`, or with a slash and a name behind it a mixture's part.
            given: [updates, samples].
        """
        assert self.reward is not None
        updates, places = (~given.isfinite()).nonzero(as_tuple=True)
        part = scalar.removeprefix("generator/reward").strip("/")
        name = f"{self.reward.name}, {part}" if part else self.reward.name
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
        if self.reward is None:
            return
        share, name = scalars.get("generator/reward_undefined", 0.0), self.reward.name
        if share > 0.0 and name not in self._counts and self._is_to_tell(f"the gradient of {name}", 1):
            self.warn(
                "reward-undefined",
                f"the gradient of {name} is not finite for {share:.2%} of the last samples, though the reward is: they "
                "give the generator none.",
            )
        self.judge_gradient(step, first=first, enough=enough)

    def judge_gradient(self, step: int, *, first: bool, enough: bool) -> None:
        """The part of `judge_log` that needs no log."""
        if self._has_gradient or self.reward is None or not step:
            return
        self._has_gradient = self.world.any(self.reward.has_gradient)
        if self._has_gradient:
            return
        said = f"{self.reward.name} has no gradient by the images for any sample so far"
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
