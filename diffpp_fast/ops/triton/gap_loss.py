"""The losses of SiD and SIM: |k| C / mean|r| and m^2 C / sqrt(m^2 sum d^2 + c^2), with C = sum d (r - curvature d)."""

from types import SimpleNamespace
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from diffpp_fast.ops.gap_loss import Given
from diffpp_fast.ops.triton.device import on_its_device
from diffpp_fast.ops.triton.gap import (
    BLOCK,
    WARPS,
    Gap,
    Target,
    coefficients,
    combine,
    floored_mean,
    guide,
    load,
    per_sample,
    regression_target,
)
from diffpp_fast.ops.triton.layout import block_of_sample, tile

_GIVEN = len(Given._fields)

#: Left to itself, ptxas spills a register for sm_100 to fit more programs.
MOST_REGISTERS = 168


@on_its_device
def sid_forward(*arguments: Any) -> tuple[Tensor, ...]:
    *given, sid_alpha = arguments
    return _losses(Given(*given), sid_alpha, None)


@on_its_device
def sid_backward(grad_output: Tensor, factor: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    sid_alpha, *needs = arguments[_GIVEN:]
    return _gradients_of(grad_output, factor, None, Given(*arguments[:_GIVEN]), 2.0 * sid_alpha, needs)


@on_its_device
def sim_forward(*arguments: Any) -> tuple[Tensor, ...]:
    *given, huber_c = arguments
    return _losses(Given(*given), 1.0, huber_c)


@on_its_device
def sim_backward(grad_output: Tensor, factor: Tensor, shrink: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return _gradients_of(grad_output, factor, shrink, Given(*arguments[:_GIVEN]), 2.0, arguments[_GIVEN:])


sid = SimpleNamespace(forward=sid_forward, backward=sid_backward)
sim = SimpleNamespace(forward=sim_forward, backward=sim_backward)


def _laid_out(given: Given) -> tuple[Gap, Target]:
    gap = Gap(given.fake, given.cond, given.uncond, given.guidance_scale)
    address = given.noise, given.seed, given.stream
    return gap, Target(gap.order, given.prediction_type, given.x0, *address, given.alpha, given.sigma)


def _losses(given: Given, curvature: float, huber_c: float | None) -> tuple[Tensor, ...]:
    """Two launches: the sums, then the loss [B] and what the gradients need, of SIM if there is a `huber_c`."""
    gap, target = _laid_out(given)
    loss, factor = gap.statistic(), gap.statistic()
    shrink = None if huber_c is None else gap.statistic()
    if given.fake.numel():
        _finish[(gap.order.batch,)](
            p_loss=loss,
            p_factor=factor,
            p_shrink=shrink,
            p_partials=gap.sums(target, float(curvature)),
            batch=gap.order.batch,
            programs=gap.programs,
            elements=float(gap.order.sample),
            c_sq=0.0 if huber_c is None else float(huber_c) ** 2,
            p_alpha=target.alpha,
            alpha_stride=target.alpha_stride,
            p_sigma=target.sigma,
            sigma_stride=target.sigma_stride,
            PREDICTION=target.prediction,
            num_warps=1,
        )
    return (loss, factor) if shrink is None else (loss, factor, shrink)


def _gradients_of(
    grad_output: Tensor, factor: Tensor, shrink: Tensor | None, given: Given, curvature: float, needs: Any
) -> tuple[Tensor, ...]:
    """The gradients of fake, cond, uncond and x0, in one launch, with outer = grad_output * factor.

    dL/dd = outer (r - (curvature + shrink) d) and dL/dr = outer d; grad_output, factor and shrink are [B].
    """
    gap, target = _laid_out(given)
    order = gap.order
    inputs = given.fake, given.cond, given.uncond, given.x0
    results = [
        order.result(like) if needed and like is not None else None for like, needed in zip(inputs, needs, strict=True)
    ]
    if given.fake.numel():
        _gradients[order.grid(BLOCK)](
            p_grad_fake=results[0],
            p_grad_cond=results[1],
            p_grad_uncond=results[2],
            p_grad_x0=results[3],
            p_grad_output=grad_output,
            grad_output_stride=grad_output.stride(0),
            p_factor=factor,
            p_shrink=shrink,
            curvature=float(curvature),
            p_fake=gap.fake,
            p_cond=gap.cond,
            p_uncond=gap.uncond,
            w=gap.w,
            p_x0=target.x0,
            p_noise=target.noise,
            p_alpha=target.alpha,
            alpha_stride=target.alpha_stride,
            p_sigma=target.sigma,
            sigma_stride=target.sigma_stride,
            noise_seed=target.seed,
            noise_stream=target.stream,
            sample=order.sample,
            channels=order.channels,
            PREDICTION=target.prediction,
            DRAWN=target.drawn,
            PIXEL=target.pixel,
            CHANNELS_LAST=target.channels_last,
            WIDE=order.wide,
            BLOCK=BLOCK,
            num_warps=WARPS,
            maxnreg=MOST_REGISTERS,
        )
    return tuple(
        given.fake.new_empty(0) if result is None or like is None else order.finish(result, like)
        for result, like in zip(results, inputs, strict=True)
    )


@triton.jit(do_not_specialize=["batch", "programs"])
def _finish(
    p_loss,  # float32 [B]
    p_factor,  # float32 [B]
    p_shrink,  # float32 [B] of SIM, or None for SiD
    p_partials,  # float32 [3, B, programs]
    batch,
    programs,
    elements,
    c_sq,
    p_alpha,  # [B]
    alpha_stride,
    p_sigma,  # [B]
    sigma_stride,
    PREDICTION: tl.constexpr,
):
    b = tl.program_id(0)
    product = combine(p_partials, 2, batch, b, programs)
    if p_shrink is None:
        if PREDICTION == "sample":
            k = 1.0
        else:
            k = tl.abs(per_sample(p_sigma, sigma_stride, b, 1.0))
            if PREDICTION == "epsilon":
                k = tl.div_rn(k, tl.abs(per_sample(p_alpha, alpha_stride, b, 1.0)))
        _, divisor = floored_mean(combine(p_partials, 1, batch, b, programs), elements)
        factor = tl.div_rn(k, divisor)
    else:
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
        tl.store(p_shrink + b, tl.div_rn(factor * product, norm))
    tl.store(p_factor + b, factor)
    tl.store(p_loss + b, factor * product)


@triton.jit(do_not_specialize=["noise_seed", "noise_stream"])
def _gradients(
    p_grad_fake,  # [B, sample] as the outputs, or None where it is not needed, as the next three
    p_grad_cond,
    p_grad_uncond,
    p_grad_x0,
    p_grad_output,  # [B]
    grad_output_stride,
    p_factor,  # float32 [B]
    p_shrink,  # float32 [B], or None for 0
    curvature,
    p_fake,  # [B, sample]
    p_cond,
    p_uncond,  # or None for no guidance
    w,
    p_x0,  # [B, sample]
    p_noise,  # eps [B, sample], or int64 [B] sample numbers if DRAWN
    p_alpha,  # [B]
    alpha_stride,
    p_sigma,  # [B]
    sigma_stride,
    noise_seed,
    noise_stream,
    sample,
    channels,
    PREDICTION: tl.constexpr,
    DRAWN: tl.constexpr,
    PIXEL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0)
    start = b.to(tl.int64) * sample
    alpha, sigma, number = coefficients(p_alpha, alpha_stride, p_sigma, sigma_stride, p_noise, b, PREDICTION, DRAWN)
    outer = tl.load(p_grad_output + b * grad_output_stride).to(tl.float32) * tl.load(p_factor + b)
    bend = curvature + per_sample(p_shrink, 1, b, 0.0)
    b_at, m_inside, b_block, b_lane = tile(
        block_of_sample(), sample, channels, p_fake.dtype.element_ty, PIXEL, CHANNELS_LAST, False, WIDE, BLOCK
    )
    b_guided = guide(p_cond, p_uncond, w, start, b_at, m_inside)
    b_gap = b_guided - load(p_fake + start, b_at, m_inside)
    b_through_residual = outer * b_gap
    if p_grad_fake is not None or p_grad_cond is not None or p_grad_uncond is not None:
        b_target = regression_target(
            p_x0=p_x0,
            p_noise=p_noise,
            alpha=alpha,
            sigma=sigma,
            number=number,
            seed=noise_seed,
            stream=noise_stream,
            start=start,
            b_at=b_at,
            m_inside=m_inside,
            b_block=b_block,
            b_lane=b_lane,
            PREDICTION=PREDICTION,
            DRAWN=DRAWN,
        )
        b_through_gap = outer * tl.fma(b_gap, -bend, b_guided - b_target)
        if p_grad_fake is not None:
            tl.store(p_grad_fake + start + b_at, (-b_through_gap).to(p_grad_fake.dtype.element_ty), mask=m_inside)
        # d and r both move with guided = w cond + (1 - w) uncond.
        b_through_guided = b_through_gap + b_through_residual
        if p_grad_cond is not None:
            b_grad_cond = b_through_guided if p_uncond is None else w * b_through_guided
            tl.store(p_grad_cond + start + b_at, b_grad_cond.to(p_grad_cond.dtype.element_ty), mask=m_inside)
        if p_grad_uncond is not None:
            b_grad_uncond = (1.0 - w) * b_through_guided
            tl.store(p_grad_uncond + start + b_at, b_grad_uncond.to(p_grad_uncond.dtype.element_ty), mask=m_inside)
    if p_grad_x0 is not None:
        if PREDICTION == "epsilon":
            slope = 0.0
        elif PREDICTION == "v_prediction":
            slope = -sigma
        elif PREDICTION == "flow_prediction":
            slope = -1.0
        else:
            slope = 1.0
        b_grad_x0 = -slope * b_through_residual
        tl.store(p_grad_x0 + start + b_at, b_grad_x0.to(p_grad_x0.dtype.element_ty), mask=m_inside)
