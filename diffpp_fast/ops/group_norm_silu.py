"""Group normalisation with its activation, forward and backward."""

from typing import Any

from torch import Tensor
from torch.autograd import Function

from diffpp_fast import transforms
from diffpp_fast.arguments import integer
from diffpp_fast.kernels import dispatch
from diffpp_fast.kernels.reference import group_norm_silu as definition
from diffpp_fast.ops import checks
from diffpp_fast.ops.autograd import needs_gradient, recorded

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
        [B, C, ...] in the dtype and memory format of `x`. An empty batch gives an empty result.

    Transforms:
        Kernels compute the value and the gradients of `x`, `weight` and `bias`. Plain torch computes second
        derivatives, tangents (forward mode) and what `torch.func` makes of the operator, `vmap` among it; all are
        exact.

    Raises:
        TypeError: an argument is not a floating-point tensor, num_groups not an integer, or eps not a number.
        ValueError: wrong shapes, num_groups does not divide C, a sample has no elements, eps is negative or not
            finite, unknown activation.
    """
    op = "group_norm_silu"
    checks.floating(op, {"x": x, "weight": weight, "bias": bias}, optional=("weight", "bias"))
    if x.dim() < 2:
        raise ValueError(f"{op}: x must have shape [B, C, ...], got {list(x.shape)}")
    checks.elements(op, "x", x)
    channels = x.shape[1]
    num_groups = integer(op, "num_groups", num_groups)
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"{op}: num_groups must divide the {channels} channels, got {num_groups}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != (channels,):
            raise ValueError(f"{op}: {name} must have shape [C] = [{channels}], got {list(parameter.shape)}")
    eps = checks.eps(op, eps)
    checks.one_of(op, "activation", activation, ACTIVATIONS)
    y: Tensor
    if transforms.active():
        y, _, _ = definition.forward(x, num_groups, weight, bias, eps, activation)
    elif needs_gradient(x, weight, bias):
        y = _GroupNormSilu.apply(x, weight, bias, num_groups, eps, activation)
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
        ctx.eps, ctx.activation = eps, activation
        y: Tensor
        y, mean, rstd = ctx.kernels.forward(x, num_groups, weight, bias, eps, activation)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias = ctx.saved_tensors
        kernels = ctx.kernels
        if recorded():
            kernels = definition
            _, mean, rstd = definition.forward(x, mean.shape[1], weight, bias, ctx.eps, ctx.activation)  # depend on x
        grads = kernels.backward(grad_output, x, mean, rstd, weight, bias, ctx.activation, ctx.needs_input_grad[:3])
        return (*grads, None, None, None)
