"""A diffusion network as a one-step generator: one call turns noise into x0."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import nn

from diffpp_fast.precision import widen
from diffpp_fast.schedule import LARGEST_GAP_SCALE, NoiseSchedule


class OneStepGenerator(nn.Module):
    """x0 = the sample that `network` predicts from `input_scale` z at the fixed time `timestep`.

    The released one-step models are this adapter with other numbers: SD1.5 as in SiD-LSG (timestep 625, input sigma z),
    DMD2's SDXL (timestep 399, input z), PixArt (timestep 440, input sigma z).

    Args:
        network: (x, t, conditioning) -> prediction, e.g. `networks.Denoiser(unet)`.
        schedule: gives alpha and sigma at `timestep` and the prediction type.
        timestep: where the network is asked, 0 <= timestep < len(schedule).
        input_scale: "sigma" feeds sigma z, the marginal of x_t without the signal; a number feeds that times z.

    Raises ValueError for a timestep outside the schedule or one at which the network's output would be no x0, and for
    an input without z.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        *,
        timestep: int = 625,
        input_scale: float | Literal["sigma"] = "sigma",
    ) -> None:
        super().__init__()
        self.network = network
        self.timestep = timestep
        self.prediction_type = schedule.prediction_type
        self.alpha, self.sigma = coefficients_of_call(schedule, timestep)
        self.input_scale = factor_of_z(input_scale, schedule, timestep)

    def forward(self, z: torch.Tensor, conditioning: Any = None) -> torch.Tensor:
        """z [B, C, H, W], standard normal -> x0 [B, C, H, W], float32, or float64 where z or the prediction is."""
        x = self.input_scale * widen(z)
        t = torch.full((len(z),), self.timestep, dtype=torch.int64, device=z.device)
        # x0 is a difference of the two: neither is rounded before.
        prediction = widen(self.network(x.to(z.dtype), t, conditioning))
        if self.prediction_type == "epsilon":
            return (x - self.sigma * prediction) / self.alpha
        if self.prediction_type == "v_prediction":
            # v = alpha eps - sigma x0, with alpha^2 + sigma^2 = 1.
            return self.alpha * x - self.sigma * prediction
        if self.prediction_type == "flow_prediction":
            # eps - x0, with alpha = 1 - sigma.
            return x - self.sigma * prediction
        return prediction


def coefficients_of_call(schedule: NoiseSchedule, timestep: int) -> tuple[float, float]:
    """Return alpha and sigma at the time of a generator's call.

    Raises ValueError for a time outside the schedule, or one at which the network's output would be no x0.
    """
    if not 0 <= timestep < len(schedule):
        raise ValueError(f"timestep must lie in [0, {len(schedule)}), got {timestep}")
    alpha, sigma = (float(each) for each in schedule.coefficients(torch.tensor([timestep])))
    at = _described(timestep, alpha, sigma)
    if schedule.prediction_type == "epsilon" and sigma > LARGEST_GAP_SCALE * alpha:
        raise ValueError(
            f"{at}: x0 = (x - sigma eps) / alpha would be the error of an epsilon prediction, magnified over "
            f"{LARGEST_GAP_SCALE:.0f}-fold: choose an earlier timestep"
        )
    if schedule.prediction_type != "sample" and sigma == 0.0:
        raise ValueError(f"{at}: x0 would be the input, whatever the network says: choose a later timestep")
    return alpha, sigma


def factor_of_z(input_scale: float | Literal["sigma"], schedule: NoiseSchedule, timestep: int) -> float:
    """Return what z is multiplied by for a generator's first call; raises ValueError for an input without z."""
    alpha, sigma = (float(each) for each in schedule.coefficients(torch.tensor([timestep])))
    factor = sigma if input_scale == "sigma" else float(input_scale)
    if not math.isfinite(factor) or factor == 0.0:
        raise ValueError(
            f"input_scale {input_scale!r} feeds the network {factor:g} z at {_described(timestep, alpha, sigma)}: "
            "it must be finite and not 0"
        )
    return factor


def _described(timestep: int, alpha: float, sigma: float) -> str:
    return f"timestep {timestep}, where alpha is {alpha:.4g} and sigma {sigma:.4g}"
