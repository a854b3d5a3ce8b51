"""Backward passes without a derivative of their own."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For the backward of an operator: a `backward()` that reaches its gradients raises.

    Unlike with torch's decorator of this name, also where the upstream gradient is a constant. A gradient penalty that
    went through would be a number without a gradient. `torch.autograd.grad(..., inputs)` does not get to the error: it
    visits what leads to the inputs, and these gradients lead nowhere.
    """

    @wraps(backward)
    def call(ctx: Any, *grad_outputs: Any) -> Any:
        with torch.no_grad():
            gradients = backward(ctx, *grad_outputs)
        # Gradients are recorded here under create_graph=True alone. torch.compile traces first derivatives only.
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return gradients
        op = type(ctx).__name__.removesuffix("Backward").strip("_")
        message = f"{op} has no second derivative: where a gradient penalty goes through it, write it in plain torch"
        listed = [gradients] if isinstance(gradients, Tensor) else list(gradients)
        refuse: Any = torch._C._functions.DelayedError(message.encode(), len(listed))
        return refuse(*(None if gradient is None else gradient.detach().requires_grad_() for gradient in listed))

    return call
