"""Latents as diffusion sees them, by class of autoencoder: their channels, their pixels, and the autoencoder's own."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

#: The class whose latents are normalised by channel, and four pixels of which make one that diffusion sees.
NORMED, PATCHED = "AutoencoderKLQwenImage", "AutoencoderKLFlux2"


def channels_of(kind: str, facts: Mapping[str, Any]) -> int:
    """Return the channels of a latent as diffusion sees it.

    Args:
        kind: the autoencoder's class.
        facts: its configuration, with the class's defaults.
    """
    channels: int = facts["z_dim" if kind == NORMED else "latent_channels"]
    return channels * prod(facts["patch_size"]) if kind == PATCHED else channels


def pixels_of(kind: str, facts: Mapping[str, Any]) -> int:
    """Return how many rows of pixels a row of latents makes, as diffusion sees them; arguments as above."""
    if kind == NORMED:
        return int(2 ** len(facts["temperal_downsample"]))
    blocks = facts.get("block_out_channels") or facts.get("decoder_block_out_channels") or (0,) * 4
    scale: int = 2 ** (len(blocks) - 1)
    return scale * facts["patch_size"][0] if kind == PATCHED else scale


class Unscale:
    """Turns latents as diffusion sees them into what the autoencoder itself calls so, as diffusers' pipelines do it.

    Args:
        vae: an autoencoder of diffusers. Statistics that it was trained with, where it has any, are read at every call.
    """

    def __init__(self, vae: Any) -> None:
        config: Any = vae.config
        self.norm: Any = getattr(vae, "bn", None)
        self.scale = float(getattr(config, "scaling_factor", None) or 1.0)
        self.shift = float(getattr(config, "shift_factor", None) or 0.0)
        self.mean: list[float] | None = getattr(config, "latents_mean", None)
        self.std: list[float] | None = getattr(config, "latents_std", None)
        self.patch: tuple[int, int] | None = tuple(config.patch_size) if type(vae).__name__ == PATCHED else None

    def __call__(self, latents: Tensor) -> Tensor:
        """latents [B, C, h, w] -> [B, C', h', w'], in their dtype."""
        if self.patch is not None:
            deviation, mean = self._statistics(latents)
            latents = latents * deviation + mean
            high, wide = self.patch
            parts = latents.unflatten(1, (-1, high, wide)).permute(0, 1, 4, 2, 5, 3)
            return parts.flatten(4, 5).flatten(2, 3)
        if self.mean is None or self.std is None:
            return latents / self.scale + self.shift
        mean, std = (_per_channel(values, latents) for values in (self.mean, self.std))
        return latents * std / self.scale + mean

    def inverse(self, latents: Tensor) -> Tensor:
        """Return as diffusion sees them [B, C, h, w] what the autoencoder itself calls latents [B, C', h', w']."""
        if self.patch is not None:
            high, wide = self.patch
            parts = latents.unflatten(3, (-1, wide)).unflatten(2, (-1, high))
            deviation, mean = self._statistics(latents)
            return (parts.permute(0, 1, 3, 5, 2, 4).flatten(1, 3) - mean) / deviation
        if self.mean is None or self.std is None:
            return (latents - self.shift) * self.scale
        mean, std = (_per_channel(values, latents) for values in (self.mean, self.std))
        return (latents - mean) * self.scale / std

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Standard deviation and mean by channel, [1, C, 1, 1], of latents whose pixels are put together."""
        statistics = (self.norm.running_var, self.norm.running_mean)
        variance, mean = (each.to(like.dtype)[None, :, None, None] for each in statistics)
        return torch.sqrt(variance + self.norm.eps), mean


def _per_channel(values: list[float], like: Tensor) -> Tensor:
    """[1, C, 1, 1], filled on the device: a copy from the host would wait for it."""
    return torch.cat([like.new_full((1, 1, 1, 1), value) for value in values], dim=1)
