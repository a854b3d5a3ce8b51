"""d = guided - fake, scaled and normalised per sample, with the statistics of d and of the residual r."""

import triton
import triton.language as tl
from torch import Tensor

from diffpp_fast.ops.triton.device import on_its_device
from diffpp_fast.ops.triton.gap import (
    BLOCK,
    WARPS,
    Gap,
    Target,
    combine,
    floored_mean,
    guide,
    load,
    per_sample,
    stride,
)
from diffpp_fast.ops.triton.layout import in_order

#: Left to itself, ptxas spills a register for sm_100 to fit more programs.
MOST_REGISTERS = 96


@on_its_device
def forward(
    fake: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    guidance_scale: float,
    scale: float,
    scales: Tensor | None,
    mean_abs: bool,
    x0: Tensor | None,
    noise: Tensor | None,
    seed: int,
    stream: int,
    alpha: Tensor | None,
    sigma: Tensor | None,
    prediction_type: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two launches: the sums, then the statistics; the first of them that knows the normaliser writes the gradient."""
    gap = Gap(fake, cond, uncond, guidance_scale)
    order, programs = gap.order, gap.programs
    target = Target(order, prediction_type, x0, noise, seed, stream, alpha, sigma)
    gradient = order.result(fake)
    gap_sq = gap.statistic()
    residual_abs = None if noise is None else gap.statistic()
    gap_dot_residual = None if noise is None else gap.statistic()
    if fake.numel():
        partials = gap.sums(target, None, None if mean_abs else gradient, scale, scales)
        _finish[order.batch, programs if mean_abs else 1](
            p_gap_sq=gap_sq,
            p_residual_abs=residual_abs,
            p_gap_dot_residual=gap_dot_residual,
            p_partials=partials,
            batch=order.batch,
            programs=programs,
            elements=float(order.sample),
            p_gradient=gradient if mean_abs else None,
            p_scale=scales,
            scale_stride=stride(scales),
            scale=float(scale),
            p_fake=gap.fake,
            p_cond=gap.cond,
            p_uncond=gap.uncond,
            w=gap.w,
            sample=order.sample,
            EVEN=order.sample % BLOCK == 0,
            WIDE=order.wide,
            BLOCK=BLOCK,
            num_warps=WARPS if mean_abs else 1,
            maxnreg=MOST_REGISTERS,
        )
    nothing = gap_sq.new_empty(0)
    return (
        order.finish(gradient, fake),
        gap_sq,
        nothing if residual_abs is None else residual_abs,
        nothing if gap_dot_residual is None else gap_dot_residual,
    )


@on_its_device
def score_gap_with_reward(
    fake: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    guidance_scale: float,
    scale: float,
    scales: Tensor | None,
    mean_abs: bool,
    x0: Tensor | None,
    noise: Tensor | None,
    seed: int,
    stream: int,
    alpha: Tensor | None,
    sigma: Tensor | None,
    prediction_type: int,
    reward_score: Tensor,
    reward_scale: float,
    reward_scales: Tensor | None,
    reward_clip: float,
) -> tuple[Tensor, ...]:
    """Two launches: the sums and, but for "mean_abs", the gradient; then the statistics, and what they change of it."""
    gap = Gap(fake, cond, uncond, guidance_scale)
    order, programs = gap.order, gap.programs
    target = Target(order, prediction_type, x0, noise, seed, stream, alpha, sigma)
    gradient, reward = order.result(fake), order.of(reward_score)
    gap_sq, reward_sq, gap_dot_reward, share = (gap.statistic() for _ in range(4))
    residual_abs = None if noise is None else gap.statistic()
    gap_dot_residual = None if noise is None else gap.statistic()
    if fake.numel():
        early = None if mean_abs else gradient
        partials = gap.sums(target, None, early, scale, scales, reward, reward_scale, reward_scales)
        _settle[order.batch, programs](
            p_gap_sq=gap_sq,
            p_residual_abs=residual_abs,
            p_gap_dot_residual=gap_dot_residual,
            p_reward_sq=reward_sq,
            p_gap_dot_reward=gap_dot_reward,
            p_share=share,
            p_partials=partials,
            batch=order.batch,
            programs=programs,
            elements=float(order.sample),
            p_gradient=gradient,
            p_scale=scales,
            scale_stride=stride(scales),
            scale=float(scale),
            p_reward=reward,
            p_reward_scale=reward_scales,
            reward_scale_stride=stride(reward_scales),
            reward_scale=float(reward_scale),
            reward_clip=float(reward_clip),
            p_fake=gap.fake,
            p_cond=gap.cond,
            p_uncond=gap.uncond,
            w=gap.w,
            sample=order.sample,
            MEAN_ABS=mean_abs,
            EVEN=order.sample % BLOCK == 0,
            WIDE=order.wide,
            BLOCK=BLOCK,
            num_warps=WARPS,
            maxnreg=MOST_REGISTERS,
        )
    nothing = gap_sq.new_empty(0)
    return (
        order.finish(gradient, fake),
        gap_sq,
        nothing if residual_abs is None else residual_abs,
        nothing if gap_dot_residual is None else gap_dot_residual,
        reward_sq,
        gap_dot_reward,
        share,
    )


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
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0)
    program = tl.program_id(1)
    if p_residual_abs is not None:
        # Every program of a sample adds up the same numbers in the same order: none has to wait for another.
        mean, divisor = floored_mean(combine(p_partials, 1, batch, b, programs), elements)
    if p_gradient is not None:
        start = b.to(tl.int64) * sample
        factor = tl.div_rn(per_sample(p_scale, scale_stride, b, scale), divisor)
        for block in range(program, tl.cdiv(sample, BLOCK), programs):
            b_at, m_inside = in_order(block, sample, p_fake.dtype.element_ty, EVEN, WIDE, BLOCK)
            b_gap = guide(p_cond, p_uncond, w, start, b_at, m_inside) - load(p_fake + start, b_at, m_inside)
            tl.store(p_gradient + start + b_at, (factor * b_gap).to(p_gradient.dtype.element_ty), mask=m_inside)
    if program == 0:
        tl.store(p_gap_sq + b, combine(p_partials, 0, batch, b, programs))
        if p_residual_abs is not None:
            tl.store(p_residual_abs + b, mean)
            tl.store(p_gap_dot_residual + b, combine(p_partials, 2, batch, b, programs))


@triton.jit
def reward_share(length, limit):
    """The share that is left of a term of this length: all, what a limit leaves, or nothing where it is not finite."""
    share = tl.where(length > limit, tl.div_rn(limit, length), 1.0)
    return tl.where(length - length == 0.0, share, 0.0)


@triton.jit(do_not_specialize=["batch", "programs"])
def _settle(
    p_gap_sq,  # float32 [B]
    p_residual_abs,  # float32 [B], or None for no target, as the next
    p_gap_dot_residual,
    p_reward_sq,  # float32 [B]
    p_gap_dot_reward,
    p_share,
    p_partials,  # float32 [5, B, programs]
    batch,
    programs,
    elements,
    p_gradient,  # [B, sample] as the outputs; without MEAN_ABS it holds what a share of 1 makes of them
    p_scale,  # [B], or None for `scale`
    scale_stride,
    scale,
    p_reward,  # [B, sample]
    p_reward_scale,  # [B], or None for `reward_scale`
    reward_scale_stride,
    reward_scale,
    reward_clip,
    p_fake,  # [B, sample]
    p_cond,
    p_uncond,  # or None for no guidance
    w,
    sample,
    MEAN_ABS: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0)
    program = tl.program_id(1)
    # Every program of a sample adds up the same numbers in the same order: none has to wait for another.
    gap_sq = combine(p_partials, 0, batch, b, programs)
    reward_sq = combine(p_partials, 3, batch, b, programs)
    factor = per_sample(p_scale, scale_stride, b, scale)
    reward_factor = per_sample(p_reward_scale, reward_scale_stride, b, reward_scale)
    limit = reward_clip * tl.abs(factor) * tl.sqrt_rn(gap_sq)
    share = reward_share(tl.abs(reward_factor) * tl.sqrt_rn(reward_sq), limit)
    if p_residual_abs is not None:
        mean, divisor = floored_mean(combine(p_partials, 1, batch, b, programs), elements)
    if program == 0:
        tl.store(p_gap_sq + b, gap_sq)
        tl.store(p_reward_sq + b, reward_sq)
        tl.store(p_gap_dot_reward + b, combine(p_partials, 4, batch, b, programs))
        tl.store(p_share + b, share)
        if p_residual_abs is not None:
            tl.store(p_residual_abs + b, mean)
            tl.store(p_gap_dot_residual + b, combine(p_partials, 2, batch, b, programs))
    if MEAN_ABS:
        factor = tl.div_rn(factor, divisor)
        reward_factor = tl.div_rn(reward_factor, divisor)
    start = b.to(tl.int64) * sample
    left = share > 0.0
    reward_factor = tl.where(left, share * reward_factor, 0.0)
    # Else the first launch has written the gradient as it is.
    if MEAN_ABS or share != 1.0:
        for block in range(program, tl.cdiv(sample, BLOCK), programs):
            b_at, m_inside = in_order(block, sample, p_fake.dtype.element_ty, EVEN, WIDE, BLOCK)
            b_gap = guide(p_cond, p_uncond, w, start, b_at, m_inside) - load(p_fake + start, b_at, m_inside)
            # A term that is left out may hold NaN.
            b_reward = tl.where(left, load(p_reward + start, b_at, m_inside), 0.0)
            b_gradient = tl.fma(b_reward, -reward_factor, factor * b_gap)
            tl.store(p_gradient + start + b_at, b_gradient.to(p_gradient.dtype.element_ty), mask=m_inside)
