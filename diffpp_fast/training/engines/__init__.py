"""Engines: trained networks with their optimizers and averages, in one process or spread over many."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from diffpp_fast.training.config import Config, EmaSection
from diffpp_fast.training.distributed import World
from diffpp_fast.training.engines.base import Engine
from diffpp_fast.training.engines.deepspeed import DeepSpeedEngine, place_reference
from diffpp_fast.training.engines.optimizers import updates_of
from diffpp_fast.training.engines.plain import PlainEngine, ReplicatedEngine

__all__ = ["DeepSpeedEngine", "Engine", "PlainEngine", "ReplicatedEngine", "make_engine", "place_reference"]


def make_engine(
    role: str,
    network: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    config: Config,
    world: World,
    ema: EmaSection | None = None,
) -> Engine:
    """The engine that a configuration asks for (collective).

    Args:
        role: "generator" or "fake".
        network: the module that is called, in float32, on its device.
        parameters: those to train, by their name in `network.state_dict()`; the others are left as they are.
        config: of the run.
        world: the processes.
        ema: keep a moving average of the weights.

    Raises ConfigurationError for what can't be done as asked.
    """
    distributed = config.distributed
    settings, zero = getattr(config.optimizers, role), getattr(distributed, role)
    updates = updates_of(role, config)
    spread = distributed.engine == "deepspeed" or world.size > 1 or distributed.needs_deepspeed
    if distributed.engine == "plain" or not spread:
        return PlainEngine(role, network, parameters, settings, updates, world, ema)
    if zero.stage == 0:
        return ReplicatedEngine(role, network, parameters, settings, updates, world, ema)
    return DeepSpeedEngine(
        role,
        network,
        parameters,
        settings,
        updates,
        world,
        ema,
        zero=zero,
        bfloat16=config.precision == "bfloat16",
        nvme_path=distributed.nvme_path,
    )
