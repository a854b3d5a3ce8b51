"""The weighted denoising loss of a diffusion network, forward and gradient in one pass."""

from typing import Any

import torch
from torch import Tensor

from diffpp_fast.availability import fake
from diffpp_fast.backends import kernels, register
from diffpp_fast.noise import Noise
from diffpp_fast.ops import checks
from diffpp_fast.ops.autograd import Operator, by_definition, needs_gradient, recorded, straight
from diffpp_fast.plain import compute_dtype, per_sample, stored_like, sum_per_sample
from diffpp_fast.prediction import PREDICTION_TYPES, regression_target


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
        x0: [B, ...], the clean samples behind x_t. Its dtype counts even for "epsilon", whose target does not hold it:
            beside a bfloat16 prediction pass `x0.to(prediction.dtype)` where the target does without it.
        noise: the noise in x_t: a `Noise` of B samples, regenerated from its address, or eps itself.
        alpha: [B], the factor of x0 in x_t.
        sigma: [B], the factor of the noise in x_t.
        prediction_type: "epsilon", "v_prediction", "flow_prediction" or "sample".
        weight: [B], or None for 1.

    Returns:
        A scalar, float32 (float64 for float64 inputs). A NaN in the prediction makes it NaN, and the gradient at that
        element alone.

    Transforms:
        Kernels compute the loss and the gradient of `prediction`, for which the residual is kept, unscaled, in the
        common dtype of the large tensors, and `weight`. Plain torch computes gradients of all other tensors (detach
        those that only make the target), second derivatives, tangents (forward mode) and what `torch.func` makes of the
        operator, `vmap` among it; all are exact.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes, batch sizes or devices differ; the batch is empty; unknown prediction type.
    """
    op = "denoising_loss"
    kind = checks.prediction_type(op, prediction_type)
    checks.floating(
        op, {"prediction": prediction, "x0": x0, "alpha": alpha, "sigma": sigma, "weight": weight}, ("weight",)
    )
    checks.same_shape(op, {"prediction": prediction, "x0": x0})
    checks.per_sample(op, x0.shape[0], {"alpha": alpha, "sigma": sigma, "weight": weight})
    if prediction.numel() == 0:
        raise ValueError(f"{op}: the mean over an empty batch is no number, got shape {list(prediction.shape)}")
    eps, seed, stream = checks.address(op, noise, x0)
    x0 = checks.target_x0(prediction_type, x0, prediction)
    prediction, x0, eps = checks.promoted(prediction, x0, eps)
    arguments = (prediction, x0, eps, seed, stream, alpha, sigma, kind, weight)
    loss: Tensor
    if by_definition(x0, eps, alpha, sigma, weight):
        loss, _ = forward(*arguments, False)
    elif needs_gradient(prediction):
        loss, _ = _DenoisingLoss.directly(prediction, arguments[1:])
    else:
        loss, _ = kernels(op, prediction.device, prediction.dtype, prediction.numel()).forward(*arguments, False)
    return loss


def forward(
    prediction: Tensor,
    x0: Tensor,
    noise: Tensor,
    seed: int,
    stream: int,
    alpha: Tensor,
    sigma: Tensor,
    prediction_type: int,
    weight: Tensor | None,
    save_residual: bool,
) -> tuple[Tensor, Tensor]:
    """Return the loss, and prediction - target in the prediction's dtype, without elements unless `save_residual`.

    The residual is stored unscaled: the gradient's factor 2 weight / (B N) would underflow in float16.
    """
    dtype = compute_dtype(prediction)
    target = regression_target(PREDICTION_TYPES[prediction_type], x0, noise, seed, stream, alpha, sigma)
    residual = prediction.to(dtype) - target
    of_sample = sum_per_sample(residual.square()) / prediction[0].numel()
    if weight is not None:
        of_sample = weight.to(dtype) * of_sample
    return of_sample.mean(), stored_like(residual, prediction) if save_residual else prediction.new_empty(0)


def backward(grad_output: Tensor, residual: Tensor, weight: Tensor | None) -> Tensor:
    """Return d loss / d prediction = grad_output * 2 weight_b / (B N) * residual."""
    dtype = compute_dtype(residual)
    scale = grad_output.to(dtype) * (2.0 / residual.numel())
    if weight is not None:
        scale = scale * per_sample(weight, residual)
    return stored_like(scale * residual.to(dtype), residual)


@straight
class _DenoisingLoss(Operator):
    @staticmethod
    def forward(ctx: Any, prediction: Tensor, others: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """Return the loss and the residual, an output so that second derivatives can go through it."""
        ctx.kernels = kernels("denoising_loss", prediction.device, prediction.dtype, prediction.numel())
        ctx.set_materialize_grads(False)
        loss, residual = ctx.kernels.forward(prediction, *others, True)
        ctx.save_for_backward(residual, others[-1])
        return loss, residual

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, grad_residual: Tensor | None) -> tuple[Tensor | None, ...]:
        residual, weight = ctx.saved_tensors
        grad = grad_residual
        if grad_loss is not None:
            differentiate = backward if recorded(grad_loss) else ctx.kernels.backward
            grad = differentiate(grad_loss, residual, weight)
            if grad_residual is not None:
                grad = grad + grad_residual
        return grad, None


def _shapes(prediction: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    residual = torch.empty_like(prediction) if others[-1] else prediction.new_empty(0)
    return prediction.new_empty((), dtype=compute_dtype(prediction)), residual


register("denoising_loss", forward=forward, backward=backward)
fake("denoising_loss", _shapes)
fake("denoising_loss_backward", lambda grad_output, residual, weight: torch.empty_like(residual))
