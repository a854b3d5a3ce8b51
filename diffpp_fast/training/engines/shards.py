"""The elements of weights that a process updates, the tensors that hold them, their average, and whole weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.optim.sgd import sgd

from diffpp_fast.training.distributed import World


@dataclass(frozen=True)
class Fragment:
    """The elements of one weight that this process updates: consecutive ones of the flattened weight, or none.

    Attributes:
        name: of the weight, in the network's state.
        shape: of the whole weight.
        start, count: elements [start, start + count) of it.
        tensor: the number of the tensor that they lie in.
        offset: of the first of them in that tensor; 0 if the tensor is the whole weight, in its shape.
    """

    name: str
    shape: torch.Size
    start: int
    count: int
    tensor: int
    offset: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The elements as a view of that tensor, or of another of its shape."""
        if tensor.dim() == 1 and self.count != tensor.numel():
            return tensor.narrow(0, self.offset, self.count)
        return tensor


class Shards:
    """The float32 weights that a process updates.

    This class is for a process that updates whole weights, where they are used.

    Args:
        parameters: trained, by name.
        world: the processes, all of which have the same.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], world: World) -> None:
        self.world = world
        #: The tensors that the optimizer knows.
        self.tensors: list[torch.Tensor] = list(parameters.values())
        #: One for each weight, in the same order in all processes.
        self.fragments = [
            Fragment(name, weight.shape, 0, weight.numel(), number, 0)
            for number, (name, weight) in enumerate(parameters.items())
        ]

    @property
    def groups(self) -> list[range]:
        """The tensors' numbers, in groups that are in memory together."""
        return [range(len(self.tensors))]

    @contextmanager
    def held(self, group: range) -> Iterator[list[torch.Tensor]]:
        """Inside, a group and its optimizer's state are in memory; what is changed there stays changed."""
        yield [self.tensors[number] for number in group]

    def publish(self) -> None:
        """Brings the tensors' values to where the network computes with them, in all processes (collective)."""

    def gather(self, fragment: Fragment, tensor: torch.Tensor, receiver: int) -> torch.Tensor | None:
        """A whole weight, or what belongs to it, on one process; None on the others (collective).

        Args:
            fragment: of the weight.
            tensor: one that the fragment lies in: of weights, averages or the optimizer's state.
            receiver: the rank that gets it.
        """
        return tensor if self.world.rank == receiver else None


class SpreadShards(Shards):
    """The float32 weights of a network of which every process updates a part.

    Args:
        tensors: this process's, flat.
        fragments: one for each weight, in the same order in all processes; those that are elsewhere have no elements.
        world: the processes.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], fragments: Sequence[Fragment], world: World) -> None:
        self.world = world
        self.tensors = list(tensors)
        self.fragments = list(fragments)

    def gather(self, fragment: Fragment, tensor: torch.Tensor, receiver: int) -> torch.Tensor | None:
        # Bit patterns are added to zeros, as integers: a sum of floats would lose the sign of -0.
        whole = torch.zeros(fragment.shape.numel(), dtype=torch.int32, device=self.world.device)
        if fragment.count:
            part = whole.narrow(0, fragment.start, fragment.count)
            part.copy_(fragment.of(tensor).detach().contiguous().view(torch.int32))
        if self.world.size > 1:
            dist.reduce(whole, receiver)
        return whole.view(torch.float32).view(fragment.shape) if self.world.rank == receiver else None


class MovingAverage:
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
                elif skipped.is_cuda:
                    approach(averages, tensors, amount, skipped)
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


def approach(averages: list[torch.Tensor], tensors: list[torch.Tensor], amount: float, skipped: torch.Tensor) -> None:
    """averages += amount (tensors - averages), to the bit as torch's lerp has it; nothing where `skipped` is 1.

    It is a step of gradient ascent on -tensors with weight decay 1: few launches for all tensors, and `skipped` is read
    on the device. On GPUs torch's lerp with a weight that is a tensor takes a launch for each tensor.
    """
    sgd(
        averages,
        tensors,
        [],
        fused=True,
        found_inf=skipped,
        lr=amount,
        weight_decay=1.0,
        maximize=True,
        momentum=0.0,
        dampening=0.0,
        nesterov=False,
    )


@torch.no_grad()
def start_together(parameters: Mapping[str, torch.nn.Parameter], world: World) -> None:
    """Gives every process the weights of rank 0: what was initialised at random differs (collective)."""
    if world.size > 1:
        for parameter in parameters.values():
            dist.broadcast(parameter.data, 0)


def receivers(fragments: Sequence[Fragment], size: int) -> list[int]:
    """Return which rank writes which weight: consecutive ones, in shares of about the same number of bytes."""
    total = sum(fragment.shape.numel() for fragment in fragments)
    ranks, before = [], 0
    for fragment in fragments:
        ranks.append(min(before * size // max(total, 1), size - 1))
        before += fragment.shape.numel()
    return ranks
