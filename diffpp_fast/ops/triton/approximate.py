"""Reciprocal and power of two in one instruction of the GPU, for where results are rounded to 16 bits.

Denormal arguments and results count as zero; else 1 / x is within an ulp, 2^x within 2 ulp. The interpreter has no
instructions, and computes exactly.
"""

import triton
import triton.language as tl

from diffpp_fast import availability

INTERPRETED = tl.constexpr(availability.INTERPRETED)


@triton.jit
def reciprocal(b_x):
    """1 / x of float32."""
    if INTERPRETED:
        b_y = 1.0 / b_x
    else:
        b_y = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [b_x], dtype=tl.float32, is_pure=True, pack=1
        )
    return b_y


@triton.jit
def exp2(b_x):
    """2^x of float32."""
    if INTERPRETED:
        b_y = tl.exp2(b_x)
    else:
        b_y = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [b_x], dtype=tl.float32, is_pure=True, pack=1
        )
    return b_y
