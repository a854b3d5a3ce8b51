"""How a pipeline of diffusers makes a generator's single step: the scheduler of a flow, and a call's arguments."""

from __future__ import annotations

from typing import Any

from diffpp_fast.networks.families import Family, family_named
from diffpp_fast.networks.inputs import with_defaults
from diffpp_fast.networks.loading import diffusers_class, load_schedule, read_config
from diffpp_fast.training.build.networks import configuration_of, stored_weights
from diffpp_fast.training.config import Config
from diffpp_fast.training.exported import latents_scale


def flow_family(config: Config) -> Family | None:
    """Return the family of a run's networks where it is one of `networks.families`, whose pipelines take `sigmas`."""
    return family_named(read_config(config.models.reference.path).get("_class_name"))


def flow_scheduler(config: Config) -> Any:
    """Return the scheduler of a flow whose step from `sigmas=[timestep / T]` is the generator's, without any shift."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    times = len(load_schedule(config.models.scheduler.path))
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=times, shift=1.0)


def pipeline_call(config: Config) -> str:
    """Return the arguments, besides the prompt, with which a pipeline makes the generator's single step."""
    call, family = config.models.generator, flow_family(config)
    if family is None:
        scale = latents_scale(call.input_scale)
        return f"num_inference_steps=1, guidance_scale=1.0{_latents(scale)}"
    sigma = call.timestep / len(load_schedule(config.models.scheduler.path))
    scale = sigma if call.input_scale == "sigma" else call.input_scale
    told = _told(config, family)
    guidance = family.unguided if told is None else f"{family.unguided}, guidance_scale={told:g}"
    return f"num_inference_steps=1, sigmas=[{sigma:g}], {guidance}{_latents(scale)}"


def _told(config: Config, family: Family) -> float | None:
    """The guidance scale that the generator's network is told; None: it is told none."""
    path = configuration_of(config.models, stored_weights(config.models, "generator"))
    facts = read_config(path)
    told = family.told(with_defaults(facts, diffusers_class(facts, path, "ModelMixin")))
    given = config.models.generator.guidance_embedding
    return told if told is None or given is None else given


def _latents(scale: float) -> str:
    return "" if scale == 1.0 else f", latents={scale:g} * z"
