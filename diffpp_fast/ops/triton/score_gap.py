"""d = guided - fake, scaled and normalised per sample, with the statistics of d and of the residual r."""

import triton
import triton.language as tl
from torch import Tensor

from diffpp_fast.kernels.reference.philox import Address
from diffpp_fast.ops.triton.device import on_its_device
from diffpp_fast.ops.triton.gap import (
    BLOCK,
    WARPS,
    Outputs,
    combine,
    floored_mean,
    guide,
    load,
    per_sample,
    scale_arguments,
    tile,
)


@on_its_device
def forward(
    fake: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    guidance_scale: float,
    scale: float | Tensor,
    mean_abs_normalizer: bool,
    x0: Tensor | None,
    noise: Tensor | Address | None,
    alpha: Tensor | None,
    sigma: Tensor | None,
    prediction_type: str,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Two launches: the sums, then the statistics; the first of them that knows the normaliser writes the gradient."""
    outputs = Outputs(fake, cond, uncond, guidance_scale, x0, noise, alpha, sigma, prediction_type)
    order, programs = outputs.order, outputs.programs
    gradient = order.result(fake)
    gap_sq = outputs.statistic()
    residual_abs = outputs.statistic() if outputs.has_target else None
    gap_dot_residual = outputs.statistic() if outputs.has_target else None
    if fake.numel():
        partials = outputs.sums(0.0, None if mean_abs_normalizer else gradient, scale)
        _finish[(order.batch * (programs if mean_abs_normalizer else 1),)](
            gap_sq,
            residual_abs,
            gap_dot_residual,
            p_partials=partials,
            batch=order.batch,
            programs=programs,
            elements=float(order.sample),
            p_gradient=gradient if mean_abs_normalizer else None,
            **scale_arguments(scale),
            **outputs.gap,
            sample=order.sample,
            WIDE=order.constants["WIDE"],
            BLOCK=BLOCK,
            num_warps=WARPS if mean_abs_normalizer else 1,
        )
    return order.finish(gradient, fake), gap_sq, residual_abs, gap_dot_residual


@triton.jit(do_not_specialize=["batch", "programs"])
def _finish(
    p_gap_sq,  # float32 [B]
    p_residual_abs,  # float32 [B], or None for no target, as the next
    p_gap_dot_residual,
    p_partials,  # float32 [3, B, programs]
    batch,
    programs,
    elements,
    p_gradient,  # [B, sample] as the outputs, or None where it is written already
    p_scale,  # [B], or None for `scale`
    scale_stride,
    scale,
    p_fake,  # [B, sample]
    p_cond,
    p_uncond,  # or None for no guidance
    w,
    sample,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sharing = 1 if p_gradient is None else programs
    b = tl.program_id(0) // sharing
    program = tl.program_id(0) % sharing
    if p_residual_abs is not None:
        # Every program of a sample adds up the same numbers in the same order: none has to wait for another.
        mean, divisor = floored_mean(combine(p_partials, 1, batch, b, programs), elements)
    if p_gradient is not None:
        start = b.to(tl.int64) * sample
        factor = tl.div_rn(per_sample(p_scale, scale_stride, b, scale), divisor)
        for step in range(tl.cdiv(tl.cdiv(sample, BLOCK) - program, programs)):
            _, b_at, m_inside = tile(program + step * programs, sample, 1, False, WIDE, BLOCK)
            b_gap = guide(p_cond, p_uncond, w, start, b_at, m_inside) - load(p_fake + start, b_at, m_inside)
            tl.store(p_gradient + start + b_at, (factor * b_gap).to(p_gradient.dtype.element_ty), mask=m_inside)
    if program == 0:
        tl.store(p_gap_sq + b, combine(p_partials, 0, batch, b, programs))
        if p_residual_abs is not None:
            tl.store(p_residual_abs + b, mean)
            tl.store(p_gap_dot_residual + b, combine(p_partials, 2, batch, b, programs))
