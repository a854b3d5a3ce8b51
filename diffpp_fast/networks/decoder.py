"""Latents to images with a frozen autoencoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute


class FrozenDecoder(nn.Module):
    """The decoding half of a diffusers autoencoder; gradient goes to the latents and to no weight.

    Args:
        vae: an `AutoencoderKL`; frozen and set to eval here.
        checkpoint: keep nothing of the decode and compute it again in the backward pass.
    """

    def __init__(self, vae: nn.Module, checkpoint: bool = False) -> None:
        super().__init__()
        # diffusers' autoencoders share no base class that declares `decode` and `config`.
        config: Any = getattr(vae, "config", None)
        if config is None or not hasattr(vae, "decode"):
            raise TypeError(f"FrozenDecoder needs a diffusers autoencoder with decode() and config, got {type(vae)}")
        self.vae: Any = vae.eval().requires_grad_(False)
        self.checkpoint = checkpoint
        self.scaling_factor = float(config.scaling_factor)
        self.shift_factor = float(getattr(config, "shift_factor", None) or 0.0)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """latents [B, C, h, w], as diffusion sees them -> images [B, 3, H, W], about [-1, 1], not clamped."""
        if self.checkpoint and latents.requires_grad:
            images: torch.Tensor = recompute(self._decode, latents, use_reentrant=False)
            return images
        return self._decode(latents)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        images: torch.Tensor = self.vae.decode(latents / self.scaling_factor + self.shift_factor, return_dict=False)[0]
        return images
