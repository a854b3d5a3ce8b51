"""A reward model's preprocessing and its exact adjoint: one axis, then the other, each a launch.

Images of 16 bits, whose axes can be cut into tiles, are resized by matrix products in one launch instead
(`reward_pixels_tiles`); the rest is for float32, for images that are shrunk very much, and for no clamp.

Forward resizes the rows, then the columns; backward goes the other way with the transposed tables. Between the two is
a float32 tensor [planes, size, used columns], which has fewer rows than the image where the image shrinks. In one
launch an output pixel would read taps x taps pixels, 11 x 11 from 512 to 224 pixels and 21 x 21 from 1024; in two it
reads taps + taps, and the tensor between costs less than what that saves.

channels_last is a plane of the whole image whose pixels are `inner` channels wide.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffpp_fast.ops.reward_pixels import CLAMPS, FILTERS, FITS, axis_matrix
from diffpp_fast.ops.triton import reward_pixels_tiles as tiles
from diffpp_fast.ops.triton.device import on_its_device
from diffpp_fast.ops.triton.layout import INT32_ELEMENTS, Order
from diffpp_fast.transforms import decided_when_traced

#: A tile of the rows' resize: a row of it is a warp's loads of 16 bytes of bfloat16, and its rows share most of the
#: rows that they read, which fit in the first-level cache.
ROWS_TILE = (8, 256)
#: A tile of the columns' resize: 224 and 336 pixels leave few of its columns idle.
COLUMNS_TILE = (16, 64)
WARPS = 4
#: Of a thread. Left to itself, Triton 3.6 takes 186 and 142: a program less at a time on each multiprocessor.
ROWS_REGISTERS, COLUMNS_REGISTERS = 168, 128
#: Of the start and the end of the used columns, in elements: keeps accesses of 16 bytes aligned.
ALIGNMENT = 16
#: What is resized by matrix products, if source and result are both of these.
PRODUCTS = {torch.bfloat16, torch.float16}
#: Pixels of a window that a program loads at a time.
CHUNK = 128 * 64
SPREAD_WARPS = 8
#: The most that a thread can have, where rows are no vectors: if nothing is said, ptxas spills a few bytes there for
#: more programs at a time. Vectors keep what it chooses, 96 instead of 147 at 512 to 224 pixels.
TILES_REGISTERS = 255


class Axis(NamedTuple):
    """A sparse matrix [out, in]: row o is weights[k, o] at columns first[o] + k for k < counts[o]."""

    first: Tensor  # int32 [out]
    counts: Tensor  # int32 [out]
    weights: Tensor  # float32 [taps, out]
    begin: int  # the columns that are not zero
    end: int


@on_its_device
def forward(
    images: Tensor,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    filter: int,
    antialias: bool,
    fit: int,
    low: float,
    high: float,
    clamp: int,
    dtype: torch.dtype,
) -> Tensor:
    order = Order(images)
    batch, channels, height, _ = images.shape
    pixels = torch.empty(
        batch, channels, size, size, dtype=dtype, device=images.device, memory_format=order.memory_format
    )
    if images.numel():
        call = _ResizeCall(
            images,
            order,
            size=size,
            mean=mean,
            std=std,
            filter=filter,
            antialias=antialias,
            fit=fit,
            low=low,
            high=high,
        )
        (rows, _), (columns, _) = call.rows, call.columns
        # Clamped in their dtype.
        clamped = CLAMPS[clamp] != "none" and all(tiles.exact(end, images.dtype) for end in (low, high))
        if clamped and (cut := call.cut(images, pixels)) is not None:
            call.shrink(cut, order.of(images), pixels)
            return pixels
        between = call.between(images)
        call.resize_rows(
            rows, order.of(images), between, height, size, offset=call.start, clamp=CLAMPS[clamp] != "none"
        )
        call.resize_columns(columns, between, pixels, size, from_offset=call.start, to_offset=0, normalise=True)
    return pixels


@on_its_device
def backward(
    grad_output: Tensor,
    images: Tensor,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    filter: int,
    antialias: bool,
    fit: int,
    low: float,
    high: float,
    clamp: int,
) -> Tensor:
    order = Order(images)
    height = images.shape[2]
    grad_images = order.result(images)
    if images.numel():
        call = _ResizeCall(
            images,
            order,
            size=size,
            mean=mean,
            std=std,
            filter=filter,
            antialias=antialias,
            fit=fit,
            low=low,
            high=high,
        )
        (_, rows), (_, columns) = call.rows, call.columns
        masked = order.of(images) if CLAMPS[clamp] == "hard" else None
        if (cut := call.cut(grad_output, grad_images, adjoint=True)) is not None:
            call.spread(cut, order.of(grad_output), grad_images, masked)
            return order.finish(grad_images, images)
        between = call.between(images)
        call.resize_columns(
            columns, order.of(grad_output), between, size, from_offset=0, to_offset=call.start, normalise=False
        )
        call.resize_rows(rows, between, grad_images, size, height, offset=-call.start, masked=masked)
    return order.finish(grad_images, images)


class _ResizeCall:
    """The arguments that the two launches share."""

    def __init__(
        self,
        images: Tensor,
        order: Order,
        *,
        size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        filter: int,
        antialias: bool,
        fit: int,
        low: float,
        high: float,
    ) -> None:
        batch, channels, height, width = images.shape
        self.low, self.high = low, high
        self.stds = std
        self.resize = height, width, size, FITS[fit], FILTERS[filter], antialias
        self.rows, self.columns, self.mean, self.std, self.per_std = _constants(
            images.device, height, width, size, FITS[fit], FILTERS[filter], antialias, mean, std
        )
        self.channels, self.channels_last = channels, order.channels_last
        self.inner = order.channels
        self.planes = batch * channels // self.inner
        self.size = size
        columns = self.columns[0]
        self.start = columns.begin * self.inner // ALIGNMENT * ALIGNMENT
        end = triton.cdiv(columns.end * self.inner, ALIGNMENT) * ALIGNMENT
        self.used = min(width * self.inner, end) - self.start

    def between(self, images: Tensor) -> Tensor:
        return torch.empty(self.planes, self.size, self.used, dtype=torch.float32, device=images.device)

    def cut(self, source: Tensor, to: Tensor, adjoint: bool = False) -> tiles.TileTables | None:
        """Return the tables of the products; None where the taps are gathered."""
        elements = max(tensor.shape[2:].numel() * self.inner for tensor in (source, to))
        if not {source.dtype, to.dtype} <= PRODUCTS or elements >= INT32_ELEMENTS:
            return None
        std = self.stds if adjoint and self.inner > 1 else ()
        return _tiles(source.device, source.dtype, self.inner, adjoint, *self.resize, std)

    def shrink(self, cut: tiles.TileTables, images: Tensor, pixels: Tensor) -> None:
        # Single addresses take more registers than those of vectors. If the compiler knew how many chunks there are, it
        # would hold those of all at once, and spill some.
        vectors = cut.columns.unit > 1
        chunk = min(cut.columns.window, (CHUNK if vectors else CHUNK // 4) // cut.rows.window)
        tiles.shrink[(self.planes, cut.rows.number, cut.columns.number)](
            images,
            pixels,
            *self._tables(cut, 0),
            p_mean=self.mean,
            p_per_std=self.per_std,
            p_row_sums=cut.row_sums,
            **self._numbers(cut, images, pixels, 0),
            some_chunks=cut.columns.window // chunk,
            CHUNKS=cut.columns.window // chunk if vectors else 0,
            M=cut.rows.padded,
            K=cut.rows.window,
            N=chunk,
            C=cut.columns.padded,
            num_warps=4 if vectors else 8,
        )

    def spread(self, cut: tiles.TileTables, grads: Tensor, grad_images: Tensor, masked: Tensor | None) -> None:
        tiles.spread[(self.planes, cut.rows.number, cut.columns.number)](
            grads,
            grad_images,
            *self._tables(cut, 1),
            p_images=masked,
            p_per_std=self.per_std,
            **self._numbers(cut, grads, grad_images, 1),
            M=cut.rows.padded,
            K=cut.rows.window,
            N=cut.columns.window,
            C=cut.columns.padded,
            num_warps=SPREAD_WARPS,
        )

    def _tables(self, cut: tiles.TileTables, direction: int) -> tuple[Tensor, ...]:
        rows, columns = self.rows[direction], self.columns[direction]
        return (
            *(cut.rows.start, cut.columns.start, cut.row_weights, cut.column_weights),
            *(rows.first, rows.counts, rows.weights, columns.first, columns.counts, columns.weights),
        )

    def _numbers(self, cut: tiles.TileTables, source: Tensor, to: Tensor, direction: int) -> dict[str, Any]:
        width_in, width_out = source.shape[3] * self.inner, to.shape[3] * self.inner
        return {
            "rows_in": source.shape[2],
            "units_in": width_in // tiles.unit_of(width_in),
            "rows_out": to.shape[2],
            "units_out": width_out // tiles.unit_of(width_out),
            "channels": self.channels,
            "UNIT_IN": tiles.unit_of(width_in),
            "UNIT_OUT": tiles.unit_of(width_out),
            "INNER": self.inner,
            "SIZE_R": cut.rows.size,
            "SIZE_C": cut.columns.size,
            "low": self.low,
            "high": self.high,
            "per_range": 1.0 / (self.high - self.low),
            "TAPS_R": self.rows[direction].weights.shape[0],
            "TAPS_C": self.columns[direction].weights.shape[0],
            "WHOLE": cut.rows.whole and cut.columns.whole,
            "maxnreg": None if tiles.unit_of(width_in) == tiles.unit_of(width_out) == tiles.VECTOR else TILES_REGISTERS,
        }

    def resize_rows(
        self,
        axis: Axis,
        source: Tensor,
        to: Tensor,
        rows_in: int,
        rows_out: int,
        offset: int,
        clamp: bool | None = None,
        masked: Tensor | None = None,
    ) -> None:
        """clamp: None where the source holds no images; masked: images that zero the result where they are outside."""
        from_width = source.numel() // (self.planes * rows_in)
        to_width = to.numel() // (self.planes * rows_out)
        block_r, block_x = ROWS_TILE
        _rows[(triton.cdiv(to_width, block_x) * triton.cdiv(rows_out, block_r) * self.planes,)](
            p_from=source,
            p_to=to,
            p_masked=masked,
            p_first=axis.first,
            p_count=axis.counts,
            p_weights=axis.weights,
            rows_in=rows_in,
            rows_out=rows_out,
            from_width=from_width,
            to_width=to_width,
            offset=offset,
            low=self.low,
            high=self.high,
            per_range=1.0 / (self.high - self.low),
            TAPS=axis.weights.shape[0],
            IMAGES=clamp is not None,
            CLAMP=bool(clamp),
            WIDE=max(rows_in * from_width, rows_out * to_width) >= INT32_ELEMENTS,
            BLOCK_R=block_r,
            BLOCK_X=block_x,
            num_warps=WARPS,
            maxnreg=ROWS_REGISTERS,
        )

    def resize_columns(
        self, axis: Axis, source: Tensor, to: Tensor, rows: int, from_offset: int, to_offset: int, normalise: bool
    ) -> None:
        from_width = source.numel() // (self.planes * rows)
        to_width = to.numel() // (self.planes * rows)
        block_r, block_x = COLUMNS_TILE
        _columns[(triton.cdiv(to_width, block_x) * triton.cdiv(rows, block_r) * self.planes,)](
            p_from=source,
            p_to=to,
            p_first=axis.first,
            p_count=axis.counts,
            p_weights=axis.weights,
            p_mean=self.mean,
            p_std=self.std,
            rows=rows,
            out=axis.first.shape[0],
            from_width=from_width,
            to_width=to_width,
            from_offset=from_offset,
            to_offset=to_offset,
            inner=self.inner,
            channels=self.channels,
            TAPS=axis.weights.shape[0],
            NORMALISE=normalise,
            CHANNELS_LAST=self.channels_last,
            # Four taps of channels_last at a time would take 190 registers: their addresses have nothing in common.
            UNROLL=2 if self.channels_last else 4,
            WIDE=rows * max(from_width, to_width) >= INT32_ELEMENTS,
            BLOCK_R=block_r,
            BLOCK_X=block_x,
            num_warps=WARPS,
            maxnreg=COLUMNS_REGISTERS,
        )


# torch.compile can't trace how they are made, and must not copy them to the device in every call: they are constants of
# its graph. It looks through the cache, so this has to be a function of its own.
@decided_when_traced
def _constants(
    device: torch.device,
    height: int,
    width: int,
    size: int,
    fit: str,
    filter: str,
    antialias: bool,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> tuple[tuple[Axis, Axis], tuple[Axis, Axis], Tensor, Tensor, Tensor]:
    """The tables of rows and of columns, mean, std and 1 / std on the device."""
    options = size, fit, filter, antialias
    return (
        _tables(device, height, width, *options),
        _tables(device, width, height, *options),
        _per_channel(mean, device),
        _per_channel(std, device),
        _per_channel(tuple(1.0 / value for value in std), device),
    )


@decided_when_traced
def _tiles(
    device: torch.device, dtype: torch.dtype, inner: int, adjoint: bool, *resize: Any
) -> tiles.TileTables | None:
    return tiles.tiled(device, dtype, inner, adjoint, *resize)


# Cached, so that a call copies nothing to the device.
@lru_cache(maxsize=256)
def _tables(
    device: torch.device, in_size: int, other_in_size: int, size: int, fit: str, filter: str, antialias: bool
) -> tuple[Axis, Axis]:
    """An axis of the resize and its transpose, from the matrix in float64."""
    matrix = axis_matrix(in_size, other_in_size, size, fit, filter, antialias)
    return _sparse(matrix, device), _sparse(matrix.T, device)


def _sparse(matrix: Tensor, device: torch.device) -> Axis:
    """matrix: float64 [out, in]. Rows of zeros have count 0."""
    columns = matrix.shape[1]
    nonzero = matrix != 0.0
    some = nonzero.any(dim=1)
    first = nonzero.int().argmax(dim=1) * some
    end = (columns - nonzero.flip(1).int().argmax(dim=1)) * some
    count = end - first
    index = first[:, None] + torch.arange(max(1, int(count.max())))
    weights = matrix.gather(1, index.clamp(max=columns - 1)) * (index < end[:, None])
    return Axis(
        first.to(device, torch.int32),
        count.to(device, torch.int32),
        weights.T.to(device, torch.float32).contiguous(),
        int(first[some].min()) if some.any() else 0,
        int(end.max()),
    )


@lru_cache(maxsize=256)
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


@triton.jit
def _place(rows, width, BLOCK_R: tl.constexpr, BLOCK_X: tl.constexpr):
    """The plane of this program, and its rows and columns of a result [planes, rows, width]."""
    program = tl.program_id(0)
    across, down = tl.cdiv(width, BLOCK_X), tl.cdiv(rows, BLOCK_R)
    b_r = program // across % down * BLOCK_R + tl.arange(0, BLOCK_R)
    b_x = program % across * BLOCK_X + tl.arange(0, BLOCK_X)
    return program // across // down, b_r, b_x


@triton.jit
def _within(b_r, b_x, width, WIDE: tl.constexpr):
    """Where elements of rows are in a plane."""
    if WIDE:
        b_r = b_r.to(tl.int64)
    return b_r * width + b_x


@triton.jit
def _rows(
    p_from,  # [planes, rows_in, from_width]
    p_to,  # [planes, rows_out, to_width]
    p_masked,  # as p_to, or None
    p_first,  # [rows_out]
    p_count,
    p_weights,  # [TAPS, rows_out]
    rows_in,
    rows_out,
    from_width,
    to_width,
    offset,  # the column of `from` that is column 0 of `to`; outside of `from` is zero
    low,
    high,
    per_range,
    TAPS: tl.constexpr,
    IMAGES: tl.constexpr,
    CLAMP: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    plane, b_r, b_x = _place(rows_out, to_width, BLOCK_R, BLOCK_X)
    plane = plane.to(tl.int64)
    m_r = b_r < rows_out
    b_source = b_x + offset
    m_source = (b_source >= 0) & (b_source < from_width) & (b_x < to_width)
    b_first = tl.load(p_first + b_r, mask=m_r, other=0)
    b_count = tl.load(p_count + b_r, mask=m_r, other=0)
    p_plane = p_from + plane * rows_in * from_width
    b_sum = tl.zeros([BLOCK_R, BLOCK_X], tl.float32)
    for k in tl.range(TAPS, loop_unroll_factor=4):
        m_tap = k < b_count
        b_weight = tl.load(p_weights + k * rows_out + b_r, mask=m_tap, other=0.0)
        b_at = _within((b_first + k)[:, None], b_source[None, :], from_width, WIDE)
        b_value = tl.load(p_plane + b_at, mask=m_tap[:, None] & m_source[None, :], other=0.0).to(tl.float32)
        if IMAGES:
            b_value -= low
            if CLAMP:
                # In this order NaN stays NaN.
                b_value = tl.where(b_value < 0.0, 0.0, b_value)
                b_value = tl.where(b_value > high - low, high - low, b_value)
        b_sum = tl.fma(b_weight[:, None], b_value, b_sum)
    b_sum *= per_range
    m_to = m_r[:, None] & (b_x < to_width)[None, :]
    b_to = plane * rows_out * to_width + _within(b_r[:, None], b_x[None, :], to_width, WIDE)
    if p_masked is not None:
        b_image = tl.load(p_masked + b_to, mask=m_to, other=0.0).to(tl.float32)
        b_sum = tl.where((b_image >= low) & (b_image <= high), b_sum, 0.0)
    tl.store(p_to + b_to, b_sum.to(p_to.dtype.element_ty), mask=m_to)


@triton.jit
def _columns(
    p_from,  # [planes, rows, from_width]
    p_to,  # [planes, rows, to_width]
    p_first,  # [out]
    p_count,
    p_weights,  # [TAPS, out]
    p_mean,  # [C]
    p_std,
    rows,
    out,
    from_width,
    to_width,
    from_offset,  # where `from` and `to` begin in a row of whole images, in elements
    to_offset,
    inner,
    channels,
    TAPS: tl.constexpr,
    NORMALISE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNROLL: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    plane, b_r, b_x = _place(rows, to_width, BLOCK_R, BLOCK_X)
    m_r, m_x = b_r < rows, b_x < to_width
    if CHANNELS_LAST:
        b_channel = (b_x + to_offset) % inner
        b_pixel = (b_x + to_offset) // inner
        b_from = b_channel - from_offset
    else:
        b_channel = b_x * 0 + plane % channels
        b_pixel = b_x + to_offset
        b_from = b_x * 0 - from_offset
    b_first = tl.load(p_first + b_pixel, mask=m_x, other=0)
    b_count = tl.load(p_count + b_pixel, mask=m_x, other=0)
    plane = plane.to(tl.int64)
    p_plane = p_from + plane * rows * from_width
    b_sum = tl.zeros([BLOCK_R, BLOCK_X], tl.float32)
    for k in tl.range(TAPS, loop_unroll_factor=UNROLL):
        m_tap = k < b_count
        b_weight = tl.load(p_weights + k * out + b_pixel, mask=m_tap, other=0.0)
        b_at = _within(b_r[:, None], (b_from + (b_first + k) * inner)[None, :], from_width, WIDE)
        b_value = tl.load(p_plane + b_at, mask=m_r[:, None] & m_tap[None, :], other=0.0).to(tl.float32)
        b_sum = tl.fma(b_weight[None, :], b_value, b_sum)
    if NORMALISE:
        b_sum -= tl.load(p_mean + b_channel, mask=m_x, other=0.0)[None, :]
    b_std = tl.load(p_std + b_channel, mask=m_x, other=1.0)
    b_sum = tl.div_rn(b_sum, tl.broadcast_to(b_std[None, :], [BLOCK_R, BLOCK_X]))
    b_to = plane * rows * to_width + _within(b_r[:, None], b_x[None, :], to_width, WIDE)
    tl.store(p_to + b_to, b_sum.to(p_to.dtype.element_ty), mask=m_r[:, None] & m_x[None, :])
