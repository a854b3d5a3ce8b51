"""The noise schedule of a run, and what stands on it: the one-step generator and the method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from diffpp_fast.methods import METHODS, Method
from diffpp_fast.methods.times import DISTRIBUTIONS
from diffpp_fast.networks import OneStepGenerator, load_schedule
from diffpp_fast.schedule import NoiseSchedule
from diffpp_fast.training.build.checks import naming
from diffpp_fast.training.config import Config


def load_run_schedule(config: Config) -> NoiseSchedule:
    """Load a run's noise schedule. Raises ConfigurationError for one that can't be read or is none."""
    path = config.models.scheduler.path
    with naming("models.scheduler", path):
        return load_schedule(path)


def load_checked_schedule(config: Config) -> NoiseSchedule:
    """Load a run's noise schedule, and build generator and method on it without networks, so that no weight is read.

    Raises ConfigurationError as `load_run_schedule`, and for settings that the schedule does not serve: times at which
    alpha or sigma is 0, say.
    """
    schedule = load_run_schedule(config)
    make_generator(config, nn.Identity(), schedule)
    make_method(config, nn.Identity(), nn.Identity(), nn.Identity(), schedule, nn.Identity())
    return schedule


def make_generator(config: Config, network: nn.Module, schedule: NoiseSchedule) -> OneStepGenerator:
    """Make a run's one-step generator of its network. Raises ConfigurationError as `load_checked_schedule`."""
    settings = config.models.generator
    with naming("models.generator"):
        return OneStepGenerator(network, schedule, timestep=settings.timestep, input_scale=settings.input_scale)


def make_method(
    config: Config,
    generator: Callable[..., Any],
    fake: Callable[..., Any],
    reference: Callable[..., Any],
    schedule: NoiseSchedule,
    reward: Callable[..., Any] | None,
) -> Method:
    """Make a run's method of its networks and its reward. Raises ConfigurationError as `load_checked_schedule`."""
    settings = config.method
    arguments: dict[str, Any] = settings.model_dump(exclude={"name"}, exclude_none=True)
    for key in ("time_distribution", "fake_time_distribution"):
        if key in arguments:
            arguments[key] = DISTRIBUTIONS[arguments[key].pop("name")](**arguments[key])
    optimised = config.rewards.optimised
    if METHODS[settings.name].takes_reward:
        assert optimised is not None  # the schema sees to it
        arguments.update(reward=reward, reward_scale=optimised.scale, reward_clip=optimised.clip)
    with naming("method"):
        return METHODS[settings.name](generator, fake, reference, schedule, **arguments)
