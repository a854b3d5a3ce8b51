"""A trained network in one process."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.training import config
from diffpp_fast.training.distributed import World
from diffpp_fast.training.engines.optimizers import make_optimizer
from diffpp_fast.training.engines.sharded import NORM_FLOOR, ShardedEngine
from diffpp_fast.training.engines.shards import Shards


class PlainEngine(ShardedEngine):
    """A trained network whose float32 weights are updated where they are used.

    Whether the gradient is finite decides on the device what an update does; with AdamW the processor never waits.

    Args: see `ShardedEngine`. Raises ConfigurationError for several processes.
    """

    def __init__(
        self,
        role: str,
        network: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        settings: config.Optimizer,
        updates_in_all: int,
        world: World,
        ema: config.EmaSection | None = None,
    ) -> None:
        self._join(world, parameters)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        optimizer = make_optimizer(parameters.values(), settings)
        shards = Shards(parameters, world)
        super().__init__(role, network, parameters, settings, updates_in_all, world, shards, optimizer, ema)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Adds a micro-batch's gradient to what earlier ones left."""
        loss.backward()

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        """Clips or normalises the gradient, updates weights and average, and drops it; see `Engine.step`."""
        trained = [parameter for parameter in self.parameters.values() if parameter.grad is not None]
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        self._reduce(gradients)
        norm = nn.utils.get_total_norm(gradients).float()
        if self.settings.normalize:
            torch._foreach_div_(gradients, norm.clamp(min=NORM_FLOOR))
        elif self.settings.clip is not None:
            nn.utils.clip_grads_with_norm_(trained, self.settings.clip, norm)
        self._set_learning_rate()
        if self.optimizer_state.is_torch:
            # The fused kernel leaves weights, state and its count of steps alone where this is 1, as with GradScaler.
            skipped = 1.0 - norm.isfinite().float()
            setattr(self.optimizer, "found_inf", skipped)  # noqa: B010 (torch declares it nowhere)
            self.optimizer.step()
            if self.ema is not None:
                self.ema.update(self.updates, skipped)
        elif norm.isfinite().item():
            self.optimizer.step()
            if self.ema is not None:
                self.ema.update(self.updates)
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        return norm

    def _join(self, world: World, parameters: Mapping[str, nn.Parameter]) -> None:
        if world.size > 1:
            raise ConfigurationError(
                f"distributed.engine is plain, which is one process, but there are {world.size}: "
                "use distributed.engine=deepspeed, or auto"
            )

    def _reduce(self, gradients: list[torch.Tensor]) -> None:
        """Nothing to average in one process."""
