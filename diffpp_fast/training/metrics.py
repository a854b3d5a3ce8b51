"""Scalars of the steps between two logs, kept on the device until they are asked for."""

from __future__ import annotations

from collections.abc import Mapping

import torch


class Means:
    """Running weighted sums by name; reading them is the one moment that waits for the device."""

    def __init__(self) -> None:
        # By the names that come together: their weighted sums as one vector, and the sum of the weights.
        self._sums: dict[tuple[str, ...], torch.Tensor] = {}
        self._weights: dict[tuple[str, ...], float] = {}

    def add(self, scalars: Mapping[str, torch.Tensor], *, prefix: str, weight: float = 1.0) -> None:
        """Takes in float32 scalars, all on one device."""
        names = tuple(f"{prefix}/{name}" for name in scalars)
        values = weight * torch.stack(list(scalars.values()))
        self._sums[names] = self._sums[names] + values if names in self._sums else values
        self._weights[names] = self._weights.get(names, 0.0) + weight

    def take(self) -> dict[str, float]:
        """The means since the last taking."""
        sums, weights = self._sums, self._weights
        self._sums, self._weights = {}, {}
        if not sums:
            return {}
        values = iter(torch.cat(list(sums.values())).tolist())
        return {name: next(values) / weights[names] for names in sums for name in names}
