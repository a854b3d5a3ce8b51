"""Images to latents, by the autoencoder whose decoder a run has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffpp_fast.networks.decoder import FrozenDecoder
from diffpp_fast.networks.decoder.latents import NORMED


class ImageEncoder(nn.Module):
    """The encoding half of a decoder's autoencoder: the mean of the latents that it gives an image.

    Args:
        decoder: whose weights' dtype is computed in.

    Raises TypeError for what is no `FrozenDecoder`.
    """

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        if not isinstance(decoder, FrozenDecoder):
            raise TypeError(f"ImageEncoder needs a FrozenDecoder, got {type(decoder).__name__}")
        self._decoder = [decoder]  # in a list: its weights stay the decoder's
        vae: Any = decoder.vae
        self.encoder: Any = vae.encoder
        self.quant_conv: Any = getattr(vae, "quant_conv", None)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [-1, 1] -> latents [B, C, h, w] as diffusion sees them, float32."""
        (decoder,) = self._decoder
        images = images.to(next(self.encoder.parameters()).dtype)
        # Qwen-Image's autoencoder takes videos, of which a picture is one frame.
        video = decoder.kind == NORMED
        (encoded,) = decoder.vae.encode(images[:, :, None] if video else images, return_dict=False)
        latents = encoded if isinstance(encoded, Tensor) else encoded.mode()
        return decoder.scale((latents[:, :, 0] if video else latents).float())
