"""Targets, d = guided - fake, r = guided - target, and their sums, which the operators on network outputs share."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffpp_fast.ops.triton.layout import PER_THREAD, Order, fold, ordered_noise, tile
from diffpp_fast.ops.triton.random import normals
from diffpp_fast.philox import is_drawn
from diffpp_fast.prediction import MEAN_ABS_FLOOR, PREDICTION_TYPES

#: With 128 threads, 16 elements each: two 16-byte accesses per tensor in bfloat16 and four in float32.
BLOCK = 2048
WARPS = 4
#: Of a thread that reads a reward's score as well: left to itself the compiler takes fewer, and spills some.
MOST_REGISTERS = 224
#: Of one that draws noise for the pixels of float32, where it takes 64 and spills two.
PIXEL_REGISTERS = 128
#: Programs that share a sample, at most; beyond it each takes several blocks. A program of a second launch reads one
#: number of each of them, and a single large sample still gives three or four programs to every multiprocessor.
PROGRAMS = 512
#: Programs of all samples, unless there are more samples: several times what runs at once, so that the last ones leave
#: little of a GPU idle. What a program does before its first block and after its last is a quarter of the instructions
#: of one block.
ALL_PROGRAMS = 4096

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
        self.pixel, self.channels_last = order.walk(self.drawn)


class Gap:
    """Network outputs [B, ...] and their target, if there is one, in the memory order of `fake`."""

    def __init__(self, fake: Tensor, cond: Tensor, uncond: Tensor | None, guidance_scale: float) -> None:
        self.order = order = Order(fake)
        self.programs = min(triton.cdiv(order.sample, BLOCK), PROGRAMS, ALL_PROGRAMS // max(order.batch, 1) + 1)
        self.fake = order.of(fake)
        self.cond = order.of(cond)
        self.uncond = None if uncond is None else order.of(uncond)
        self.w = float(guidance_scale)

    def sums(
        self,
        target: Target,
        curvature: float | None,
        gradient: Tensor | None = None,
        scale: float = 1.0,
        scales: Tensor | None = None,
        reward: Tensor | None = None,
        reward_scale: float = 1.0,
        reward_scales: Tensor | None = None,
    ) -> Tensor:
        """float32 [3, B, programs]: parts of sum d^2, sum |r|, sum d (r - curvature d). Writes `gradient` = scale d.

        With a reward's score s (in the order of `fake`) [5, B, programs]: sum s^2 and sum d s follow; `gradient` is
        scale d - reward_scale s. A `curvature` of 0 is None.
        """
        order = self.order
        partials = self.fake.new_empty(3 if reward is None else 5, order.batch, self.programs, dtype=torch.float32)
        most = PIXEL_REGISTERS if target.pixel and self.fake.element_size() == 4 else None
        most = most if reward is None else MOST_REGISTERS
        _sums[order.batch, self.programs](
            p_partials=partials,
            p_gradient=gradient,
            p_scale=scales,
            scale_stride=stride(scales),
            scale=float(scale),
            p_reward=reward,
            p_reward_scale=reward_scales,
            reward_scale_stride=stride(reward_scales),
            reward_scale=float(reward_scale),
            curvature=curvature,
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
            EVEN=order.sample % BLOCK == 0,
            WIDE=order.wide,
            BLOCK=BLOCK,
            num_warps=WARPS,
            maxnreg=most,
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
    start,
    b_at,
    m_inside,
    b_block,
    b_lane,
    PREDICTION: tl.constexpr,
    DRAWN: tl.constexpr,
):
    """o* of a tile of the sample that starts at `start`."""
    if DRAWN:
        b_target = normals(seed, stream, number, b_block, b_lane)
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
    p_partials,  # float32 [3, B, programs], or 5 with a reward
    p_gradient,  # [B, sample] as the outputs, or None
    p_scale,  # [B], or None for `scale`
    scale_stride,
    scale,
    p_reward,  # [B, sample] as the outputs, or None
    p_reward_scale,  # [B], or None for `reward_scale`
    reward_scale_stride,
    reward_scale,
    curvature,  # or None for 0
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
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0)
    program = tl.program_id(1)
    start = b.to(tl.int64) * sample
    factor = per_sample(p_scale, scale_stride, b, scale)
    alpha, sigma, number = coefficients(p_alpha, alpha_stride, p_sigma, sigma_stride, p_noise, b, PREDICTION, DRAWN)
    b_gap_sq = tl.zeros([BLOCK // PER_THREAD], tl.float32)
    b_residual_abs = tl.zeros([BLOCK // PER_THREAD], tl.float32)
    b_product = tl.zeros([BLOCK // PER_THREAD], tl.float32)
    b_reward_sq = tl.zeros([BLOCK // PER_THREAD], tl.float32)
    b_reward_product = tl.zeros([BLOCK // PER_THREAD], tl.float32)
    if p_reward is not None:
        reward_factor = per_sample(p_reward_scale, reward_scale_stride, b, reward_scale)
    for block in range(program, tl.cdiv(sample, BLOCK), programs):
        b_at, m_inside, b_block, b_lane = tile(
            block, sample, channels, p_fake.dtype.element_ty, PIXEL, CHANNELS_LAST, EVEN, WIDE, BLOCK
        )
        b_guided = guide(p_cond, p_uncond, w, start, b_at, m_inside)
        b_gap = b_guided - load(p_fake + start, b_at, m_inside)
        b_gap = tl.where(m_inside, b_gap, 0.0)
        b_gap_sq += fold(b_gap * b_gap)
        if PREDICTION is not None:
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
            b_residual = tl.where(m_inside, b_guided - b_target, 0.0)
            b_residual_abs += fold(tl.abs(b_residual))
            if curvature is not None:
                b_residual = tl.fma(b_gap, -curvature, b_residual)
            b_product += fold(b_gap * b_residual)
        b_gradient = factor * b_gap
        if p_reward is not None:
            b_reward = tl.where(m_inside, load(p_reward + start, b_at, m_inside), 0.0)
            b_reward_sq += fold(b_reward * b_reward)
            b_reward_product += fold(b_gap * b_reward)
            b_gradient = tl.fma(b_reward, -reward_factor, b_gradient)
        # After all loads: they could not pass a store that may write what they read.
        if p_gradient is not None:
            tl.store(p_gradient + start + b_at, b_gradient.to(p_gradient.dtype.element_ty), mask=m_inside)
    row = tl.cast(batch, tl.int64) * programs
    p_partial = p_partials + b * programs + program
    if PREDICTION is None:
        tl.store(p_partial, tl.sum(b_gap_sq))
    else:
        b_sums = tl.sum(tl.join(tl.join(b_gap_sq, b_residual_abs), tl.join(b_product, b_product)), axis=0)
        b_row = tl.arange(0, 2)[:, None] + 2 * tl.arange(0, 2)[None, :]
        tl.store(p_partial + b_row * row, b_sums, mask=b_row < 3)
    if p_reward is not None:
        b_sums = tl.sum(tl.join(b_reward_sq, b_reward_product), axis=0)
        tl.store(p_partial + (3 + tl.arange(0, 2)) * row, b_sums)
