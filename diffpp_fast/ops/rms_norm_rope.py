"""RMS norm of queries or keys with their rotary embedding, forward and backward."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from diffpp_fast.backends import kernels, register
from diffpp_fast.ops import checks
from diffpp_fast.ops.autograd import Operator, by_definition, needs_gradient, only_needed, recorded, straight
from diffpp_fast.plain import compute_dtype, stored_like


def rms_norm_rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    interleaved: bool = True,
    sequence_dim: int = 1,
) -> Tensor:
    """y cos + rotated(y) sin with y = x weight / sqrt(mean x^2 + eps): what attention does to queries and to keys.

    The mean goes over the last dimension. Rotated pairs (a, b) become (-b, a): elements 2 i and 2 i + 1, or i and
    i + D / 2. These are diffusers' `use_real_unbind_dim` -1 (FLUX) and -2.

    Args:
        x: [B, T, H, D], or [B, H, T, D] with `sequence_dim` 2; D is even. Slices of one projection are read where they
            are.
        cos: [T, D] or [B, T, D], as in diffusers; its dtype may be its own. Rotate text and image each with its part.
        sin: the same.
        weight: [D], of the norm; None is 1.
        eps: added to the mean of the squares.
        interleaved: whether pairs are neighbours.
        sequence_dim: the dimension of `x` that `cos` and `sin` run along, 1 or 2, as in diffusers.

    Returns:
        The shape, dtype and memory format of `x`. An empty batch gives an empty result.

    Transforms:
        Kernels compute the value and the gradients of `x` and `weight`, for which these, `cos` and `sin` are kept.
        Plain torch computes those of `cos` and `sin`, second derivatives, tangents (forward mode) and what `torch.func`
        makes of the operator; all are exact.

    Raises:
        TypeError: an argument is not a floating-point tensor, eps not a number, or `interleaved` not a bool.
        ValueError: wrong shapes, a row of more than 1024 elements on backend "triton", eps is negative or not finite,
            `sequence_dim` is neither 1 nor 2.
    """
    op = "rms_norm_rope"
    checks.floating(op, {"x": x, "cos": cos, "sin": sin, "weight": weight}, optional=("weight",))
    checks.one_of_numbers(op, "sequence_dim", sequence_dim, (1, 2))
    checks.true_or_false(op, "interleaved", interleaved)
    if x.dim() != 4 or x.shape[3] % 2 or x.shape[3] == 0:
        raise ValueError(f"{op}: x must have shape [B, T, H, D] with D even, got {list(x.shape)}")
    tokens = x if sequence_dim == 1 else x.transpose(1, 2)
    batch, count, _, width = tokens.shape
    for name, values in (("cos", cos), ("sin", sin)):
        if values.shape not in ((count, width), (batch, count, width)):
            raise ValueError(
                f"{op}: {name} must have shape [T, D] = [{count}, {width}] or [B, T, D], got {list(values.shape)}"
            )
    if weight is not None and weight.shape != (width,):
        raise ValueError(f"{op}: weight must have shape [D] = [{width}], got {list(weight.shape)}")
    eps = checks.eps(op, eps)
    if cos.dim() != sin.dim():
        cos, sin = cos.expand(batch, -1, -1), sin.expand(batch, -1, -1)
    cos, sin = _precise(cos, x), _precise(sin, x)
    weight = None if weight is None else _precise(weight, x)
    y: Tensor
    if by_definition(cos, sin):
        y = forward(tokens, cos, sin, weight, eps, interleaved)
    elif needs_gradient(x, weight):
        y = _RmsNormRope.directly(tokens, cos, sin, weight, eps, interleaved)
    else:
        y = kernels(op, x.device, x.dtype).forward(tokens, cos, sin, weight, eps, interleaved)
    return y if sequence_dim == 1 else y.transpose(1, 2)


def _precise(values: Tensor, like: Tensor) -> Tensor:
    """Kernels compute in one precision: float64 for all, or for none."""
    if (values.dtype == torch.float64) == (like.dtype == torch.float64):
        return values
    return values.to(torch.promote_types(like.dtype, torch.float32))


def forward(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float, interleaved: bool) -> Tensor:
    """Return the rotated norm of [B, T, H, D]."""
    wide = x.to(compute_dtype(x))
    y = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(y.dtype)
    y = y * _by_head(cos, y) + _rotated(y, interleaved) * _by_head(sin, y)
    return stored_like(y, x)


def backward(
    grad_output: Tensor,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor | None,
    eps: float,
    interleaved: bool,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of x and weight, each where it is needed."""
    wide, grad = x.to(compute_dtype(x)), grad_output.to(compute_dtype(x))
    rstd = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    normalized = wide * rstd
    # The adjoint of a rotation is the one back.
    g = grad * _by_head(cos, grad) - _rotated(grad * _by_head(sin, grad), interleaved)
    grad_weight = None
    if weight is not None:
        if needs_weight:
            grad_weight = (g * normalized).sum(dim=(0, 1, 2)).to(weight.dtype)
        g = g * weight.to(g.dtype)
    if not needs_x:
        return None, grad_weight
    g = rstd * (g - normalized * (g * normalized).mean(dim=-1, keepdim=True))
    return stored_like(g, x), grad_weight


def _by_head(values: Tensor, like: Tensor) -> Tensor:
    """[T, D] or [B, T, D] -> [..., T, 1, D] in the compute dtype."""
    return values.to(like.dtype).unsqueeze(-2)


def _rotated(y: Tensor, interleaved: bool) -> Tensor:
    """Pairs (a, b) as (-b, a)."""
    if interleaved:
        a, b = y.reshape(*y.shape[:-1], y.shape[-1] // 2, 2).unbind(-1)
        return torch.stack((-b, a), dim=-1).reshape(y.shape)
    a, b = y.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


@straight
class _RmsNormRope(Operator):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float, interleaved: bool
    ) -> Tensor:
        ctx.kernels = kernels("rms_norm_rope", x.device, x.dtype)
        ctx.save_for_backward(x, cos, sin, weight)
        ctx.options = eps, interleaved
        y: Tensor = ctx.kernels.forward(x, cos, sin, weight, eps, interleaved)
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        differentiate = backward if recorded(grad_output) else ctx.kernels.backward
        x, cos, sin, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        eps, interleaved = ctx.options
        grads = differentiate(grad_output, x, cos, sin, weight, eps, interleaved, *needs)
        grad_x, grad_weight = only_needed(grads, needs)
        return grad_x, None, None, grad_weight, None, None


register(
    "rms_norm_rope",
    cpu=SimpleNamespace(forward=forward, backward=backward),
    cuda=False,
    forward=forward,
    backward=backward,
)
