"""Triton launches on the current device, whichever device the tensors are on."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def on_its_device(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, run on the device of its first argument, a tensor."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        # The code that torch.compile makes of a launch changes devices itself.
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        tensor = args[0]
        assert isinstance(tensor, Tensor)
        if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
            return function(*args, **kwargs)
        with torch.cuda.device(tensor.device):
            return function(*args, **kwargs)

    return call
