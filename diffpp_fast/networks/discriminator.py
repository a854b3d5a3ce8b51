"""A discriminator on what a denoiser has made of its input when it reaches its middle block."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class MiddleBlockDiscriminator(nn.Module):
    """(x_t, t, conditioning) -> one logit per sample, from the features behind a UNet's middle block (DMD2's).

    The features are the denoiser's own: its weights get gradient from the logits, as those of the head do, and what
    lies behind the middle block is not computed. Only the head belongs to this module's parameters.

    Args:
        denoiser: calls a network with a `mid_block`, e.g. `networks.Denoiser(unet)`; not one that ZeRO-3 has spread or
            that is compiled as a whole, since the call ends before the network's end.
        channels: of the features; for diffusers' UNets the last of `block_out_channels`.
        width: of the head.
        seed: of the head's initial weights; nothing is drawn from the global generator.

    Raises ValueError where the network has no middle block.
    """

    def __init__(self, denoiser: nn.Module, channels: int, *, width: int = 256, seed: int = 0) -> None:
        super().__init__()
        blocks = [module for name, module in denoiser.named_modules() if name.rpartition(".")[2] == "mid_block"]
        if not blocks:
            raise ValueError(f"{type(denoiser).__name__} has no mid_block: a discriminator looks at a UNet's")
        # In a tuple: a module's attributes would make these weights the discriminator's own.
        self._denoiser, self._block = (denoiser,), (blocks[0],)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = nn.Sequential(
                nn.Conv2d(channels, width, 3, stride=2, padding=1),
                nn.GroupNorm(min(32, width), width),
                nn.SiLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(width, 1),
            )

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, conditioning: Any = None) -> torch.Tensor:
        """x_t [B, C, H, W], t [B] int64 -> logits [B], float32."""
        logits: torch.Tensor = self.head(self._features(x_t, t, conditioning).float())
        return logits.squeeze(1)

    def _features(self, x_t: torch.Tensor, t: torch.Tensor, conditioning: Any) -> torch.Tensor:
        def stop(module: nn.Module, inputs: Any, output: Any) -> None:
            raise _Reached(output)

        handle = self._block[0].register_forward_hook(stop)
        try:
            self._denoiser[0](x_t, t, conditioning)
        except _Reached as reached:
            return reached.features
        finally:
            handle.remove()
        raise RuntimeError("the denoiser was called and did not call its mid_block")


class _Reached(Exception):
    """Ends a call of the denoiser at its middle block."""

    def __init__(self, features: torch.Tensor) -> None:
        super().__init__()
        self.features = features
