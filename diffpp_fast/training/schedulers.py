"""Schedulers of diffusers whose steps are a generator's own, and how a pipeline is called with them."""

from __future__ import annotations

from typing import Any, Literal

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.networks.families import Family, family_named
from diffpp_fast.networks.inputs import with_defaults
from diffpp_fast.networks.loading import diffusers_class, is_file, load_scheduler, read_config
from diffpp_fast.schedule import NoiseSchedule
from diffpp_fast.training.config import Config, Generator

#: Of LCMScheduler, which mixes its input into x0 by a share that falls with timestep times this: below float32's
#: resolution from timestep 1 on.
TIMESTEP_SCALING = 1e6


def generator_scheduler(config: Config) -> Any:
    """Return the scheduler of a run's generator, of one step or several.

    Raises ConfigurationError where diffusers has none.
    """
    scheduler, call = load_scheduler(config.models.scheduler.path), config.models.generator
    if len(call.times) > 1:
        return few_step_scheduler(scheduler, call)
    if _is_flow(NoiseSchedule.from_diffusers(scheduler)) and flow_family(config) is not None:
        return flow_scheduler(scheduler)
    return one_step_scheduler(scheduler, call.times[0], call.input_scale)


def flow_family(config: Config) -> Family | None:
    """Return the family of a run's networks where it is one of `networks.families`, whose pipelines take `sigmas`."""
    return family_named(read_config(config.models.reference.path).get("_class_name"))


def flow_scheduler(scheduler: Any, *, stochastic: bool = False) -> Any:
    """Return the scheduler of a flow whose steps from `sigmas=[timestep / T, ...]` are the generator's, without shift.

    Args:
        scheduler: from diffusers, with the schedule of training.
        stochastic: it draws noise between the steps.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    times = len(NoiseSchedule.from_diffusers(scheduler))
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=times, shift=1.0, stochastic_sampling=stochastic, use_dynamic_shifting=False
    )


def one_step_scheduler(scheduler: Any, timestep: int, input_scale: float | Literal["sigma"]) -> Any:
    """A scheduler whose single step is `networks.OneStepGenerator` with the same numbers, but for rounding.

    Its schedule ends at `timestep`: `num_inference_steps=1` then asks the network there, and nowhere else. Euler's
    latents are sigma / alpha z, which it divides by sqrt(1 + sigma^2 / alpha^2): the network gets sigma z. DDIM's are
    z, and so is what the network gets. For any other scale the latents have to be given as `latents=input_scale * z`.

    Args:
        scheduler: from diffusers, with the betas of training.
        timestep, input_scale: the generator's.

    Raises ConfigurationError for a schedule without betas, as those of flow matching.
    """
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    betas = getattr(scheduler, "betas", None)
    if betas is None or scheduler.config.get("prediction_type") == "flow_prediction":
        raise ConfigurationError(
            f"models.scheduler is a {type(scheduler).__name__} without betas, or of flow matching: "
            "no scheduler of the families' pipelines makes a one-step call of its schedule"
        )
    settings = {
        "num_train_timesteps": timestep + 1,
        "trained_betas": betas[: timestep + 1].tolist(),
        "prediction_type": scheduler.config.prediction_type,
        "timestep_spacing": "trailing",
        "steps_offset": 1,  # not used with this spacing; pipelines warn of any other
    }
    # Where alpha is 0 there is no sigma / alpha; sigma is 1 then.
    if input_scale == "sigma" and scheduler.alphas_cumprod[timestep] > 0:
        return EulerDiscreteScheduler(**settings)
    return DDIMScheduler(**settings, clip_sample=False)


def few_step_scheduler(scheduler: Any, call: Generator) -> Any:
    """A scheduler whose steps are `networks.FewStepGenerator`'s, but for rounding, and for the numbers of its noise.

    A pipeline is called as `pipeline_call` says: no scheduler keeps times of its own. With fresh noise it is
    LCMScheduler, its boundary scaling out of the way, or flow matching's with `stochastic_sampling`; they draw noise
    from the `generator` that the pipeline is given, of the same law as the addressed noise. Without, it is Euler's,
    which is DDIM in other units, or that of flow matching.

    Args:
        scheduler: from diffusers, with the schedule of training.
        call: the generator's.

    Raises ConfigurationError for what these schedulers don't serve.
    """
    from diffusers import EulerDiscreteScheduler, LCMScheduler

    schedule, fresh, times = NoiseSchedule.from_diffusers(scheduler), call.renoise == "fresh", call.times
    if _is_flow(schedule):
        return flow_scheduler(scheduler, stochastic=fresh)
    if fresh and times[-1] == 0:
        raise ConfigurationError("models.generator.timesteps end at 0, where LCMScheduler returns its input for x0")
    if not fresh and (schedule.prediction_type == "sample" or float(schedule.alphas[times[0]]) == 0.0):
        raise ConfigurationError(
            "models.generator.renoise=ddim: no scheduler makes these steps of a network that predicts x0, or from a "
            "time at which alpha is 0"
        )
    # A schedule that ends at the first time has all of the times, and diffusers warns of none.
    settings = {
        "num_train_timesteps": times[0] + 1,
        "trained_betas": scheduler.betas[: times[0] + 1].tolist(),
        "prediction_type": schedule.prediction_type,
        "steps_offset": 1,
    }
    if not fresh:
        return EulerDiscreteScheduler(**settings, timestep_spacing="trailing")
    return LCMScheduler(**settings, original_inference_steps=times[0] + 1, timestep_scaling=TIMESTEP_SCALING)


def pipeline_call(config: Config) -> str:
    """Return the arguments, besides the prompt, by which a pipeline with `generator_scheduler` draws a picture."""
    call, schedule = config.models.generator, NoiseSchedule.from_diffusers(load_scheduler(config.models.scheduler.path))
    family = flow_family(config) if _is_flow(schedule) else None
    guided = "guidance_scale=1.0" if family is None else _unguided(config, family)
    one = "num_inference_steps=1, " if len(call.times) == 1 else ""
    if one and family is None:
        return f"{one}{guided}{_latents(latents_scale(call.input_scale))}"
    sigma = float(schedule.sigmas[call.times[0]])
    scale = sigma if call.input_scale == "sigma" else float(call.input_scale)
    if _is_flow(schedule):
        steps = f"sigmas={[round(float(schedule.sigmas[time]), 9) for time in call.times]}"
    else:
        steps = f"timesteps={list(call.times)}"
        scale = scale / sigma if call.renoise == "ddim" else scale
    return f"{one}{steps}, {guided}{_latents(scale)}"


def _unguided(config: Config, family: Family) -> str:
    """A pipeline's arguments without guidance by two predictions; networks that are told a scale are told theirs."""
    section, reference = config.models.generator, config.models.reference.path
    path = reference if section.path is None or is_file(section.path) else section.path
    facts = read_config(path)
    told = family.told(with_defaults(facts, diffusers_class(facts, path, "ModelMixin")))
    if told is None:
        return family.unguided
    scale = f"guidance_scale={section.guidance_embedding or told:g}"
    return scale if family.unguided.startswith("guidance_scale") else f"{scale}, {family.unguided}"


def latents_scale(input_scale: float | Literal["sigma"]) -> float:
    """By what the latents that a pipeline is given for one step have to be multiplied; 1 where it may draw them."""
    return 1.0 if input_scale == "sigma" else float(input_scale)


def _is_flow(schedule: NoiseSchedule) -> bool:
    return schedule.prediction_type == "flow_prediction"


def _latents(scale: float) -> str:
    return "" if scale == 1.0 else f", latents={scale:g} * z"
