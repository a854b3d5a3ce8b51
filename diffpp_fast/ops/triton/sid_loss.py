"""|k| (sum d r - sid_alpha sum d^2) / mean|r| per sample, with no gradient through mean|r|."""

import triton
import triton.language as tl
from torch import Tensor

from diffpp_fast.kernels.reference.philox import Address
from diffpp_fast.ops.triton.device import on_its_device
from diffpp_fast.ops.triton.gap import Outputs, combine, floored_mean, per_sample


@on_its_device
def forward(
    fake: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    x0: Tensor,
    noise: Tensor | Address,
    alpha: Tensor,
    sigma: Tensor,
    guidance_scale: float,
    prediction_type: str,
    sid_alpha: float,
) -> tuple[Tensor, Tensor]:
    """The loss [B] and |k| / mean|r| [B], in two launches."""
    outputs = Outputs(fake, cond, uncond, guidance_scale, x0, noise, alpha, sigma, prediction_type)
    loss, factor = outputs.statistic(), outputs.statistic()
    if fake.numel():
        batch = outputs.order.batch
        _finish[(batch,)](
            loss,
            factor,
            outputs.sums(sid_alpha),
            batch,
            outputs.programs,
            float(outputs.order.sample),
            alpha,
            alpha.stride(0),
            sigma,
            sigma.stride(0),
            PREDICTION=prediction_type,
            num_warps=1,
        )
    return loss, factor


@on_its_device
def backward(
    grad_output: Tensor,
    factor: Tensor,
    fake: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    x0: Tensor,
    noise: Tensor | Address,
    alpha: Tensor,
    sigma: Tensor,
    guidance_scale: float,
    prediction_type: str,
    sid_alpha: float,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of fake, cond, uncond and x0, each where `needs` says so, in one launch."""
    outputs = Outputs(fake, cond, uncond, guidance_scale, x0, noise, alpha, sigma, prediction_type)
    return outputs.gradients(grad_output, factor, 2.0 * sid_alpha, None, cond, uncond, x0, needs)


@triton.jit(do_not_specialize=["batch", "programs"])
def _finish(
    p_loss,  # float32 [B]
    p_factor,  # float32 [B]
    p_partials,  # float32 [3, B, programs]
    batch,
    programs,
    elements,
    p_alpha,  # [B]
    alpha_stride,
    p_sigma,  # [B]
    sigma_stride,
    PREDICTION: tl.constexpr,
):
    b = tl.program_id(0)
    _, divisor = floored_mean(combine(p_partials, 1, batch, b, programs), elements)
    if PREDICTION == "sample":
        k = 1.0
    else:
        k = tl.abs(per_sample(p_sigma, sigma_stride, b, 1.0))
        if PREDICTION == "epsilon":
            k = tl.div_rn(k, tl.abs(per_sample(p_alpha, alpha_stride, b, 1.0)))
    factor = tl.div_rn(k, divisor)
    tl.store(p_factor + b, factor)
    tl.store(p_loss + b, factor * combine(p_partials, 2, batch, b, programs))
