"""Layer or RMS norm of rows, modulated, behind a gated residual or not: one launch forward, one or two backward.

A program keeps a row in its registers, as two blocks whose lengths are powers of two: 1152 columns are 1024 and 128,
not 2048. Backward it goes through several rows of a sample and leaves their sums per column, which a second launch
adds up in a fixed order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffpp_fast.ops.triton.layout import as_float

#: The widest row that registers hold, with the gradient's sums beside it: two of them, or three and a residual.
MOST_COLUMNS, MOST_COLUMNS_OF_RESIDUALS = 8192, 6144
#: Elements of a row per warp. Forward 48 a thread: up to 1536 columns no sum leaves the warp. Backward 16 a thread,
#: for each of up to three sums, three factors and four values.
COLUMNS_PER_WARP, COLUMNS_PER_WARP_BACKWARD = 1536, 512
MOST_WARPS = 32
#: Rows of a multiple of the first are vectors to Triton. Backward, others are counted in vectors, if that goes; if not,
#: each element has an address, and there are registers for half of the elements.
KNOWN_VECTORS, VECTOR = 16, 8
#: Of a multiprocessor. Of other rows a thread may have all that there are: left to itself the compiler spills some.
REGISTERS, MOST_REGISTERS = 65536, 255
#: Programs of the backward pass beyond which one takes more rows: enough to fill large GPUs several times over.
PROGRAMS = 1024
#: Rows of a program, backward. Fewer would make the sums that programs leave a large part of the traffic.
LEAST_ROWS, MOST_ROWS = 8, 64
#: Partial sums and columns of a tile of the last launch.
SUM_ROWS, SUM_COLUMNS = 32, 64
#: Of a thread there. Left to itself the compiler takes 32 for some widths, and spills two.
SUM_REGISTERS = 64


class Modulation(NamedTuple):
    """Rows of factors or summands as kernels read them: one for each sample, or one for each row."""

    values: Tensor | None  # [B, D] or [B, rows, D], elements of a row beside each other
    sample_stride: int
    row_stride: int


def modulation(values: Tensor | None) -> Modulation:
    """Return [B, D] or [B, rows, D] as kernels read it."""
    if values is None:
        return Modulation(None, 0, 0)
    if values.stride(-1) != 1:
        values = values.contiguous()
    return Modulation(values, values.stride(0), values.stride(1) if values.dim() == 3 else 0)


def shape(op: str, x: Tensor) -> tuple[int, int, int]:
    """Batch, rows of a sample and width. Rows that are too wide are refused."""
    width = x.shape[-1]
    name, most = ("x", MOST_COLUMNS) if op == "ada_layer_norm" else ("residual", MOST_COLUMNS_OF_RESIDUALS)
    if width > most:
        raise ValueError(
            f"{op}: backend 'triton' serves rows of up to {most} elements, {name} has {width}; "
            "use_backend('reference') serves any"
        )
    return x.shape[0], x.shape[1:-1].numel(), width


def like(result: Tensor, x: Tensor) -> Tensor:
    """A row-major result in the layout of x."""
    return result if x.is_contiguous() else torch.empty_like(x).copy_(result)


def forward(
    op: str,
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    layer: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor]:
    """Return x + gate branch (None without a branch), its modulated norm, mean (None for RMS) and 1 / deviation."""
    batch, rows, width = shape(op, x)
    values = x.contiguous()
    y = torch.empty_like(values)
    hidden = None if branch is None else torch.empty_like(values)
    rstd = torch.empty(batch, rows, dtype=torch.float32, device=x.device)
    mean = torch.empty_like(rstd) if layer else None
    if x.numel():
        main, tail = _blocks(width)
        gate, gate_stride, gate_row_stride = modulation(gate)
        scale, scale_stride, scale_row_stride = modulation(scale)
        shift, shift_stride, shift_row_stride = modulation(shift)
        _forward[(batch * rows,)](
            p_x=values,
            p_branch=None if branch is None else branch.contiguous(),
            p_gate=gate,
            gate_stride=gate_stride,
            gate_row_stride=gate_row_stride,
            p_hidden=hidden,
            p_y=y,
            p_mean=mean,
            p_rstd=rstd,
            p_weight=None if weight is None else weight.contiguous(),
            p_scale=scale,
            scale_stride=scale_stride,
            scale_row_stride=scale_row_stride,
            p_shift=shift,
            shift_stride=shift_stride,
            shift_row_stride=shift_row_stride,
            eps=eps,
            rows=rows,
            width=width,
            MAIN=main,
            TAIL=tail,
            num_warps=_warps(width, COLUMNS_PER_WARP),
        )
    return None if hidden is None else like(hidden, x), like(y, x), mean, rstd


def backward(
    op: str,
    grad_hidden: Tensor | None,
    grad_y: Tensor,
    hidden: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    needs_x: bool,
    needs_branch: bool,
    needs_gate: bool,
    needs_weight: bool,
    needs_scale: bool,
    needs_shift: bool,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, branch, gate, weight, scale and shift, each where it is needed.

    Of `shift` only shape and dtype are read, of `branch` also the values where the gate needs its gradient.
    """
    batch, rows, width = shape(op, hidden)
    values = hidden.contiguous()
    per_row = any(each is not None and each.dim() == 3 for each in (gate, scale, shift))
    grad_x = torch.empty_like(values) if needs_x else None
    grad_branch = torch.empty_like(values) if needs_branch else None
    # The sums for scale and weight are the same ones, times what does not depend on the row.
    needs_products = needs_weight or (needs_scale and not per_row)
    wide = torch.float32
    grad_gate = _gradient(gate, None) if needs_gate else None
    grad_scale = _gradient(scale, None if weight is None or per_row else wide) if needs_scale else None
    grad_shift = _gradient(shift, None) if needs_shift else None
    products = grad_scale if needs_products else None
    if needs_products and (per_row or not needs_scale):
        products = torch.empty(batch, width, dtype=wide, device=hidden.device)
    if hidden.numel():
        per_program = min(max(batch * rows // PROGRAMS, LEAST_ROWS), MOST_ROWS)
        chunks = triton.cdiv(rows, per_program)
        # Rows with their own modulation have their own gradients of it; the weight's is a sum all the same.
        sum_gate, sum_shift = needs_gate and not per_row, needs_shift and not per_row
        kinds = sum_gate + needs_products + sum_shift
        sums = None
        if kinds:
            sums = torch.empty(batch, chunks, kinds, width, dtype=torch.float32, device=hidden.device)
        main, tail = _blocks(width)
        dense_gate, gate_stride, gate_row_stride = modulation(gate)
        dense_scale, scale_stride, scale_row_stride = modulation(scale)
        lengths = width, gate_stride, gate_row_stride, scale_stride, scale_row_stride
        known = width % KNOWN_VECTORS == 0
        unit = 1 if known or any(length % VECTOR for length in lengths) else VECTOR
        warps = _warps(width, COLUMNS_PER_WARP_BACKWARD // (1 if known or unit > 1 else 2))
        _backward[(batch * chunks,)](
            p_grad_hidden=None if grad_hidden is None else grad_hidden.contiguous(),
            p_grad_y=grad_y.contiguous(),
            p_hidden=values,
            p_mean=mean,
            p_rstd=rstd,
            p_branch=branch.contiguous() if needs_gate and branch is not None else None,
            p_gate=dense_gate,
            gate_stride=gate_stride // unit,
            gate_row_stride=gate_row_stride // unit,
            p_weight=None if weight is None else weight.contiguous(),
            p_scale=dense_scale,
            scale_stride=scale_stride // unit,
            scale_row_stride=scale_row_stride // unit,
            p_grad_x=grad_x,
            p_grad_branch=grad_branch,
            p_grad_gate=grad_gate if per_row else None,
            p_grad_scale=grad_scale if per_row else None,
            p_grad_shift=grad_shift if per_row else None,
            p_sums=sums,
            rows=rows,
            units=width // unit,
            per_program=per_program,
            UNIT=unit,
            PER_ROW=per_row,
            SUM_GATE=sum_gate,
            SUM_PRODUCTS=needs_products,
            SUM_SHIFT=sum_shift,
            MAIN=main,
            TAIL=tail,
            num_warps=warps,
            maxnreg=None if known else min(MOST_REGISTERS, REGISTERS // (32 * warps)),
        )
        if sums is not None:
            results = (grad_gate if sum_gate else None, products, grad_shift if sum_shift else None)
            first, second, third = sorted(results, key=lambda each: each is None)
            _combine[(batch, triton.cdiv(width, SUM_COLUMNS), kinds)](
                p_sums=sums,
                p_first=first,
                p_second=second,
                p_third=third,
                chunks=chunks,
                width=width,
                KINDS=kinds,
                BLOCK_R=SUM_ROWS,
                BLOCK_C=SUM_COLUMNS,
                num_warps=4,
                maxnreg=SUM_REGISTERS,
            )
    grad_weight = None
    if weight is not None and products is not None:
        factored = products if per_row or scale is None else products * (1.0 + scale.float())
        grad_weight = factored.sum(0).to(weight.dtype) if needs_weight else None
        if needs_scale and not per_row and scale is not None:
            grad_scale = (products * weight.float()).to(scale.dtype)
    return (
        None if grad_x is None else like(grad_x, hidden),
        None if grad_branch is None or branch is None else like(grad_branch, branch),
        grad_gate,
        grad_weight,
        grad_scale,
        grad_shift,
    )


def _gradient(values: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """Where the gradient of a modulation goes."""
    return None if values is None else torch.empty(values.shape, dtype=dtype or values.dtype, device=values.device)


def _blocks(width: int) -> tuple[int, int]:
    """The largest power of two below a row's width, and one that holds the rest."""
    main = max(triton.next_power_of_2(width) // 2, 1)
    return main, triton.next_power_of_2(max(width - main, 1))


def _warps(width: int, columns_per_warp: int) -> int:
    # The widest rows spill one register of float32 with 16 warps.
    columns_per_warp = columns_per_warp // 2 if width > MOST_COLUMNS_OF_RESIDUALS else columns_per_warp
    return min(triton.next_power_of_2(triton.cdiv(width, columns_per_warp)), MOST_WARPS)


@triton.jit
def _load(p, b_c, m_c):
    """Part of a row as float32, zero outside."""
    return tl.load(p + b_c, mask=m_c, other=0.0).to(tl.float32)


@triton.jit
def _store(p, b_c, b_values, m_c):
    tl.store(p + b_c, b_values.to(p.dtype.element_ty), mask=m_c)


@triton.jit
def _residual(p_x, p_branch, p_gate, p_hidden, b_c, m_c):
    """Part of the row that is normalised: x, or x + gate branch as it is stored."""
    b_x = _load(p_x, b_c, m_c)
    if p_branch is not None:
        b_branch = _load(p_branch, b_c, m_c)
        if p_gate is not None:
            b_x = tl.fma(_load(p_gate, b_c, m_c), b_branch, b_x)
        else:
            b_x += b_branch
        b_x = b_x.to(p_hidden.dtype.element_ty).to(tl.float32)
        _store(p_hidden, b_c, b_x, m_c)
    return b_x


@triton.jit
def _factor(p_weight, p_scale, scale_at, b_c, m_c):
    """weight (1 + scale) of part of a row; 1 where there is neither."""
    b_factor = 1.0 + (_load(p_scale + scale_at, b_c, m_c) if p_scale is not None else 0.0)
    if p_weight is not None:
        b_factor *= _load(p_weight, b_c, m_c)
    return b_factor


@triton.jit
def _modulate(b_d, rstd, p_weight, p_scale, p_shift, p_y, b_c, m_c):
    b_y = b_d * rstd
    if p_weight is not None:
        b_y *= _load(p_weight, b_c, m_c)
    if p_scale is not None:
        b_y *= 1.0 + _load(p_scale, b_c, m_c)
    if p_shift is not None:
        b_y += _load(p_shift, b_c, m_c)
    _store(p_y, b_c, b_y, m_c)


@triton.jit
def _forward(
    p_x,  # [B, rows, width], as p_branch, p_hidden and p_y
    p_branch,  # or None, and with it p_gate and p_hidden
    p_gate,  # [B, width] or [B, rows, width], as p_scale and p_shift; or None
    gate_stride,
    gate_row_stride,
    p_hidden,
    p_y,
    p_mean,  # [B, rows], or None: then the norm is RMS
    p_rstd,
    p_weight,  # [width] or None
    p_scale,
    scale_stride,
    scale_row_stride,
    p_shift,
    shift_stride,
    shift_row_stride,
    eps,
    rows,
    width,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
):
    # Divided in 32 bits: in 64 it is a subroutine.
    row = tl.program_id(0)
    b, r = (row // rows).to(tl.int64), (row % rows).to(tl.int64)
    row = row.to(tl.int64)
    at = row * width
    if p_gate is not None:
        p_gate += b * gate_stride + r * gate_row_stride
    if p_scale is not None:
        p_scale += b * scale_stride + r * scale_row_stride
    if p_shift is not None:
        p_shift += b * shift_stride + r * shift_row_stride
    if p_branch is not None:
        p_branch += at
        p_hidden += at
    b_c, t_c = tl.arange(0, MAIN), MAIN + tl.arange(0, TAIL)
    m_b, m_t = b_c < width, t_c < width
    b_d = _residual(p_x + at, p_branch, p_gate, p_hidden, b_c, m_b)
    t_d = _residual(p_x + at, p_branch, p_gate, p_hidden, t_c, m_t)
    share = 1.0 / as_float(width)
    if p_mean is not None:
        pivot = (tl.sum(b_d) + tl.sum(t_d)) * share
        b_d, t_d = b_d - pivot, tl.where(m_t, t_d - pivot, 0.0)
        # The sum rounds; the mean of what is left takes the rounding off.
        rest = (tl.sum(b_d) + tl.sum(t_d)) * share
        b_d, t_d = b_d - rest, tl.where(m_t, t_d - rest, 0.0)
        tl.store(p_mean + row, pivot + rest)
    rstd = tl.rsqrt((tl.sum(b_d * b_d) + tl.sum(t_d * t_d)) * share + eps)
    tl.store(p_rstd + row, rstd)
    _modulate(b_d, rstd, p_weight, p_scale, p_shift, p_y + at, b_c, m_b)
    _modulate(t_d, rstd, p_weight, p_scale, p_shift, p_y + at, t_c, m_t)


@triton.jit
def _normalized(p_hidden, mean, rstd, b_c, m_c):
    """Part of a normalised row, zero outside."""
    return tl.where(m_c, (_load(p_hidden, b_c, m_c) - mean) * rstd, 0.0)


@triton.jit
def _input_gradients(b_in, p_grad_hidden, p_gate, gate_at, p_grad_x, p_grad_branch, at, b_c, m_c):
    """Part of a row of the gradient of x + gate branch, of which x and branch get theirs."""
    if p_grad_hidden is not None:
        b_in += _load(p_grad_hidden + at, b_c, m_c)
    if p_grad_x is not None:
        _store(p_grad_x + at, b_c, b_in, m_c)
    if p_grad_branch is not None:
        if p_gate is not None:
            _store(p_grad_branch + at, b_c, b_in * _load(p_gate + gate_at, b_c, m_c), m_c)
        else:
            _store(p_grad_branch + at, b_c, b_in, m_c)
    return b_in


@triton.jit
def _products(b_grad, b_n, p_scale, scale_at, b_c, m_c, PER_ROW: tl.constexpr):
    """Part of a row of the gradient of the weight; of the scale, where a sample has one."""
    b_product = b_grad * b_n
    if PER_ROW and p_scale is not None:
        b_product *= 1.0 + _load(p_scale + scale_at, b_c, m_c)
    return b_product


@triton.jit
def _scale_gradient(p_grad_scale, b_grad, b_n, p_weight, b_c, m_c):
    b_product = b_grad * b_n
    if p_weight is not None:
        b_product *= _load(p_weight, b_c, m_c)
    _store(p_grad_scale, b_c, b_product, m_c)


@triton.jit(do_not_specialize=["per_program"])
def _backward(
    p_grad_hidden,  # [B, rows, width] or None, as all that is not said to be otherwise
    p_grad_y,
    p_hidden,
    p_mean,  # [B, rows], or None for RMS
    p_rstd,
    p_branch,  # where the gate needs its gradient
    p_gate,  # [B, width] or [B, rows, width], as p_scale, or None
    gate_stride,
    gate_row_stride,
    p_weight,  # [width] or None
    p_scale,
    scale_stride,
    scale_row_stride,
    p_grad_x,
    p_grad_branch,
    p_grad_gate,  # here and below, where rows have their own modulation
    p_grad_scale,
    p_grad_shift,
    p_sums,  # [B, chunks, 1 to 3, width] or None: for the gate, for scale and weight, for the shift
    rows,
    units,  # of a row, and of the strides
    per_program,
    UNIT: tl.constexpr,
    PER_ROW: tl.constexpr,
    SUM_GATE: tl.constexpr,
    SUM_PRODUCTS: tl.constexpr,
    SUM_SHIFT: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
):
    width = units * UNIT
    chunks = tl.cdiv(rows, per_program)
    program = tl.program_id(0)
    b = (program // chunks).to(tl.int64)
    first = (program % chunks).to(tl.int64) * per_program
    program = program.to(tl.int64)
    last = tl.minimum(first + per_program, rows)
    b_c, t_c = tl.arange(0, MAIN), MAIN + tl.arange(0, TAIL)
    m_b, m_t = b_c < width, t_c < width
    share = 1.0 / as_float(width)
    b_gates, t_gates = tl.zeros([MAIN], tl.float32), tl.zeros([TAIL], tl.float32)
    b_products, t_products = tl.zeros([MAIN], tl.float32), tl.zeros([TAIL], tl.float32)
    b_shifts, t_shifts = tl.zeros([MAIN], tl.float32), tl.zeros([TAIL], tl.float32)
    NEEDS_INPUT: tl.constexpr = p_grad_x is not None or p_grad_branch is not None or SUM_GATE or p_grad_gate is not None
    for r in range(first, last):
        row = b * rows + r
        at = row * width
        gate_at = (b * gate_stride + r * gate_row_stride) * UNIT
        scale_at = (b * scale_stride + r * scale_row_stride) * UNIT
        b_grad, t_grad = _load(p_grad_y + at, b_c, m_b), _load(p_grad_y + at, t_c, m_t)
        rstd = tl.load(p_rstd + row)
        mean = tl.load(p_mean + row) if p_mean is not None else 0.0
        b_n, t_n = _normalized(p_hidden + at, mean, rstd, b_c, m_b), _normalized(p_hidden + at, mean, rstd, t_c, m_t)
        if SUM_PRODUCTS:
            b_products += _products(b_grad, b_n, p_scale, scale_at, b_c, m_b, PER_ROW)
            t_products += _products(t_grad, t_n, p_scale, scale_at, t_c, m_t, PER_ROW)
        if SUM_SHIFT:
            b_shifts += b_grad
            t_shifts += t_grad
        if p_grad_scale is not None:
            _scale_gradient(p_grad_scale + at, b_grad, b_n, p_weight, b_c, m_b)
            _scale_gradient(p_grad_scale + at, t_grad, t_n, p_weight, t_c, m_t)
        if p_grad_shift is not None:
            _store(p_grad_shift + at, b_c, b_grad, m_b)
            _store(p_grad_shift + at, t_c, t_grad, m_t)
        if NEEDS_INPUT:
            b_g = b_grad * _factor(p_weight, p_scale, scale_at, b_c, m_b)
            t_g = t_grad * _factor(p_weight, p_scale, scale_at, t_c, m_t)
            g_mean = (tl.sum(b_g) + tl.sum(t_g)) * share if p_mean is not None else 0.0
            gn_mean = (tl.sum(b_g * b_n) + tl.sum(t_g * t_n)) * share
            b_in, t_in = rstd * (b_g - tl.fma(b_n, gn_mean, g_mean)), rstd * (t_g - tl.fma(t_n, gn_mean, g_mean))
            b_in = _input_gradients(b_in, p_grad_hidden, p_gate, gate_at, p_grad_x, p_grad_branch, at, b_c, m_b)
            t_in = _input_gradients(t_in, p_grad_hidden, p_gate, gate_at, p_grad_x, p_grad_branch, at, t_c, m_t)
            if p_branch is not None:
                b_in *= _load(p_branch + at, b_c, m_b)
                t_in *= _load(p_branch + at, t_c, m_t)
                if SUM_GATE:
                    b_gates += b_in
                    t_gates += t_in
                else:
                    _store(p_grad_gate + at, b_c, b_in, m_b)
                    _store(p_grad_gate + at, t_c, t_in, m_t)
    if p_sums is not None:
        p_to = p_sums + program * (SUM_GATE + SUM_PRODUCTS + SUM_SHIFT) * width
        if SUM_GATE:
            _store(p_to, b_c, b_gates, m_b)
            _store(p_to, t_c, t_gates, m_t)
            p_to += width
        if SUM_PRODUCTS:
            _store(p_to, b_c, b_products, m_b)
            _store(p_to, t_c, t_products, m_t)
            p_to += width
        if SUM_SHIFT:
            _store(p_to, b_c, b_shifts, m_b)
            _store(p_to, t_c, t_shifts, m_t)


@triton.jit
def _combine(
    p_sums,  # [B, chunks, KINDS, width]
    p_first,  # [B, width], as the others, of which the last may be None
    p_second,
    p_third,
    chunks,
    width,
    KINDS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b, kind = tl.program_id(0).to(tl.int64), tl.program_id(2)
    b_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = b_c < width
    p_sums += (b * chunks * KINDS + kind) * width
    b_rows = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for begin in range(0, chunks, BLOCK_R):
        b_r = begin + tl.arange(0, BLOCK_R)
        m_inside = (b_r < chunks)[:, None] & m_c[None, :]
        b_rows += tl.load(p_sums + b_r.to(tl.int64)[:, None] * KINDS * width + b_c[None, :], mask=m_inside, other=0.0)
    b_sum = tl.sum(b_rows, 0)
    _store(p_first + b * width, b_c, b_sum, m_c & (kind == 0))
    if p_second is not None:
        _store(p_second + b * width, b_c, b_sum, m_c & (kind == 1))
    if p_third is not None:
        _store(p_third + b * width, b_c, b_sum, m_c & (kind == 2))
