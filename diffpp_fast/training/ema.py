"""An exponential moving average of a network's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


class Ema:
    """average <- decay average + (1 - decay) weights, in the weights' own precision and on their device.

    Args:
        network: whose parameters are averaged; the average starts as a copy of them.
        decay: in [0, 1).
        warmup: after n updates the decay is min(decay, (1 + n) / (10 + n)).
        parameters: those that are averaged, by name; None: all of the network's.
    """

    def __init__(
        self,
        network: nn.Module,
        decay: float,
        warmup: bool = False,
        parameters: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        self.parameters = dict(network.named_parameters() if parameters is None else parameters)
        self.decay = decay
        self.warmup = warmup
        self.average = {name: weight.detach().clone() for name, weight in self.parameters.items()}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Takes in the weights after an update; `updates` counts those before it."""
        decay = min(self.decay, (1 + updates) / (10 + updates)) if self.warmup else self.decay
        weights = [weight.detach() for weight in self.parameters.values()]
        torch._foreach_lerp_(list(self.average.values()), weights, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the network computes with the average. Storages change places, so that nothing is rounded."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for name, average in self.average.items():
            average.copy_(state[name])

    def _swap(self) -> None:
        for name, weight in self.parameters.items():
            weight.data, self.average[name] = self.average[name], weight.data
