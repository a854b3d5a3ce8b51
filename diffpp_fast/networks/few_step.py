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

#: Streams of what a generator draws itself, above the users' own: the step whose x0 a loss is of (a sample's, or that
#: of an update by its first sample), and the noise after the first step; that after the next has the next number, and
#: so on.
STEP, RENOISE = 2**31, 2**31 + 1
#: Of a generator's steps; each has a stream, and beyond it is no few-step generator.
MOST_STEPS = 8

Renoise = Literal["fresh", "ddim"]
GradientStep = Literal["last", "random", "random_exit"]


class FewStepGenerator(nn.Module):
    """x0 by several calls of `network` at falling times, with a gradient through one of them.

    Each call predicts x0 as `OneStepGenerator` does, and but for the last one the next input is made of it:
    alpha x0 + sigma eps at the next time. No gradient goes through calls before the one that gives the result, which
    run without a graph: memory is that of one call.

    A method calls `generator(z, conditioning, noise=batch.noise, for_loss=True)` where `draws` is true, as it is here,
    with `update=batch.update_noise` where `draws_by_update` is.

    Args:
        network: (x, t, conditioning) -> prediction, e.g. `networks.Denoiser(unet)`.
        schedule: gives alpha and sigma at each time and the prediction type.
        timesteps: of the calls, 1 to 8 of them, falling.
        input_scale: of the first call's input, as of `OneStepGenerator`.
        renoise: "fresh": eps is new noise, as in DMD2 and consistency models, with an address: a stream for each step.
            "ddim": the noise that the prediction implies, DDIM's step, or Euler's of a flow, as in TDM: one z gives one
            trajectory.
        gradient_step: whose x0 a loss is of. "random": of a step that is drawn for each sample, as in TDM: a batch has
            all steps, so that all calls are made. "random_exit": of one that is drawn for the whole update, as in DMD2
            and Self Forcing, at which the calls end: (K + 1) / 2 of K on the average. "last": of the last one.

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

    @property
    def draws_by_update(self) -> bool:
        """Whether a loss needs `update`."""
        return self.gradient_step == "random_exit" and len(self.timesteps) > 1

    @property
    def loss_steps(self) -> range:
        """The steps, counted from 0, whose x0 a loss may be of."""
        count = len(self.timesteps)
        return range(count - 1 if self.gradient_step == "last" else 0, count)

    def steps(self, noise: Callable[[int], Noise] | None, update: Callable[[int], Noise] | None = None) -> torch.Tensor:
        """Return the steps [B], int64, whose x0 a loss of these samples is of; arguments are those of `forward`."""
        if self.gradient_step == "random" and len(self.timesteps) > 1:
            return self._noise(noise, STEP).integers(0, len(self.timesteps))
        return torch.full_like(self._noise(noise, STEP).samples, self._exit(update))

    def forward(
        self,
        z: torch.Tensor,
        conditioning: Any = None,
        *,
        noise: Callable[[int], Noise] | None = None,
        update: Callable[[int], Noise] | None = None,
        for_loss: bool = False,
        times: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """z [B, C, H, W], standard normal -> x0 [B, C, H, W], float32, or float64 where z or the prediction is.

        Args:
            z, conditioning: of B samples.
            noise: a stream's number -> the `Noise` of these samples, e.g. `Batch.noise`; not needed where nothing is
                drawn.
            update: the same for the update's one number, on the CPU, e.g. `Batch.update_noise`.
            for_loss: return the x0 of the step that `gradient_step` names, not the last one's.
            times: int64 [B]: of single calls in place of the steps. In place of z they are fed what is noised so much.

        Raises ValueError where there is something to draw and no `noise`, or no `update`.
        """
        if times is not None:
            return self._predict(widen(z), times, z.dtype, conditioning)[0]
        x = self.input_scale * widen(z)
        t = torch.full((len(z),), self.timesteps[0], dtype=torch.int64, device=z.device)
        if len(self.timesteps) > 1:
            with torch.no_grad():
                if for_loss and self.gradient_step == "random":
                    x, t = self._inputs_of_steps(x, t, z.dtype, conditioning, noise)
                else:
                    for number in range(self._exit(update) if for_loss else len(self.timesteps) - 1):
                        x, t = self._next(number, x, t, z.dtype, conditioning, noise)
        return self._predict(x, t, z.dtype, conditioning)[0]

    def _exit(self, update: Callable[[int], Noise] | None) -> int:
        """The step at which the calls of a whole update end, on the host: equal in all processes, which therefore call
        a network whose weights they share equally often."""
        if not self.draws_by_update:
            return len(self.timesteps) - 1
        return int(self._noise(update, STEP, "update").integers(0, len(self.timesteps)))

    def _inputs_of_steps(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        dtype: torch.dtype,
        conditioning: Any,
        noise: Callable[[int], Noise] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Input and time of the call that gives each sample's result. All calls are made, whatever steps are drawn.

        So shapes are the same in every update, no number is read off the device, and processes that share the network's
        weights call it equally often.
        """
        steps, kept, kept_t = self.steps(noise), x, t
        for number in range(len(self.timesteps) - 1):
            x, t = self._next(number, x, t, dtype, conditioning, noise)
            later = steps > number
            kept = torch.where(later.reshape(-1, *[1] * (x.dim() - 1)), x, kept)
            kept_t = torch.where(later, t, kept_t)
        return kept, kept_t

    def _next(
        self,
        number: int,
        x: torch.Tensor,
        t: torch.Tensor,
        dtype: torch.dtype,
        conditioning: Any,
        noise: Callable[[int], Noise] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Input and time of the call after step `number`."""
        x0, eps = self._predict(x, t, dtype, conditioning)
        t = torch.full_like(t, self.timesteps[number + 1])
        alpha, sigma = self.schedule.coefficients(t)
        renoised = eps if self.renoise == "ddim" else self._noise(noise, RENOISE + number)
        return ops.add_noise(x0, alpha, sigma, renoised), t

    def _predict(
        self, x: torch.Tensor, t: torch.Tensor, dtype: torch.dtype, conditioning: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The x0 and the noise that the network reads out of its input, which it gets in a dtype."""
        # x0 is a difference of the two: neither is rounded before.
        prediction = widen(self.network(x.to(dtype), t, conditioning))
        alpha, sigma = (per_sample(each, x) for each in self.schedule.coefficients(t))
        return implied(self.schedule.prediction_type, prediction, x, alpha, sigma)

    def _noise(self, noise: Callable[[int], Noise] | None, stream: int, name: str = "noise") -> Noise:
        if noise is None:
            raise ValueError(
                f"FewStepGenerator draws noise after its steps, or the step of a loss: hand it {name}, stream -> "
                f"Noise, such as Batch.{'noise' if name == 'noise' else 'update_noise'}"
            )
        return noise(stream)


def refuse_no_steps(timesteps: Sequence[int]) -> None:
    """Raise ValueError for times that no generator makes its calls at, whatever the schedule."""
    if not 1 <= len(timesteps) <= MOST_STEPS:
        raise ValueError(f"timesteps must be 1 to {MOST_STEPS} times, got {len(timesteps)} of them")
    if any(later >= earlier for earlier, later in pairwise(timesteps)):
        raise ValueError(f"timesteps must fall from each call to the next, got {list(timesteps)}")


def draw_options(
    generator: Callable[..., Any],
    noise: Callable[[int], Noise],
    update: Callable[[int], Noise] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Return the keywords that a generator is called with: `noise` and `options` where it draws, else none."""
    if not getattr(generator, "draws", False):
        return {}
    by_update = {"update": update} if update is not None and getattr(generator, "draws_by_update", False) else {}
    return {"noise": noise, **by_update, **options}
