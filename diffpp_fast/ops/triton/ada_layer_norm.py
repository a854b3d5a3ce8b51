"""Layer normalisation without parameters, scaled and shifted per sample: one launch forward, one or two backward.

A program keeps a row in its registers. Backward it goes through several rows of a sample and leaves their two sums per
column, which a second launch adds up in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffpp_fast.ops.triton.device import on_its_device
from diffpp_fast.ops.triton.layout import as_float

#: The widest row that registers hold, with the gradient's sums beside it.
MOST_COLUMNS = 8192
#: Elements of a row per warp: 8 a thread.
COLUMNS_PER_WARP = 256
MOST_WARPS = 32
#: Programs of the backward pass beyond which one takes more rows: enough to fill large GPUs several times over.
PROGRAMS = 1024
#: Rows of a program, backward. Fewer would make the sums that programs leave a large part of the traffic.
LEAST_ROWS, MOST_ROWS = 8, 64
#: Partial sums and columns of a tile of the last launch.
SUM_ROWS, SUM_COLUMNS = 32, 64


@on_its_device
def forward(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    batch, rows, width = _shape(x)
    values = x.contiguous()
    y = torch.empty_like(values)
    mean = torch.empty(batch, rows, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if x.numel():
        scale, shift = _dense_rows(scale), _dense_rows(shift)
        block = triton.next_power_of_2(width)
        _forward[(batch * rows,)](
            p_x=values,
            p_y=y,
            p_mean=mean,
            p_rstd=rstd,
            p_scale=scale,
            scale_stride=scale.stride(0),
            p_shift=shift,
            shift_stride=shift.stride(0),
            eps=eps,
            rows=rows,
            width=width,
            BLOCK=block,
            num_warps=_warps(block),
        )
    return _like(y, x), mean, rstd


@on_its_device
def backward(
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor,
    needs_x: bool,
    needs_scale: bool,
    needs_shift: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    batch, rows, width = _shape(x)
    needs_sums = needs_scale or needs_shift
    values, grads = x.contiguous(), grad_output.contiguous()
    grad_x = torch.empty_like(values) if needs_x else None
    grad_scale = torch.empty(batch, width, dtype=scale.dtype, device=x.device) if needs_scale else None
    grad_shift = torch.empty(batch, width, dtype=scale.dtype, device=x.device) if needs_shift else None
    if x.numel() and (needs_x or needs_sums):
        per_program = min(max(batch * rows // PROGRAMS, LEAST_ROWS), MOST_ROWS)
        chunks = triton.cdiv(rows, per_program)
        sums = None
        if needs_sums:
            sums = torch.empty(batch, chunks, 2, width, dtype=torch.float32, device=x.device)
        scale, block = _dense_rows(scale), triton.next_power_of_2(width)
        _backward[(batch * chunks,)](
            p_grad=grads,
            p_x=values,
            p_mean=mean,
            p_rstd=rstd,
            p_scale=scale,
            scale_stride=scale.stride(0),
            p_grad_x=grad_x,
            p_sums=sums,
            rows=rows,
            width=width,
            per_program=per_program,
            BLOCK=block,
            num_warps=_warps(block),
        )
        if sums is not None:
            _combine[(batch, triton.cdiv(width, SUM_COLUMNS))](
                p_sums=sums,
                p_grad_scale=grad_scale,
                p_grad_shift=grad_shift,
                chunks=chunks,
                width=width,
                BLOCK_R=SUM_ROWS,
                BLOCK_C=SUM_COLUMNS,
                num_warps=4,
            )
    return None if grad_x is None else _like(grad_x, x), grad_scale, grad_shift


def _shape(x: Tensor) -> tuple[int, int, int]:
    width = x.shape[-1]
    if width > MOST_COLUMNS:
        raise ValueError(
            f"ada_layer_norm: backend 'triton' serves rows of up to {MOST_COLUMNS} elements, x has {width}; "
            "use_backend('reference') serves any"
        )
    return x.shape[0], x.shape[1:-1].numel(), width


def _dense_rows(values: Tensor) -> Tensor:
    """[B, D] with the elements of a row beside each other."""
    return values if values.stride(1) == 1 else values.contiguous()


def _like(result: Tensor, x: Tensor) -> Tensor:
    return result if x.is_contiguous() else torch.empty_like(x).copy_(result)


def _warps(block: int) -> int:
    return min(max(block // COLUMNS_PER_WARP, 1), MOST_WARPS)


@triton.jit
def _forward(
    p_x,  # [B, rows, width], as p_y
    p_y,
    p_mean,  # [B, rows]
    p_rstd,
    p_scale,  # [B, width]
    scale_stride,
    p_shift,
    shift_stride,
    eps,
    rows,
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    b = row // rows
    b_c = tl.arange(0, BLOCK)
    m_c = b_c < width
    b_x = tl.load(p_x + row * width + b_c, mask=m_c, other=0.0).to(tl.float32)
    b_scale = tl.load(p_scale + b * scale_stride + b_c, mask=m_c, other=0.0).to(tl.float32)
    b_shift = tl.load(p_shift + b * shift_stride + b_c, mask=m_c, other=0.0).to(tl.float32)
    total = as_float(width)
    pivot = tl.sum(b_x) / total
    # The sum rounds; the mean of what is left takes the rounding off.
    mean = pivot + tl.sum(tl.where(m_c, b_x - pivot, 0.0)) / total
    b_d = tl.where(m_c, b_x - mean, 0.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(b_d * b_d) / total + eps))
    tl.store(p_mean + row, mean)
    tl.store(p_rstd + row, rstd)
    b_y = tl.fma(b_d * rstd, 1.0 + b_scale, b_shift)
    tl.store(p_y + row * width + b_c, b_y.to(p_y.dtype.element_ty), mask=m_c)


@triton.jit(do_not_specialize=["per_program"])
def _backward(
    p_grad,  # [B, rows, width], as p_x and p_grad_x
    p_x,
    p_mean,  # [B, rows]
    p_rstd,
    p_scale,  # [B, width]
    scale_stride,
    p_grad_x,  # or None
    p_sums,  # [B, chunks, 2, width] or None: of g normalized and of g
    rows,
    width,
    per_program,
    BLOCK: tl.constexpr,
):
    chunks = tl.cdiv(rows, per_program)
    program = tl.program_id(0).to(tl.int64)
    b = program // chunks
    first = (program % chunks) * per_program
    last = tl.minimum(first + per_program, rows)
    b_c = tl.arange(0, BLOCK)
    m_c = b_c < width
    b_factor = 1.0 + tl.load(p_scale + b * scale_stride + b_c, mask=m_c, other=0.0).to(tl.float32)
    total = as_float(width)
    b_by_scale = tl.zeros([BLOCK], tl.float32)
    b_by_shift = tl.zeros([BLOCK], tl.float32)
    for r in range(first, last):
        row = b * rows + r
        b_grad = tl.load(p_grad + row * width + b_c, mask=m_c, other=0.0).to(tl.float32)
        b_x = tl.load(p_x + row * width + b_c, mask=m_c, other=0.0).to(tl.float32)
        rstd = tl.load(p_rstd + row)
        b_normalized = tl.where(m_c, (b_x - tl.load(p_mean + row)) * rstd, 0.0)
        if p_sums is not None:
            b_by_scale += b_grad * b_normalized
            b_by_shift += b_grad
        if p_grad_x is not None:
            b_g = b_grad * b_factor
            g_mean = tl.sum(b_g) / total
            gn_mean = tl.sum(b_g * b_normalized) / total
            b_grad_x = rstd * (b_g - tl.fma(b_normalized, gn_mean, g_mean))
            tl.store(p_grad_x + row * width + b_c, b_grad_x.to(p_grad_x.dtype.element_ty), mask=m_c)
    if p_sums is not None:
        p_to = p_sums + program * 2 * width + b_c
        tl.store(p_to, b_by_scale, mask=m_c)
        tl.store(p_to + width, b_by_shift, mask=m_c)


@triton.jit
def _combine(
    p_sums,  # [B, chunks, 2, width]
    p_grad_scale,  # [B, width] or None
    p_grad_shift,
    chunks,
    width,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    b_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = b_c < width
    b_scale = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    b_shift = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for begin in range(0, chunks, BLOCK_R):
        b_r = begin + tl.arange(0, BLOCK_R)
        m_inside = (b_r < chunks)[:, None] & m_c[None, :]
        b_at = (b * chunks + b_r)[:, None] * 2 * width + b_c[None, :]
        b_scale += tl.load(p_sums + b_at, mask=m_inside, other=0.0)
        b_shift += tl.load(p_sums + b_at + width, mask=m_inside, other=0.0)
    if p_grad_scale is not None:
        tl.store(p_grad_scale + b * width + b_c, tl.sum(b_scale, 0).to(p_grad_scale.dtype.element_ty), mask=m_c)
    if p_grad_shift is not None:
        tl.store(p_grad_shift + b * width + b_c, tl.sum(b_shift, 0).to(p_grad_shift.dtype.element_ty), mask=m_c)
