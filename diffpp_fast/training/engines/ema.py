"""An exponential moving average of weights, or of the parts of them that a process updates."""

from __future__ import annotations

import torch

from diffpp_fast.training.engines.shards import Shards


class Ema:
    """average <- decay average + (1 - decay) weights, in float32, on the device where the weights are updated.

    Args:
        shards: the weights; the average starts as a copy of them.
        decay: in [0, 1).
        warmup: after n updates the decay is min(decay, (1 + n) / (10 + n)).
    """

    @torch.no_grad()
    def __init__(self, shards: Shards, decay: float, warmup: bool = False) -> None:
        self.shards = shards
        self.decay = decay
        self.warmup = warmup
        #: One for each tensor of the shards.
        self.averages: list[torch.Tensor] = []
        for group in shards.groups:
            with shards.held(group) as tensors:
                self.averages += [tensor.detach().clone() for tensor in tensors]

    @torch.no_grad()
    def update(self, updates: int, skipped: torch.Tensor | None = None) -> None:
        """Takes in the weights after an update.

        Args:
            updates: how many there were before it.
            skipped: a float32 scalar on the device, 1 where that update changed nothing; the average stays then, too.
        """
        amount = 1.0 - (min(self.decay, (1 + updates) / (10 + updates)) if self.warmup else self.decay)
        for group in self.shards.groups:
            averages = [self.averages[number] for number in group]
            with self.shards.held(group) as tensors:
                if skipped is None:
                    torch._foreach_lerp_(averages, tensors, amount)
                else:
                    # Weights that an update left are finite: average + 0 (weight - average) is the average to the bit.
                    torch._foreach_lerp_(averages, tensors, [amount * (1.0 - skipped)] * len(tensors))

    @torch.no_grad()
    def exchange(self) -> None:
        """Weights and averages change places, to the bit. Values move, not storages: views and graphs stay valid."""
        for group in self.shards.groups:
            with self.shards.held(group) as tensors:
                for number, tensor in zip(group, tensors, strict=True):
                    kept = tensor.detach().clone()
                    tensor.copy_(self.averages[number])
                    self.averages[number].copy_(kept)
