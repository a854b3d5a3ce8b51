"""Group normalisation followed by SiLU or nothing, each direction in one to three launches.

A group that fits in one program's registers is done there, in one launch. Others are cut into chunks of pixels: the
first launch leaves two numbers for each channel and chunk, which later launches combine in a fixed order. Row-major,
a program of the last launch works inside one group and combines that group's numbers itself. channels_last, it works
on many groups, so that a small launch between the two combines them once.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffpp_fast.ops.triton.device import on_its_device
from diffpp_fast.ops.triton.layout import Order, as_float

#: Elements of a tile: 16 a thread, so that a thread has at least two loads of 16 bytes in flight, and four programs
#: with their accumulators fit on a multiprocessor.
TILE = 4096
WARPS = 8
#: Of kernels that keep more than a tile. Left to itself, ptxas spills a register or several to fit more programs.
MOST_REGISTERS = 128
#: Channels of a tile in channels_last: 128 bytes of bfloat16, and the networks' channels are multiples.
TILE_CHANNELS = 64
#: The most elements of a group that one program keeps in registers. At 16 a thread these are the most that leave each
#: thread registers for the gradient.
MOST_IN_ONE = 8192
#: Programs beyond which a program takes several tiles: enough to fill large GPUs several times over, few enough that
#: combining what they leave costs little. It does not depend on the GPU, and neither do the results.
PROGRAMS = 2048
#: Partial results that are combined at a time.
MOST_PARTIALS = 1024
#: Samples x chunks and channels of a tile of the gradients of weight and bias.
PARAMETER_ROWS = 64
PARAMETER_CHANNELS = 16


class Cut(NamedTuple):
    """How [B, C, pixels] is cut among programs, one for each chunk of pixels of each tile of channels of a sample."""

    batch: int
    channels: int
    pixels: int
    per_group: int  # channels
    span: int  # the channels among which a tile of them lies: a group's, in channels_last all
    tiles: int  # of channels in a span
    chunk: int  # pixels
    chunks: int
    block_c: int
    block_p: int
    channels_last: bool
    wide: bool

    @property
    def grid(self) -> tuple[int]:
        return (self.batch * (self.channels // self.span) * self.tiles * self.chunks,)

    @property
    def is_one_group(self) -> bool:
        """Whether each program has a whole group as one tile."""
        return self.span == self.per_group and self.block_c >= self.span and self.block_p >= self.pixels

    @property
    def warps(self) -> int:
        return max(1, self.block_c * self.block_p // 512) if self.is_one_group else WARPS

    @property
    def block_partials(self) -> int:
        return min(MOST_PARTIALS, triton.next_power_of_2(self.per_group * self.chunks))

    def partials(self, like: Tensor) -> Tensor:
        """Two numbers for each channel and chunk, of which the channels are contiguous."""
        return torch.empty(self.batch, self.chunks, 2, self.channels, dtype=torch.float32, device=like.device)


def cut(x: Tensor, num_groups: int, order: Order) -> Cut:
    channels = x.shape[1]
    pixels, per_group = order.sample // channels, channels // num_groups
    powers = triton.next_power_of_2(per_group), triton.next_power_of_2(pixels)
    whole = Cut(
        order.batch, channels, pixels, per_group, per_group, 1, pixels, 1, *powers, order.channels_last, order.wide
    )
    if powers[0] * powers[1] <= MOST_IN_ONE:
        return whole
    # Element by element, each has an address in registers, and more programs are to hide the latency.
    whole_loads = x.data_ptr() % 16 == 0 and (channels if order.channels_last else pixels) % 16 == 0
    tile = TILE if whole_loads else TILE // 2
    if order.channels_last:
        span = channels
        block_c = min(triton.next_power_of_2(channels), TILE_CHANNELS)
        block_p = min(powers[1], tile // block_c)
    else:
        span = per_group
        block_p = min(powers[1], tile)
        block_c = min(powers[0], tile // block_p)
    tiles = triton.cdiv(span, block_c)
    tiles_of_pixels = triton.cdiv(pixels, block_p)
    programs = order.batch * (channels // span) * tiles * tiles_of_pixels
    chunk = block_p * min(tiles_of_pixels, max(1, programs // PROGRAMS))
    return whole._replace(
        span=span, tiles=tiles, chunk=chunk, chunks=triton.cdiv(pixels, chunk), block_c=block_c, block_p=block_p
    )


@on_its_device
def forward(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    order = Order(x)
    y = order.result(x)
    mean = torch.empty(x.shape[0], num_groups, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if x.numel():
        call = _NormCall(order.of(x), cut(x, num_groups, order), weight, bias, silu)
        if call.how.is_one_group:
            call.normalise_group(y, mean, rstd, eps)
        else:
            partials = call.how.partials(x)
            call.statistics(partials)
            if order.channels_last:
                call.moments(partials, mean, rstd, eps)
            call.activate(y, mean, rstd, None if order.channels_last else partials, eps)
    return order.finish(y, x), mean, rstd


@on_its_device
def backward(
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    silu: bool,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    order = Order(x)
    grad_x = order.result(x) if needs_x else None
    # Of an empty batch they are zero, and nothing is launched that writes them.
    new = x.new_empty if x.numel() else x.new_zeros
    grad_weight = new(weight.shape, dtype=weight.dtype) if needs_weight and weight is not None else None
    grad_bias = new(bias.shape, dtype=bias.dtype) if needs_bias and bias is not None else None
    needs_parameters = grad_weight is not None or grad_bias is not None
    if x.numel() and (needs_x or needs_parameters):
        call = _NormCall(order.of(x), cut(x, mean.shape[1], order), weight, bias, silu)
        grads = order.of(grad_output)
        partials = call.how.partials(x) if needs_parameters or not call.how.is_one_group else None
        if call.how.is_one_group:
            call.group_gradient(grads, mean, rstd, grad_x, partials)
        else:
            call.sums(grads, mean, rstd, partials)
            if needs_x:
                terms = call.terms(partials, mean) if order.channels_last else None
                call.input_gradient(grads, mean, rstd, grad_x, terms, partials)
        if needs_parameters:
            call.parameter_gradients(partials, grad_weight, grad_bias)
    return None if grad_x is None else order.finish(grad_x, x), grad_weight, grad_bias


class _NormCall:
    """The launches of a call, each named as its kernel, and the arguments that they share."""

    def __init__(self, x: Tensor, how: Cut, weight: Tensor | None, bias: Tensor | None, silu: bool) -> None:
        self.x, self.how, self.weight, self.bias, self.silu = x, how, weight, bias, silu

    def normalise_group(self, y: Tensor, mean: Tensor, rstd: Tensor, eps: float) -> None:
        how = self.how
        _normalise_group[how.grid](
            p_x=self.x,
            p_y=y,
            p_mean=mean,
            p_rstd=rstd,
            p_weight=self.weight,
            weight_stride=_stride(self.weight),
            p_bias=self.bias,
            bias_stride=_stride(self.bias),
            eps=eps,
            channels=how.channels,
            pixels=how.pixels,
            per_group=how.per_group,
            span=how.span,
            tiles=how.tiles,
            chunk=how.chunk,
            chunks=how.chunks,
            SILU=self.silu,
            CHANNELS_LAST=how.channels_last,
            WIDE=how.wide,
            BLOCK_C=how.block_c,
            BLOCK_P=how.block_p,
            num_warps=how.warps,
            maxnreg=MOST_REGISTERS,
        )

    def statistics(self, partials: Tensor) -> None:
        how = self.how
        _statistics[how.grid](
            p_x=self.x,
            p_partials=partials,
            channels=how.channels,
            pixels=how.pixels,
            per_group=how.per_group,
            span=how.span,
            tiles=how.tiles,
            chunk=how.chunk,
            chunks=how.chunks,
            CHANNELS_LAST=how.channels_last,
            WIDE=how.wide,
            BLOCK_C=how.block_c,
            BLOCK_P=how.block_p,
            num_warps=how.warps,
        )

    def moments(self, partials: Tensor, mean: Tensor, rstd: Tensor, eps: float) -> None:
        how = self.how
        _moments[mean.shape](
            p_x=self.x,
            p_partials=partials,
            p_mean=mean,
            p_rstd=rstd,
            eps=eps,
            channels=how.channels,
            pixels=how.pixels,
            per_group=how.per_group,
            chunk=how.chunk,
            chunks=how.chunks,
            CHANNELS_LAST=how.channels_last,
            WIDE=how.wide,
            BLOCK=how.block_partials,
        )

    def activate(self, y: Tensor, mean: Tensor, rstd: Tensor, partials: Tensor | None, eps: float) -> None:
        how = self.how
        _activate[how.grid](
            p_x=self.x,
            p_y=y,
            p_mean=mean,
            p_rstd=rstd,
            p_partials=partials,
            p_weight=self.weight,
            weight_stride=_stride(self.weight),
            p_bias=self.bias,
            bias_stride=_stride(self.bias),
            eps=eps,
            channels=how.channels,
            pixels=how.pixels,
            per_group=how.per_group,
            span=how.span,
            tiles=how.tiles,
            chunk=how.chunk,
            chunks=how.chunks,
            SILU=self.silu,
            CHANNELS_LAST=how.channels_last,
            WIDE=how.wide,
            BLOCK_C=how.block_c,
            BLOCK_P=how.block_p,
            BLOCK_PARTIALS=how.block_partials,
            num_warps=how.warps,
        )

    def group_gradient(
        self, grads: Tensor, mean: Tensor, rstd: Tensor, grad_x: Tensor | None, partials: Tensor | None
    ) -> None:
        how = self.how
        _group_gradient[how.grid](
            p_x=self.x,
            p_grad=grads,
            p_mean=mean,
            p_rstd=rstd,
            p_grad_x=grad_x,
            p_partials=partials,
            p_weight=self.weight,
            weight_stride=_stride(self.weight),
            p_bias=self.bias,
            bias_stride=_stride(self.bias),
            channels=how.channels,
            pixels=how.pixels,
            per_group=how.per_group,
            span=how.span,
            tiles=how.tiles,
            chunk=how.chunk,
            chunks=how.chunks,
            SILU=self.silu,
            CHANNELS_LAST=how.channels_last,
            WIDE=how.wide,
            BLOCK_C=how.block_c,
            BLOCK_P=how.block_p,
            num_warps=how.warps,
        )

    def sums(self, grads: Tensor, mean: Tensor, rstd: Tensor, partials: Tensor | None) -> None:
        how = self.how
        _sums[how.grid](
            p_x=self.x,
            p_grad=grads,
            p_mean=mean,
            p_rstd=rstd,
            p_partials=partials,
            p_weight=self.weight,
            weight_stride=_stride(self.weight),
            p_bias=self.bias,
            bias_stride=_stride(self.bias),
            channels=how.channels,
            pixels=how.pixels,
            per_group=how.per_group,
            span=how.span,
            tiles=how.tiles,
            chunk=how.chunk,
            chunks=how.chunks,
            SILU=self.silu,
            CHANNELS_LAST=how.channels_last,
            WIDE=how.wide,
            BLOCK_C=how.block_c,
            BLOCK_P=how.block_p,
            num_warps=how.warps,
            maxnreg=MOST_REGISTERS,
        )

    def terms(self, partials: Tensor | None, mean: Tensor) -> Tensor:
        terms = torch.empty(*mean.shape, 2, dtype=torch.float32, device=mean.device)
        how = self.how
        _terms[mean.shape](
            p_partials=partials,
            p_terms=terms,
            p_weight=self.weight,
            weight_stride=_stride(self.weight),
            channels=how.channels,
            pixels=how.pixels,
            per_group=how.per_group,
            chunk=how.chunk,
            chunks=how.chunks,
            BLOCK=how.block_partials,
        )
        return terms

    def input_gradient(
        self,
        grads: Tensor,
        mean: Tensor,
        rstd: Tensor,
        grad_x: Tensor | None,
        terms: Tensor | None,
        partials: Tensor | None,
    ) -> None:
        how = self.how
        _input_gradient[how.grid](
            p_x=self.x,
            p_grad=grads,
            p_mean=mean,
            p_rstd=rstd,
            p_grad_x=grad_x,
            p_terms=terms,
            p_partials=partials,
            p_weight=self.weight,
            weight_stride=_stride(self.weight),
            p_bias=self.bias,
            bias_stride=_stride(self.bias),
            channels=how.channels,
            pixels=how.pixels,
            per_group=how.per_group,
            span=how.span,
            tiles=how.tiles,
            chunk=how.chunk,
            chunks=how.chunks,
            SILU=self.silu,
            CHANNELS_LAST=how.channels_last,
            WIDE=how.wide,
            BLOCK_C=how.block_c,
            BLOCK_P=how.block_p,
            BLOCK_PARTIALS=how.block_partials,
            num_warps=how.warps,
        )

    def parameter_gradients(
        self, partials: Tensor | None, grad_weight: Tensor | None, grad_bias: Tensor | None
    ) -> None:
        how = self.how
        _parameter_gradients[(triton.cdiv(how.channels, PARAMETER_CHANNELS),)](
            p_partials=partials,
            p_grad_weight=grad_weight,
            p_grad_bias=grad_bias,
            rows=how.batch * how.chunks,
            channels=how.channels,
            BLOCK_R=PARAMETER_ROWS,
            BLOCK_C=PARAMETER_CHANNELS,
            num_warps=WARPS,
        )


def _stride(parameter: Tensor | None) -> int:
    return 0 if parameter is None else parameter.stride(0)


@triton.jit
def _place(channels, span, tiles, chunks, BLOCK_C: tl.constexpr):
    """The sample, the first channel of the span, the tile in it and the chunk of this program, and its channels."""
    program = tl.program_id(0)
    chunk_index = program % chunks
    line = program // chunks
    tile = line % tiles
    spans = channels // span
    first = line // tiles % spans * span
    b = line // tiles // spans
    b_c = first + tile * BLOCK_C + tl.arange(0, BLOCK_C)
    return b.to(tl.int64), first, tile, chunk_index, b_c, b_c < first + span


@triton.jit
def _first_pixel(chunk_index, chunk, WIDE: tl.constexpr):
    # Not an early return: one function has one type.
    return (chunk_index.to(tl.int64) if WIDE else chunk_index) * chunk


@triton.jit
def _within(b_c, b_p, channels, pixels, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr):
    """Where channels and pixels are within a sample. [BLOCK_C, BLOCK_P]"""
    if WIDE:
        b_c = b_c.to(tl.int64)
    if CHANNELS_LAST:
        return b_p[None, :] * channels + b_c[:, None]
    return b_c[:, None] * pixels + b_p[None, :]


@triton.jit
def _per_channel(p_values, stride, b_c, m_c, DEFAULT: tl.constexpr):
    """A parameter of the channels, as a column. [BLOCK_C, 1]"""
    # Not an early return: what follows one is compiled all the same.
    if p_values is None:
        b_values = tl.full([b_c.shape[0], 1], DEFAULT, tl.float32)
    else:
        b_values = tl.load(p_values + b_c * stride, mask=m_c, other=0.0).to(tl.float32)[:, None]
    return b_values


@triton.jit
def _per_group(p_values, b, b_c, m_c, channels, per_group):
    """A number of the channels' groups, as a column. p_values: [B, groups] -> [BLOCK_C, 1]"""
    return tl.load(p_values + b * (channels // per_group) + b_c // per_group, mask=m_c, other=0.0)[:, None]


@triton.jit
def _silu(b_y):
    return b_y * tl.sigmoid(b_y)


@triton.jit
def _through_silu(b_grad, b_y):
    """b_grad times the derivative of SiLU at b_y."""
    b_sigmoid = tl.sigmoid(b_y)
    return b_grad * b_sigmoid * tl.fma(b_y, 1.0 - b_sigmoid, 1.0)


@triton.jit
def _merged(b_n, b_mean, b_squares, total, AXIS: tl.constexpr):
    """Mean and sum of squared deviations of `total` values from those of the lanes along an axis, which is kept.

    The second pass goes around the mean but for rounding, and its first moment takes the rounding off.
    """
    b_pivot = tl.sum(b_n * b_mean, AXIS, keep_dims=True) / total
    b_d = b_mean - b_pivot
    b_first = tl.sum(b_n * b_d, AXIS, keep_dims=True)
    b_second = tl.sum(b_squares + b_n * b_d * b_d, AXIS, keep_dims=True)
    b_shift = b_first / total
    b_left = b_second - b_first * b_shift
    return b_pivot + b_shift, tl.where(b_left < 0.0, 0.0, b_left)


@triton.jit
def _rstd(squares, total, eps):
    return tl.div_rn(1.0, tl.sqrt_rn(squares / total + eps))


@triton.jit
def _pivot(p_sample, first, inside, pixels, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr):
    """The first value of the groups whose first channels are `first`."""
    if WIDE:
        first = first.to(tl.int64)
    if CHANNELS_LAST:
        return tl.load(p_sample + first, mask=inside, other=0.0).to(tl.float32)
    return tl.load(p_sample + first * pixels, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _group_moments(
    p_x,
    p_partials,
    b,
    first,
    channels,
    pixels,
    per_group,
    chunk,
    chunks,
    eps,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mean and 1 / sqrt(variance + eps) of the group whose first channel is `first`. [1] each"""
    count = per_group * chunks
    b_n = tl.zeros([BLOCK], tl.float32)
    b_mean = tl.zeros([BLOCK], tl.float32)
    b_squares = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, count, BLOCK):
        b_i = begin + tl.arange(0, BLOCK)
        m_i = b_i < count
        b_chunk = (b_i // per_group).to(tl.int64)
        p_of_chunk = p_partials + (b * chunks + b_chunk) * 2 * channels + first + b_i % per_group
        b_more = tl.where(m_i, tl.minimum(pixels - b_chunk * chunk, chunk), 0).to(tl.float32)
        # Chan, Golub, LeVeque: "Algorithms for computing the sample variance", 1983.
        b_d = tl.load(p_of_chunk, mask=m_i, other=0.0) - b_mean
        b_d = tl.where(m_i, b_d, 0.0)
        b_share = b_more / tl.maximum(b_n + b_more, 1.0)
        b_squares += tl.load(p_of_chunk + channels, mask=m_i, other=0.0) + b_d * b_d * (b_n * b_share)
        b_mean += b_d * b_share
        b_n += b_more
    total = as_float(per_group) * as_float(pixels)
    mean, squares = _merged(b_n, b_mean, b_squares, total, 0)
    pivot = _pivot(p_x + b * pixels * channels, first, True, pixels, CHANNELS_LAST, WIDE)
    return pivot + mean, _rstd(squares, total, eps)


@triton.jit
def _group_terms(
    p_partials, p_weight, weight_stride, b, first, channels, pixels, per_group, chunk, chunks, BLOCK: tl.constexpr
):
    """Means over a group of g weight and of g weight normalized, g the gradient before the activation. [1] each"""
    count = per_group * chunks
    b_first = tl.zeros([BLOCK], tl.float32)
    b_second = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, count, BLOCK):
        b_i = begin + tl.arange(0, BLOCK)
        m_i = b_i < count
        b_c = first + b_i % per_group
        p_of_chunk = p_partials + (b * chunks + b_i // per_group) * 2 * channels + b_c
        b_first_more = tl.load(p_of_chunk, mask=m_i, other=0.0)
        b_second_more = tl.load(p_of_chunk + channels, mask=m_i, other=0.0)
        if p_weight is not None:
            b_weight = tl.load(p_weight + b_c * weight_stride, mask=m_i, other=0.0).to(tl.float32)
            b_first_more *= b_weight
            b_second_more *= b_weight
        b_first += b_first_more
        b_second += b_second_more
    total = as_float(per_group) * as_float(pixels)
    return tl.sum(b_first, 0, keep_dims=True) / total, tl.sum(b_second, 0, keep_dims=True) / total


@triton.jit
def _normalise_group(
    p_x,  # [B, C, pixels], as p_y
    p_y,
    p_mean,  # [B, groups]
    p_rstd,
    p_weight,  # [C] or None
    weight_stride,
    p_bias,
    bias_stride,
    eps,
    channels,
    pixels,
    per_group,
    span,
    tiles,
    chunk,
    chunks,
    SILU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    b, first, _, _, b_c, m_c = _place(channels, span, tiles, chunks, BLOCK_C)
    b_p = tl.arange(0, BLOCK_P)
    m_inside = m_c[:, None] & (b_p < pixels)[None, :]
    b_at = b * pixels * channels + _within(b_c, b_p, channels, pixels, CHANNELS_LAST, WIDE)
    b_x = tl.load(p_x + b_at, mask=m_inside, other=0.0).to(tl.float32)
    total = as_float(per_group * pixels)
    pivot = tl.sum(tl.sum(b_x, 1), 0) / total
    shift = tl.sum(tl.sum(tl.where(m_inside, b_x - pivot, 0.0), 1), 0) / total
    mean = pivot + shift
    b_d = tl.where(m_inside, b_x - mean, 0.0)
    rstd = _rstd(tl.sum(tl.sum(b_d * b_d, 1), 0), total, eps)
    at_group = b * (channels // per_group) + first // per_group
    tl.store(p_mean + at_group, mean)
    tl.store(p_rstd + at_group, rstd)
    b_scale = _per_channel(p_weight, weight_stride, b_c, m_c, 1.0) * rstd
    b_y = tl.fma(b_d, b_scale, _per_channel(p_bias, bias_stride, b_c, m_c, 0.0))
    if SILU:
        b_y = _silu(b_y)
    tl.store(p_y + b_at, b_y.to(p_y.dtype.element_ty), mask=m_inside)


@triton.jit
def _statistics(
    p_x,  # [B, C, pixels]
    p_partials,  # [B, chunks, 2, C]: mean less the group's first value, sum of squared deviations from the mean
    channels,
    pixels,
    per_group,
    span,
    tiles,
    chunk,
    chunks,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    b, _, _, chunk_index, b_c, m_c = _place(channels, span, tiles, chunks, BLOCK_C)
    begin = _first_pixel(chunk_index, chunk, WIDE)
    length = tl.minimum(pixels - begin, chunk).to(tl.int32)
    p_sample = p_x + b * pixels * channels
    # Welford's recurrence in every lane, for one reduction among lanes at the end. It goes around the group's first
    # value: the means of chunks would round to the precision of the group's where that is large.
    b_pivot = _pivot(p_sample, b_c // per_group * per_group, m_c, pixels, CHANNELS_LAST, WIDE)[:, None]
    b_mean = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    b_squares = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    seen = 0.0
    for offset in range(0, length, BLOCK_P):
        b_i = offset + tl.arange(0, BLOCK_P)
        m_inside = m_c[:, None] & (b_i < length)[None, :]
        b_at = _within(b_c, begin + b_i, channels, pixels, CHANNELS_LAST, WIDE)
        b_x = tl.load(p_sample + b_at, mask=m_inside, other=0.0).to(tl.float32)
        b_x -= b_pivot
        seen += 1.0
        b_d = tl.where(m_inside, b_x - b_mean, 0.0)
        b_mean += b_d * (1.0 / seen)
        b_squares += b_d * (b_x - b_mean)
    b_n = ((length + BLOCK_P - 1 - tl.arange(0, BLOCK_P)) // BLOCK_P).to(tl.float32)[None, :]
    b_mean, b_squares = _merged(b_n, b_mean, b_squares, length.to(tl.float32), 1)
    b_to = (b * chunks + chunk_index) * 2 * channels + b_c[:, None]
    tl.store(p_partials + b_to, b_mean, mask=m_c[:, None])
    tl.store(p_partials + b_to + channels, b_squares, mask=m_c[:, None])


@triton.jit
def _moments(
    p_x,  # [B, C, pixels]
    p_partials,  # [B, chunks, 2, C]
    p_mean,  # [B, groups]
    p_rstd,
    eps,
    channels,
    pixels,
    per_group,
    chunk,
    chunks,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    mean, rstd = _group_moments(
        p_x,
        p_partials,
        b,
        g * per_group,
        channels,
        pixels,
        per_group,
        chunk,
        chunks,
        eps,
        CHANNELS_LAST,
        WIDE,
        BLOCK,
    )
    b_at = b * (channels // per_group) + g + tl.arange(0, 1)
    tl.store(p_mean + b_at, mean)
    tl.store(p_rstd + b_at, rstd)


@triton.jit
def _activate(
    p_x,  # [B, C, pixels], as p_y
    p_y,
    p_mean,  # [B, groups]; written if there are partials
    p_rstd,
    p_partials,  # [B, chunks, 2, C] or None
    p_weight,  # [C] or None
    weight_stride,
    p_bias,
    bias_stride,
    eps,
    channels,
    pixels,
    per_group,
    span,
    tiles,
    chunk,
    chunks,
    SILU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_PARTIALS: tl.constexpr,
):
    b, first, tile, chunk_index, b_c, m_c = _place(channels, span, tiles, chunks, BLOCK_C)
    if p_partials is None:
        b_mean = _per_group(p_mean, b, b_c, m_c, channels, per_group)
        b_rstd = _per_group(p_rstd, b, b_c, m_c, channels, per_group)
    else:
        mean, rstd = _group_moments(
            p_x,
            p_partials,
            b,
            first,
            channels,
            pixels,
            per_group,
            chunk,
            chunks,
            eps,
            CHANNELS_LAST,
            WIDE,
            BLOCK_PARTIALS,
        )
        m_one = (tl.arange(0, 1) + tile + chunk_index) == 0
        b_at_group = b * (channels // per_group) + first // per_group + tl.arange(0, 1)
        tl.store(p_mean + b_at_group, mean, mask=m_one)
        tl.store(p_rstd + b_at_group, rstd, mask=m_one)
        b_mean, b_rstd = mean[:, None], rstd[:, None]
    b_scale = _per_channel(p_weight, weight_stride, b_c, m_c, 1.0) * b_rstd
    b_bias = _per_channel(p_bias, bias_stride, b_c, m_c, 0.0)
    begin = _first_pixel(chunk_index, chunk, WIDE)
    length = tl.minimum(pixels - begin, chunk).to(tl.int32)
    for offset in range(0, length, BLOCK_P):
        b_i = offset + tl.arange(0, BLOCK_P)
        m_inside = m_c[:, None] & (b_i < length)[None, :]
        b_at = b * pixels * channels + _within(b_c, begin + b_i, channels, pixels, CHANNELS_LAST, WIDE)
        b_x = tl.load(p_x + b_at, mask=m_inside, other=0.0).to(tl.float32)
        # The mean goes off first: x scale + (bias - mean scale) would cancel where it is large.
        b_y = (b_x - b_mean) * b_scale + b_bias
        if SILU:
            b_y = _silu(b_y)
        tl.store(p_y + b_at, b_y.to(p_y.dtype.element_ty), mask=m_inside)


@triton.jit
def _group_gradient(
    p_x,  # [B, C, pixels], as p_grad and p_grad_x
    p_grad,
    p_mean,  # [B, groups]
    p_rstd,
    p_grad_x,  # or None
    p_partials,  # [B, 1, 2, C] or None: sums of g and g normalized
    p_weight,  # [C] or None
    weight_stride,
    p_bias,
    bias_stride,
    channels,
    pixels,
    per_group,
    span,
    tiles,
    chunk,
    chunks,
    SILU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    b, first, _, _, b_c, m_c = _place(channels, span, tiles, chunks, BLOCK_C)
    b_p = tl.arange(0, BLOCK_P)
    m_inside = m_c[:, None] & (b_p < pixels)[None, :]
    b_at = b * pixels * channels + _within(b_c, b_p, channels, pixels, CHANNELS_LAST, WIDE)
    at_group = b * (channels // per_group) + first // per_group
    mean, rstd = tl.load(p_mean + at_group), tl.load(p_rstd + at_group)
    b_weight = _per_channel(p_weight, weight_stride, b_c, m_c, 1.0)
    b_x = tl.load(p_x + b_at, mask=m_inside, other=0.0).to(tl.float32)
    b_g = tl.load(p_grad + b_at, mask=m_inside, other=0.0).to(tl.float32)
    b_normalized = (b_x - mean) * rstd
    if SILU:
        b_g = _through_silu(b_g, b_normalized * b_weight + _per_channel(p_bias, bias_stride, b_c, m_c, 0.0))
    b_first = tl.sum(b_g, 1, keep_dims=True)
    b_second = tl.sum(b_g * b_normalized, 1, keep_dims=True)
    if p_partials is not None:
        b_to = b * 2 * channels + b_c[:, None]
        tl.store(p_partials + b_to, b_first, mask=m_c[:, None])
        tl.store(p_partials + b_to + channels, b_second, mask=m_c[:, None])
    if p_grad_x is not None:
        total = as_float(per_group * pixels)
        b_first_mean = tl.sum(b_first * b_weight, 0, keep_dims=True) / total
        b_second_mean = tl.sum(b_second * b_weight, 0, keep_dims=True) / total
        b_grad_x = rstd * (b_g * b_weight - b_first_mean - b_normalized * b_second_mean)
        tl.store(p_grad_x + b_at, b_grad_x.to(p_grad_x.dtype.element_ty), mask=m_inside)


@triton.jit
def _sums(
    p_x,  # [B, C, pixels], as p_grad
    p_grad,
    p_mean,  # [B, groups]
    p_rstd,
    p_partials,  # [B, chunks, 2, C]: sums of g and g normalized, g the gradient before the activation
    p_weight,  # [C] or None
    weight_stride,
    p_bias,
    bias_stride,
    channels,
    pixels,
    per_group,
    span,
    tiles,
    chunk,
    chunks,
    SILU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    b, _, _, chunk_index, b_c, m_c = _place(channels, span, tiles, chunks, BLOCK_C)
    b_mean = _per_group(p_mean, b, b_c, m_c, channels, per_group)
    b_rstd = _per_group(p_rstd, b, b_c, m_c, channels, per_group)
    b_scale = _per_channel(p_weight, weight_stride, b_c, m_c, 1.0) * b_rstd
    b_bias = _per_channel(p_bias, bias_stride, b_c, m_c, 0.0)
    begin = _first_pixel(chunk_index, chunk, WIDE)
    length = tl.minimum(pixels - begin, chunk).to(tl.int32)
    p_to = p_partials + (b * chunks + chunk_index) * 2 * channels + b_c[:, None]
    b_first = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    b_second = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for offset in range(0, length, BLOCK_P):
        b_i = offset + tl.arange(0, BLOCK_P)
        m_inside = m_c[:, None] & (b_i < length)[None, :]
        b_at = b * pixels * channels + _within(b_c, begin + b_i, channels, pixels, CHANNELS_LAST, WIDE)
        b_x = tl.load(p_x + b_at, mask=m_inside, other=0.0).to(tl.float32)
        b_g = tl.load(p_grad + b_at, mask=m_inside, other=0.0).to(tl.float32)
        b_d = b_x - b_mean
        if SILU:
            b_g = _through_silu(b_g, b_d * b_scale + b_bias)
        b_first += b_g
        b_second += b_g * b_d
    tl.store(p_to, tl.sum(b_first, 1, keep_dims=True), mask=m_c[:, None])
    tl.store(p_to + channels, tl.sum(b_second, 1, keep_dims=True) * b_rstd, mask=m_c[:, None])


@triton.jit
def _terms(
    p_partials,  # [B, chunks, 2, C]
    p_terms,  # [B, groups, 2]
    p_weight,  # [C] or None
    weight_stride,
    channels,
    pixels,
    per_group,
    chunk,
    chunks,
    BLOCK: tl.constexpr,
):
    b, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first_mean, second_mean = _group_terms(
        p_partials, p_weight, weight_stride, b, g * per_group, channels, pixels, per_group, chunk, chunks, BLOCK
    )
    b_at = (b * (channels // per_group) + g) * 2 + tl.arange(0, 1)
    tl.store(p_terms + b_at, first_mean)
    tl.store(p_terms + b_at + 1, second_mean)


@triton.jit
def _input_gradient(
    p_x,  # [B, C, pixels], as p_grad and p_grad_x
    p_grad,
    p_mean,  # [B, groups]
    p_rstd,
    p_grad_x,
    p_terms,  # [B, groups, 2] or None
    p_partials,  # [B, chunks, 2, C]
    p_weight,  # [C] or None
    weight_stride,
    p_bias,
    bias_stride,
    channels,
    pixels,
    per_group,
    span,
    tiles,
    chunk,
    chunks,
    SILU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_PARTIALS: tl.constexpr,
):
    b, first, _, chunk_index, b_c, m_c = _place(channels, span, tiles, chunks, BLOCK_C)
    if p_terms is None:
        first_mean, second_mean = _group_terms(
            p_partials, p_weight, weight_stride, b, first, channels, pixels, per_group, chunk, chunks, BLOCK_PARTIALS
        )
        b_first_mean, b_second_mean = first_mean[:, None], second_mean[:, None]
    else:
        b_of_group = (b * (channels // per_group) + b_c // per_group) * 2
        b_first_mean = tl.load(p_terms + b_of_group, mask=m_c, other=0.0)[:, None]
        b_second_mean = tl.load(p_terms + b_of_group + 1, mask=m_c, other=0.0)[:, None]
    b_mean = _per_group(p_mean, b, b_c, m_c, channels, per_group)
    b_rstd = _per_group(p_rstd, b, b_c, m_c, channels, per_group)
    b_weight = _per_channel(p_weight, weight_stride, b_c, m_c, 1.0)
    b_bias = _per_channel(p_bias, bias_stride, b_c, m_c, 0.0)
    begin = _first_pixel(chunk_index, chunk, WIDE)
    length = tl.minimum(pixels - begin, chunk).to(tl.int32)
    for offset in range(0, length, BLOCK_P):
        b_i = offset + tl.arange(0, BLOCK_P)
        m_inside = m_c[:, None] & (b_i < length)[None, :]
        b_at = b * pixels * channels + _within(b_c, begin + b_i, channels, pixels, CHANNELS_LAST, WIDE)
        b_x = tl.load(p_x + b_at, mask=m_inside, other=0.0).to(tl.float32)
        b_g = tl.load(p_grad + b_at, mask=m_inside, other=0.0).to(tl.float32)
        b_normalized = (b_x - b_mean) * b_rstd
        if SILU:
            b_g = _through_silu(b_g, b_normalized * b_weight + b_bias)
        b_grad_x = b_rstd * (b_g * b_weight - b_first_mean - b_normalized * b_second_mean)
        tl.store(p_grad_x + b_at, b_grad_x.to(p_grad_x.dtype.element_ty), mask=m_inside)


@triton.jit
def _parameter_gradients(
    p_partials,  # [rows, 2, C]
    p_grad_weight,  # [C] or None
    p_grad_bias,
    rows,  # samples x chunks
    channels,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = b_c < channels
    b_bias = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    b_weight = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for begin in range(0, rows, BLOCK_R):
        b_r = begin + tl.arange(0, BLOCK_R)
        m_inside = (b_r < rows)[:, None] & m_c[None, :]
        b_at = b_r.to(tl.int64)[:, None] * 2 * channels + b_c[None, :]
        b_bias += tl.load(p_partials + b_at, mask=m_inside, other=0.0)
        b_weight += tl.load(p_partials + b_at + channels, mask=m_inside, other=0.0)
    if p_grad_weight is not None:
        tl.store(p_grad_weight + b_c, tl.sum(b_weight, 0).to(p_grad_weight.dtype.element_ty), mask=m_c)
    if p_grad_bias is not None:
        tl.store(p_grad_bias + b_c, tl.sum(b_bias, 0).to(p_grad_bias.dtype.element_ty), mask=m_c)
