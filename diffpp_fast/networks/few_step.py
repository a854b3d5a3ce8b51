"""A diffusion network as a generator of a few steps: every call predicts x0, which is noised again for the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import nn

from diffpp_fast import ops
from diffpp_fast.networks.one_step import coefficients_of_call, factor_of_z
from diffpp_fast.noise import Noise
from diffpp_fast.plain import per_sample
from diffpp_fast.precision import widen
from diffpp_fast.prediction import implied
from diffpp_fast.schedule import NoiseSchedule

#: Streams of what a generator draws itself, above the users' own: the step whose x0 a loss is of, and the noise after
#: the first step; that after the next has the next number, and so on.
STEP, RENOISE = 2**31, 2**31 + 1
#: Of a generator's steps; each has a stream, and beyond it is no few-step generator.
MOST_STEPS = 8

Renoise = Literal["fresh", "ddim"]
GradientStep = Literal["last", "random"]


class FewStepGenerator(nn.Module):
    """x0 by several calls of `network` at falling times, with a gradient through one of them.

    Each call predicts x0 as `OneStepGenerator` does, and but for the last one the next input is made of it:
    alpha x0 + sigma eps at the next time. No gradient goes through calls before the one that gives the result, which
    run without a graph: memory is that of one call.

    A method calls `generator(z, conditioning, noise=batch.noise, for_loss=True)` where `draws` is true, as it is here.

    Args:
        network: (x, t, conditioning) -> prediction, e.g. `networks.Denoiser(unet)`.
        schedule: gives alpha and sigma at each time and the prediction type.
        timesteps: of the calls, 1 to 8 of them, falling.
        input_scale: of the first call's input, as of `OneStepGenerator`.
        renoise: "fresh": eps is new noise, as in DMD2 and consistency models, with an address: a stream for each step.
            "ddim": the noise that the prediction implies, DDIM's step, or Euler's of a flow, as in TDM: one z gives one
            trajectory.
        gradient_step: whose x0 a loss is of. "random": of a step that is drawn for each sample, as DMD2 trains: every
            call learns. "last": of the last one.

    Raises ValueError for times that are none, too many, not falling or outside the schedule, for those at which the
    network's output would be no x0, and for an input without z.
    """

    #: Tells methods and samplers to hand over `noise`.
    draws = True

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        *,
        timesteps: Sequence[int],
        input_scale: float | Literal["sigma"] = "sigma",
        renoise: Renoise = "fresh",
        gradient_step: GradientStep = "random",
    ) -> None:
        super().__init__()
        refuse_no_steps(timesteps)
        for timestep in timesteps:
            coefficients_of_call(schedule, timestep)
        if renoise not in get_args(Renoise):
            raise ValueError(f"renoise must be one of {', '.join(get_args(Renoise))}, got {renoise!r}")
        if gradient_step not in get_args(GradientStep):
            raise ValueError(f"gradient_step must be one of {', '.join(get_args(GradientStep))}, got {gradient_step!r}")
        self.network = network
        self.schedule = schedule
        self.timesteps = tuple(timesteps)
        self.input_scale = factor_of_z(input_scale, schedule, timesteps[0])
        self.renoise = renoise
        self.gradient_step = gradient_step

    def forward(
        self,
        z: torch.Tensor,
        conditioning: Any = None,
        *,
        noise: Callable[[int], Noise] | None = None,
        for_loss: bool = False,
    ) -> torch.Tensor:
        """z [B, C, H, W], standard normal -> x0 [B, C, H, W], float32, or float64 where z or the prediction is.

        Args:
            z, conditioning: of B samples.
            noise: a stream's number -> the `Noise` of these samples, e.g. `Batch.noise`; not needed where nothing is
                drawn.
            for_loss: return the x0 of the step that `gradient_step` names, not the last one's.

        Raises ValueError where there is something to draw and no `noise`.
        """
        x = self.input_scale * widen(z)
        t = torch.full((len(z),), self.timesteps[0], dtype=torch.int64, device=z.device)
        if len(self.timesteps) > 1:
            with torch.no_grad():
                x, t = self._input_of_result(x, t, z.dtype, conditioning, noise, for_loss)
        return self._predict(x, t, z.dtype, conditioning)[0]

    def _input_of_result(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        dtype: torch.dtype,
        conditioning: Any,
        noise: Callable[[int], Noise] | None,
        for_loss: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Input and time of the call that gives each sample's result. All calls are made, whatever step is drawn.

        So shapes are the same in every update, no number is read off the device, and processes that share the network's
        weights call it equally often.
        """
        step = None
        if for_loss and self.gradient_step == "random":
            step = self._noise(noise, STEP).integers(0, len(self.timesteps))
        kept, kept_t = x, t
        for number, (_, following) in enumerate(pairwise(self.timesteps)):
            x0, eps = self._predict(x, t, dtype, conditioning)
            t = torch.full_like(t, following)
            alpha, sigma = self.schedule.coefficients(t)
            x = ops.add_noise(x0, alpha, sigma, eps if self.renoise == "ddim" else self._noise(noise, RENOISE + number))
            if step is None:
                kept, kept_t = x, t
            else:
                later = step > number
                kept = torch.where(later.reshape(-1, *[1] * (x.dim() - 1)), x, kept)
                kept_t = torch.where(later, t, kept_t)
        return kept, kept_t

    def _predict(
        self, x: torch.Tensor, t: torch.Tensor, dtype: torch.dtype, conditioning: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The x0 and the noise that the network reads out of its input, which it gets in a dtype."""
        # x0 is a difference of the two: neither is rounded before.
        prediction = widen(self.network(x.to(dtype), t, conditioning))
        alpha, sigma = (per_sample(each, x) for each in self.schedule.coefficients(t))
        return implied(self.schedule.prediction_type, prediction, x, alpha, sigma)

    def _noise(self, noise: Callable[[int], Noise] | None, stream: int) -> Noise:
        if noise is None:
            raise ValueError(
                "FewStepGenerator draws noise after its steps, or the step of a loss: hand it noise, stream -> Noise, "
                "such as Batch.noise"
            )
        return noise(stream)


def refuse_no_steps(timesteps: Sequence[int]) -> None:
    """Raise ValueError for times that no generator makes its calls at, whatever the schedule."""
    if not 1 <= len(timesteps) <= MOST_STEPS:
        raise ValueError(f"timesteps must be 1 to {MOST_STEPS} times, got {len(timesteps)} of them")
    if any(later >= earlier for earlier, later in pairwise(timesteps)):
        raise ValueError(f"timesteps must fall from each call to the next, got {list(timesteps)}")


def draw_options(generator: Callable[..., Any], noise: Callable[[int], Noise], **options: Any) -> dict[str, Any]:
    """Return the keywords that a generator is called with: `noise` and `options` where it draws, else none."""
    return {"noise": noise, **options} if getattr(generator, "draws", False) else {}
