"""Adaptive layer normalisation, forward and backward."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from diffpp_fast.kernels import dispatch
from diffpp_fast.ops import checks
from diffpp_fast.ops.autograd import once_differentiable


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
        [B, ..., D] in the dtype of `x`. Differentiable in `x`, `scale` and `shift`. An empty batch gives an empty
        result.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: wrong shapes, a row has no elements.
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
    if not eps >= 0.0:
        raise ValueError(f"{op}: eps must not be negative, got {eps}")
    dtype = checks.common_dtype(scale, shift)
    # Kernels compute in one precision: float64 for all, or for none.
    if (dtype == torch.float64) != (x.dtype == torch.float64):
        dtype = torch.promote_types(x.dtype, torch.float32)
    rows = checks.cast(scale.reshape(batch, width), dtype), checks.cast(shift.reshape(batch, width), dtype)
    if checks.needs_gradient(x, *rows):
        y: Tensor = _AdaLayerNorm.apply(x, *rows, eps)
    else:
        y, _, _ = dispatch.select(op, x.device, x.dtype).forward(x, *rows, eps)
    return y


class _AdaLayerNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
        ctx.kernels = dispatch.select("ada_layer_norm", x.device, x.dtype)
        y: Tensor
        y, mean, rstd = ctx.kernels.forward(x, scale, shift, eps)
        ctx.save_for_backward(x, mean, rstd, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.kernels.backward(grad_output, *ctx.saved_tensors, ctx.needs_input_grad[:3]), None)
