"""mean over b of weight_b * mean over elements of (prediction - target)^2."""

from torch import Tensor

from diffpp_fast.kernels.reference import compute_dtype, per_sample, stored_like, sum_per_sample
from diffpp_fast.kernels.reference.philox import Address
from diffpp_fast.kernels.reference.prediction import regression_target


def forward(
    prediction: Tensor,
    x0: Tensor,
    noise: Tensor | Address,
    alpha: Tensor,
    sigma: Tensor,
    prediction_type: str,
    weight: Tensor | None,
    save_residual: bool,
) -> tuple[Tensor, Tensor | None]:
    """The loss, and prediction - target in the prediction's dtype if `save_residual`.

    The residual is stored unscaled: the gradient's factor 2 weight / (B N) would underflow in float16.
    """
    dtype = compute_dtype(prediction)
    residual = prediction.to(dtype) - regression_target(prediction_type, x0, noise, alpha, sigma)
    per_sample_loss = sum_per_sample(residual.square()) / prediction[0].numel()
    if weight is not None:
        per_sample_loss = weight.to(dtype) * per_sample_loss
    return per_sample_loss.mean(), stored_like(residual, prediction) if save_residual else None


def backward(grad_output: Tensor, residual: Tensor, weight: Tensor | None) -> Tensor:
    """d loss / d prediction = grad_output * 2 weight_b / (B N) * residual."""
    dtype = compute_dtype(residual)
    scale = grad_output.to(dtype) * (2.0 / residual.numel())
    if weight is not None:
        scale = scale * per_sample(weight, residual)
    return stored_like(scale * residual.to(dtype), residual)
