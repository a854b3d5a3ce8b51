"""Adaptive layer normalisation, forward and backward."""

from typing import Any

import torch
from torch import Tensor

from diffpp_fast import transforms
from diffpp_fast.availability import fake
from diffpp_fast.backends import kernels, register
from diffpp_fast.ops import checks
from diffpp_fast.ops.autograd import Operator, needs_gradient, only_needed, recorded, straight
from diffpp_fast.plain import compute_dtype, stored_like


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
        [B, ..., D] in the dtype of `x`. An empty batch gives an empty result. What is not finite spoils its row, and
        the sample's gradients of scale and shift.

    Transforms:
        Kernels compute the value and the gradients of `x`, `scale` and `shift`, for which `x`, `scale`, and each row's
        mean and deviation are kept. Plain torch computes second derivatives, tangents (forward mode) and what
        `torch.func` makes of the operator, `vmap` among it; all are exact.

    Raises:
        TypeError: an argument is not a floating-point tensor, or eps not a number.
        ValueError: wrong shapes, a row has no elements or, on backend "triton", more than 8192, eps is negative or not
            finite.
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
    scale, shift = checks.promoted(scale.reshape(batch, width), shift.reshape(batch, width))
    # Kernels compute in one precision: float64 for all, or for none.
    if (scale.dtype == torch.float64) != (x.dtype == torch.float64):
        dtype = torch.promote_types(x.dtype, torch.float32)
        scale, shift = scale.to(dtype), shift.to(dtype)
    y: Tensor
    if transforms.active():
        y, _, _ = forward(x, scale, shift, eps)
    elif needs_gradient(x, scale, shift):
        y = _AdaLayerNorm.directly(x, scale, shift, eps)
    else:
        y, _, _ = kernels(op, x.device, x.dtype).forward(x, scale, shift, eps)
    return y


def forward(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, and each row's mean and 1 / sqrt(variance + eps): [B, rows] in the compute dtype."""
    rows = _rows(x)
    mean = rows.mean(dim=2)
    centered = rows - mean[:, :, None]
    rstd = torch.rsqrt(centered.square().mean(dim=2) + eps)
    y = centered * rstd[:, :, None] * (1.0 + scale.to(rows.dtype)[:, None]) + shift.to(rows.dtype)[:, None]
    return stored_like(y.reshape(x.shape), x), mean, rstd


def backward(
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor,
    needs_x: bool,
    needs_scale: bool,
    needs_shift: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, scale and shift, each where it is needed."""
    normalized = (_rows(x) - mean[:, :, None]) * rstd[:, :, None]
    grad = _rows(grad_output)
    grad_x = None
    if needs_x:
        g = grad * (1.0 + scale.to(grad.dtype)[:, None])
        g_mean = g.mean(dim=2, keepdim=True)
        gn_mean = (g * normalized).mean(dim=2, keepdim=True)
        grad_x = stored_like((rstd[:, :, None] * (g - g_mean - normalized * gn_mean)).reshape(x.shape), x)
    return (
        grad_x,
        (grad * normalized).sum(dim=1).to(scale.dtype) if needs_scale else None,
        grad.sum(dim=1).to(scale.dtype) if needs_shift else None,
    )


def _rows(x: Tensor) -> Tensor:
    """[B, ..., D] -> [B, rows, D] in the compute dtype."""
    return x.to(compute_dtype(x)).reshape(x.shape[0], x.shape[1:-1].numel(), x.shape[-1])


@straight
class _AdaLayerNorm(Operator):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
        ctx.kernels = kernels("ada_layer_norm", x.device, x.dtype)
        y: Tensor
        y, mean, rstd = ctx.kernels.forward(x, scale, shift, eps)
        ctx.save_for_backward(x, mean, rstd, scale, shift)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, scale, shift = ctx.saved_tensors
        differentiate = ctx.kernels.backward
        if recorded(grad_output):
            differentiate = backward
            _, mean, rstd = forward(x, scale, shift, ctx.eps)  # which depend on x
        needs = ctx.needs_input_grad[:3]
        grads = differentiate(grad_output, x, mean, rstd, scale, *needs)
        return (*only_needed(grads, needs), None)


def _fake(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty((x.shape[0], x.shape[1:-1].numel()), dtype=compute_dtype(x))
    return torch.empty_like(x), mean, torch.empty_like(mean)


def _fake_backward(
    grad_output: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, *needs: bool
) -> tuple[Tensor, ...]:
    needs_x, *needs_rows = needs
    rows = (scale.new_empty(scale.shape if needed else (0,)) for needed in needs_rows)
    return (torch.empty_like(x) if needs_x else x.new_empty(0), *rows)


register("ada_layer_norm", cuda=False, forward=forward, backward=backward)
fake("ada_layer_norm", _fake)
fake("ada_layer_norm_backward", _fake_backward)
