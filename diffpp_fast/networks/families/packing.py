"""Latents [B, C, H, W] as the tokens that FLUX and Qwen-Image take, and back; and the places of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

#: Rows and columns of the latents that make a token.
PATCH = 2


def pack(latents: Tensor) -> Tensor:
    """Return the tokens of patches, channels before rows and columns: [B, C, H, W] -> [B, H W / 4, 4 C]."""
    batch, channels, height, width = latents.shape
    parts = latents.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return parts.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Return what `pack` made tokens of: [B, H W / 4, 4 C] -> [B, C, H, W]."""
    parts = tokens.unflatten(1, (height // PATCH, width // PATCH)).unflatten(3, (-1, PATCH, PATCH))
    return parts.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def places(height: int, width: int, axes: int, device: torch.device) -> Tensor:
    """Return the places of tokens in a picture [height width, axes], float32: row and column are axes 1 and 2."""
    row, column = torch.meshgrid(
        torch.arange(height, device=device, dtype=torch.float32),
        torch.arange(width, device=device, dtype=torch.float32),
        indexing="ij",
    )
    nothing = torch.zeros_like(row)
    return torch.stack([nothing, row, column, *[nothing] * (axes - 3)], dim=-1).flatten(0, 1)
