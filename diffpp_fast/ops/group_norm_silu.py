"""Group normalisation with its activation, forward and backward."""

from typing import Any

from torch import Tensor
from torch.autograd import Function

from diffpp_fast.kernels import dispatch
from diffpp_fast.ops import checks
from diffpp_fast.ops.autograd import once_differentiable

ACTIVATIONS = ("silu", "identity")


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
) -> Tensor:
    """silu(y) or y, with y = (x - mean) / sqrt(variance + eps) * weight + bias over groups of channels.

    Equals `torch.nn.functional.group_norm` followed by `silu`. The variance is the biased one, in two passes.

    Args:
        x: [B, C, ...], any number of spatial dimensions.
        num_groups: divides C.
        weight: [C] or None for 1; its dtype may differ from that of `x`.
        bias: [C] or None for 0.
        eps: added to the variance.
        activation: "silu" or "identity".

    Returns:
        [B, C, ...] in the dtype and memory format of `x`. Differentiable in `x`, `weight` and `bias`. An empty batch
        gives an empty result.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: wrong shapes, num_groups does not divide C, a sample has no elements, unknown activation.
    """
    op = "group_norm_silu"
    checks.floating(op, {"x": x, "weight": weight, "bias": bias})
    if x.dim() < 2:
        raise ValueError(f"{op}: x must have shape [B, C, ...], got {list(x.shape)}")
    checks.elements(op, "x", x)
    channels = x.shape[1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"{op}: num_groups must divide the {channels} channels, got {num_groups}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != (channels,):
            raise ValueError(f"{op}: {name} must have shape [C] = [{channels}], got {list(parameter.shape)}")
    if not eps >= 0.0:
        raise ValueError(f"{op}: eps must not be negative, got {eps}")
    checks.one_of(op, "activation", activation, ACTIVATIONS)
    if checks.needs_gradient(x, weight, bias):
        y: Tensor = _GroupNormSilu.apply(x, weight, bias, num_groups, eps, activation)
    else:
        y, _, _ = dispatch.select(op, x.device, x.dtype).forward(x, num_groups, weight, bias, eps, activation)
    return y


class _GroupNormSilu(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        num_groups: int,
        eps: float,
        activation: str,
    ) -> Tensor:
        ctx.kernels = dispatch.select("group_norm_silu", x.device, x.dtype)
        ctx.activation = activation
        y: Tensor
        y, mean, rstd = ctx.kernels.forward(x, num_groups, weight, bias, eps, activation)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.kernels.backward(grad_output, *ctx.saved_tensors, ctx.activation, ctx.needs_input_grad[:3])
        return (*grads, None, None, None)
