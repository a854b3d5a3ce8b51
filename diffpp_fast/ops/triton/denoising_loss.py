"""mean over b of weight_b * mean over elements of (prediction - target)^2."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffpp_fast.ops.triton.device import on_its_device
from diffpp_fast.ops.triton.gap import (
    ALL_PROGRAMS,
    BLOCK,
    WARPS,
    Target,
    coefficients,
    load,
    per_sample,
    regression_target,
    stride,
)
from diffpp_fast.ops.triton.layout import PER_THREAD, Order, block_of_sample, fold, in_order, tile

#: Programs of the first launch, unless the batch is larger, and no more than one program of the second adds up at once.
PROGRAMS = ALL_PROGRAMS

_PROGRAMS = tl.constexpr(PROGRAMS)


@on_its_device
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
    """Two launches: each program's part of the loss, then their sum."""
    order = Order(prediction)
    target = Target(order, prediction_type, x0, noise, seed, stream, alpha, sigma)
    residual = order.result(prediction) if save_residual else None
    programs = min(triton.cdiv(order.sample, BLOCK), triton.cdiv(PROGRAMS, order.batch))
    count = order.batch * programs
    partials = prediction.new_empty(count, dtype=torch.float32)
    loss = prediction.new_empty((), dtype=torch.float32)
    _forward[order.batch, programs](
        p_partials=partials,
        p_residual=residual,
        p_prediction=order.of(prediction),
        p_weight=weight,
        weight_stride=stride(weight),
        programs=programs,
        p_x0=target.x0,
        p_noise=target.noise,
        p_alpha=alpha,
        alpha_stride=target.alpha_stride,
        p_sigma=sigma,
        sigma_stride=target.sigma_stride,
        noise_seed=target.seed,
        noise_stream=target.stream,
        sample=order.sample,
        channels=order.channels,
        PREDICTION=target.prediction,
        DRAWN=target.drawn,
        PIXEL=target.pixel,
        CHANNELS_LAST=target.channels_last,
        EVEN=order.sample % BLOCK == 0,
        WIDE=order.wide,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    _finish[(1,)](p_loss=loss, p_partials=partials, count=count, elements=float(prediction.numel()), num_warps=WARPS)
    return loss, prediction.new_empty(0) if residual is None else order.finish(residual, prediction)


@on_its_device
def backward(grad_output: Tensor, residual: Tensor, weight: Tensor | None) -> Tensor:
    order = Order(residual)
    gradient = order.result(residual)
    _backward[order.grid(BLOCK)](
        p_gradient=gradient,
        p_residual=order.of(residual),
        p_grad_output=grad_output,
        p_weight=weight,
        weight_stride=stride(weight),
        mean=2.0 / residual.numel(),
        sample=order.sample,
        EVEN=order.sample % BLOCK == 0,
        WIDE=order.wide,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return order.finish(gradient, residual)


@triton.jit(do_not_specialize=["noise_seed", "noise_stream", "programs"])
def _forward(
    p_partials,  # float32 [B, programs], weighted
    p_residual,  # [B, sample] as the prediction, or None
    p_prediction,  # [B, sample]
    p_weight,  # [B], or None for 1
    weight_stride,
    programs,
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
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0)
    program = tl.program_id(1)
    start = b.to(tl.int64) * sample
    alpha, sigma, number = coefficients(p_alpha, alpha_stride, p_sigma, sigma_stride, p_noise, b, PREDICTION, DRAWN)
    b_sum = tl.zeros([BLOCK // PER_THREAD], tl.float32)
    for block in range(program, tl.cdiv(sample, BLOCK), programs):
        b_at, m_inside, b_block, b_lane = tile(
            block, sample, channels, p_prediction.dtype.element_ty, PIXEL, CHANNELS_LAST, EVEN, WIDE, BLOCK
        )
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
        b_residual = load(p_prediction + start, b_at, m_inside) - b_target
        if p_residual is not None:
            tl.store(p_residual + start + b_at, b_residual.to(p_residual.dtype.element_ty), mask=m_inside)
        b_residual = tl.where(m_inside, b_residual, 0.0)
        b_sum += fold(b_residual * b_residual)
    weight = per_sample(p_weight, weight_stride, b, 1.0)
    tl.store(p_partials + b * programs + program, weight * tl.sum(b_sum))


@triton.jit(do_not_specialize=["count"])
def _finish(
    p_loss,  # float32 []
    p_partials,  # float32 [count]
    count,
    elements,
):
    b_sum = tl.zeros([_PROGRAMS], tl.float32)
    for step in range(tl.cdiv(count, _PROGRAMS)):
        b_partial = step * _PROGRAMS + tl.arange(0, _PROGRAMS)
        b_sum += tl.load(p_partials + b_partial, mask=b_partial < count, other=0.0)
    tl.store(p_loss, tl.div_rn(tl.sum(b_sum), elements))


@triton.jit
def _backward(
    p_gradient,  # [B, sample] as the residual
    p_residual,  # [B, sample]
    p_grad_output,  # []
    p_weight,  # [B], or None for 1
    weight_stride,
    mean,  # 2 / (B sample)
    sample,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0)
    start = b.to(tl.int64) * sample
    scale = tl.load(p_grad_output).to(tl.float32) * mean * per_sample(p_weight, weight_stride, b, 1.0)
    b_at, m_inside = in_order(block_of_sample(), sample, p_residual.dtype.element_ty, EVEN, WIDE, BLOCK)
    b_gradient = scale * load(p_residual + start, b_at, m_inside)
    tl.store(p_gradient + start + b_at, b_gradient.to(p_gradient.dtype.element_ty), mask=m_inside)
