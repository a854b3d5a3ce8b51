"""DeepSpeed's insides, as far as this package uses them; nothing else of them is used anywhere.

DeepSpeed's public functions serve where they can: `initialize`, the engine's call, `backward`, `step`,
`set_gradient_accumulation_boundary`, `get_global_grad_norm` and `was_step_applied`. Those for weights
(`deepspeed.utils.safe_get_full_fp32_param` and the like) add floats, which loses the sign of -0, put every weight onto
every process, and know no optimizer state of 8 bits; their local ones are of stage 3 alone, and swap per weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from diffpp_fast.training.distributed import World
from diffpp_fast.training.engines.shards import Fragment, SpreadShards

#: The private names by whose they are. What sets them only when it works is told of in tests/test_engines.py.
PRIVATE = {
    "deepspeed.ops": ("__compatible_ops__",),
    "the engine": ("_backward_prologue",),
    "the optimizer of stages 1 and 2": ("update_lp_params",),
    "a weight of stages 1 and 2": ("_hp_mapping",),
    "a weight's mapping": ("lp_fragment_address", "get_hp_fragment_address", "param_group_index"),
    "the optimizer of stage 2": ("averaged_gradients",),
    "the optimizer of stage 3": (
        "clear_backward_seen_flag",
        "fp32_partitioned_groups_flat",
        "get_param_id",
        "grad_position",
        "persistent_parameters",
        "swap_optimizer",
        "_swappable_optimizer_subgroup",
        "_optimizer_states_and_gradient_swap_in",
        "_optimizer_states_and_gradient_swap_out",
        "_partition_all_parameters",
        "_reassign_or_swap_out_partitioned_parameters",
    ),
    "a weight of stage 3": ("ds_shape", "ds_numel", "all_gather"),
}


def compile_nothing(deepspeed: Any) -> None:
    """Keep DeepSpeed from compiling its own collectives for the CPU, which would take minutes."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Zero12Shards(SpreadShards):
    """Stages 1 and 2: all weights behind each other, flattened and cut into one piece per process.

    Args:
        engine: DeepSpeed's, of a module that gives back what it is called with.
        optimizer: that was handed to DeepSpeed; its groups hold the pieces.
        parameters: trained, by name.
        world: the processes.
    """

    def __init__(
        self, engine: Any, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], world: World
    ) -> None:
        tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
        super().__init__(tensors, [_fragment(name, weight) for name, weight in parameters.items()], world)
        self._engine, self._optimizer = engine, engine.optimizer

    def watch(self, loss: torch.Tensor) -> torch.Tensor:
        """Return a loss that tells the engine when its backward pass begins."""
        watched: torch.Tensor = self._engine(loss)
        return watched

    def publish(self) -> None:
        self._optimizer.update_lp_params()

    def forget_gradients(self) -> None:
        """Drops the gradients of an update that was skipped."""
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
        engine: DeepSpeed's, of the network itself.
        parameters: trained, by name.
        world: the processes.
    """

    def __init__(self, engine: Any, parameters: Mapping[str, nn.Parameter], world: World) -> None:
        optimizer, fragments = engine.optimizer, []
        for name, weight in parameters.items():
            place: Any = weight
            tensor, offset, piece = optimizer.grad_position[optimizer.get_param_id(weight)]
            start = min(world.rank * piece, place.ds_numel)
            count = min(piece, place.ds_numel - start)
            fragments.append(Fragment(name, torch.Size(place.ds_shape), start, count, tensor, offset))
        super().__init__(optimizer.fp32_partitioned_groups_flat, fragments, world)
        self._engine, self._optimizer = engine, optimizer

    @property
    def groups(self) -> list[range]:
        # Tensors on a disk come into memory one at a time.
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

    def watch(self, loss: torch.Tensor) -> torch.Tensor:
        """Return a loss that tells the engine when its backward pass begins."""
        # The engine's own call would be a call of the network.
        self._optimizer.clear_backward_seen_flag()
        loss.register_hook(lambda _: self._engine._backward_prologue())
        return loss

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
