"""Pictures to look at: one-step samples of given prompts, laid out in a grid."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from diffpp_fast.methods.base import LATENT
from diffpp_fast.noise import Noise
from diffpp_fast.training.build import Sampler

#: Grid pictures have these sample numbers: training counts up from 0 and never gets there.
FIRST_GRID_SAMPLE = 2**62


@torch.no_grad()
def sample_latents(
    sampler: Sampler, prompts: Sequence[str], samples: torch.Tensor, *, seed: int, shape: tuple[int, ...], batch: int
) -> torch.Tensor:
    """One sample per prompt.

    Args:
        prompts: N of them.
        samples: int64 [N] on the generator's device, the sample numbers whose latents are used.
        seed: of those latents.
        shape: of one latent.
        batch: how many are computed at a time.

    Returns float32 [N, *shape].
    """
    parts = [slice(start, start + batch) for start in range(0, len(prompts), batch)]
    return torch.cat(
        [
            sampler.generator(Noise(seed, samples[part], stream=LATENT).normal(shape), sampler.encode(prompts[part]))
            for part in parts
        ]
    )


@torch.no_grad()
def decode(sampler: Sampler, latents: torch.Tensor, *, batch: int) -> torch.Tensor:
    """latents [N, C, h, w] -> images [N, 3, H, W], float32, about [-1, 1]."""
    assert sampler.decoder is not None
    return torch.cat([sampler.decoder(part).float() for part in latents.split(batch)])


def tile(images: torch.Tensor, columns: int) -> torch.Tensor:
    """images [N, 3, H, W] about [-1, 1] -> one [rows H, columns W, 3] uint8 on the CPU; a short last row ends white."""
    count, channels, height, width = images.shape
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
    rows = -(-count // columns)
    missing = pixels.new_full((rows * columns - count, channels, height, width), 255)
    cells = torch.cat([pixels, missing]).view(rows, columns, channels, height, width)
    return cells.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, channels)


def write_png(path: Path, pixels: torch.Tensor) -> None:
    """pixels: [H, W, 3] uint8; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.numpy()).save(path)
