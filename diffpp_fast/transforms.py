"""Whether torch differentiates forwards, or transforms what is computed, in ways that kernels know nothing of."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch.autograd import forward_ad

P = ParamSpec("P")
R = TypeVar("R")

_functional = torch._C._are_functorch_transforms_active


def decided_when_traced(function: Callable[P, R]) -> Callable[P, R]:
    """Mark a function that torch.compile calls where it traces, and whose result it takes for a constant.

    This is `torch.compiler.assume_constant_result`, which would import torch._dynamo, sympy and Triton to do it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# torch.compile guards on both.
@decided_when_traced
def active() -> bool:
    """Inside a transform of `torch.func` (jvp, grad, vmap and their relatives), or a dual level of forward-mode AD."""
    return _functional() or forward_ad._current_level >= 0


@decided_when_traced
def functional() -> bool:
    """Inside a transform of `torch.func`: tensors are wrapped, have no storage and perhaps hidden dimensions."""
    return _functional()
