"""m^2 Q / sqrt(m^2 sum d^2 + c^2) per sample, with Q = sum d r - sum d^2 and m the scale from outputs to scores."""

import triton
import triton.language as tl
from torch import Tensor

from diffpp_fast.kernels.reference.philox import Address
from diffpp_fast.ops.triton.device import on_its_device
from diffpp_fast.ops.triton.gap import Outputs, combine, per_sample


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
    huber_c: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss [B], m^2 / n [B] and m^2 Q / n^2 [B], in two launches."""
    outputs = Outputs(fake, cond, uncond, guidance_scale, x0, noise, alpha, sigma, prediction_type)
    loss, factor, shrink = outputs.statistic(), outputs.statistic(), outputs.statistic()
    if fake.numel():
        batch = outputs.order.batch
        _finish[(batch,)](
            loss,
            factor,
            shrink,
            outputs.sums(1.0),
            batch,
            outputs.programs,
            float(huber_c) ** 2,
            alpha,
            alpha.stride(0),
            sigma,
            sigma.stride(0),
            PREDICTION=prediction_type,
            num_warps=1,
        )
    return loss, factor, shrink


@on_its_device
def backward(
    grad_output: Tensor,
    factor: Tensor,
    shrink: Tensor,
    fake: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    x0: Tensor,
    noise: Tensor | Address,
    alpha: Tensor,
    sigma: Tensor,
    guidance_scale: float,
    prediction_type: str,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of fake, cond, uncond and x0, each where `needs` says so, in one launch."""
    outputs = Outputs(fake, cond, uncond, guidance_scale, x0, noise, alpha, sigma, prediction_type)
    return outputs.gradients(grad_output, factor, 2.0, shrink, cond, uncond, x0, needs)


@triton.jit(do_not_specialize=["batch", "programs"])
def _finish(
    p_loss,  # float32 [B]
    p_factor,  # float32 [B]
    p_shrink,  # float32 [B]
    p_partials,  # float32 [3, B, programs]
    batch,
    programs,
    c_sq,
    p_alpha,  # [B]
    alpha_stride,
    p_sigma,  # [B]
    sigma_stride,
    PREDICTION: tl.constexpr,
):
    b = tl.program_id(0)
    sigma = per_sample(p_sigma, sigma_stride, b, 1.0)
    if PREDICTION == "epsilon":
        m = tl.div_rn(1.0, sigma)
    else:
        m = tl.div_rn(per_sample(p_alpha, alpha_stride, b, 1.0), sigma)
        if PREDICTION == "sample":
            m = tl.div_rn(m, sigma)
    m_sq = m * m
    norm = tl.sqrt_rn(tl.fma(m_sq, combine(p_partials, 0, batch, b, programs), c_sq))
    factor = tl.div_rn(m_sq, norm)
    loss = factor * combine(p_partials, 2, batch, b, programs)
    tl.store(p_factor + b, factor)
    tl.store(p_loss + b, loss)
    tl.store(p_shrink + b, tl.div_rn(loss, norm))
