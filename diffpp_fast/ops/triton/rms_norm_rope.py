"""RMS norm with rotary embedding, each direction in one launch, but for the sum that is the weight's gradient.

A program has one token, backward several: cosines and sines are read once for all heads. Heads come in tiles, as pairs
of what is rotated together.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffpp_fast.ops.triton.device import on_its_device
from diffpp_fast.ops.triton.layout import as_float

#: Elements of a tile: 8 a thread, which loads 16 bytes of 16-bit numbers at a time. Gradients of float32 have twice the
#: warps, for their loads take twice the registers, and Triton would spill one.
TILE, WARPS = 1024, 4
#: Of a thread of the gradients: left to itself Triton 3.6 takes fewer for sm_100 and spills two.
MOST_REGISTERS = 128
#: The longest row, of which a tile then has one.
MOST_COLUMNS = 1024
#: Programs of the backward pass beyond which one takes more tokens: enough to fill large GPUs several times over.
PROGRAMS, MOST_TOKENS = 2048, 16


@on_its_device
def forward(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float, interleaved: bool) -> Tensor:
    like, x, (cos, sin) = x, _dense(x), _alike(cos, sin)
    y = torch.empty_like(x)
    batch, tokens, heads, width = x.shape
    if x.numel():
        half, block = _tile(width, heads)
        _forward[(batch * tokens,)](
            p_x=x,
            x_batch=x.stride(0),
            x_token=x.stride(1),
            x_head=x.stride(2),
            p_y=y,
            y_batch=y.stride(0),
            y_token=y.stride(1),
            y_head=y.stride(2),
            p_cos=cos,
            p_sin=sin,
            angle_batch=cos.stride(0) if cos.dim() == 3 else 0,
            angle_token=cos.stride(-2),
            p_weight=None if weight is None else _dense(weight),
            eps=eps,
            tokens=tokens,
            heads=heads,
            width=width,
            EVEN=width == 2 * half and heads % block == 0,
            INTERLEAVED=interleaved,
            HALF=half,
            HEADS=block,
            num_warps=WARPS,
        )
    return _laid_out(y, like)


@on_its_device
def backward(
    grad_output: Tensor,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor | None,
    eps: float,
    interleaved: bool,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    like = x
    x, (cos, sin), grad = _dense(x), _alike(cos, sin), _dense(grad_output)
    grad_x = torch.empty_like(x) if needs_x else None
    strides = (0, 0, 0, 1) if grad_x is None else grad_x.stride()
    batch, tokens, heads, width = x.shape
    per_program = min(max(batch * tokens // PROGRAMS, 1), MOST_TOKENS)
    chunks = triton.cdiv(tokens, per_program)
    sums = None
    if needs_weight:
        sums = torch.empty(batch * chunks, width, dtype=torch.float32, device=x.device)
    if x.numel() and (needs_x or needs_weight):
        half, block = _tile(width, heads)
        # Where there is the sum alone, Triton would spill a register of float32 with the whole tile.
        block = block if needs_x or x.element_size() == 2 else max(block // 2, 1)
        _backward[(batch * chunks,)](
            p_grad=grad,
            grad_batch=grad.stride(0),
            grad_token=grad.stride(1),
            grad_head=grad.stride(2),
            p_x=x,
            x_batch=x.stride(0),
            x_token=x.stride(1),
            x_head=x.stride(2),
            p_grad_x=grad_x,
            y_batch=strides[0],
            y_token=strides[1],
            y_head=strides[2],
            p_cos=cos,
            p_sin=sin,
            angle_batch=cos.stride(0) if cos.dim() == 3 else 0,
            angle_token=cos.stride(-2),
            p_weight=None if weight is None else _dense(weight),
            p_sums=sums,
            eps=eps,
            tokens=tokens,
            heads=heads,
            width=width,
            per_program=per_program,
            EVEN=width == 2 * half and heads % block == 0,
            INTERLEAVED=interleaved,
            HALF=half,
            HEADS=block,
            num_warps=WARPS * (2 if needs_x and x.element_size() == 4 else 1),
            maxnreg=MOST_REGISTERS,
        )
    # torch sums in an order that depends on the shape alone.
    return None if grad_x is None else _laid_out(grad_x, like), None if sums is None or weight is None else sums.sum(
        0
    ).to(weight.dtype)


def _dense(values: Tensor) -> Tensor:
    """With the elements of a row beside each other."""
    return values if _is_dense(values) else values.contiguous()


def _is_dense(values: Tensor) -> bool:
    """Whether the elements of a row are beside each other, here and in a tensor that is made like this one.

    Where another dimension has a stride of 1, rows overlap, and torch may put that dimension last.
    """
    return values.stride(-1) == 1 and values.stride().count(1) == 1


def _laid_out(result: Tensor, x: Tensor) -> Tensor:
    """The result for a dense x in the layout of x."""
    return result if _is_dense(x) else torch.empty_like(x).copy_(result)


def _alike(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the same strides, and the elements of a row beside each other."""
    cos, sin = _dense(cos), _dense(sin)
    return (cos, sin) if cos.stride() == sin.stride() else (cos.contiguous(), sin.contiguous())


def _tile(width: int, heads: int) -> tuple[int, int]:
    """Pairs of a row and heads of a tile."""
    if width > MOST_COLUMNS:
        raise ValueError(
            f"rms_norm_rope: backend 'triton' serves rows of up to {MOST_COLUMNS} elements, x has {width}; "
            "use_backend('reference') serves any"
        )
    half = triton.next_power_of_2(width // 2)
    return half, min(max(TILE // (2 * half), 1), triton.next_power_of_2(heads))


@triton.jit
def _rows(b_h, heads, EVEN: tl.constexpr):
    """Which heads of a tile there are, [ROWS, 1]: a constant where all tiles are whole, so that masks are dropped."""
    return tl.full(b_h.shape, True, tl.int1) if EVEN else b_h < heads


@triton.jit
def _inside(m_rows, b_c, width, EVEN: tl.constexpr):
    return m_rows if EVEN else m_rows & (b_c < width)


@triton.jit
def _load_pairs(p, m_rows, width, EVEN: tl.constexpr, INTERLEAVED: tl.constexpr, HALF: tl.constexpr):
    """Rows that begin at p [ROWS, 1] as float32 pairs: [ROWS, HALF] twice, zero outside."""
    if INTERLEAVED:
        b_c = tl.arange(0, 2 * HALF)[None, :]
        b_row = tl.load(p + b_c, mask=_inside(m_rows, b_c, width, EVEN), other=0.0).to(tl.float32)
        b_a, b_b = tl.split(tl.reshape(b_row, [b_row.shape[0], HALF, 2]))
    else:
        b_c = tl.arange(0, HALF)[None, :]
        m_inside = _inside(m_rows, b_c, width // 2, EVEN)
        b_a = tl.load(p + b_c, mask=m_inside, other=0.0).to(tl.float32)
        b_b = tl.load(p + width // 2 + b_c, mask=m_inside, other=0.0).to(tl.float32)
    return b_a, b_b


@triton.jit
def _store_pairs(p, b_a, b_b, m_rows, width, EVEN: tl.constexpr, INTERLEAVED: tl.constexpr, HALF: tl.constexpr):
    if INTERLEAVED:
        b_c = tl.arange(0, 2 * HALF)[None, :]
        b_row = tl.reshape(tl.join(b_a, b_b), [b_a.shape[0], 2 * HALF])
        tl.store(p + b_c, b_row.to(p.dtype.element_ty), mask=_inside(m_rows, b_c, width, EVEN))
    else:
        b_c = tl.arange(0, HALF)[None, :]
        m_inside = _inside(m_rows, b_c, width // 2, EVEN)
        tl.store(p + b_c, b_a.to(p.dtype.element_ty), mask=m_inside)
        tl.store(p + width // 2 + b_c, b_b.to(p.dtype.element_ty), mask=m_inside)


@triton.jit
def _load_row(p, width, EVEN: tl.constexpr, INTERLEAVED: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr):
    """One row as pairs, for every row of a tile: [ROWS, HALF] twice.

    Each thread reads its own columns. Spreading a row that is read once takes more instructions, and barriers.
    """
    return _load_pairs(
        p + tl.zeros([ROWS, 1], tl.int32), tl.full([ROWS, 1], True, tl.int1), width, EVEN, INTERLEAVED, HALF
    )


@triton.jit
def _weight_pairs(
    p_weight, width, EVEN: tl.constexpr, INTERLEAVED: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr
):
    if p_weight is not None:
        w_a, w_b = _load_row(p_weight, width, EVEN, INTERLEAVED, HALF, ROWS)
    else:
        w_a, w_b = tl.full([ROWS, HALF], 1.0, tl.float32), tl.full([ROWS, HALF], 1.0, tl.float32)
    return w_a, w_b


@triton.jit
def _normalized(p_x, m_h, width, eps, EVEN: tl.constexpr, INTERLEAVED: tl.constexpr, HALF: tl.constexpr):
    """Rows of a tile without the weight, as pairs, and 1 / root mean square, [ROWS, 1]."""
    b_a, b_b = _load_pairs(p_x, m_h, width, EVEN, INTERLEAVED, HALF)
    b_rstd = tl.rsqrt(tl.sum(b_a * b_a + b_b * b_b, 1)[:, None] * (1.0 / as_float(width)) + eps)
    return b_a * b_rstd, b_b * b_rstd, b_rstd


@triton.jit
def _forward(
    p_x,  # [B, tokens, heads, width], each with its strides, as p_y
    x_batch,
    x_token,
    x_head,
    p_y,
    y_batch,
    y_token,
    y_head,
    p_cos,  # [tokens, width] or [B, tokens, width], as p_sin
    p_sin,
    angle_batch,
    angle_token,
    p_weight,  # [width] or None
    eps,
    tokens,
    heads,
    width,
    EVEN: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
):
    # Divided in 32 bits: in 64 it is a subroutine.
    program = tl.program_id(0)
    b, t = (program // tokens).to(tl.int64), (program % tokens).to(tl.int64)
    c_a, c_b = _load_row(p_cos + b * angle_batch + t * angle_token, width, EVEN, INTERLEAVED, HALF, HEADS)
    s_a, s_b = _load_row(p_sin + b * angle_batch + t * angle_token, width, EVEN, INTERLEAVED, HALF, HEADS)
    w_a, w_b = _weight_pairs(p_weight, width, EVEN, INTERLEAVED, HALF, HEADS)
    # The weight once for all heads: a row's elements are multiplied by it where they are rotated.
    c_a, c_b, s_a, s_b = w_a * c_a, w_b * c_b, w_b * s_a, w_a * s_b
    b_h = tl.arange(0, HEADS)[:, None]
    p_from = p_x + b * x_batch + t * x_token + b_h.to(tl.int64) * x_head
    p_to = p_y + b * y_batch + t * y_token + b_h.to(tl.int64) * y_head
    for first in range(0, heads, HEADS):
        m_h = _rows(b_h, heads - first, EVEN)
        b_a, b_b, _ = _normalized(p_from, m_h, width, eps, EVEN, INTERLEAVED, HALF)
        y_a, y_b = tl.fma(b_a, c_a, -b_b * s_a), tl.fma(b_b, c_b, b_a * s_b)
        _store_pairs(p_to, y_a, y_b, m_h, width, EVEN, INTERLEAVED, HALF)
        p_from += tl.cast(x_head, tl.int64) * HEADS
        p_to += tl.cast(y_head, tl.int64) * HEADS


@triton.jit(do_not_specialize=["per_program"])
def _backward(
    p_grad,  # [B, tokens, heads, width], each with its strides, as p_x and p_grad_x
    grad_batch,
    grad_token,
    grad_head,
    p_x,
    x_batch,
    x_token,
    x_head,
    p_grad_x,  # or None
    y_batch,
    y_token,
    y_head,
    p_cos,  # [tokens, width] or [B, tokens, width], as p_sin
    p_sin,
    angle_batch,
    angle_token,
    p_weight,  # [width] or None
    p_sums,  # [programs, width] or None: the weight's gradient of each program
    eps,
    tokens,
    heads,
    width,
    per_program,
    EVEN: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
):
    chunks = tl.cdiv(tokens, per_program)
    program = tl.program_id(0)
    b = (program // chunks).to(tl.int64)
    begin = (program % chunks).to(tl.int64) * per_program
    end = tl.minimum(begin + per_program, tokens)
    w_a, w_b = _weight_pairs(p_weight, width, EVEN, INTERLEAVED, HALF, HEADS)
    sum_a, sum_b = tl.zeros([HEADS, HALF], tl.float32), tl.zeros([HEADS, HALF], tl.float32)
    for t in range(begin, end):
        c_a, c_b = _load_row(p_cos + b * angle_batch + t * angle_token, width, EVEN, INTERLEAVED, HALF, HEADS)
        s_a, s_b = _load_row(p_sin + b * angle_batch + t * angle_token, width, EVEN, INTERLEAVED, HALF, HEADS)
        for first in range(0, heads, HEADS):
            b_h = (first + tl.arange(0, HEADS)).to(tl.int64)[:, None]
            m_h = _rows(b_h, heads, EVEN)
            p_row = p_x + b * x_batch + t * x_token + b_h * x_head
            b_a, b_b, b_rstd = _normalized(p_row, m_h, width, eps, EVEN, INTERLEAVED, HALF)
            p_from = p_grad + b * grad_batch + t * grad_token + b_h * grad_head
            o_a, o_b = _load_pairs(p_from, m_h, width, EVEN, INTERLEAVED, HALF)
            g_a, g_b = tl.fma(o_a, c_a, o_b * s_b), tl.fma(o_b, c_b, -o_a * s_a)
            if p_sums is not None:
                sum_a += g_a * b_a
                sum_b += g_b * b_b
            if p_grad_x is not None:
                g_a, g_b = g_a * w_a, g_b * w_b
                b_mean = tl.sum(g_a * b_a + g_b * b_b, 1)[:, None] * (1.0 / as_float(width))
                g_a, g_b = b_rstd * tl.fma(-b_a, b_mean, g_a), b_rstd * tl.fma(-b_b, b_mean, g_b)
                p_to = p_grad_x + b * y_batch + t * y_token + b_h * y_head
                _store_pairs(p_to, g_a, g_b, m_h, width, EVEN, INTERLEAVED, HALF)
    if p_sums is not None:
        sum_a, sum_b = tl.sum(sum_a, 0)[None, :], tl.sum(sum_b, 0)[None, :]
        p_to = p_sums + tl.program_id(0).to(tl.int64) * width + tl.zeros([1, 1], tl.int32)
        _store_pairs(p_to, sum_a, sum_b, tl.full([1, 1], True, tl.int1), width, EVEN, INTERLEAVED, HALF)
