"""The least precision of what is computed with predictions and samples."""

import torch
from torch import Tensor


def widen(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in its own dtype where that is wider; differentiable.

    Scores, samples and rewards are differences of numbers that lie close together: what is computed from a network's
    output is computed from it in here.
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
