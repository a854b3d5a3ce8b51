"""A one-step generator of flow matching in its family's pipeline: the scheduler, and the arguments of a call."""

from __future__ import annotations

from typing import Any

from diffpp_fast.networks.families import Family, family_named
from diffpp_fast.networks.inputs import with_defaults
from diffpp_fast.networks.loading import diffusers_class, load_schedule
from diffpp_fast.training.build.agreement import facts_of
from diffpp_fast.training.build.networks import configuration_of, stored_weights
from diffpp_fast.training.config import Config


def family_scheduler(config: Config) -> Any:
    """Return the scheduler with which a pipeline that is called by `family_call` makes a generator's step.

    Its sigmas are those that it is asked for, with no shift. None for networks of no family.
    """
    if _family(config) is None:
        return None
    from diffusers import FlowMatchEulerDiscreteScheduler

    times = len(load_schedule(config.models.scheduler.path))
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=times, shift=1.0, use_dynamic_shifting=False)


def family_call(config: Config) -> str | None:
    """Return the arguments of the pipeline's call that is a generator's, as code; None for networks of no family.

    z is standard normal, as the pipeline takes its `latents`; where none are asked for, it draws them itself.
    """
    family = _family(config)
    if family is None:
        return None
    call, models = config.models.generator, config.models
    sigma = float(load_schedule(models.scheduler.path).sigmas[call.timestep])
    scale = sigma if call.input_scale == "sigma" else call.input_scale
    path = configuration_of(models, stored_weights(models, "generator"))
    facts = facts_of("models.generator", path)
    told = family.told(with_defaults(facts, diffusers_class(facts, path, "ModelMixin")))
    if told is not None and call.guidance_embedding is not None:
        told = call.guidance_embedding
    arguments = ["num_inference_steps=1", f"sigmas=[{sigma:g}]", family.unguided(told)]
    arguments += [] if scale == 1.0 else [f"latents={scale:g} * z"]
    return ", ".join(filter(None, arguments))


def _family(config: Config) -> Family | None:
    return family_named(facts_of("models.reference", config.models.reference.path)["_class_name"])
