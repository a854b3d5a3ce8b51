"""A diffusers UNet or transformer as `(x_t, t, conditioning) -> prediction`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffpp_fast.networks.conditioning import network_arguments


class Denoiser(nn.Module):
    """Calls a diffusers network and gives back its raw prediction, of the shape of x_t.

    Networks that also predict a variance (PixArt-alpha: 8 channels for 4) have it cut off.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, conditioning: Any = None) -> torch.Tensor:
        """x_t [B, C, H, W], t [B] int64 -> [B, C, H, W]."""
        prediction = self.network(x_t, timestep=t, return_dict=False, **network_arguments(conditioning))[0]
        return prediction[:, : x_t.shape[1]]
