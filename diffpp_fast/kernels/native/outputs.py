"""What the losses on three network outputs have in common: their gradients, each only where it is needed."""

import torch
from torch import Tensor


def only_needed(gradients: tuple[Tensor, ...], needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """The gradients of fake, cond, uncond and x0 as autograd takes them: None for one that was not asked for."""
    return tuple(gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True))


def gradients_like(
    fake: Tensor, cond: Tensor, uncond: Tensor | None, x0: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor, ...]:
    """The fakes of these gradients."""
    return tuple(
        torch.empty_like(tensor) if needed and tensor is not None else fake.new_empty(0)
        for tensor, needed in zip((fake, cond, uncond, x0), needs, strict=True)
    )
