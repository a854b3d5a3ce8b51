"""A diffusion network as a one-step generator: one call turns noise into x0."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from diffpp_fast.precision import widen
from diffpp_fast.schedule import NoiseSchedule


class OneStepGenerator(nn.Module):
    """x0 = the sample that `network` predicts from `input_scale` z at the fixed time `timestep`.

    The released one-step models are this adapter with other numbers: SD1.5 as in SiD-LSG (timestep 625, input sigma z),
    DMD2's SDXL (timestep 399, input z), PixArt (timestep 440, input sigma z).

    Args:
        network: (x, t, conditioning) -> prediction, e.g. `networks.Denoiser(unet)`.
        schedule: gives alpha and sigma at `timestep` and the prediction type.
        timestep: where the network is asked, 0 <= timestep < len(schedule).
        input_scale: "sigma" feeds sigma z, the marginal of x_t without the signal; a number feeds that times z.
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
        if not 0 <= timestep < len(schedule):
            raise ValueError(f"timestep must lie in [0, {len(schedule)}), got {timestep}")
        self.network = network
        self.timestep = timestep
        self.prediction_type = schedule.prediction_type
        alpha, sigma = schedule.coefficients(torch.tensor([timestep]))
        self.alpha, self.sigma = float(alpha), float(sigma)
        self.input_scale = self.sigma if input_scale == "sigma" else float(input_scale)

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
