"""Whether torch differentiates forwards, or transforms what is computed, in ways that kernels know nothing of."""

import torch
from torch.autograd import forward_ad

_functional = torch._C._are_functorch_transforms_active


# torch.compile guards on both, and evaluates the function where it traces.
@torch.compiler.assume_constant_result
def active() -> bool:
    """Inside a transform of `torch.func` (jvp, grad, vmap and their relatives), or a dual level of forward-mode AD."""
    return _functional() or forward_ad._current_level >= 0


@torch.compiler.assume_constant_result
def functional() -> bool:
    """Inside a transform of `torch.func`: tensors are wrapped, have no storage and perhaps hidden dimensions."""
    return _functional()
