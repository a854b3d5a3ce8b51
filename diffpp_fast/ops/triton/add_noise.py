"""x_t = alpha x0 + sigma eps, with eps drawn where it is used."""

import triton
import triton.language as tl
from torch import Tensor

from diffpp_fast.ops.triton.device import on_its_device
from diffpp_fast.ops.triton.layout import Order, block_of_sample, in_order, ordered_noise, tile
from diffpp_fast.ops.triton.random import normals
from diffpp_fast.philox import is_drawn

#: With 128 threads, 16 elements each; 32 where that leaves programs enough for every multiprocessor: what comes before
#: the first element takes as many instructions as 20 of the gradient's.
BLOCK = 2048
LARGE = 1 << 20


@on_its_device
def forward(x0: Tensor, alpha: Tensor, sigma: Tensor, noise: Tensor, seed: int, stream: int) -> Tensor:
    order = Order(x0)
    x_t = order.result(x0)
    pixel, channels_last = order.walk(is_drawn(noise))
    if x0.numel():
        block = BLOCK if x0.numel() < LARGE else 2 * BLOCK
        _forward[order.grid(block)](
            p_x0=order.of(x0),
            p_x_t=x_t,
            p_alpha=alpha,
            alpha_stride=alpha.stride(0),
            p_sigma=sigma,
            sigma_stride=sigma.stride(0),
            p_noise=ordered_noise(noise, order),
            noise_seed=seed,
            noise_stream=stream,
            sample=order.sample,
            channels=order.channels,
            DRAWN=is_drawn(noise),
            PIXEL=pixel,
            CHANNELS_LAST=channels_last,
            EVEN=order.sample % block == 0,
            WIDE=order.wide,
            BLOCK=block,
        )
    return order.finish(x_t, x0)


@on_its_device
def backward(grad_output: Tensor, alpha: Tensor) -> Tensor:
    order = Order(grad_output)
    grad_x0 = order.result(grad_output)
    if grad_output.numel():
        block = BLOCK if grad_output.numel() < LARGE else 2 * BLOCK
        _backward[order.grid(block)](
            p_grad_output=order.of(grad_output),
            p_grad_x0=grad_x0,
            p_alpha=alpha,
            alpha_stride=alpha.stride(0),
            sample=order.sample,
            EVEN=order.sample % block == 0,
            WIDE=order.wide,
            BLOCK=block,
        )
    return order.finish(grad_x0, grad_output)


@triton.jit(do_not_specialize=["noise_seed", "noise_stream"])
def _forward(
    p_x0,  # [B, sample], as p_x_t and stored eps
    p_x_t,
    p_alpha,  # [B]
    alpha_stride,
    p_sigma,  # [B]
    sigma_stride,
    p_noise,  # eps, or int64 [B] sample numbers if DRAWN
    noise_seed,
    noise_stream,
    sample,
    channels,
    DRAWN: tl.constexpr,
    PIXEL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0)
    start = b.to(tl.int64) * sample
    alpha = tl.load(p_alpha + b * alpha_stride).to(tl.float32)
    sigma = tl.load(p_sigma + b * sigma_stride).to(tl.float32)
    b_at, m_inside, b_block, b_lane = tile(
        block_of_sample(), sample, channels, p_x0.dtype.element_ty, PIXEL, CHANNELS_LAST, EVEN, WIDE, BLOCK
    )
    b_x0 = tl.load(p_x0 + start + b_at, mask=m_inside).to(tl.float32)
    if DRAWN:
        b_eps = normals(noise_seed, noise_stream, tl.load(p_noise + b), b_block, b_lane)
    else:
        b_eps = tl.load(p_noise + start + b_at, mask=m_inside).to(tl.float32)
    b_x_t = tl.fma(b_eps, sigma, alpha * b_x0)
    tl.store(p_x_t + start + b_at, b_x_t.to(p_x_t.dtype.element_ty), mask=m_inside)


@triton.jit
def _backward(
    p_grad_output,  # [B, sample]
    p_grad_x0,
    p_alpha,  # [B]
    alpha_stride,
    sample,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0)
    start = b.to(tl.int64) * sample
    alpha = tl.load(p_alpha + b * alpha_stride).to(tl.float32)
    b_at, m_inside = in_order(block_of_sample(), sample, p_grad_output.dtype.element_ty, EVEN, WIDE, BLOCK)
    b_grad = tl.load(p_grad_output + start + b_at, mask=m_inside).to(tl.float32)
    tl.store(p_grad_x0 + start + b_at, (alpha * b_grad).to(p_grad_x0.dtype.element_ty), mask=m_inside)
