"""x_t = alpha x0 + sigma eps, with eps drawn where it is used."""

import triton
import triton.language as tl
from torch import Tensor

from diffpp_fast.ops.triton.device import on_its_device
from diffpp_fast.ops.triton.layout import Order, in_memory, ordered_noise, place, sample_index
from diffpp_fast.ops.triton.random import normals
from diffpp_fast.philox import is_drawn

BLOCK = 1024


@on_its_device
def forward(x0: Tensor, alpha: Tensor, sigma: Tensor, noise: Tensor, seed: int, stream: int) -> Tensor:
    order = Order(x0)
    x_t = order.result(x0)
    if x0.numel():
        _forward[order.grid(BLOCK)](
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
            CHANNELS_LAST=order.channels_last,
            WIDE=order.wide,
            BLOCK=BLOCK,
        )
    return order.finish(x_t, x0)


@on_its_device
def backward(grad_output: Tensor, alpha: Tensor) -> Tensor:
    order = Order(grad_output)
    grad_x0 = order.result(grad_output)
    if grad_output.numel():
        _backward[order.grid(BLOCK)](
            p_grad_output=order.of(grad_output),
            p_grad_x0=grad_x0,
            p_alpha=alpha,
            alpha_stride=alpha.stride(0),
            sample=order.sample,
            WIDE=order.wide,
            BLOCK=BLOCK,
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
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b, block = place(sample, BLOCK)
    alpha = tl.load(p_alpha + b * alpha_stride).to(tl.float32)
    sigma = tl.load(p_sigma + b * sigma_stride).to(tl.float32)
    first = sample_index(block, BLOCK, WIDE)
    b_index = first + tl.arange(0, BLOCK)
    m_inside = b_index < sample
    b_at = b.to(tl.int64) * sample + in_memory(b_index, channels, sample // channels, CHANNELS_LAST)
    b_x0 = tl.load(p_x0 + b_at, mask=m_inside).to(tl.float32)
    if DRAWN:
        b_eps = normals(noise_seed, noise_stream, tl.load(p_noise + b), first, BLOCK)
    else:
        b_eps = tl.load(p_noise + b_at, mask=m_inside).to(tl.float32)
    b_x_t = tl.fma(b_eps, sigma, alpha * b_x0)
    tl.store(p_x_t + b_at, b_x_t.to(p_x_t.dtype.element_ty), mask=m_inside)


@triton.jit
def _backward(
    p_grad_output,  # [B, sample]
    p_grad_x0,
    p_alpha,  # [B]
    alpha_stride,
    sample,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b, block = place(sample, BLOCK)
    alpha = tl.load(p_alpha + b * alpha_stride).to(tl.float32)
    b_index = sample_index(block, BLOCK, WIDE) + tl.arange(0, BLOCK)
    m_inside = b_index < sample
    b_at = b.to(tl.int64) * sample + b_index
    b_grad = tl.load(p_grad_output + b_at, mask=m_inside).to(tl.float32)
    tl.store(p_grad_x0 + b_at, (alpha * b_grad).to(p_grad_x0.dtype.element_ty), mask=m_inside)
