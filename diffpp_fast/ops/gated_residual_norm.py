"""A gated residual, the norm of the sum, and its modulation, forward and backward."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffpp_fast import transforms
from diffpp_fast.backends import kernels, register
from diffpp_fast.library import operators
from diffpp_fast.ops import checks
from diffpp_fast.ops.autograd import Operator, needs_gradient, only_needed, recorded, straight
from diffpp_fast.plain import compute_dtype, stored_like

NORMS = ("layer", "rms")
Gradients = tuple[Tensor | None, ...]


class Needs(NamedTuple):
    """The tensors that get gradients."""

    residual: bool
    branch: bool
    gate: bool
    weight: bool
    scale: bool
    shift: bool


def gated_residual_norm(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    norm: str = "layer",
    weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """h = residual + gate branch, and norm(h) weight (1 + scale) + shift: what stands between two layers of a DiT.

    `h` is rounded to its dtype before it is normalised, as the next layers will find it. The norm goes over the last
    dimension: layer norm, with the biased variance in two passes, or RMS norm, h / sqrt(mean h^2 + eps).

    Args:
        residual: [B, ..., D].
        branch: the same shape.
        gate: [B, D] or [B, 1, ..., 1, D], one row for each sample, or [B, ..., D]; None is 1. Its dtype may be its own.
        scale: the same; None is 0.
        shift: the same; None is 0.
        norm: "layer" or "rms".
        weight: [D], of the norm; None is 1.
        eps: added to the variance, or to the mean of the squares.

    Returns:
        h and its modulated norm, [B, ..., D] in the common dtype of `residual` and `branch`. An empty batch gives empty
        results.

    Transforms:
        Kernels compute values and the gradients of all tensors, for which h, each row's mean and deviation, the vectors
        and, for the gate's, the branch are kept. Plain torch computes second derivatives, tangents (forward mode) and
        what `torch.func` makes of the operator, `vmap` among it; all are exact.

    Raises:
        TypeError: an argument is not a floating-point tensor, or eps not a number.
        ValueError: wrong shapes, an unknown norm, a row has no elements or, on backend "triton", more than 6144, eps is
            negative or not finite.
    """
    op = "gated_residual_norm"
    tensors = {"residual": residual, "branch": branch, "gate": gate, "scale": scale, "shift": shift, "weight": weight}
    checks.floating(op, tensors, optional=("gate", "scale", "shift", "weight"))
    checks.same_shape(op, {"residual": residual, "branch": branch})
    if residual.dim() < 2:
        raise ValueError(f"{op}: residual must have shape [B, ..., D], got {list(residual.shape)}")
    checks.elements(op, "residual", residual)
    checks.one_of(op, "norm", norm, NORMS)
    if weight is not None and weight.shape != residual.shape[-1:]:
        raise ValueError(f"{op}: weight must have shape [D] = {list(residual.shape[-1:])}, got {list(weight.shape)}")
    residual, branch = checks.promoted(residual, branch)
    rows = [_rows_of(op, name, tensors[name], residual) for name in ("gate", "scale", "shift")]
    if any(values is not None and values.dim() == 3 for values in rows):
        # All have a row for each row, or for each sample: the views cost nothing.
        count = residual.shape[1:-1].numel()
        rows = [
            values if values is None or values.dim() == 3 else values[:, None].expand(-1, count, -1) for values in rows
        ]
    weight, gate, scale, shift = (_precise(values, residual) for values in (weight, *rows))
    arguments = residual, branch, gate, weight, scale, shift, checks.eps(op, eps), norm == "layer"
    if transforms.active():
        hidden, modulated, _, _ = forward(*arguments)
    elif needs_gradient(*arguments):
        hidden, modulated = _GatedResidualNorm.directly(*arguments)
    else:
        hidden, modulated, _, _ = kernels(op, residual.device, residual.dtype).forward(*arguments)
    return hidden, modulated


def _rows_of(op: str, name: str, values: Tensor | None, like: Tensor) -> Tensor | None:
    """A modulation as [B, D], or as [B, rows, D] if it has one for each row."""
    if values is None:
        return None
    batch, width = like.shape[0], like.shape[-1]
    if values.dim() >= 2 and (values.shape[0], values.shape[-1]) == (batch, width):
        if values[:1].numel() <= width:
            return values.reshape(batch, width)
        if values.shape == like.shape:
            return values.reshape(batch, like.shape[1:-1].numel(), width)
    raise ValueError(
        f"{op}: {name} must have shape [B, D] = [{batch}, {width}], [B, 1, D] or that of residual, "
        f"{list(like.shape)}, got {list(values.shape)}"
    )


def _precise(values: Tensor | None, like: Tensor) -> Tensor | None:
    """Kernels compute in one precision: float64 for all, or for none."""
    if values is None or (values.dtype == torch.float64) == (like.dtype == torch.float64):
        return values
    return values.to(torch.promote_types(like.dtype, torch.float32))


def forward(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    layer: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return h, its modulated norm, and of each row the mean, None for RMS, and 1 / deviation: [B, rows]."""
    hidden = _sum(residual, branch, gate)
    normalized, mean, rstd = _normalized(_rows(hidden), eps, layer)
    y = normalized if weight is None else normalized * weight.to(normalized.dtype)
    if scale is not None and shift is not None:
        y = torch.addcmul(_by_row(shift, y), y, 1.0 + _by_row(scale, y))
    elif scale is not None:
        y = y * (1.0 + _by_row(scale, y))
    elif shift is not None:
        y = y + _by_row(shift, y)
    return hidden, _stored(y, residual), mean, rstd


def backward(
    grad_hidden: Tensor,
    grad_modulated: Tensor,
    hidden: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    needs: Needs,
) -> Gradients:
    """Return the gradients of residual, branch, gate, weight, scale and shift, each where it is needed."""
    rows, grad = _rows(hidden), _rows(grad_modulated)
    normalized = (rows if mean is None else rows - mean[:, :, None]) * rstd[:, :, None]
    factor = None if scale is None else 1.0 + _by_row(scale, grad)
    own = None if weight is None else weight.to(grad.dtype)
    grads: dict[str, Tensor | None] = dict.fromkeys(Needs._fields)
    if needs.shift and shift is not None:
        grads["shift"] = _summed(grad, shift)
    if needs.scale and scale is not None:
        grads["scale"] = _summed(_times(grad * normalized, own), scale)
    if needs.weight and weight is not None:
        grads["weight"] = _times(grad * normalized, factor).sum(dim=(0, 1)).to(weight.dtype)
    if needs.residual or needs.branch or needs.gate:
        g = _times(_times(grad, factor), own)
        if mean is not None and not recorded(grad_hidden, grad_modulated):
            width, only_input = [rows.shape[2]], [True, False, False]
            statistics = mean[:, :, None], rstd[:, :, None]
            g, _, _ = torch.ops.aten.native_layer_norm_backward(g, rows, width, *statistics, None, None, only_input)
            g = g + _rows(grad_hidden)
        else:
            if mean is not None:
                g = g - g.mean(dim=2, keepdim=True)
            g = g - normalized * (g * normalized).mean(dim=2, keepdim=True)
            g = torch.addcmul(_rows(grad_hidden), rstd[:, :, None], g)
        if needs.residual or gate is None:
            grads["residual"] = _stored(g, hidden)
        if needs.gate and gate is not None:
            grads["gate"] = _summed(g * _rows(branch), gate)
        if needs.branch:
            grads["branch"] = _branch_gradient(g, branch, gate, grads["residual"])
    return tuple(grads.values())


def cpu_forward(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    layer: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The same on the CPU: where it can, by csrc's `ada_layer_norm` behind torch's residual."""
    if scale is None or shift is None or not _is_ada(layer, weight, scale):
        return forward(residual, branch, gate, weight, scale, shift, eps, layer)
    hidden = _sum(residual, branch, gate)
    y, mean, rstd = operators.ada_layer_norm(hidden, *checks.promoted(scale, shift), eps)
    return hidden, y, mean, rstd


def cpu_backward(
    grad_hidden: Tensor,
    grad_modulated: Tensor,
    hidden: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    needs: Needs,
) -> Gradients:
    """Return what `backward` does."""
    if scale is None or shift is None or mean is None or not _is_ada(True, weight, scale):
        return backward(grad_hidden, grad_modulated, hidden, mean, rstd, branch, gate, weight, scale, shift, needs)
    needs_sum = needs.residual or needs.branch or needs.gate
    normed, grad_scale, grad_shift = operators.ada_layer_norm_backward(
        grad_modulated, hidden, mean, rstd, scale, needs_sum, needs.scale, needs.shift
    )
    grad_branch = grad_gate = None
    if needs_sum:
        normed = normed + grad_hidden
        rows = _rows(normed)
        if needs.gate and gate is not None:
            grad_gate = _summed(rows * _rows(branch), gate)
        if needs.branch:
            grad_branch = _branch_gradient(rows, branch, gate, normed)
    return normed, grad_branch, grad_gate, None, grad_scale, grad_shift.to(shift.dtype)


def _branch_gradient(grad: Tensor, branch: Tensor, gate: Tensor | None, grad_residual: Tensor | None) -> Tensor | None:
    """Return that of h, [B, rows, D], through the gate.

    Without one it is the residual's, and the same tensor: autograd would let two of one memory accumulate in place.
    """
    if gate is None:
        return grad_residual
    return _stored(grad * _by_row(gate, grad), branch)


def _is_ada(layer: bool, weight: Tensor | None, scale: Tensor) -> bool:
    """Whether the norm is `ada_layer_norm`."""
    return layer and weight is None and scale.dim() == 2


def _sum(residual: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    """residual + gate branch, as it is stored."""
    rows, added = _rows(residual), _rows(branch)
    total = rows + added if gate is None else torch.addcmul(rows, _by_row(gate, added), added)
    return _stored(total, residual)


def _normalized(rows: Tensor, eps: float, layer: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return normalised rows [B, rows, D], and their means and 1 / deviation."""
    if layer:
        normalized, mean, rstd = torch.native_layer_norm(rows, [rows.shape[2]], None, None, eps)
        return normalized, mean[:, :, 0], rstd[:, :, 0]
    rstd = torch.rsqrt(rows.square().mean(dim=2) + eps)
    return rows * rstd[:, :, None], None, rstd


def _statistics(rows: Tensor, eps: float, layer: bool) -> tuple[Tensor | None, Tensor]:
    """Return what `_normalized` does beside the rows, differentiably: torch's layer norm differentiates rows alone."""
    mean = rows.mean(dim=2) if layer else None
    centered = rows if mean is None else rows - mean[:, :, None]
    return mean, torch.rsqrt(centered.square().mean(dim=2) + eps)


def _times(values: Tensor, factor: Tensor | None) -> Tensor:
    return values if factor is None else values * factor


def _stored(rows: Tensor, like: Tensor) -> Tensor:
    """New rows [B, rows, D] in the shape, dtype and memory layout of `like`, without a copy where it is row-major."""
    if not like.is_contiguous():
        return stored_like(rows.reshape(like.shape), like)
    # A view may not be written in place where it is one of a Function's two results.
    stored: Tensor = torch.ops.aten._unsafe_view(rows.to(like.dtype).contiguous(), like.shape)
    return stored


def _rows(x: Tensor) -> Tensor:
    """[B, ..., D] -> [B, rows, D] in the compute dtype."""
    return x.to(compute_dtype(x)).reshape(x.shape[0], x.shape[1:-1].numel(), x.shape[-1])


def _by_row(values: Tensor, like: Tensor) -> Tensor:
    """[B, D] or [B, rows, D] -> what broadcasts with [B, rows, D], in the compute dtype."""
    return (values if values.dim() == 3 else values[:, None]).to(like.dtype)


def _summed(grad: Tensor, values: Tensor) -> Tensor:
    """[B, rows, D] -> the gradient of `values`."""
    return (grad if values.dim() == 3 else grad.sum(dim=1)).to(values.dtype)


@straight
class _GatedResidualNorm(Operator):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        residual, branch, gate, weight, scale, shift, ctx.eps, layer = arguments
        ctx.kernels = kernels("gated_residual_norm", residual.device, residual.dtype)
        hidden, modulated, mean, rstd = ctx.kernels.forward(*arguments)
        # Only the gate's gradient is made of the branch.
        kept = branch if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(hidden, mean, rstd, kept, gate, weight, scale, shift)
        ctx.layer = layer
        return hidden, modulated

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        hidden, mean, rstd, branch, gate, weight, scale, shift = ctx.saved_tensors
        needs, differentiate = Needs(*ctx.needs_input_grad[:6]), ctx.kernels.backward
        if recorded(*grads):
            differentiate = backward
            mean, rstd = _statistics(_rows(hidden), ctx.eps, ctx.layer)  # which depend on it
        like = hidden if branch is None else branch
        found = differentiate(*grads, hidden, mean, rstd, like, gate, weight, scale, shift, needs)
        return (*only_needed(found, needs), None, None)


register(
    "gated_residual_norm",
    cpu=SimpleNamespace(forward=cpu_forward, backward=cpu_backward),
    cuda=False,
    forward=forward,
    backward=backward,
)
