"""Group normalisation followed by SiLU or nothing, each direction in one to three launches.

A group that fits in one program's registers is done there, in one launch. Others are cut into chunks of pixels: the
first launch leaves two numbers for each channel and chunk, which later launches combine in a fixed order. Row-major,
a program of the last launch works inside one group and combines that group's numbers itself. channels_last, it works
on many groups, so that a small launch between the two combines them once, and leaves numbers for each channel.

The sigmoid is made of two approximate instructions: ex2.approx and rcp.approx.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffpp_fast.availability import INTERPRETED
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
#: The most programs that large tensors are cut for: enough to fill large GPUs twice, few enough that what a program
#: does before and after its loop costs less than the loop. It does not depend on the GPU, and neither do the results.
PROGRAMS = 1024
#: Partial results that are combined at a time.
MOST_PARTIALS = 1024
#: Samples x chunks and channels of a tile of the gradients of weight and bias.
PARAMETER_ROWS = 64
PARAMETER_CHANNELS = 16
#: Pixels of a row-major tile below which no channel is added to it: 512 bytes of bfloat16.
SHORTEST = 256
#: The hardware's limit of a grid's second and third axis.
MOST_ON_AN_AXIS = 65535
#: Channels beyond which `_group_of` needs a division.
MOST_CHANNELS = 65535

_LOG2E = tl.constexpr(1.4426950408889634)
_INTERPRETED = tl.constexpr(INTERPRETED)


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
    def grid(self) -> tuple[int, int]:
        return self.batch * (self.channels // self.span) * self.tiles, self.chunks

    @property
    def is_one_group(self) -> bool:
        """Whether each program has a whole group as one tile."""
        return self.span == self.per_group and self.block_c >= self.span and self.block_p >= self.pixels

    @property
    def full(self) -> bool:
        """Whether there is nothing to mask: tiles end where channels and pixels do."""
        return self.span % self.block_c == 0 and self.pixels % self.block_p == 0

    @property
    def warps(self) -> int:
        return max(1, self.block_c * self.block_p // 512) if self.is_one_group else WARPS

    @property
    def halves(self) -> int:
        """Parts of a tile of pixels that share their accumulators."""
        return 2 if self.block_p > 1 else 1

    @property
    def block_partials(self) -> tuple[int, int]:
        """Chunks and channels of a group whose partial results are combined at a time."""
        channels = min(MOST_PARTIALS, triton.next_power_of_2(self.per_group))
        return min(MOST_PARTIALS // channels, triton.next_power_of_2(self.chunks)), channels

    @property
    def at_once(self) -> bool:
        """Whether these are all of a group."""
        chunks, channels = self.block_partials
        return chunks >= self.chunks and channels >= self.per_group

    def partials(self, like: Tensor) -> Tensor:
        """Two numbers for each channel and chunk, of which the channels are contiguous."""
        return torch.empty(self.batch, self.chunks, 2, self.channels, dtype=torch.float32, device=like.device)


def cut(x: Tensor, num_groups: int, order: Order) -> Cut:
    channels = x.shape[1]
    pixels, per_group = order.sample // channels, channels // num_groups
    powers = triton.next_power_of_2(per_group), triton.next_power_of_2(pixels)
    wide = order.wide or channels > MOST_CHANNELS
    whole = Cut(order.batch, channels, pixels, per_group, per_group, 1, pixels, 1, *powers, order.channels_last, wide)
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
        # Short channels are several to a program, so that it has several tiles, too.
        most_channels = triton.cdiv(order.batch * channels, PROGRAMS) if pixels <= tile else 1
        while block_c < most_channels and span % (2 * block_c) == 0 and block_p > SHORTEST:
            block_c, block_p = 2 * block_c, block_p // 2
    tiles = triton.cdiv(span, block_c)
    tiles_of_pixels = triton.cdiv(pixels, block_p)
    programs = order.batch * (channels // span) * tiles * tiles_of_pixels
    most = min(MOST_ON_AN_AXIS, max(1, PROGRAMS * tiles_of_pixels // programs))
    chunk = block_p * triton.cdiv(tiles_of_pixels, most)
    return whole._replace(
        span=span, tiles=tiles, chunk=chunk, chunks=triton.cdiv(pixels, chunk), block_c=block_c, block_p=block_p
    )


@on_its_device
def forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    offset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    y, _, mean, rstd = _forward(x, None, num_groups, weight, bias, eps, silu, offset)
    return y, mean, rstd


@on_its_device
def group_norm_silu_of_sum(
    x: Tensor,
    residual: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _forward(x, residual, num_groups, weight, bias, eps, silu, None)


def _forward(
    x: Tensor,
    residual: Tensor | None,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    offset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, x + residual (x itself without a residual), mean and rstd."""
    order = Order(x)
    y = order.result(x)
    total = None if residual is None else order.result(x)
    mean = torch.empty(x.shape[0], num_groups, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if x.numel():
        call = _NormCall(order.of(x), cut(x, num_groups, order), weight, bias, offset, silu)
        added = None if residual is None else order.of(residual)
        if call.how.is_one_group:
            call.normalise_group(added, total, y, mean, rstd, eps)
        else:
            partials = call.how.partials(x)
            call.statistics(added, total, partials)
            call.x = call.x if total is None else total
            coefficients = call.moments(partials, mean, rstd, eps) if order.channels_last else None
            call.activate(y, mean, rstd, partials, coefficients, eps)
    return order.finish(y, x), x if total is None else order.finish(total, x), mean, rstd


@on_its_device
def backward(
    grad_output: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    offset: Tensor | None,
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
        call = _NormCall(order.of(x), cut(x, mean.shape[1], order), weight, bias, offset, silu)
        grads = order.of(grad_output)
        more = None if grad_sum is None or not needs_x else order.of(grad_sum)
        partials = call.how.partials(x) if needs_parameters or not call.how.is_one_group else None
        if call.how.is_one_group:
            call.group_gradient(grads, more, mean, rstd, grad_x, partials)
        else:
            call.sums(grads, mean, rstd, partials)
            if needs_x:
                coefficients = call.terms(partials, mean, rstd) if order.channels_last else None
                call.input_gradient(grads, more, mean, rstd, grad_x, partials, coefficients)
        if needs_parameters:
            call.parameter_gradients(partials, grad_weight, grad_bias)
    return None if grad_x is None else order.finish(grad_x, x), grad_weight, grad_bias


class _NormCall:
    """The launches of a call, each named as its kernel, and the arguments that they share."""

    def __init__(
        self,
        x: Tensor,
        how: Cut,
        weight: Tensor | None,
        bias: Tensor | None,
        offset: Tensor | None,
        silu: bool,
    ) -> None:
        self.x, self.how, self.weight, self.bias, self.offset, self.silu = x, how, weight, bias, offset, silu

    def normalise_group(
        self, residual: Tensor | None, total: Tensor | None, y: Tensor, mean: Tensor, rstd: Tensor, eps: float
    ) -> None:
        how = self.how
        _normalise_group[how.grid](
            p_x=self.x,
            p_residual=residual,
            p_sum=total,
            p_y=y,
            p_mean=mean,
            p_rstd=rstd,
            p_weight=self.weight,
            weight_stride=_stride(self.weight),
            p_bias=self.bias,
            bias_stride=_stride(self.bias),
            p_offset=self.offset,
            offset_row=_stride(self.offset, 0),
            offset_stride=_stride(self.offset, 1),
            eps=eps,
            channels=how.channels,
            pixels=how.pixels,
            per_group=how.per_group,
            SILU=self.silu,
            FULL=how.full,
            CHANNELS_LAST=how.channels_last,
            WIDE=how.wide,
            BLOCK_C=how.block_c,
            BLOCK_P=how.block_p,
            num_warps=how.warps,
            maxnreg=MOST_REGISTERS,
        )

    def statistics(self, residual: Tensor | None, total: Tensor | None, partials: Tensor) -> None:
        how = self.how
        _statistics[how.grid](
            p_x=self.x,
            p_residual=residual,
            p_sum=total,
            p_partials=partials,
            channels=how.channels,
            pixels=how.pixels,
            span=how.span,
            tiles=how.tiles,
            chunk=how.chunk,
            FULL=how.full,
            CHANNELS_LAST=how.channels_last,
            WIDE=how.wide,
            BLOCK_C=how.block_c,
            BLOCK_P=how.block_p // how.halves,
            HALVES=how.halves,
            num_warps=WARPS,
            maxnreg=MOST_REGISTERS,
        )

    def moments(self, partials: Tensor, mean: Tensor, rstd: Tensor, eps: float) -> Tensor:
        """Return each channel's mean, less its offset, and weight x rstd. [B, 2, C]"""
        how = self.how
        coefficients = partials.new_empty(how.batch, 2, how.channels)
        _moments[mean.shape](
            p_x=self.x,
            p_partials=partials,
            p_mean=mean,
            p_rstd=rstd,
            p_coefficients=coefficients,
            p_weight=self.weight,
            weight_stride=_stride(self.weight),
            p_offset=self.offset,
            offset_row=_stride(self.offset, 0),
            offset_stride=_stride(self.offset, 1),
            eps=eps,
            channels=how.channels,
            pixels=how.pixels,
            per_group=how.per_group,
            chunk=how.chunk,
            chunks=how.chunks,
            CHANNELS_LAST=how.channels_last,
            WIDE=how.wide,
            AT_ONCE=how.at_once,
            BLOCK_K=how.block_partials[0],
            BLOCK_G=how.block_partials[1],
        )
        return coefficients

    def activate(
        self, y: Tensor, mean: Tensor, rstd: Tensor, partials: Tensor, coefficients: Tensor | None, eps: float
    ) -> None:
        how = self.how
        _activate[how.grid](
            p_x=self.x,
            p_y=y,
            p_mean=mean,
            p_rstd=rstd,
            p_partials=partials,
            p_coefficients=coefficients,
            p_weight=self.weight,
            weight_stride=_stride(self.weight),
            p_bias=self.bias,
            bias_stride=_stride(self.bias),
            p_offset=self.offset,
            offset_row=_stride(self.offset, 0),
            offset_stride=_stride(self.offset, 1),
            eps=eps,
            channels=how.channels,
            pixels=how.pixels,
            per_group=how.per_group,
            span=how.span,
            tiles=how.tiles,
            chunk=how.chunk,
            chunks=how.chunks,
            SILU=self.silu,
            FULL=how.full,
            CHANNELS_LAST=how.channels_last,
            WIDE=how.wide,
            BLOCK_C=how.block_c,
            BLOCK_P=how.block_p,
            AT_ONCE=how.at_once,
            BLOCK_K=how.block_partials[0],
            BLOCK_G=how.block_partials[1],
            num_warps=WARPS,
        )

    def group_gradient(
        self,
        grads: Tensor,
        more: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        grad_x: Tensor | None,
        partials: Tensor | None,
    ) -> None:
        how = self.how
        _group_gradient[how.grid](
            p_x=self.x,
            p_grad=grads,
            p_more=more,
            p_mean=mean,
            p_rstd=rstd,
            p_grad_x=grad_x,
            p_partials=partials,
            p_weight=self.weight,
            weight_stride=_stride(self.weight),
            p_bias=self.bias,
            bias_stride=_stride(self.bias),
            p_offset=self.offset,
            offset_row=_stride(self.offset, 0),
            offset_stride=_stride(self.offset, 1),
            channels=how.channels,
            pixels=how.pixels,
            per_group=how.per_group,
            SILU=self.silu,
            FULL=how.full,
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
            p_offset=self.offset,
            offset_row=_stride(self.offset, 0),
            offset_stride=_stride(self.offset, 1),
            channels=how.channels,
            pixels=how.pixels,
            per_group=how.per_group,
            span=how.span,
            tiles=how.tiles,
            chunk=how.chunk,
            SILU=self.silu,
            FULL=how.full,
            CHANNELS_LAST=how.channels_last,
            WIDE=how.wide,
            BLOCK_C=how.block_c,
            BLOCK_P=how.block_p // how.halves,
            HALVES=how.halves,
            num_warps=WARPS,
            maxnreg=MOST_REGISTERS,
        )

    def terms(self, partials: Tensor | None, mean: Tensor, rstd: Tensor) -> Tensor:
        """Return each channel's mean, less its offset, weight x rstd, slope and intercept. [B, 4, C]"""
        how = self.how
        coefficients = mean.new_empty(how.batch, 4, how.channels)
        _terms[mean.shape](
            p_partials=partials,
            p_mean=mean,
            p_rstd=rstd,
            p_coefficients=coefficients,
            p_weight=self.weight,
            weight_stride=_stride(self.weight),
            p_offset=self.offset,
            offset_row=_stride(self.offset, 0),
            offset_stride=_stride(self.offset, 1),
            channels=how.channels,
            pixels=how.pixels,
            per_group=how.per_group,
            chunks=how.chunks,
            AT_ONCE=how.at_once,
            BLOCK_K=how.block_partials[0],
            BLOCK_G=how.block_partials[1],
        )
        return coefficients

    def input_gradient(
        self,
        grads: Tensor,
        more: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        grad_x: Tensor | None,
        partials: Tensor | None,
        coefficients: Tensor | None,
    ) -> None:
        how = self.how
        _input_gradient[how.grid](
            p_x=self.x,
            p_grad=grads,
            p_more=more,
            p_mean=mean,
            p_rstd=rstd,
            p_grad_x=grad_x,
            p_partials=partials,
            p_coefficients=coefficients,
            p_weight=self.weight,
            weight_stride=_stride(self.weight),
            p_bias=self.bias,
            bias_stride=_stride(self.bias),
            p_offset=self.offset,
            offset_row=_stride(self.offset, 0),
            offset_stride=_stride(self.offset, 1),
            channels=how.channels,
            pixels=how.pixels,
            per_group=how.per_group,
            span=how.span,
            tiles=how.tiles,
            chunk=how.chunk,
            chunks=how.chunks,
            SILU=self.silu,
            FULL=how.full,
            CHANNELS_LAST=how.channels_last,
            WIDE=how.wide,
            BLOCK_C=how.block_c,
            BLOCK_P=how.block_p,
            AT_ONCE=how.at_once,
            BLOCK_K=how.block_partials[0],
            BLOCK_G=how.block_partials[1],
            num_warps=WARPS,
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


def _stride(values: Tensor | None, axis: int = 0) -> int:
    return 0 if values is None else values.stride(axis)


@triton.jit
def _place(channels, span, tiles, BLOCK_C: tl.constexpr):
    """The sample and span of channels of this program, the first of them, the tile among them, and its channels."""
    program = tl.program_id(0)
    per_sample = channels // span * tiles
    b = program // per_sample
    line = program - b * per_sample
    number = line // tiles
    tile = line - number * tiles
    first = number * span
    b_c = first + tile * BLOCK_C + tl.arange(0, BLOCK_C)
    return b.to(tl.int64), number, first, tile, b_c, b_c < first + span


@triton.jit
def _group_place(channels, pixels, per_group, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """The sample and number of the group that this program has whole, its channels, and its pixels."""
    groups = channels // per_group
    program = tl.program_id(0)
    b = program // groups
    b_in_group = tl.arange(0, BLOCK_C)
    b_c = program % groups * per_group + b_in_group
    return b.to(tl.int64), program, b_c, b_in_group < per_group, tl.arange(0, BLOCK_P)


@triton.jit
def _first_pixel(chunk, WIDE: tl.constexpr):
    """The first pixel of this program's chunk."""
    # Not an early return: one function has one type.
    return (tl.program_id(1).to(tl.int64) if WIDE else tl.program_id(1)) * chunk


@triton.jit
def _within(b_c, b_p, channels, pixels, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr):
    """Where channels and pixels are within a sample. [BLOCK_C, BLOCK_P]"""
    if WIDE:
        b_c = b_c.to(tl.int64)
    if CHANNELS_LAST:
        return b_p[None, :] * channels + b_c[:, None]
    return b_c[:, None] * pixels + b_p[None, :]


@triton.jit
def _loaded(p_values, b_at, m_inside, FULL: tl.constexpr):
    """Elements as float32, 0 outside."""
    b_values = tl.load(p_values + b_at) if FULL else tl.load(p_values + b_at, mask=m_inside, other=0.0)
    return b_values.to(tl.float32)


@triton.jit
def _stored(p_values, b_at, b_values, m_inside, FULL: tl.constexpr):
    if FULL:
        tl.store(p_values + b_at, b_values.to(p_values.dtype.element_ty))
    else:
        tl.store(p_values + b_at, b_values.to(p_values.dtype.element_ty), mask=m_inside)


@triton.jit
def _rounded_sum(b_x, b_residual, p_sum):
    """x + residual as it is stored."""
    return (b_x + b_residual).to(p_sum.dtype.element_ty).to(tl.float32)


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
def _offset(p_offset, row, stride, b, b_c, m_c):
    """The offsets of a sample's channels, as a column. [BLOCK_C, 1]"""
    if p_offset is None:
        b_offset = tl.zeros([b_c.shape[0], 1], tl.float32)
    else:
        b_offset = tl.load(p_offset + b * row + b_c * stride, mask=m_c, other=0.0).to(tl.float32)[:, None]
    return b_offset


@triton.jit
def _group_of(b_c, per_group, WIDE: tl.constexpr):
    """b_c // per_group, by a multiplication that is exact while channels x channels of a group fit in 32 bits."""
    if WIDE:
        b_group = b_c // per_group
    else:
        inverse = tl.cast(0xFFFFFFFF, tl.uint32) // tl.cast(per_group, tl.uint32)
        b_group = tl.umulhi((b_c + 1).to(tl.uint32), inverse)
    return b_group.to(tl.int32)


@triton.jit
def _sigmoid(b_y):
    """1 / (1 + 2^(-y log2 e)), whose two approximations are within 2^-22; 0 for y below -88."""
    b_denominator = 1.0 + tl.exp2(b_y * -_LOG2E)
    if _INTERPRETED:
        b_sigmoid = 1.0 / b_denominator
    else:
        # Triton's own division scales what is near the ends of float32, which takes three more instructions.
        b_sigmoid = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [b_denominator], dtype=tl.float32, is_pure=True, pack=1
        )
    return b_sigmoid


@triton.jit
def _silu(b_y):
    return b_y * _sigmoid(b_y)


@triton.jit
def _through_silu(b_grad, b_y):
    """b_grad times the derivative of SiLU at b_y."""
    b_sigmoid = _sigmoid(b_y)
    return b_grad * b_sigmoid * tl.fma(b_y, 1.0 - b_sigmoid, 1.0)


@triton.jit
def _rstd(squares, total, eps):
    b_left = squares / total
    return tl.rsqrt(tl.where(b_left < 0.0, 0.0, b_left) + eps)


@triton.jit
def _first_values(p_sample, b_c, m_c, pixels, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr):
    """The values of channels at the first pixel. [BLOCK_C]"""
    if WIDE:
        b_c = b_c.to(tl.int64)
    return tl.load(p_sample + (b_c if CHANNELS_LAST else b_c * pixels), mask=m_c, other=0.0).to(tl.float32)


@triton.jit
def _sums_of_both(b_first, b_second, AXIS: tl.constexpr):
    """Sums along an axis, which is kept, of two blocks at once."""
    if _INTERPRETED:
        # The interpreter goes through pairs element by element.
        b_first_sum = tl.sum(b_first, AXIS, keep_dims=True)
        b_second_sum = tl.sum(b_second, AXIS, keep_dims=True)
    else:
        b_first_sum, b_second_sum = tl.reduce((b_first, b_second), AXIS, _added, keep_dims=True)
    return b_first_sum, b_second_sum


@triton.jit
def _added(first, second, more_first, more_second):
    return first + more_first, second + more_second


@triton.jit
def _group_moments(
    p_x,
    p_partials,
    p_offset,
    offset_row,
    offset_stride,
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
    AT_ONCE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Mean and 1 / sqrt(variance + eps) of the group whose first channel is `first`.

    Two passes over the partial results, the second around the mean of the first.
    """
    total = as_float(per_group) * as_float(pixels)
    p_sample = p_x + b * pixels * channels
    p_partials += b * chunks * 2 * channels + first
    if p_offset is not None:
        p_offset += b * offset_row + first * offset_stride
    # The means of channels are kept as distances from their first values, these here as distances from the group's:
    # else they would round to the precision of the group's mean where that is large.
    pivot = _first_values(p_sample, first, True, pixels, CHANNELS_LAST, WIDE)
    b_i, b_k = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_K)
    if AT_ONCE:
        b_near = _near(p_sample, p_offset, offset_stride, first, b_i, per_group, pivot, pixels, CHANNELS_LAST, WIDE)
        m_inside, b_at, b_n = _parts(b_i, b_k, channels, pixels, per_group, chunk, chunks, WIDE)
        b_mean = tl.load(p_partials + b_at, mask=m_inside, other=0.0) + b_near
        b_more = tl.load(p_partials + channels + b_at, mask=m_inside, other=0.0)
        shift = tl.sum(tl.where(m_inside, b_n * b_mean, 0.0)) / total
        b_d = b_mean - shift
        b_squares = tl.where(m_inside, b_n * b_d * b_d + b_more, 0.0)
    else:
        b_sum = tl.zeros([BLOCK_K, BLOCK_G], tl.float32)
        for begin in range(0, per_group, BLOCK_G):
            b_c = begin + b_i
            b_near = _near(p_sample, p_offset, offset_stride, first, b_c, per_group, pivot, pixels, CHANNELS_LAST, WIDE)
            for begin_k in range(0, chunks, BLOCK_K):
                m_inside, b_at, b_n = _parts(b_c, begin_k + b_k, channels, pixels, per_group, chunk, chunks, WIDE)
                b_mean = tl.load(p_partials + b_at, mask=m_inside, other=0.0) + b_near
                b_sum += tl.where(m_inside, b_n * b_mean, 0.0)
        shift = tl.sum(b_sum) / total
        b_squares = tl.zeros([BLOCK_K, BLOCK_G], tl.float32)
        for begin in range(0, per_group, BLOCK_G):
            b_c = begin + b_i
            b_near = _near(p_sample, p_offset, offset_stride, first, b_c, per_group, pivot, pixels, CHANNELS_LAST, WIDE)
            for begin_k in range(0, chunks, BLOCK_K):
                m_inside, b_at, b_n = _parts(b_c, begin_k + b_k, channels, pixels, per_group, chunk, chunks, WIDE)
                b_d = tl.load(p_partials + b_at, mask=m_inside, other=0.0) + (b_near - shift)
                b_more = tl.load(p_partials + channels + b_at, mask=m_inside, other=0.0)
                b_squares += tl.where(m_inside, b_n * b_d * b_d + b_more, 0.0)
    return pivot + shift, _rstd(tl.sum(b_squares), total, eps)


@triton.jit
def _near(
    p_sample,
    p_offset,
    offset_stride,
    first,
    b_i,
    per_group,
    pivot,
    pixels,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The first values of channels, with what is added to them, as distances from the group's. [1, BLOCK_G]"""
    b_near = _first_values(p_sample, first + b_i, b_i < per_group, pixels, CHANNELS_LAST, WIDE) - pivot
    if p_offset is not None:
        b_near += tl.load(p_offset + b_i * offset_stride, mask=b_i < per_group, other=0.0).to(tl.float32)
    return b_near[None, :]


@triton.jit
def _parts(b_i, b_k, channels, pixels, per_group, chunk, chunks, WIDE: tl.constexpr):
    """Which partial results there are of channels b_i of a group and chunks b_k, where, and of how many pixels."""
    m_inside = (b_k < chunks)[:, None] & (b_i < per_group)[None, :]
    b_at = b_k[:, None].to(tl.int64) * 2 * channels + b_i[None, :]
    b_begin = (b_k.to(tl.int64) if WIDE else b_k) * chunk
    return m_inside, b_at, tl.minimum(pixels - b_begin, chunk).to(tl.float32)[:, None]


@triton.jit
def _group_terms(
    p_partials,
    p_weight,
    weight_stride,
    b,
    first,
    channels,
    pixels,
    per_group,
    chunks,
    AT_ONCE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Means over a group of g weight and of g weight normalized, g the gradient before the activation."""
    total = as_float(per_group) * as_float(pixels)
    p_partials += b * chunks * 2 * channels + first
    b_i, b_k = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_K)
    if AT_ONCE:
        b_first, b_second = _weighted(p_partials, p_weight, weight_stride, first, b_i, b_k, channels, per_group, chunks)
    else:
        b_first = tl.zeros([BLOCK_K, BLOCK_G], tl.float32)
        b_second = tl.zeros([BLOCK_K, BLOCK_G], tl.float32)
        for begin in range(0, per_group, BLOCK_G):
            for begin_k in range(0, chunks, BLOCK_K):
                b_more, b_more_second = _weighted(
                    p_partials,
                    p_weight,
                    weight_stride,
                    first,
                    begin + b_i,
                    begin_k + b_k,
                    channels,
                    per_group,
                    chunks,
                )
                b_first += b_more
                b_second += b_more_second
    return tl.sum(b_first) / total, tl.sum(b_second) / total


@triton.jit
def _weighted(p_partials, p_weight, weight_stride, first, b_i, b_k, channels, per_group, chunks):
    """The partial results of channels b_i of a group and chunks b_k times the weight. [BLOCK_K, BLOCK_G] each"""
    m_inside = (b_k < chunks)[:, None] & (b_i < per_group)[None, :]
    b_at = b_k[:, None].to(tl.int64) * 2 * channels + b_i[None, :]
    b_first = tl.load(p_partials + b_at, mask=m_inside, other=0.0)
    b_second = tl.load(p_partials + channels + b_at, mask=m_inside, other=0.0)
    if p_weight is not None:
        b_weight = tl.load(p_weight + (first + b_i) * weight_stride, mask=b_i < per_group, other=0.0)
        b_first *= b_weight.to(tl.float32)[None, :]
        b_second *= b_weight.to(tl.float32)[None, :]
    return b_first, b_second


@triton.jit
def _normalise_group(
    p_x,  # [B, C, pixels], as p_residual, p_sum and p_y
    p_residual,  # or None
    p_sum,  # x + residual, or None
    p_y,
    p_mean,  # [B, groups]
    p_rstd,
    p_weight,  # [C] or None
    weight_stride,
    p_bias,
    bias_stride,
    p_offset,  # [B, C] or None
    offset_row,
    offset_stride,
    eps,
    channels,
    pixels,
    per_group,
    SILU: tl.constexpr,
    FULL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    b, group, b_c, m_c, b_p = _group_place(channels, pixels, per_group, BLOCK_C, BLOCK_P)
    m_inside = m_c[:, None] & (b_p < pixels)[None, :]
    b_at = b * pixels * channels + _within(b_c, b_p, channels, pixels, CHANNELS_LAST, WIDE)
    b_x = _loaded(p_x, b_at, m_inside, FULL)
    if p_residual is not None:
        b_x = _rounded_sum(b_x, _loaded(p_residual, b_at, m_inside, FULL), p_sum)
        _stored(p_sum, b_at, b_x, m_inside, FULL)
    if p_offset is not None:
        b_x += _offset(p_offset, offset_row, offset_stride, b, b_c, m_c)
        b_x = b_x if FULL else tl.where(m_inside, b_x, 0.0)
    total = as_float(per_group * pixels)
    pivot = tl.sum(tl.sum(b_x, 1), 0) / total
    b_d = b_x - pivot
    shift = tl.sum(tl.sum(b_d if FULL else tl.where(m_inside, b_d, 0.0), 1), 0) / total
    b_d = b_x - (pivot + shift)
    b_d = b_d if FULL else tl.where(m_inside, b_d, 0.0)
    rstd = _rstd(tl.sum(tl.sum(b_d * b_d, 1), 0), total, eps)
    tl.store(p_mean + group, pivot + shift)
    tl.store(p_rstd + group, rstd)
    b_scale = _per_channel(p_weight, weight_stride, b_c, m_c, 1.0) * rstd
    b_y = tl.fma(b_d, b_scale, _per_channel(p_bias, bias_stride, b_c, m_c, 0.0))
    if SILU:
        b_y = _silu(b_y)
    _stored(p_y, b_at, b_y, m_inside, FULL)


@triton.jit
def _statistics(
    p_x,  # [B, C, pixels], as p_residual and p_sum
    p_residual,  # or None
    p_sum,  # x + residual, or None
    p_partials,  # [B, chunks, 2, C]: mean less the channel's first value, sum of squared deviations from the mean
    channels,
    pixels,
    span,
    tiles,
    chunk,
    FULL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    HALVES: tl.constexpr,
):
    b, _, _, _, b_c, m_c = _place(channels, span, tiles, BLOCK_C)
    begin = _first_pixel(chunk, WIDE)
    length = tl.minimum(pixels - begin, chunk).to(tl.int32)
    p_sample = p_x + b * pixels * channels
    b_lane = tl.arange(0, BLOCK_P)
    # Every lane adds up the distances of its values from its first one, and their squares. That is one of the n values
    # of which the variance is, so that subtracting the square of the mean distance loses no more than a factor of n.
    m_inside = m_c[:, None] & (b_lane < length)[None, :]
    b_at = _within(b_c, begin + b_lane, channels, pixels, CHANNELS_LAST, WIDE)
    b_first = _loaded(p_sample, b_at, m_inside, FULL)
    if p_residual is not None:
        b_first = _rounded_sum(b_first, _loaded(p_residual + b * pixels * channels, b_at, m_inside, FULL), p_sum)
    b_sum = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    b_squares = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for offset in range(0, length, HALVES * BLOCK_P):
        for half in tl.static_range(HALVES):
            b_i = offset + half * BLOCK_P + b_lane
            m_inside = m_c[:, None] & (b_i < length)[None, :]
            b_at = _within(b_c, begin + b_i, channels, pixels, CHANNELS_LAST, WIDE)
            b_x = _loaded(p_sample, b_at, m_inside, FULL)
            if p_residual is not None:
                b_x = _rounded_sum(b_x, _loaded(p_residual + b * pixels * channels, b_at, m_inside, FULL), p_sum)
                _stored(p_sum + b * pixels * channels, b_at, b_x, m_inside, FULL)
            b_d = b_x - b_first
            if not FULL:
                b_d = tl.where(m_inside, b_d, 0.0)
            b_sum += b_d
            b_squares += b_d * b_d
    b_pivot = _first_values(p_sample, b_c, m_c, pixels, CHANNELS_LAST, WIDE)[:, None]
    if p_residual is not None:
        b_more = _first_values(p_residual + b * pixels * channels, b_c, m_c, pixels, CHANNELS_LAST, WIDE)[:, None]
        b_pivot = _rounded_sum(b_pivot, b_more, p_sum)
    b_first -= b_pivot
    total = length.to(tl.float32)
    if FULL:
        n = total / BLOCK_P
        b_shift = b_sum * (1.0 / n)
        b_mean = tl.sum(b_first + b_shift, 1, keep_dims=True) / BLOCK_P
        b_d = b_first + b_shift - b_mean
        b_squares = tl.sum(b_squares - b_sum * b_shift + n * (b_d * b_d), 1, keep_dims=True)
    else:
        b_n = ((length + BLOCK_P - 1 - b_lane) // BLOCK_P).to(tl.float32)[None, :]
        b_shift = b_sum / tl.maximum(b_n, 1.0)
        b_mean = tl.sum(tl.where(b_n > 0.0, b_n * (b_first + b_shift), 0.0), 1, keep_dims=True) / total
        b_d = b_first + b_shift - b_mean
        b_squares = b_squares - b_sum * b_shift + b_n * (b_d * b_d)
        b_squares = tl.sum(tl.where(b_n > 0.0, b_squares, 0.0), 1, keep_dims=True)
    b_to = (b * tl.num_programs(1) + tl.program_id(1)) * 2 * channels + b_c[:, None]
    tl.store(p_partials + b_to, b_mean, mask=m_c[:, None])
    tl.store(p_partials + b_to + channels, b_squares, mask=m_c[:, None])


@triton.jit
def _moments(
    p_x,  # [B, C, pixels]
    p_partials,  # [B, chunks, 2, C]
    p_mean,  # [B, groups]
    p_rstd,
    p_coefficients,  # [B, 2, C]: mean less offset, weight rstd
    p_weight,  # [C] or None
    weight_stride,
    p_offset,  # [B, C] or None
    offset_row,
    offset_stride,
    eps,
    channels,
    pixels,
    per_group,
    chunk,
    chunks,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    b, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    mean, rstd = _group_moments(
        p_x,
        p_partials,
        p_offset,
        offset_row,
        offset_stride,
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
        AT_ONCE,
        BLOCK_K,
        BLOCK_G,
    )
    at = b * (channels // per_group) + g
    tl.store(p_mean + at, mean)
    tl.store(p_rstd + at, rstd)
    for begin in range(0, per_group, BLOCK_G):
        b_i = begin + tl.arange(0, BLOCK_G)
        b_c, m_c = g * per_group + b_i, b_i < per_group
        b_to = b * 2 * channels + b_c[:, None]
        b_scale = _per_channel(p_weight, weight_stride, b_c, m_c, 1.0) * rstd
        tl.store(
            p_coefficients + b_to, mean - _offset(p_offset, offset_row, offset_stride, b, b_c, m_c), mask=m_c[:, None]
        )
        tl.store(p_coefficients + b_to + channels, b_scale, mask=m_c[:, None])


@triton.jit
def _activate(
    p_x,  # [B, C, pixels], as p_y
    p_y,
    p_mean,  # [B, groups]; written if there are no coefficients
    p_rstd,
    p_partials,  # [B, chunks, 2, C]
    p_coefficients,  # [B, 2, C] or None
    p_weight,  # [C] or None
    weight_stride,
    p_bias,
    bias_stride,
    p_offset,  # [B, C] or None
    offset_row,
    offset_stride,
    eps,
    channels,
    pixels,
    per_group,
    span,
    tiles,
    chunk,
    chunks,
    SILU: tl.constexpr,
    FULL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    b, group, first, tile, b_c, m_c = _place(channels, span, tiles, BLOCK_C)
    if p_coefficients is None:
        mean, rstd = _group_moments(
            p_x,
            p_partials,
            p_offset,
            offset_row,
            offset_stride,
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
            AT_ONCE,
            BLOCK_K,
            BLOCK_G,
        )
        m_one = tile + tl.program_id(1) == 0
        at_group = b * (channels // per_group) + group
        tl.store(p_mean + at_group, mean, mask=m_one)
        tl.store(p_rstd + at_group, rstd, mask=m_one)
        b_scale = _per_channel(p_weight, weight_stride, b_c, m_c, 1.0) * rstd
        b_mean = mean - _offset(p_offset, offset_row, offset_stride, b, b_c, m_c)
    else:
        p_coefficients += b * 2 * channels
        b_mean = _per_channel(p_coefficients, 1, b_c, m_c, 0.0)
        b_scale = _per_channel(p_coefficients + channels, 1, b_c, m_c, 0.0)
    b_bias = _per_channel(p_bias, bias_stride, b_c, m_c, 0.0)
    begin = _first_pixel(chunk, WIDE)
    length = tl.minimum(pixels - begin, chunk).to(tl.int32)
    p_x += b * pixels * channels
    p_y += b * pixels * channels
    for offset in range(0, length, BLOCK_P):
        b_i = offset + tl.arange(0, BLOCK_P)
        m_inside = m_c[:, None] & (b_i < length)[None, :]
        b_at = _within(b_c, begin + b_i, channels, pixels, CHANNELS_LAST, WIDE)
        # The mean goes off first: x scale + (bias - mean scale) would cancel where it is large.
        b_y = (_loaded(p_x, b_at, m_inside, FULL) - b_mean) * b_scale + b_bias
        if SILU:
            b_y = _silu(b_y)
        _stored(p_y, b_at, b_y, m_inside, FULL)


@triton.jit
def _group_gradient(
    p_x,  # [B, C, pixels], as p_grad, p_more and p_grad_x
    p_grad,
    p_more,  # added to the gradient, or None
    p_mean,  # [B, groups]
    p_rstd,
    p_grad_x,  # or None
    p_partials,  # [B, 1, 2, C] or None: sums of g and g normalized
    p_weight,  # [C] or None
    weight_stride,
    p_bias,
    bias_stride,
    p_offset,  # [B, C] or None
    offset_row,
    offset_stride,
    channels,
    pixels,
    per_group,
    SILU: tl.constexpr,
    FULL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    b, group, b_c, m_c, b_p = _group_place(channels, pixels, per_group, BLOCK_C, BLOCK_P)
    m_inside = m_c[:, None] & (b_p < pixels)[None, :]
    b_at = b * pixels * channels + _within(b_c, b_p, channels, pixels, CHANNELS_LAST, WIDE)
    rstd = tl.load(p_rstd + group)
    b_mean = tl.load(p_mean + group) - _offset(p_offset, offset_row, offset_stride, b, b_c, m_c)
    b_weight = _per_channel(p_weight, weight_stride, b_c, m_c, 1.0)
    b_d = _loaded(p_x, b_at, m_inside, FULL) - b_mean
    b_g = _loaded(p_grad, b_at, m_inside, FULL)
    if SILU:
        b_g = _through_silu(b_g, b_d * (b_weight * rstd) + _per_channel(p_bias, bias_stride, b_c, m_c, 0.0))
    b_first, b_second = _sums_of_both(b_g, b_g * b_d, 1)
    b_second *= rstd
    if p_partials is not None:
        b_to = b * 2 * channels + b_c[:, None]
        tl.store(p_partials + b_to, b_first, mask=m_c[:, None])
        tl.store(p_partials + b_to + channels, b_second, mask=m_c[:, None])
    if p_grad_x is not None:
        total = as_float(per_group * pixels)
        b_first, b_second = _sums_of_both(b_first * b_weight, b_second * b_weight, 0)
        b_grad_x = b_g * (b_weight * rstd) + (b_d * (b_second * (-rstd * rstd / total)) + b_first * (-rstd / total))
        if p_more is not None:
            b_grad_x += _loaded(p_more, b_at, m_inside, FULL)
        _stored(p_grad_x, b_at, b_grad_x, m_inside, FULL)


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
    p_offset,  # [B, C] or None
    offset_row,
    offset_stride,
    channels,
    pixels,
    per_group,
    span,
    tiles,
    chunk,
    SILU: tl.constexpr,
    FULL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    HALVES: tl.constexpr,
):
    b, group, _, _, b_c, m_c = _place(channels, span, tiles, BLOCK_C)
    b_group = group + tl.zeros([BLOCK_C], tl.int32)
    if CHANNELS_LAST:
        b_group = _group_of(b_c, per_group, WIDE)
    at_sample = b * (channels // per_group)
    b_rstd = tl.load(p_rstd + at_sample + b_group, mask=m_c, other=0.0)[:, None]
    b_mean = tl.load(p_mean + at_sample + b_group, mask=m_c, other=0.0)[:, None]
    b_mean -= _offset(p_offset, offset_row, offset_stride, b, b_c, m_c)
    b_scale = _per_channel(p_weight, weight_stride, b_c, m_c, 1.0) * b_rstd
    b_bias = _per_channel(p_bias, bias_stride, b_c, m_c, 0.0)
    begin = _first_pixel(chunk, WIDE)
    length = tl.minimum(pixels - begin, chunk).to(tl.int32)
    p_x += b * pixels * channels
    p_grad += b * pixels * channels
    b_first = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    b_second = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for offset in range(0, length, HALVES * BLOCK_P):
        for half in tl.static_range(HALVES):
            b_i = offset + half * BLOCK_P + tl.arange(0, BLOCK_P)
            m_inside = m_c[:, None] & (b_i < length)[None, :]
            b_at = _within(b_c, begin + b_i, channels, pixels, CHANNELS_LAST, WIDE)
            b_d = _loaded(p_x, b_at, m_inside, FULL) - b_mean
            b_g = _loaded(p_grad, b_at, m_inside, FULL)
            if SILU:
                b_g = _through_silu(b_g, b_d * b_scale + b_bias)
            b_first += b_g
            b_second += b_g * b_d
    b_first, b_second = _sums_of_both(b_first, b_second, 1)
    b_to = (b * tl.num_programs(1) + tl.program_id(1)) * 2 * channels + b_c[:, None]
    tl.store(p_partials + b_to, b_first, mask=m_c[:, None])
    tl.store(p_partials + b_to + channels, b_second * b_rstd, mask=m_c[:, None])


@triton.jit
def _terms(
    p_partials,  # [B, chunks, 2, C]
    p_mean,  # [B, groups]
    p_rstd,
    p_coefficients,  # [B, 4, C]: mean less offset, weight rstd, slope and intercept of the gradient in x - mean
    p_weight,  # [C] or None
    weight_stride,
    p_offset,  # [B, C] or None
    offset_row,
    offset_stride,
    channels,
    pixels,
    per_group,
    chunks,
    AT_ONCE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    b, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first_mean, second_mean = _group_terms(
        p_partials,
        p_weight,
        weight_stride,
        b,
        g * per_group,
        channels,
        pixels,
        per_group,
        chunks,
        AT_ONCE,
        BLOCK_K,
        BLOCK_G,
    )
    b_at = b * (channels // per_group) + g
    mean, rstd = tl.load(p_mean + b_at), tl.load(p_rstd + b_at)
    for begin in range(0, per_group, BLOCK_G):
        b_i = begin + tl.arange(0, BLOCK_G)
        b_c, m_c = g * per_group + b_i, b_i < per_group
        b_to = b * 4 * channels + b_c[:, None]
        b_zero = tl.zeros([BLOCK_G, 1], tl.float32)
        tl.store(
            p_coefficients + b_to, mean - _offset(p_offset, offset_row, offset_stride, b, b_c, m_c), mask=m_c[:, None]
        )
        tl.store(
            p_coefficients + b_to + channels,
            _per_channel(p_weight, weight_stride, b_c, m_c, 1.0) * rstd,
            mask=m_c[:, None],
        )
        tl.store(p_coefficients + b_to + 2 * channels, b_zero - rstd * rstd * second_mean, mask=m_c[:, None])
        tl.store(p_coefficients + b_to + 3 * channels, b_zero - rstd * first_mean, mask=m_c[:, None])


@triton.jit
def _input_gradient(
    p_x,  # [B, C, pixels], as p_grad, p_more and p_grad_x
    p_grad,
    p_more,  # added to the gradient, or None
    p_mean,  # [B, groups]
    p_rstd,
    p_grad_x,
    p_partials,  # [B, chunks, 2, C]
    p_coefficients,  # [B, 4, C] or None
    p_weight,  # [C] or None
    weight_stride,
    p_bias,
    bias_stride,
    p_offset,  # [B, C] or None
    offset_row,
    offset_stride,
    channels,
    pixels,
    per_group,
    span,
    tiles,
    chunk,
    chunks,
    SILU: tl.constexpr,
    FULL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    b, group, first, _, b_c, m_c = _place(channels, span, tiles, BLOCK_C)
    if p_coefficients is None:
        first_mean, second_mean = _group_terms(
            p_partials,
            p_weight,
            weight_stride,
            b,
            first,
            channels,
            pixels,
            per_group,
            chunks,
            AT_ONCE,
            BLOCK_K,
            BLOCK_G,
        )
        at_group = b * (channels // per_group) + group
        rstd = tl.load(p_rstd + at_group)
        b_mean = tl.load(p_mean + at_group) - _offset(p_offset, offset_row, offset_stride, b, b_c, m_c)
        b_scale = _per_channel(p_weight, weight_stride, b_c, m_c, 1.0) * rstd
        b_slope, b_intercept = -rstd * rstd * second_mean, -rstd * first_mean
    else:
        p_coefficients += b * 4 * channels
        b_mean = _per_channel(p_coefficients, 1, b_c, m_c, 0.0)
        b_scale = _per_channel(p_coefficients + channels, 1, b_c, m_c, 0.0)
        b_slope = _per_channel(p_coefficients + 2 * channels, 1, b_c, m_c, 0.0)
        b_intercept = _per_channel(p_coefficients + 3 * channels, 1, b_c, m_c, 0.0)
    b_bias = _per_channel(p_bias, bias_stride, b_c, m_c, 0.0)
    begin = _first_pixel(chunk, WIDE)
    length = tl.minimum(pixels - begin, chunk).to(tl.int32)
    at_sample = b * pixels * channels
    for offset in range(0, length, BLOCK_P):
        b_i = offset + tl.arange(0, BLOCK_P)
        m_inside = m_c[:, None] & (b_i < length)[None, :]
        b_at = _within(b_c, begin + b_i, channels, pixels, CHANNELS_LAST, WIDE)
        b_d = _loaded(p_x + at_sample, b_at, m_inside, FULL) - b_mean
        b_g = _loaded(p_grad + at_sample, b_at, m_inside, FULL)
        if SILU:
            b_g = _through_silu(b_g, b_d * b_scale + b_bias)
        b_grad_x = b_g * b_scale + (b_d * b_slope + b_intercept)
        if p_more is not None:
            b_grad_x += _loaded(p_more + at_sample, b_at, m_inside, FULL)
        _stored(p_grad_x + at_sample, b_at, b_grad_x, m_inside, FULL)


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
