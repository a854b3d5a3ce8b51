"""Classifier-free guidance of the reference, with the rescaling of arXiv 2305.08891."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Guided(NamedTuple):
    """The reference's outputs as operators take them: o_g = uncond + scale (cond - uncond)."""

    cond: torch.Tensor
    uncond: torch.Tensor | None
    scale: float

    def detach(self) -> Guided:
        """The same without graph."""
        return Guided(self.cond.detach(), None if self.uncond is None else self.uncond.detach(), self.scale)


def guide(cond: torch.Tensor, uncond: torch.Tensor, scale: float, rescale: float = 0.0) -> torch.Tensor:
    """Return o_g = uncond + scale (cond - uncond), rescaled as diffusers' `guidance_rescale` does.

    With std over the elements of a sample, the result is rescale o_g std(cond) / std(o_g) + (1 - rescale) o_g.

    Args:
        cond: [B, ...], the output with the prompt.
        uncond: [B, ...], the output without.
        scale: w in diffusers' convention, 1 is no guidance.
        rescale: in [0, 1]; 0 is none.

    Returns:
        [B, ...], float32 (float64 for float64 inputs). Differentiable in both, the standard deviations included.
    """
    dtype = torch.promote_types(cond.dtype, torch.float32)
    cond, uncond = cond.to(dtype), uncond.to(dtype)
    guided = uncond + scale * (cond - uncond)
    if rescale == 0.0:
        return guided
    axes = tuple(range(1, cond.dim()))
    spreads = [output.std(axes, correction=0, keepdim=True) for output in (cond, guided)]
    # A sample whose guided output is constant has no spread to bring back.
    factor = spreads[0] / spreads[1].clamp(min=torch.finfo(dtype).eps)
    return guided * (rescale * factor + (1.0 - rescale))
