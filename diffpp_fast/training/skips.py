"""Updates that were left out because their gradient was not finite: counted on the device, read with the logs."""

from __future__ import annotations

import torch

from diffpp_fast.training.distributed import World


class SkippedUpdates:
    """How many of one role's updates were skipped in a row, and how that began. Only reading waits for the device.

    Args:
        world: the processes.
        row: how many were skipped in a row before this session of the run.
        first_sample: the number of the first sample of the update with which that row began.
    """

    def __init__(self, world: World, row: int = 0, first_sample: int = 0) -> None:
        self.world = world
        self._row = torch.full((), row, dtype=torch.int64, device=world.device)
        self._first = torch.full((), first_sample, dtype=torch.int64, device=world.device)
        self._undefined: torch.Tensor | None = None  # which of this process's rewards were not finite in that update

    def note(self, norm: torch.Tensor, first_sample: int, rewards: torch.Tensor | None = None) -> None:
        """Takes in an update.

        Args:
            norm: of its gradient, a scalar on the device; not finite where the update was skipped.
            first_sample: the number of its first sample.
            rewards: of this process's samples, [B] on the device, if the update had any.
        """
        self._row = (self._row + 1) * ~norm.isfinite()
        begins = self._row == 1
        self._first = torch.where(begins, first_sample, self._first)
        if rewards is not None:
            undefined = ~rewards.isfinite()
            before = torch.zeros_like(undefined) if self._undefined is None else self._undefined
            self._undefined = torch.where(begins, undefined, before)

    def row(self) -> int:
        """How many of the last updates in a row were skipped; the same in all processes, as the norms are."""
        return int(self._row)

    def first_sample(self) -> int:
        """The number of the first sample of the update with which the row began."""
        return int(self._first)

    def undefined_rewards(self) -> list[int]:
        """Places in that update's whole batch whose reward was not finite (collective)."""
        if self._undefined is None:
            return []
        share = len(self._undefined)
        flags = torch.zeros(self.world.size * share, dtype=torch.int64, device=self.world.device)
        flags[self.world.rank * share : (self.world.rank + 1) * share] = self._undefined
        return [place for place, flag in enumerate(self.world.sum(flags).tolist()) if flag]
