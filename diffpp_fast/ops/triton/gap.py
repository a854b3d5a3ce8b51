"""Targets, d = guided - fake, r = guided - target, and their sums, which the operators on network outputs share."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffpp_fast.ops.triton.layout import Order, in_memory, ordered_noise, sample_index
from diffpp_fast.ops.triton.random import normals, normals_of_pixels
from diffpp_fast.philox import is_drawn
from diffpp_fast.prediction import MEAN_ABS_FLOOR, PREDICTION_TYPES

#: With 256 threads, 8 elements each: a 16-byte access per tensor in bfloat16 and two in float32.
BLOCK = 2048
WARPS = 8
#: Programs that share a sample, at most; beyond it each takes several blocks. A program of a second launch reads one
#: number of each of them, and a single large sample still gives three or four programs to every multiprocessor.
PROGRAMS = 512
#: With more, a block would hold fewer than a Philox block of each channel's elements.
MOST_PIXEL_CHANNELS = BLOCK // 4

_PROGRAMS = tl.constexpr(PROGRAMS)
_FLOOR = tl.constexpr(MEAN_ABS_FLOOR)


class Target:
    """The target of a call as kernels take it. What its prediction type does not hold is None; all is without noise."""

    def __init__(
        self,
        order: Order,
        prediction_type: int,
        x0: Tensor | None,
        noise: Tensor | None,
        seed: int,
        stream: int,
        alpha: Tensor | None,
        sigma: Tensor | None,
    ) -> None:
        self.prediction = None if noise is None else PREDICTION_TYPES[prediction_type]
        held = None if self.prediction == "sample" else noise
        self.drawn = held is not None and is_drawn(held)
        self.noise = None if held is None else ordered_noise(held, order)
        self.seed, self.stream = (seed, stream) if self.drawn else (0, 0)
        self.x0 = None if x0 is None or self.prediction == "epsilon" else order.of(x0)
        self.alpha, self.alpha_stride = alpha, stride(alpha)
        self.sigma, self.sigma_stride = sigma, stride(sigma)
        # Only drawn noise depends on the logical index of an element: all else goes through memory in its order. Noise
        # can too where a Philox block stays within a row of pixels, and whole pixels fit in a block of elements.
        channels, pixels = order.channels, order.sample // order.channels
        by_pixel = channels & (channels - 1) == 0 and channels <= MOST_PIXEL_CHANNELS and pixels % 4 == 0
        moved = order.channels_last and self.drawn
        self.pixel = channels if moved and by_pixel else 0
        self.channels_last = moved and not by_pixel


class Gap:
    """Network outputs [B, ...] and their target, if there is one, in the memory order of `fake`."""

    def __init__(self, fake: Tensor, cond: Tensor, uncond: Tensor | None, guidance_scale: float) -> None:
        self.order = order = Order(fake)
        self.programs = min(triton.cdiv(order.sample, BLOCK), PROGRAMS)
        self.fake = order.of(fake)
        self.cond = order.of(cond)
        self.uncond = None if uncond is None else order.of(uncond)
        self.w = float(guidance_scale)

    def sums(
        self,
        target: Target,
        curvature: float,
        gradient: Tensor | None = None,
        scale: float = 1.0,
        scales: Tensor | None = None,
    ) -> Tensor:
        """float32 [3, B, programs]: parts of sum d^2, sum |r|, sum d (r - curvature d). Writes `gradient` = scale d."""
        order = self.order
        partials = self.fake.new_empty(3, order.batch, self.programs, dtype=torch.float32)
        _sums[(order.batch * self.programs,)](
            p_partials=partials,
            p_gradient=gradient,
            p_scale=scales,
            scale_stride=stride(scales),
            scale=float(scale),
            curvature=float(curvature),
            batch=order.batch,
            programs=self.programs,
            p_fake=self.fake,
            p_cond=self.cond,
            p_uncond=self.uncond,
            w=self.w,
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
        )
        return partials

    def statistic(self) -> Tensor:
        """Uninitialised float32 [B]."""
        return self.fake.new_empty(self.order.batch, dtype=torch.float32)


def stride(values: Tensor | None) -> int:
    """The step in memory from one sample's number to the next, 0 where there are none."""
    return 0 if values is None else values.stride(0)


@triton.jit
def per_sample(p_values, stride, b, otherwise):
    """A number of sample b as float32, `otherwise` where there are none."""
    return otherwise if p_values is None else tl.load(p_values + b * stride).to(tl.float32)


@triton.jit
def tile(block, sample, channels, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """The first element of a block, where its elements are in the sample's memory, and which are inside it."""
    first = sample_index(block, BLOCK, WIDE)
    b_index = first + tl.arange(0, BLOCK)
    return first, in_memory(b_index, channels, sample // channels, CHANNELS_LAST), b_index < sample


@triton.jit
def load(p_values, b_at, m_inside):
    return tl.load(p_values + b_at, mask=m_inside).to(tl.float32)


@triton.jit
def coefficients(
    p_alpha, alpha_stride, p_sigma, sigma_stride, p_noise, b, PREDICTION: tl.constexpr, DRAWN: tl.constexpr
):
    """alpha, sigma and the sample number of sample b, for a target that needs them."""
    alpha = 1.0
    sigma = 1.0
    number = 0
    if PREDICTION == "v_prediction":
        alpha = per_sample(p_alpha, alpha_stride, b, 1.0)
        sigma = per_sample(p_sigma, sigma_stride, b, 1.0)
    if DRAWN:
        number = tl.load(p_noise + b)
    return alpha, sigma, number


@triton.jit
def regression_target(
    p_x0,
    p_noise,
    alpha,
    sigma,
    number,
    seed,
    stream,
    sample,
    start,
    first,
    b_at,
    m_inside,
    PREDICTION: tl.constexpr,
    DRAWN: tl.constexpr,
    PIXEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """o* of a block [BLOCK] of the sample that starts at `start`."""
    if PIXEL:
        b_target = normals_of_pixels(seed, stream, number, first, sample // PIXEL, PIXEL, BLOCK)
    elif DRAWN:
        b_target = normals(seed, stream, number, first, BLOCK)
    elif PREDICTION != "sample":
        b_target = load(p_noise + start, b_at, m_inside)
    if PREDICTION == "v_prediction":
        b_target = tl.fma(b_target, alpha, -sigma * load(p_x0 + start, b_at, m_inside))
    elif PREDICTION == "flow_prediction":
        b_target -= load(p_x0 + start, b_at, m_inside)
    elif PREDICTION == "sample":
        b_target = load(p_x0 + start, b_at, m_inside)
    return b_target


@triton.jit
def guide(p_cond, p_uncond, w, start, b_at, m_inside):
    b_guided = load(p_cond + start, b_at, m_inside)
    if p_uncond is not None:
        b_uncond = load(p_uncond + start, b_at, m_inside)
        b_guided = tl.fma(b_guided - b_uncond, w, b_uncond)
    return b_guided


@triton.jit
def combine(p_partials, row, batch, b, programs):
    """The sum of one row of partials of sample b, in a fixed order."""
    b_program = tl.arange(0, _PROGRAMS)
    p_row = p_partials + (row * batch + b).to(tl.int64) * programs
    return tl.sum(tl.load(p_row + b_program, mask=b_program < programs, other=0.0))


@triton.jit
def floored_mean(total, elements):
    """total / elements, and the same where it is not below the floor. A NaN passes through both."""
    mean = tl.div_rn(total, elements)
    return mean, tl.where(mean < _FLOOR, _FLOOR, mean)


@triton.jit(do_not_specialize=["noise_seed", "noise_stream", "batch", "programs"])
def _sums(
    p_partials,  # float32 [3, B, programs]
    p_gradient,  # [B, sample] as the outputs, or None
    p_scale,  # [B], or None for `scale`
    scale_stride,
    scale,
    curvature,
    batch,
    programs,
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
    PREDICTION: tl.constexpr,  # None for no target
    DRAWN: tl.constexpr,
    PIXEL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0) // programs
    program = tl.program_id(0) % programs
    start = b.to(tl.int64) * sample
    factor = per_sample(p_scale, scale_stride, b, scale)
    alpha, sigma, number = coefficients(p_alpha, alpha_stride, p_sigma, sigma_stride, p_noise, b, PREDICTION, DRAWN)
    b_gap_sq = tl.zeros([BLOCK], tl.float32)
    b_residual_abs = tl.zeros([BLOCK], tl.float32)
    b_product = tl.zeros([BLOCK], tl.float32)
    for step in range(tl.cdiv(tl.cdiv(sample, BLOCK) - program, programs)):
        first, b_at, m_inside = tile(program + step * programs, sample, channels, CHANNELS_LAST, WIDE, BLOCK)
        b_guided = guide(p_cond, p_uncond, w, start, b_at, m_inside)
        b_gap = b_guided - load(p_fake + start, b_at, m_inside)
        b_gap = tl.where(m_inside, b_gap, 0.0)
        b_gap_sq += b_gap * b_gap
        if PREDICTION is not None:
            b_target = regression_target(
                p_x0=p_x0,
                p_noise=p_noise,
                alpha=alpha,
                sigma=sigma,
                number=number,
                seed=noise_seed,
                stream=noise_stream,
                sample=sample,
                start=start,
                first=first,
                b_at=b_at,
                m_inside=m_inside,
                PREDICTION=PREDICTION,
                DRAWN=DRAWN,
                PIXEL=PIXEL,
                BLOCK=BLOCK,
            )
            b_residual = tl.where(m_inside, b_guided - b_target, 0.0)
            b_residual_abs += tl.abs(b_residual)
            b_product += b_gap * tl.fma(b_gap, -curvature, b_residual)
        # After all loads: they could not pass a store that may write what they read.
        if p_gradient is not None:
            tl.store(p_gradient + start + b_at, (factor * b_gap).to(p_gradient.dtype.element_ty), mask=m_inside)
    row = tl.cast(batch, tl.int64) * programs
    p_partial = p_partials + tl.program_id(0)
    tl.store(p_partial, tl.sum(b_gap_sq))
    if PREDICTION is not None:
        tl.store(p_partial + row, tl.sum(b_residual_abs))
        tl.store(p_partial + 2 * row, tl.sum(b_product))
