"""Adaptive layer normalisation, forward and backward."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from diffpp_fast import transforms
from diffpp_fast.kernels import dispatch
from diffpp_fast.kernels.reference import ada_layer_norm as definition
from diffpp_fast.ops import checks
from diffpp_fast.ops.autograd import needs_gradient, recorded


def ada_layer_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * (1 + scale) + shift over the last dimension (AdaLN of DiT, arXiv 2212.09748).

    Equals `torch.nn.functional.layer_norm` without weight and bias, then the modulation. The variance is the biased
    one, in two passes.

    Args:
        x: [B, ..., D].
        scale: [B, D] or [B, 1, ..., 1, D], one row for each sample; its dtype may differ from that of `x`.
        shift: the same.
        eps: added to the variance.

    Returns:
        [B, ..., D] in the dtype of `x`. An empty batch gives an empty result.

    Transforms:
        Kernels compute the value and the gradients of `x`, `scale` and `shift`. Plain torch computes second
        derivatives, tangents (forward mode) and what `torch.func` makes of the operator, `vmap` among it; all are
        exact.

    Raises:
        TypeError: an argument is not a floating-point tensor, or eps not a number.
        ValueError: wrong shapes, a row has no elements, eps is negative or not finite.
    """
    op = "ada_layer_norm"
    checks.floating(op, {"x": x, "scale": scale, "shift": shift})
    if x.dim() < 2:
        raise ValueError(f"{op}: x must have shape [B, ..., D], got {list(x.shape)}")
    checks.elements(op, "x", x)
    batch, width = x.shape[0], x.shape[-1]
    for name, values in (("scale", scale), ("shift", shift)):
        if values.dim() < 2 or (values.shape[0], values.shape[-1]) != (batch, width) or values[:1].numel() > width:
            raise ValueError(
                f"{op}: {name} must have shape [B, D] = [{batch}, {width}] or [B, 1, D], got {list(values.shape)}"
            )
    eps = checks.eps(op, eps)
    dtype = checks.common_dtype(scale, shift)
    # Kernels compute in one precision: float64 for all, or for none.
    if (dtype == torch.float64) != (x.dtype == torch.float64):
        dtype = torch.promote_types(x.dtype, torch.float32)
    rows = checks.cast(scale.reshape(batch, width), dtype), checks.cast(shift.reshape(batch, width), dtype)
    y: Tensor
    if transforms.active():
        y, _, _ = definition.forward(x, *rows, eps)
    elif needs_gradient(x, *rows):
        y = _AdaLayerNorm.apply(x, *rows, eps)
    else:
        y, _, _ = dispatch.select(op, x.device, x.dtype).forward(x, *rows, eps)
    return y


class _AdaLayerNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
        ctx.kernels = dispatch.select("ada_layer_norm", x.device, x.dtype)
        y: Tensor
        y, mean, rstd = ctx.kernels.forward(x, scale, shift, eps)
        ctx.save_for_backward(x, mean, rstd, scale, shift)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, scale, shift = ctx.saved_tensors
        kernels = ctx.kernels
        if recorded():
            kernels = definition
            _, mean, rstd = definition.forward(x, scale, shift, ctx.eps)  # which depend on x
        return (*kernels.backward(grad_output, x, mean, rstd, scale, ctx.needs_input_grad[:3]), None)
