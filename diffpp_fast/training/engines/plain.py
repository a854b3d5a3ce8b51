"""A trained network in one process, or whole in each of several: ZeRO stage 0."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice

import torch
import torch.distributed as dist
from torch import nn

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.training.engines.base import NORM_FLOOR, Engine
from diffpp_fast.training.engines.optimizers import make_optimizer
from diffpp_fast.training.engines.shards import Shards, start_together

#: Gradients that are reduced at a time, in bytes; a larger one goes alone.
BUCKET_BYTES = 2**28


class PlainEngine(Engine):
    """A trained network whose float32 weights are updated where they are used.

    Whether the gradient is finite decides on the device what an update does; with AdamW the processor never waits.

    Args: see `Engine`. Raises ConfigurationError for several processes.
    """

    def _spread(self) -> tuple[Shards, torch.optim.Optimizer]:
        self._join()
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        return Shards(self.parameters, self.world), make_optimizer(self.parameters.values(), self.settings)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Adds a micro-batch's gradient to what earlier ones left."""
        loss.backward()

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        """Clips or normalises the gradient, updates weights and average, and drops it; see `Engine.step`."""
        trained = [parameter for parameter in self.parameters.values() if parameter.grad is not None]
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        gradients = self._reduce(trained, gradients)
        norm = nn.utils.get_total_norm(gradients).float()
        self._set_learning_rate()
        if self.optimizer_state.is_torch:
            self._update_fused(norm)
        elif math.isfinite(size := norm.item()):
            divisor = self._divisor(norm)
            # bitsandbytes' kernels take no factor. A gradient that is short enough is left as it is, not divided by 1.
            if divisor is not None and (self.settings.normalize or size > (self.settings.clip or math.inf)):
                torch._foreach_div_(gradients, divisor)
            self.optimizer.step()
            if self.average is not None:
                self.average.update(self.updates)
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        return norm

    def _update_fused(self, norm: torch.Tensor) -> None:
        """One pass over memory for clipping and AdamW, one for the average."""
        skipped = 1.0 - norm.isfinite().float()
        # As with GradScaler: the fused kernel divides gradients by `grad_scale` where it reads them, and leaves
        # weights, state and its count of steps alone where `found_inf` is 1. torch declares neither anywhere.
        setattr(self.optimizer, "grad_scale", self._divisor(norm))  # noqa: B010
        setattr(self.optimizer, "found_inf", skipped)  # noqa: B010
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.updates, skipped)

    def _divisor(self, norm: torch.Tensor) -> torch.Tensor | None:
        """Return the number that normalises the gradient, or clips it; None where neither is asked for."""
        if self.settings.normalize:
            return norm.clamp(min=NORM_FLOOR)
        if self.settings.clip is not None:
            return (norm / self.settings.clip).clamp(min=1.0)
        return None

    def _join(self) -> None:
        if self.world.size > 1:
            raise ConfigurationError(
                f"distributed.engine is plain, which is one process, but there are {self.world.size}: "
                "use distributed.engine=deepspeed, or auto"
            )

    def _reduce(self, trained: list[nn.Parameter], gradients: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the gradients averaged over the processes; in one there is nothing to do."""
        return gradients


class ReplicatedEngine(PlainEngine):
    """The plain engine in each of several processes, on averaged gradients.

    All processes then do the same with the same numbers, so that nothing else has to be exchanged. At the start the
    weights of rank 0 are everyone's.

    Args: see `Engine`.
    """

    def _join(self) -> None:
        start_together(self.parameters, self.world)

    @torch.no_grad()
    def _reduce(self, trained: list[nn.Parameter], gradients: list[torch.Tensor]) -> list[torch.Tensor]:
        if self.world.size == 1:
            return gradients
        left = iter(trained)
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            dist.all_reduce(flat)
            flat /= self.world.size
            parts = flat.split([gradient.numel() for gradient in bucket])
            for weight, gradient, part in zip(islice(left, len(bucket)), bucket, parts, strict=True):
                # The bucket is the gradient from here on, but where the optimizer expects another order in memory.
                if gradient.is_contiguous():
                    weight.grad = part.view(gradient.shape)
                else:
                    gradient.copy_(part.view(gradient.shape))
        return [weight.grad for weight in trained if weight.grad is not None]


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    bucket: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.nbytes > BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
