"""The resize of images of 16 bits and its adjoint, each in one launch: a tile is two products of matrices.

A tile of the result needs a window of the source, which is loaded once: result = rows @ window @ columns, where the two
are pieces of the axes' matrices, dense, and most of their elements are zeros. Tensor cores take these products at a few
instructions per element, where a gather takes its addresses and weights again for each tap.

Numbers of 16 bits are exact in a product, and sums are float32. Weights are two terms of 16 bits, and so is what the
first product gives the second. Where the result is bfloat16, the second product of the forward direction has one term,
float16, for pixels from 0 to 1: each rounding is an eighth of the result's, and the filter averages it.

A product spreads what is not finite over its tile, for 0 NaN = NaN. A program that meets it gathers its tile instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffpp_fast import availability
from diffpp_fast.ops.reward_pixels import axis_matrix

INTERPRETED = tl.constexpr(availability.INTERPRETED)

#: Elements of an access of 16 bytes, to which windows and tiles of columns are aligned where that costs nothing.
VECTOR = 8
#: Rows of a tile that are gathered at a time, where something is not finite.
ROWS_GATHERED = tl.constexpr(16)
#: The most channels of a pixel in channels_last: a product takes each channel's zeros for the others.
MOST_CHANNELS = 4


def _read(count: int, window: int, inputs: int, padded: int) -> float:
    """Return what the forward direction reads, and what its second product and its programs' beginnings add."""
    return count * window / inputs * (1.0 + padded / 512 + 32 / window)


def _written(count: int, window: int, inputs: int, padded: int) -> float:
    """Return what the adjoint does for each tile: for its outputs, of which some may be none, and for its window."""
    return float(count * (192 + window))


class TileSizes(NamedTuple):
    """Tiles that a direction may have, of rows or columns: the most outputs, the windows to choose from, their cost."""

    most: int
    windows: tuple[int, ...]
    cost: Callable[[int, int, int, int], float]
    fewest: int = 8


ROWS = TileSizes(32, (16, 32, 64, 128), _read)
#: Its result has three products where that of bfloat16 has one, and both terms of its weights stay in registers.
FLOAT16_ROWS = ROWS._replace(most=16)
COLUMNS = TileSizes(64, (16, 32, 64, 128, 256), _read)
ADJOINT_ROWS = TileSizes(128, (16, 32, 64), _written)
ADJOINT_COLUMNS = TileSizes(128, (16, 32, 64, 128), _written)
#: The adjoint's tiles of a wider window have no more rows than this: there are no registers for more.
WIDE = 64


class Tiles(NamedTuple):
    """An axis of outputs in tiles, each the product of a dense matrix [outputs, window] and a window of inputs."""

    size: int  # outputs of a tile
    number: int
    window: int
    padded: int  # `size` as a power of two
    start: Tensor  # int32 [number]: where a tile's window begins, in units of `unit`
    unit: int
    weights: Tensor  # float64 [number, padded, window] on the CPU
    whole: bool  # whether all windows are inside


def tiles_of(matrix: Tensor, shape: TileSizes, align: bool) -> Tiles | None:
    """TileTables an axis; None where a window would hold fewer outputs than a tile has at least.

    Args:
        matrix: float64 [out, in].
        shape: what is possible.
        align: whether windows begin at multiples of VECTOR where the inputs are one.
    """
    out, inputs = matrix.shape
    unit = unit_of(inputs) if align else 1
    nonzero = matrix != 0.0
    some = nonzero.any(dim=1)
    first = nonzero.int().argmax(dim=1)
    end = inputs - nonzero.flip(1).int().argmax(dim=1)
    bounds = [(int(f), int(e)) if s else None for f, e, s in zip(first, end, some, strict=True)]
    best: tuple[float, int, int, list[int]] | None = None
    for window in shape.windows:
        size = _largest(bounds, inputs, window, unit, shape.most)
        if size < min(shape.fewest, out):
            continue
        # As many tiles, of about the same size; whole vectors where that takes no more of them.
        count = triton.cdiv(out, size)
        size = triton.cdiv(out, count)
        whole = triton.cdiv(size, VECTOR) * VECTOR
        starts = _starts(bounds, inputs, window, unit, whole)
        if whole <= shape.most and starts is not None:
            size = whole
        else:
            starts = _starts(bounds, inputs, window, unit, size)
        if starts is None:
            continue
        cost = shape.cost(len(starts), window, inputs, _padded(size))
        if best is None or cost < best[0]:
            best = cost, window, size, starts
    if best is None:
        return None
    _, window, size, starts = best
    weights = torch.zeros(len(starts), _padded(size), window, dtype=torch.float64)
    for tile, start in enumerate(starts):
        piece = matrix[tile * size : (tile + 1) * size, start : start + window]
        weights[tile, : piece.shape[0], : piece.shape[1]] = piece
    units = torch.tensor([start // unit for start in starts], dtype=torch.int32)
    return Tiles(size, len(starts), window, _padded(size), units, unit, weights, max(starts) + window <= inputs)


def _padded(size: int) -> int:
    return max(16, int(triton.next_power_of_2(size)))


def _largest(bounds: list[tuple[int, int] | None], inputs: int, window: int, unit: int, most: int) -> int:
    """Return how many outputs the tiles can have when their windows have `window` inputs."""
    size = min(most, len(bounds))
    while size and _starts(bounds, inputs, window, unit, size) is None:
        size -= 1
    return size


def _starts(bounds: list[tuple[int, int] | None], inputs: int, window: int, unit: int, size: int) -> list[int] | None:
    """Return where the window of each tile of `size` outputs begins; None if one is too small."""
    starts = []
    for begin in range(0, len(bounds), size):
        used = [bound for bound in bounds[begin : begin + size] if bound is not None]
        first = min((bound[0] for bound in used), default=0) // unit * unit
        end = max((bound[1] for bound in used), default=0)
        if end - first > window:
            return None
        # Inside, where an image is as wide as a window.
        starts.append(max(0, min(first, (inputs - window) // unit * unit)))
    return starts


def split(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Return weights as two terms of a dtype, [2, ...], whose sum they are."""
    high = weights.to(dtype)
    return torch.stack([high, (weights - high.double()).to(dtype)])


class TileTables(NamedTuple):
    """The tiles and tables of one direction for one kind of images, on their device."""

    rows: Tiles
    columns: Tiles
    row_weights: Tensor  # forward: [2, tiles, outputs, window], and so are the adjoint's
    column_weights: Tensor  # [2, tiles, window, outputs]
    row_sums: Tensor  # float32 [rows]: 0 where there is padding


# Cached, so that a call copies nothing to the device.
@lru_cache(maxsize=256)
def tiled(
    device: torch.device,
    dtype: torch.dtype,
    inner: int,
    adjoint: bool,
    height: int,
    width: int,
    size: int,
    fit: str,
    filter: str,
    antialias: bool,
    std: tuple[float, ...],
) -> TileTables | None:
    """Return the tables of a direction; None where tiles don't fit.

    Args:
        dtype: of the source, which is what the first product multiplies.
        std: divides the adjoint's weights of columns; none or one for each of `inner` channels.
    """
    if inner > MOST_CHANNELS:
        return None
    options = size, fit, filter, antialias
    row_matrix, column_matrix = axis_matrix(height, width, *options), axis_matrix(width, height, *options)
    if inner > 1:
        column_matrix = torch.kron(column_matrix, torch.eye(inner, dtype=torch.float64))
    if std:
        column_matrix = column_matrix / torch.tensor(std, dtype=torch.float64).repeat(size)[:, None]
    if adjoint:
        columns = tiles_of(column_matrix.T, ADJOINT_COLUMNS, False)
        wide = columns is not None and columns.window > WIDE
        rows = tiles_of(row_matrix.T, ADJOINT_ROWS._replace(most=WIDE) if wide else ADJOINT_ROWS, False)
    else:
        rows = tiles_of(row_matrix, FLOAT16_ROWS if dtype == torch.float16 else ROWS, False)
        columns = tiles_of(column_matrix, COLUMNS, True)
    if rows is None or columns is None:
        return None
    row_weights = split(rows.weights, torch.bfloat16 if adjoint else dtype)
    across = columns.weights.transpose(1, 2)
    column_weights = split(across, dtype if adjoint else torch.float16)
    sums = row_matrix.sum(dim=1).float()
    return TileTables(
        rows._replace(start=rows.start.to(device)),
        columns._replace(start=columns.start.to(device)),
        row_weights.contiguous().to(device),
        column_weights.contiguous().to(device),
        sums.to(device),
    )


def unit_of(width: int) -> int:
    """Return what rows of so many elements, and where their windows begin, are counted in."""
    return VECTOR if width % VECTOR == 0 else 1


def exact(number: float, dtype: torch.dtype) -> bool:
    """Return whether a dtype of 16 bits has this number as one that is normal, or zero."""
    limits = torch.finfo(dtype)
    fits = number == 0.0 or limits.smallest_normal <= abs(number) <= limits.max
    return fits and (math.frexp(number)[0] * 2.0 / limits.eps).is_integer()


@triton.jit
def product(b_left, b_right, b_sum):
    """b_sum + b_left @ b_right. The interpreter multiplies bfloat16 as if it were integers."""
    if INTERPRETED:
        b_left, b_right = b_left.to(tl.float32), b_right.to(tl.float32)
    return tl.dot(b_left, b_right, b_sum)


@triton.jit
def clamped(b_values, low, high):
    """Values from low to high; NaN stays NaN. Two bfloat16 at a time, which Triton would take for two float32."""
    if INTERPRETED or b_values.dtype == tl.float16:
        b_low, b_high = tl.cast(low, b_values.dtype), tl.cast(high, b_values.dtype)
        b_values = tl.maximum(b_values, b_low, propagate_nan=tl.PropagateNan.ALL)
        b_values = tl.minimum(b_values, b_high, propagate_nan=tl.PropagateNan.ALL)
    else:
        b_values = tl.inline_asm_elementwise(
            "max.NaN.bf16x2 $0, $1, $2; min.NaN.bf16x2 $0, $0, $3;",
            "=r,r,r,r",
            [b_values, tl.cast(low, tl.bfloat16), tl.cast(high, tl.bfloat16)],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    return b_values


@triton.jit
def _source(p_plane, first_r, first_c, rows, width, WHOLE: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    """A window [K, N] of a plane, zeros outside."""
    b_k, b_n = first_r + tl.arange(0, K), first_c + tl.arange(0, N)
    p_source = p_plane + (b_k * width)[:, None] + b_n[None, :]
    if WHOLE:
        b_source = tl.load(p_source)
    else:
        b_source = tl.load(p_source, mask=(b_k < rows)[:, None] & (b_n < width)[None, :], other=0.0)
    return b_source


@triton.jit
def _gathered(
    p_plane,
    b_r,
    b_c,
    rows_out,
    width_out,
    width,
    low,
    high,
    p_first_r,
    p_count_r,
    p_taps_r,  # [TAPS_R, rows_out]
    p_first_c,
    p_count_c,
    p_taps_c,  # [TAPS_C, width_out / INNER]
    CLAMP: tl.constexpr,
    INNER: tl.constexpr,
    TAPS_R: tl.constexpr,
    TAPS_C: tl.constexpr,
):
    """The resize tap by tap, which reads no pixel outside of an output's own window."""
    pixels = width_out // INNER
    b_r, b_c = tl.minimum(b_r, rows_out - 1), tl.minimum(b_c, width_out - 1)
    b_pixel = b_c // INNER
    b_first_r, b_count_r = tl.load(p_first_r + b_r)[:, None], tl.load(p_count_r + b_r)[:, None]
    b_first_c, b_count_c = tl.load(p_first_c + b_pixel)[None, :], tl.load(p_count_c + b_pixel)[None, :]
    b_sum = tl.zeros([b_r.shape[0], b_c.shape[0]], tl.float32)
    for tap in tl.range(TAPS_R * TAPS_C, loop_unroll_factor=1):
        k_r, k_c = tap // TAPS_C, tap % TAPS_C
        m_tap = (k_r < b_count_r) & (k_c < b_count_c)
        b_weight = (
            tl.load(p_taps_r + k_r * rows_out + b_r)[:, None] * tl.load(p_taps_c + k_c * pixels + b_pixel)[None, :]
        )
        b_at = (b_first_r + k_r) * width + (b_first_c + k_c) * INNER + (b_c % INNER)[None, :]
        b_value = tl.load(p_plane + b_at, mask=m_tap, other=0.0).to(tl.float32)
        if CLAMP:
            b_value = tl.where(b_value < low, low, b_value)
            b_value = tl.where(b_value > high, high, b_value) - low
        b_sum += tl.where(m_tap, b_weight * b_value, 0.0)
    return b_sum


@triton.jit
def _inside(b_r, b_c, end_r, end_c, rows, width):
    """Which elements of a tile are the tile's own, and where they are in a plane."""
    b_at = (b_r * width)[:, None] + b_c[None, :]
    return b_at, (b_r < tl.minimum(end_r, rows))[:, None] & (b_c < tl.minimum(end_c, width))[None, :]


@triton.jit(do_not_specialize=["some_chunks"])
def shrink(
    p_images,  # [planes, rows_in, width_in]
    p_pixels,  # [planes, rows_out, width_out]
    p_start_r,  # [tiles]
    p_start_c,
    p_row_weights,  # [2, tiles, M, K]
    p_column_weights,  # [2, tiles, chunks N, C]
    p_first_r,
    p_count_r,
    p_taps_r,
    p_first_c,
    p_count_c,
    p_taps_c,
    p_row_sums,  # [rows_out]
    p_mean,  # [channels]
    p_per_std,  # 1 / std
    rows_in,
    units_in,  # of a row
    rows_out,
    units_out,
    channels,
    low,
    high,
    per_range,
    some_chunks,
    UNIT_IN: tl.constexpr,
    UNIT_OUT: tl.constexpr,
    WHOLE: tl.constexpr,
    INNER: tl.constexpr,
    CHUNKS: tl.constexpr,  # or 0, for a number that the compiler does not know
    TAPS_R: tl.constexpr,
    TAPS_C: tl.constexpr,
    SIZE_R: tl.constexpr,
    SIZE_C: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
):
    """Clamp, resize and normalise a tile of pixels, [M, C], from a window [K, chunks N]."""
    chunks = CHUNKS if CHUNKS > 0 else some_chunks
    plane, tile_r, tile_c = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    width_in, width_out = units_in * UNIT_IN, units_out * UNIT_OUT
    p_plane = p_images + plane.to(tl.int64) * rows_in * width_in
    p_result = p_pixels + plane.to(tl.int64) * rows_out * width_out
    b_r, b_c = tile_r * SIZE_R + tl.arange(0, M), tile_c * SIZE_C + tl.arange(0, C)
    end_r, end_c = tile_r * SIZE_R + SIZE_R, tile_c * SIZE_C + SIZE_C
    first_r = tl.load(p_start_r + tile_r)
    first_c = tl.load(p_start_c + tile_c) * UNIT_IN
    p_rows = p_row_weights + tile_r * (M * K) + (tl.arange(0, M) * K)[:, None] + tl.arange(0, K)[None, :]
    p_across = p_column_weights + tile_c * (chunks * N * C) + (tl.arange(0, N) * C)[:, None] + tl.arange(0, C)[None, :]
    b_high = tl.load(p_rows)
    b_low = tl.load(p_rows + tl.num_programs(1) * (M * K))
    b_lowest = (-low * per_range * tl.load(p_row_sums + tl.minimum(b_r, rows_out - 1)))[:, None]
    b_sum = tl.zeros([M, C], tl.float32)
    for chunk in tl.range(chunks, num_stages=1):
        b_source = _source(p_plane, first_r, first_c + chunk * N, rows_in, width_in, WHOLE, K, N)
        b_source = clamped(b_source, low, high)
        b_between = product(b_high, b_source, tl.zeros([M, N], tl.float32))
        b_between = product(b_low, b_source, b_between)
        b_between = tl.fma(b_between, per_range, tl.broadcast_to(b_lowest, [M, N]))
        b_weights, b_most = tl.load(p_across + chunk * (N * C)), b_between.to(tl.float16)
        b_sum = product(b_most, b_weights, b_sum)
        if p_pixels.dtype.element_ty == tl.float16:
            b_rest = tl.load(p_across + (tl.num_programs(2) * chunks + chunk) * (N * C))
            b_sum = product(b_most, b_rest, b_sum)
            b_sum = product((b_between - b_most.to(tl.float32)).to(tl.float16), b_weights, b_sum)
    b_channel = b_c % INNER + (plane % channels if INNER == 1 else 0)
    b_mean, b_per_std = tl.load(p_mean + b_channel)[None, :], tl.load(p_per_std + b_channel)[None, :]
    if tl.max(tl.where(b_sum == b_sum, 0, 1)) != 0:
        for some in tl.range(0, M, ROWS_GATHERED):
            b_own = tile_r * SIZE_R + some + tl.arange(0, ROWS_GATHERED)
            b_some = per_range * _gathered(
                p_plane, b_own, b_c, rows_out, width_out, width_in, low, high, p_first_r, p_count_r, p_taps_r,
                p_first_c, p_count_c, p_taps_c, True, INNER, TAPS_R, TAPS_C,
            )  # fmt: skip
            b_at, m_inside = _inside(b_own, b_c, end_r, end_c, rows_out, width_out)
            b_some = (b_some - b_mean) * b_per_std
            tl.store(p_result + b_at, b_some.to(p_pixels.dtype.element_ty), mask=m_inside)
    else:
        b_at, m_inside = _inside(b_r, b_c, end_r, end_c, rows_out, width_out)
        b_sum = (b_sum - b_mean) * b_per_std
        tl.store(p_result + b_at, b_sum.to(p_pixels.dtype.element_ty), mask=m_inside)


@triton.jit
def _passed(b_sum, p_images, b_at, m_inside, low, high):
    """The gradient, zero where an image is clamped."""
    if p_images is not None:
        b_image = tl.load(p_images + b_at, mask=m_inside, other=0.0).to(tl.float32)
        b_sum = tl.where((b_image >= low) & (b_image <= high), b_sum, 0.0)
    return b_sum


@triton.jit
def spread(
    p_grads,  # [planes, rows_in, width_in]: of the pixels
    p_grad_images,  # [planes, rows_out, width_out]
    p_start_r,  # [tiles]
    p_start_c,
    p_row_weights,  # [2, tiles, M, K]
    p_column_weights,  # [2, tiles, N, C]
    p_first_r,
    p_count_r,
    p_taps_r,
    p_first_c,
    p_count_c,
    p_taps_c,
    p_images,  # as p_grad_images, or None
    p_per_std,  # [channels]: 1 / std, which channels_last has in the weights of columns
    rows_in,
    units_in,  # of a row
    rows_out,
    units_out,
    channels,
    low,
    high,
    per_range,
    UNIT_IN: tl.constexpr,
    UNIT_OUT: tl.constexpr,
    WHOLE: tl.constexpr,
    INNER: tl.constexpr,
    TAPS_R: tl.constexpr,
    TAPS_C: tl.constexpr,
    SIZE_R: tl.constexpr,
    SIZE_C: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
):
    """The adjoint: the gradient of a tile of the images, [M, C], from a window [K, N] of that of the pixels."""
    plane, tile_r, tile_c = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    width_in, width_out = units_in * UNIT_IN, units_out * UNIT_OUT
    p_plane = p_grads + plane.to(tl.int64) * rows_in * width_in
    first = plane.to(tl.int64) * rows_out * width_out
    b_r, b_c = tile_r * SIZE_R + tl.arange(0, M), tile_c * SIZE_C + tl.arange(0, C)
    end_r, end_c = tile_r * SIZE_R + SIZE_R, tile_c * SIZE_C + SIZE_C
    p_rows = p_row_weights + tile_r * (M * K) + (tl.arange(0, M) * K)[:, None] + tl.arange(0, K)[None, :]
    p_across = p_column_weights + tile_c * (N * C) + (tl.arange(0, N) * C)[:, None] + tl.arange(0, C)[None, :]
    first_r, first_c = tl.load(p_start_r + tile_r), tl.load(p_start_c + tile_c)
    b_source = _source(p_plane, first_r, first_c, rows_in, width_in, WHOLE, K, N)
    # Zero times what is not finite is NaN.
    strange = tl.max(tl.where(b_source.to(tl.float32) * 0.0 == 0.0, 0, 1))
    scale = per_range * (tl.load(p_per_std + plane % channels) if INNER == 1 else 1.0)
    b_between = product(b_source, tl.load(p_across), tl.zeros([K, C], tl.float32))
    b_between = product(b_source, tl.load(p_across + tl.num_programs(2) * (N * C)), b_between) * scale
    b_most = b_between.to(tl.bfloat16)
    b_rest = (b_between - b_most.to(tl.float32)).to(tl.bfloat16)
    b_sum = product(tl.load(p_rows + tl.num_programs(1) * (M * K)), b_most, tl.zeros([M, C], tl.float32))
    b_high = tl.load(p_rows)
    b_sum = product(b_high, b_most, b_sum)
    b_sum = product(b_high, b_rest, b_sum)
    if strange != 0:
        for some in tl.range(0, M, ROWS_GATHERED):
            b_own = tile_r * SIZE_R + some + tl.arange(0, ROWS_GATHERED)
            b_some = (scale * tl.load(p_per_std + b_c % INNER)[None, :] if INNER > 1 else scale) * _gathered(
                p_plane, b_own, b_c, rows_out, width_out, width_in, low, high, p_first_r, p_count_r, p_taps_r,
                p_first_c, p_count_c, p_taps_c, False, INNER, TAPS_R, TAPS_C,
            )  # fmt: skip
            b_at, m_inside = _inside(b_own, b_c, end_r, end_c, rows_out, width_out)
            b_some = _passed(b_some, p_images, first + b_at, m_inside, low, high)
            tl.store(p_grad_images + first + b_at, b_some.to(p_grad_images.dtype.element_ty), mask=m_inside)
    else:
        b_at, m_inside = _inside(b_r, b_c, end_r, end_c, rows_out, width_out)
        b_sum = _passed(b_sum, p_images, first + b_at, m_inside, low, high)
        tl.store(p_grad_images + first + b_at, b_sum.to(p_grad_images.dtype.element_ty), mask=m_inside)
