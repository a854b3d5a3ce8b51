"""ZeRO stage 0: a trained network of which every process keeps everything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn

from diffpp_fast.training.distributed import World
from diffpp_fast.training.engines.plain import PlainEngine
from diffpp_fast.training.engines.shards import start_together

#: Gradients that are reduced at a time, in bytes; a larger one goes alone.
BUCKET_BYTES = 2**28


class ReplicatedEngine(PlainEngine):
    """The plain engine in each of several processes, on averaged gradients.

    All processes then do the same with the same numbers, so that nothing else has to be exchanged. At the start the
    weights of rank 0 are everyone's.

    Args: see `ShardedEngine`.
    """

    def _join(self, world: World, parameters: Mapping[str, nn.Parameter]) -> None:
        start_together(parameters, world)

    @torch.no_grad()
    def _reduce(self, gradients: list[torch.Tensor]) -> None:
        if self.world.size == 1:
            return
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            dist.all_reduce(flat)
            flat /= self.world.size
            parts = flat.split([gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view(gradient.shape))


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
