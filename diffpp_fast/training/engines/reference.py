"""The frozen model in several processes: a copy in each, or spread over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffpp_fast.training import config
from diffpp_fast.training.distributed import World
from diffpp_fast.training.engines.deepspeed import import_deepspeed


def place_reference(network: nn.Module, settings: config.Distributed, world: World) -> nn.Module:
    """Freezes a network and spreads it as `distributed.reference` says; it is called as before, under no_grad.

    "replica" leaves a whole network in every process. "shard" keeps an equal part of each weight per process (ZeRO-3)
    and gathers a module's weights while it computes; "offload" keeps these parts in host memory. All processes have to
    call a spread network together, and its `state_dict()` is empty.

    Args:
        network: in the dtype that it computes in, on its device; it is changed in place.
        settings: the section `distributed`.
        world: the processes.

    Returns the network. Raises ConfigurationError where DeepSpeed is needed and missing.
    """
    network.requires_grad_(False)
    if settings.reference == "replica":
        return network
    deepspeed = import_deepspeed(world)
    zero: dict[str, Any] = {"stage": 3}
    if settings.reference == "offload":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    dtype = next(network.parameters()).dtype
    deepspeed.initialize(
        model=network,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "zero_optimization": zero,
        },
        dist_init_required=False,
    )
    # The hooks that gather and drop weights are on the network itself.
    return network
