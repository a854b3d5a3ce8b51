"""The scheduler with which a pipeline of diffusers makes a one-step generator's call."""

from __future__ import annotations

from typing import Any, Literal

from diffpp_fast.errors import ConfigurationError


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


def latents_scale(input_scale: float | Literal["sigma"]) -> float:
    """By what the latents that a pipeline is given have to be multiplied; 1 where it may draw them itself."""
    return 1.0 if input_scale == "sigma" else float(input_scale)
