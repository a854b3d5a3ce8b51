"""Derivatives that kernels have not: the plain definition has them, and what has none is refused by name.

What an operator's Function has no gradient for goes to it in one tuple: torch looks at every argument, in both passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from diffpp_fast import transforms

_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def needs_gradient(*tensors: object) -> bool:
    """Whether autograd will ask for a gradient. Where it won't, an operator saves the microseconds of its Function."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                return True
    return False


def by_definition(*others: object) -> bool:
    """Whether plain torch is to compute an operator, so that every derivative and transform of torch is right.

    So it is inside a transform of `torch.func` or a dual level, and where a gradient is asked for by one of `others`:
    the arguments that the kernels have no gradient for.
    """
    return transforms.active() or needs_gradient(*others)


def recorded(*gradients: Tensor | None) -> bool:
    """In the backward pass of `gradients`: whether it is differentiated or mapped itself, and has to be plain torch.

    Under torch.compile it never is: torch refuses second derivatives of what it compiled.
    """
    if torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() or transforms.active():
        return True
    # Not `any`, whose generator takes as long as all else.
    for gradient in gradients:  # noqa: SIM110
        if gradient is not None and transforms.batched(gradient):
            return True
    return False


def only_needed(gradients: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Return the gradients as autograd takes them: None where a kernel left an empty tensor, for none was needed."""
    if False not in needs:
        return tuple(gradients)
    return tuple([gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)])


class Operator(Function):
    """An operator's boundary with autograd. No transform is active where it is applied: `by_definition` rules."""

    @classmethod
    def directly(cls, *arguments: Any) -> Any:
        """`apply` without what it does for transforms in Python, which takes longer than a small kernel."""
        if torch.compiler.is_compiling():
            return cls.apply(*arguments)
        for value in arguments:
            # Of a transform that is over: `apply` takes the wrapping off.
            if isinstance(value, Tensor) and _is_wrapped(value):
                return cls.apply(*arguments)
        return super(Function, cls).apply(*arguments)  # type: ignore[misc]


def straight(function: type[Operator]) -> type[Operator]:
    """`function`, whose backward pass autograd calls itself, and not through a method of torch's that looks it up."""
    # A class of torch's own for each Function, of which `apply` is what the engine calls.
    backward_class: Any = getattr(function, "_backward_cls", None)
    if backward_class is not None:
        backward_class.apply = function.backward
    return function


class _Refused(Function):
    """The identity. A derivative that goes through it, of either mode, raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor, message: str) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
        ctx.message = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        raise RuntimeError(ctx.message)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        raise RuntimeError(ctx.message)


def refused(message: str, tensors: Sequence[Any]) -> list[Any]:
    """The tensors among `tensors`, such that inside transforms a derivative by them raises; all else as it is."""
    return [_Refused.apply(value, message) if isinstance(value, Tensor) else value for value in tensors]
