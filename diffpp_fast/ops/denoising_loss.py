"""The weighted denoising loss of a diffusion network, forward and gradient in one pass."""

from typing import Any

from torch import Tensor
from torch.autograd import Function

from diffpp_fast.kernels import dispatch
from diffpp_fast.kernels.reference import denoising_loss as definition
from diffpp_fast.kernels.reference.philox import Address
from diffpp_fast.noise import Noise
from diffpp_fast.ops import checks
from diffpp_fast.ops.autograd import by_definition, needs_gradient, recorded


def denoising_loss(
    prediction: Tensor,
    x0: Tensor,
    noise: Noise | Tensor,
    alpha: Tensor,
    sigma: Tensor,
    *,
    prediction_type: str = "epsilon",
    weight: Tensor | None = None,
) -> Tensor:
    """mean over b of weight_b * mean over elements of (prediction - target)^2.

    The target is eps for "epsilon", alpha eps - sigma x0 for "v_prediction", eps - x0 for "flow_prediction" and x0
    for "sample". It is made on the fly; only prediction - target is kept for the backward pass.

    Args:
        prediction: [B, ...], the network's output at (x_t, t).
        x0: [B, ...], the clean samples behind x_t.
        noise: the noise in x_t: a `Noise` of B samples, regenerated from its address, or eps itself.
        alpha: [B], the factor of x0 in x_t.
        sigma: [B], the factor of the noise in x_t.
        prediction_type: "epsilon", "v_prediction", "flow_prediction" or "sample".
        weight: [B], or None for 1.

    Returns:
        A scalar, float32 (float64 for float64 inputs).

    Transforms:
        Kernels compute the loss and the gradient of `prediction`. Plain torch computes gradients of all other tensors
        (detach those that only make the target), second derivatives, tangents (forward mode) and what `torch.func`
        makes of the operator, `vmap` among it; all are exact.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes, batch sizes or devices differ; the batch is empty; unknown prediction type.
    """
    op = "denoising_loss"
    checks.prediction_type(op, prediction_type)
    checks.floating(
        op, {"prediction": prediction, "x0": x0, "alpha": alpha, "sigma": sigma, "weight": weight}, ("weight",)
    )
    checks.same_shape(op, {"prediction": prediction, "x0": x0})
    checks.per_sample(op, x0.shape[0], {"alpha": alpha, "sigma": sigma, "weight": weight})
    if prediction.numel() == 0:
        raise ValueError(f"{op}: the mean over an empty batch is no number, got shape {list(prediction.shape)}")
    eps = checks.noise(op, noise, x0)
    x0 = checks.target_x0(prediction_type, x0, prediction)
    dtype = checks.common_dtype(prediction, x0, eps)
    arguments = (
        checks.cast(prediction, dtype),
        checks.cast(x0, dtype),
        checks.cast(eps, dtype),
        alpha,
        sigma,
        prediction_type,
        weight,
    )
    loss: Tensor
    if by_definition(x0, eps, alpha, sigma, weight):
        loss, _ = definition.forward(*arguments, save_residual=False)
    elif needs_gradient(prediction):
        loss, _ = _DenoisingLoss.apply(*arguments)
    else:
        loss, _ = dispatch.select(op, prediction.device, dtype).forward(*arguments, save_residual=False)
    return loss


class _DenoisingLoss(Function):
    @staticmethod
    def forward(
        ctx: Any,
        prediction: Tensor,
        x0: Tensor,
        noise: Address | Tensor,
        alpha: Tensor,
        sigma: Tensor,
        prediction_type: str,
        weight: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The loss and the residual, an output so that second derivatives can go through it."""
        ctx.kernels = dispatch.select("denoising_loss", prediction.device, prediction.dtype)
        ctx.set_materialize_grads(False)
        loss, residual = ctx.kernels.forward(
            prediction, x0, noise, alpha, sigma, prediction_type, weight, save_residual=True
        )
        ctx.save_for_backward(residual, weight)
        return loss, residual

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, grad_residual: Tensor | None) -> tuple[Tensor | None, ...]:
        residual, weight = ctx.saved_tensors
        grad = grad_residual
        if grad_loss is not None:
            kernels = definition if recorded() else ctx.kernels
            grad = kernels.backward(grad_loss, residual, weight)
            if grad_residual is not None:
                grad = grad + grad_residual
        return grad, None, None, None, None, None, None
