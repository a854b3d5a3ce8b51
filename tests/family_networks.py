"""The tiny network of every family, and what it is called with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tiny
import tiny_flux
import torch
from torch import nn

#: By name: those before flow matching, and then by the names of `diffpp_fast.networks.families`' files.
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "stable_diffusion": tiny.unet,
    "stable_diffusion_xl": tiny.sdxl_unet,
    "pixart": tiny.pixart,
    "z_image": tiny.z_image,
    "stable_diffusion_3": tiny.sd3,
    "sana": tiny.sana,
    "flux": tiny.flux,
    "flux_2": tiny_flux.flux_2,
    "qwen_image": tiny_flux.qwen_image,
}
FAMILIES = tuple(NETWORKS)
LATENTS = {**tiny_flux.LATENTS, "flux": (2, 8, 8)}  # FLUX.1's network alone has fewer channels than its pipeline
MASKED = ("pixart", "z_image", "sana", "qwen_image")


def network(family: str, seed: int = 0, **changes: Any) -> nn.Module:
    """Return a network in eval mode whose every weight has an effect: some begin as zeros."""
    made = NETWORKS[family](seed, **changes).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for weight in made.parameters():
            if not weight.any():
                nn.init.normal_(weight, std=0.1)
    return made


def inputs(family: str, count: int, seed: int = 0, tokens: int = 6) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Return latents, times and conditioning for `Denoiser`; where text is masked, the first prompt is short."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, *LATENTS.get(family, tiny.LATENT), generator=generator)
    t = torch.randint(0, 1000, (count,), generator=generator)
    width = 3 * tiny.TEXT_WIDTH if family == "flux_2" else tiny.TEXT_WIDTH
    text: dict[str, Any] = {"encoder_hidden_states": torch.randn(count, tokens, width, generator=generator)}
    if family in MASKED:
        mask = torch.ones(count, tokens, dtype=torch.int64)
        mask[0, 3 + seed % 2 :] = 0
        text["encoder_attention_mask"] = mask
    if family in ("stable_diffusion_3", "flux"):
        text["pooled_projections"] = torch.randn(count, 8, generator=generator)
    if family == "stable_diffusion_xl":
        pooled = torch.randn(count, tiny.TEXT_WIDTH, generator=generator)
        text["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.full((count, 6), 8.0)}
    return x, t, text
