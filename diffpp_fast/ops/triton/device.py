"""Triton launches on the current device, whichever device the tensors are on, and by a plan where there is one."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from diffpp_fast.ops.triton import plans

P = ParamSpec("P")
R = TypeVar("R")

#: Whether tensors that are not on a GPU have plans too, so that host code is measured where there is none.
everywhere = False


def on_its_device(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, run on the device of its first argument, a tensor."""
    known: plans.Known = {}

    def resolved(*args: P.args, **kwargs: P.kwargs) -> R:
        # Kernels read memory, and in that of `complex.conj().imag` the numbers have the other sign.
        positive: Any = [value.resolve_neg() if isinstance(value, Tensor) else value for value in args]
        return function(*positive, **kwargs)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        tensor = args[0]
        assert isinstance(tensor, Tensor)
        # The code that torch.compile makes of a launch changes devices itself.
        if torch.compiler.is_compiling() or not (tensor.is_cuda or everywhere):
            return resolved(*args, **kwargs)
        device = tensor.get_device()
        if device != torch.cuda.current_device():
            with torch.cuda.device(tensor.device):
                return plans.run(resolved, known, device, args, kwargs)
        return plans.run(resolved, known, device, args, kwargs)

    return call
