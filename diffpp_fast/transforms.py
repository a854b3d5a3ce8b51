"""Whether torch differentiates forwards, or transforms what is computed, in ways that kernels know nothing of."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch.autograd import forward_ad

P = ParamSpec("P")
R = TypeVar("R")

_functional = torch._C._are_functorch_transforms_active
_is_batched = torch._C._functorch.is_legacy_batchedtensor


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


def batched(tensor: object) -> bool:
    """Whether `torch.autograd` maps over this gradient (`is_grads_batched`, `jacobian(vectorize=True)`).

    Its `vmap` is not that of `torch.func`: nothing but the tensor tells of it.
    """
    # torch.compile can't trace the question, and never has such a tensor.
    if torch.compiler.is_compiling():
        return False
    return isinstance(tensor, torch.Tensor) and _is_batched(tensor)
