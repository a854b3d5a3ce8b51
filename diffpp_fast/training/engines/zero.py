"""Where DeepSpeed's ZeRO optimizers keep the float32 weights of a process: the one place that knows its insides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from diffpp_fast.training.distributed import World
from diffpp_fast.training.engines.shards import Fragment, SpreadShards


class Zero12Shards(SpreadShards):
    """Stages 1 and 2: all weights behind each other, flattened and cut into one piece per process.

    Args:
        optimizer: DeepSpeed's ZeRO optimizer, or for stage 1 with bfloat16 its BF16 optimizer.
        parameters: trained, by name.
        world: the processes.
    """

    def __init__(self, optimizer: Any, parameters: Mapping[str, nn.Parameter], world: World) -> None:
        flat = getattr(optimizer, "single_partition_of_fp32_groups", None)
        tensors = optimizer.fp32_groups_flat_partition if flat is None else flat
        super().__init__(tensors, [_fragment(name, weight) for name, weight in parameters.items()], world)
        self._optimizer = optimizer

    def publish(self) -> None:
        self._optimizer.update_lp_params()

    def forget_gradients(self) -> None:
        # With bfloat16 and an offloaded optimizer DeepSpeed keeps what it did not use, and adds to it.
        if hasattr(self._optimizer, "averaged_gradients"):
            self._optimizer.averaged_gradients.clear()


def _fragment(name: str, weight: Any) -> Fragment:
    mapping = weight._hp_mapping  # None where this process updates nothing of it
    if mapping is None:
        return Fragment(name, weight.shape, 0, 0, 0, 0)
    low, high = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
    return Fragment(name, weight.shape, low.start, low.numel, mapping.param_group_index, high.start)


class Zero3Shards(SpreadShards):
    """Stage 3: every weight is cut into as many equal pieces as there are processes; pieces lie behind each other.

    Args:
        optimizer: DeepSpeed's ZeRO-3 optimizer.
        parameters: trained, by name.
        world: the processes.
    """

    def __init__(self, optimizer: Any, parameters: Mapping[str, nn.Parameter], world: World) -> None:
        fragments = []
        for name, weight in parameters.items():
            place: Any = weight
            tensor, offset, piece = optimizer.grad_position[optimizer.get_param_id(weight)]
            start = min(world.rank * piece, place.ds_numel)
            count = min(piece, place.ds_numel - start)
            fragments.append(Fragment(name, torch.Size(place.ds_shape), start, count, tensor, offset))
        super().__init__(optimizer.fp32_partitioned_groups_flat, fragments, world)
        self._optimizer = optimizer

    @property
    def groups(self) -> list[range]:
        # What is on a disk comes into memory one tensor at a time.
        if self._optimizer.swap_optimizer:
            return [range(number, number + 1) for number in range(len(self.tensors))]
        return super().groups

    @contextmanager
    def held(self, group: range) -> Iterator[list[torch.Tensor]]:
        swapped = [number for number in group if self._optimizer._swappable_optimizer_subgroup(number)]
        for number in swapped:
            self._optimizer._optimizer_states_and_gradient_swap_in(number)
        try:
            yield [self.tensors[number] for number in group]
        finally:
            for number in swapped:
                self._optimizer._optimizer_states_and_gradient_swap_out(number)

    def forget_gradients(self) -> None:
        """DeepSpeed does it."""

    def publish(self) -> None:
        self._optimizer._partition_all_parameters()
        for group in self.groups:
            with self.held(group):
                for number in group:
                    self._optimizer._reassign_or_swap_out_partitioned_parameters(number)
        # Small weights stay whole in every process.
        if self._optimizer.persistent_parameters:
            self._optimizer.persistent_parameters[0].all_gather(self._optimizer.persistent_parameters)
