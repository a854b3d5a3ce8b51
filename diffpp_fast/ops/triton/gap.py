"""What the losses share: targets, d = guided - fake and r = guided - target, their sums, and gradients through them."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffpp_fast.kernels.reference.philox import Address
from diffpp_fast.kernels.reference.score_gap import MEAN_ABS_FLOOR
from diffpp_fast.ops.triton.layout import Order, in_memory, noise_arguments, sample_index
from diffpp_fast.ops.triton.random import normals, normals_of_pixels

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


def target_arguments(
    prediction_type: str,
    x0: Tensor,
    noise: Tensor | Address,
    alpha: Tensor,
    sigma: Tensor,
    order: Order,
) -> dict[str, Any]:
    """The target as kernels take it: what this prediction type does not hold is None."""
    holds_noise = prediction_type != "sample"
    drawn = holds_noise and isinstance(noise, Address)
    eps, seed, stream = noise_arguments(noise, order) if holds_noise else (None, 0, 0)
    return {
        "p_x0": None if prediction_type == "epsilon" else order.of(x0),
        "p_noise": eps,
        "p_alpha": alpha,
        "alpha_stride": alpha.stride(0),
        "p_sigma": sigma,
        "sigma_stride": sigma.stride(0),
        "noise_seed": seed,
        "noise_stream": stream,
        "PREDICTION": prediction_type,
        "DRAWN": drawn,
        **_order_arguments(order, drawn),
    }


def _order_arguments(order: Order, drawn: bool) -> dict[str, Any]:
    # Only drawn noise depends on the logical index of an element: all else goes through memory in its order. Noise
    # can too where a Philox block stays within a row of pixels, and whole pixels fit in a block of elements.
    channels, pixels = order.channels, order.sample // order.channels
    by_pixel = channels & (channels - 1) == 0 and channels <= MOST_PIXEL_CHANNELS and pixels % 4 == 0
    return {
        "sample": order.sample,
        "channels": channels,
        "PIXEL": channels if order.channels_last and drawn and by_pixel else 0,
        **order.constants,
        "CHANNELS_LAST": order.channels_last and drawn and not by_pixel,
    }


class Outputs:
    """Network outputs [B, ...] and their target, if there is one, in the memory order of `fake`."""

    def __init__(
        self,
        fake: Tensor,
        cond: Tensor,
        uncond: Tensor | None,
        guidance_scale: float,
        x0: Tensor | None,
        noise: Tensor | Address | None,
        alpha: Tensor | None,
        sigma: Tensor | None,
        prediction_type: str,
    ) -> None:
        self.fake = fake
        self.order = order = Order(fake)
        self.has_target = x0 is not None
        self.programs = min(triton.cdiv(order.sample, BLOCK), PROGRAMS)
        self.gap = {
            "p_fake": order.of(fake),
            "p_cond": order.of(cond),
            "p_uncond": None if uncond is None else order.of(uncond),
            "w": float(guidance_scale),
        }
        if x0 is not None and noise is not None and alpha is not None and sigma is not None:
            self.target = target_arguments(prediction_type, x0, noise, alpha, sigma, order)
        else:
            nothing = dict.fromkeys(("p_x0", "p_noise", "p_alpha", "p_sigma", "PREDICTION"))
            strides = dict.fromkeys(("alpha_stride", "sigma_stride", "noise_seed", "noise_stream"), 0)
            self.target = {**nothing, **strides, "DRAWN": False, **_order_arguments(order, False)}

    def sums(self, curvature: float, gradient: Tensor | None = None, scale: float | Tensor = 1.0) -> Tensor:
        """float32 [3, B, programs]: parts of sum d^2, sum |r|, sum d (r - curvature d). Writes `gradient` = scale d."""
        order = self.order
        partials = self.fake.new_empty(3, order.batch, self.programs, dtype=torch.float32)
        _sums[(order.batch * self.programs,)](
            p_partials=partials,
            p_gradient=gradient,
            **scale_arguments(scale),
            curvature=float(curvature),
            batch=order.batch,
            programs=self.programs,
            **self.gap,
            **self.target,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
        return partials

    def statistic(self) -> Tensor:
        """Uninitialised float32 [B]."""
        return self.fake.new_empty(self.order.batch, dtype=torch.float32)

    def gradients(
        self,
        grad_output: Tensor,
        factor: Tensor,
        curvature: float,
        shrink: Tensor | None,
        cond: Tensor,
        uncond: Tensor | None,
        x0: Tensor,
        needs: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:
        """The gradients of fake, cond, uncond and x0, each where `needs` says so, with outer = grad_output * factor.

        dL/dd = outer (r - (curvature + shrink) d) and dL/dr = outer d; grad_output, factor and shrink are [B].
        """
        order = self.order
        inputs = (self.fake, cond, uncond, x0)
        results = [
            order.result(like) if needed and like is not None else None
            for like, needed in zip(inputs, needs, strict=True)
        ]
        if self.fake.numel():
            _gradients[(order.batch * triton.cdiv(order.sample, BLOCK),)](
                *results,
                p_grad_output=grad_output,
                grad_output_stride=grad_output.stride(0),
                p_factor=factor,
                p_shrink=shrink,
                curvature=float(curvature),
                **self.gap,
                **self.target,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
        return tuple(
            None if result is None or like is None else order.finish(result, like)
            for result, like in zip(results, inputs, strict=True)
        )


def scale_arguments(scale: float | Tensor) -> dict[str, Any]:
    """A number, or a tensor [B], as kernels take it."""
    if isinstance(scale, Tensor):
        return {"p_scale": scale, "scale_stride": scale.stride(0), "scale": 1.0}
    return {"p_scale": None, "scale_stride": 0, "scale": float(scale)}


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
    noise_seed,
    noise_stream,
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
        b_target = normals_of_pixels(noise_seed, noise_stream, number, first, sample // PIXEL, PIXEL, BLOCK)
    elif DRAWN:
        b_target = normals(noise_seed, noise_stream, number, first, BLOCK)
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
                p_x0,
                p_noise,
                alpha,
                sigma,
                number,
                noise_seed,
                noise_stream,
                sample,
                start,
                first,
                b_at,
                m_inside,
                PREDICTION,
                DRAWN,
                PIXEL,
                BLOCK,
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
    blocks = tl.cdiv(sample, BLOCK)
    b = tl.program_id(0) // blocks
    start = b.to(tl.int64) * sample
    alpha, sigma, number = coefficients(p_alpha, alpha_stride, p_sigma, sigma_stride, p_noise, b, PREDICTION, DRAWN)
    outer = tl.load(p_grad_output + b * grad_output_stride).to(tl.float32) * tl.load(p_factor + b)
    bend = curvature + per_sample(p_shrink, 1, b, 0.0)
    first, b_at, m_inside = tile(tl.program_id(0) % blocks, sample, channels, CHANNELS_LAST, WIDE, BLOCK)
    b_guided = guide(p_cond, p_uncond, w, start, b_at, m_inside)
    b_gap = b_guided - load(p_fake + start, b_at, m_inside)
    b_through_residual = outer * b_gap
    if p_grad_fake is not None or p_grad_cond is not None or p_grad_uncond is not None:
        b_target = regression_target(
            p_x0,
            p_noise,
            alpha,
            sigma,
            number,
            noise_seed,
            noise_stream,
            sample,
            start,
            first,
            b_at,
            m_inside,
            PREDICTION,
            DRAWN,
            PIXEL,
            BLOCK,
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
