"""A diffusers UNet or transformer as `(x_t, t, conditioning) -> prediction`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffpp_fast.networks.conditioning import network_arguments
from diffpp_fast.networks.last_layer import widen_last_layer
from diffpp_fast.precision import autocast_dtype, widen


class Denoiser(nn.Module):
    """Calls a diffusers network and gives back its raw prediction, of the shape of x_t.

    The prediction is float32 (float64 of a float64 network), whatever the network computes in: its last layer is
    changed in place, see `last_layer`. Networks that also predict a variance (PixArt-alpha: 8 channels for 4) have it
    cut off.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        widen_last_layer(network)
        self.network = network

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, conditioning: Any = None) -> torch.Tensor:
        """x_t [B, C, H, W], cast to the network's dtype unless autocast does that, and t [B] int64 -> [B, C, H, W]."""
        x = x_t if autocast_dtype(x_t.device) else x_t.to(next(self.network.parameters()).dtype)
        prediction = self.network(x, timestep=t, return_dict=False, **network_arguments(conditioning))[0]
        return widen(prediction[:, : x_t.shape[1]])
