"""The precision of each computation: predictions and samples in float32 at least, layers in autocast's."""

import torch
from torch import Tensor


def widen(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in its own dtype where that is wider; differentiable.

    Scores, samples and rewards are differences of numbers that lie close together: what is computed from a network's
    output is computed from it in here.
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast gives layers on this device now; None where it is off, and on meta, which has none."""
    kind = device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None
