"""The reward's scale over the updates of the generator."""

from __future__ import annotations

import math
from itertools import pairwise

import torch

from diffpp_fast.methods import Method
from diffpp_fast.training.config import OptimisedReward, PiecewiseSection, RampSection


def factor_at(schedule: RampSection | PiecewiseSection | None, update: int) -> float:
    """Return what the scale is multiplied by in an update of the generator, the first of which is number 1."""
    if schedule is None:
        return 1.0
    if isinstance(schedule, PiecewiseSection):
        points = schedule.points
        for (before, low), (after, high) in pairwise(points):
            if before <= update < after:
                return low + (high - low) * (update - before) / (after - before)
        return points[0][1] if update < points[0][0] else points[-1][1]
    share = min(update / schedule.steps, 1.0)
    if schedule.name == "cosine":
        share = 0.5 - 0.5 * math.cos(math.pi * share)
    return schedule.start + (schedule.end - schedule.start) * share


class RewardScale:
    """Brings a method's reward term to the scale that its schedule has.

    Args:
        section: of the reward; None: there is none.
        method: whose reward term it is.
        device: where the factor is kept, in one place, so that a captured graph reads it.
    """

    def __init__(self, section: OptimisedReward | None, method: Method, device: torch.device) -> None:
        self._section = section
        self._factor: torch.Tensor | None = None
        self._scale: float | None = None
        if section is not None and section.schedule is not None:
            self._factor = torch.ones((), device=device)
            term = getattr(method, "reward_term")  # noqa: B009 (of the methods that take a reward)
            term.factor = self._factor

    def set(self, update: int) -> None:
        """Take the scale of this update of the generator."""
        if self._section is None or self._factor is None:
            return
        factor = factor_at(self._section.schedule, update)
        self._scale = self._section.scale * factor
        self._factor.fill_(factor)

    def scalars(self) -> dict[str, float]:
        """Return the scale of the last update, to be logged; nothing where it is constant."""
        return {} if self._scale is None else {"generator/reward_scale": self._scale}
