"""A run's samples in order: every update's batch, as addresses, in the micro-batches of one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.methods import Batch
from diffpp_fast.networks import Conditioning
from diffpp_fast.training.config import Config
from diffpp_fast.training.distributed import World
from diffpp_fast.training.images import ImageBatches
from diffpp_fast.training.prompts import PromptOrder, PromptSource


@dataclass(frozen=True)
class MicroBatch:
    """The samples that are computed at a time.

    Attributes:
        batch: for a method's loss, a mean over its samples.
        weight: the part of this process's samples that it holds.
        last: whether it is the update's last one.
    """

    batch: Batch
    weight: float
    last: bool

    def later(self, count: int) -> MicroBatch:
        """The same samples of the generator, with sample numbers of a later batch for times and noise."""
        return replace(self, batch=replace(self.batch, samples=self.batch.samples + count))


class Batches:
    """The batch that begins with a given sample number.

    Raises ConfigurationError where the processes can't share it evenly.
    """

    def __init__(self, config: Config, world: World, prompts: PromptSource) -> None:
        self.size = config.training.global_batch
        if self.size % world.size:
            raise ConfigurationError(
                f"training.global_batch is {self.size}, which {world.size} processes can't share evenly: "
                f"make it a multiple of {world.size}"
            )
        self.micro_batch = config.training.micro_batch or self.size // world.size
        self.world = world
        self.seed = config.seed
        self.shape = config.models.latent_shape
        self.source = prompts
        self.order = PromptOrder(config.seed, len(prompts))

    @property
    def is_whole(self) -> bool:
        """Tell whether one process computes an update in one piece."""
        return self.world.size == 1 and self.size <= self.micro_batch

    def prompts(self, numbers: torch.Tensor) -> list[str]:
        """Sample numbers, int64 [B] on the CPU -> their prompts."""
        return self.source[self.order(numbers).tolist()]

    def whole(self, first: int) -> torch.Tensor:
        """The sample numbers of all processes, int64 [global_batch] on the CPU."""
        return torch.arange(first, first + self.size)

    def micro_batches(
        self,
        first: int,
        encode: Callable[[Sequence[str]], Conditioning],
        null: Conditioning | None,
        images: ImageBatches | None = None,
    ) -> Iterator[MicroBatch]:
        """This process's part of a batch.

        Args:
            first: the batch's first sample.
            encode: B prompts -> their conditioning, on the device.
            null: the empty prompt's conditioning, of one sample; None where the method is not guided.
            images: that the samples come with, where they do.
        """
        numbers = self.world.share(self.whole(first))
        prompts = self.prompts(numbers)
        for start in range(0, len(numbers), self.micro_batch):
            part = slice(start, start + self.micro_batch)
            mine = prompts[part]
            batch = Batch(
                samples=numbers[part].to(self.world.device),
                conditioning=encode(mine),
                seed=self.seed,
                shape=self.shape,
                null_conditioning=None if null is None else null.expand(len(mine)),
                images=None if images is None else images(numbers[part], encode),
                first=first,
            )
            yield MicroBatch(batch, len(mine) / len(numbers), start + self.micro_batch >= len(numbers))
