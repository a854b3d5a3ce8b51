"""Addressed noise inside Triton kernels: the words and the formula of csrc/common/cpu_noise.h, in few instructions.

A kernel that draws is limited by its instructions: they are counted here, and the error that they leave is in
tests/test_triton_noise.py.
"""

import triton
import triton.language as tl

from diffpp_fast.availability import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)
#: Both halves of a product of 32-bit words by one multiplication. The compiler makes two of `umulhi` and `*`, and of a
#: 64-bit product, too, where it vectorises.
_TIMES_A = tl.constexpr("{ .reg .b64 p; mul.wide.u32 p, $2, 0xD2511F53; mov.b64 {$1, $0}, p; }")
_TIMES_B = tl.constexpr("{ .reg .b64 p; mul.wide.u32 p, $2, 0xCD9E8D57; mov.b64 {$1, $0}, p; }")


@triton.jit
def minus_two_log(x):
    """-2 ln x for float32 x in [2^-33, 1], and 0 at 1.

    x = m 2^e with m in [0.65, 1.3). Its root R counts: the polynomial, minimax for that, moves it by at most
    0.7 2^-24 max(1, R).
    """
    pattern = x.to(tl.int32, bitcast=True)
    # e 2^23, for the factor of e takes any scale.
    exponent = (pattern - 0x3F266666) & -0x800000
    g = tl.fma((pattern - exponent).to(tl.float32, bitcast=True), -2.0, 2.0)
    p = tl.fma(g, 0.001554182032123208, 0.0026044549886137247)
    p = tl.fma(p, g, 0.004882301669567823)
    p = tl.fma(p, g, 0.012406392954289913)
    p = tl.fma(p, g, 0.031312234699726105)
    p = tl.fma(p, g, 0.08334042131900787)
    p = tl.fma(p, g, 0.24999652802944183)
    # -2 ln m = g + g (p g): near 1 the error is that of the last sum alone.
    return tl.fma(exponent.to(tl.float32), -1.6525916635146132e-07, tl.fma(g, p * g, g))


@triton.jit
def cos_sin_turns(x):
    """cos(2 pi u) and sin(2 pi u) up to one sign for both, and that sign as the top bit of a word.

    x is float32, u = x 2^-32 in [0, 1]. It is reduced exactly to q quarter turns around a half turn, q in [-1, 1]; odd
    half turns change both signs.
    """
    # At this size float32 holds even integers alone: the sum is rounded to the nearest, and its last bit counts halves.
    shifted = tl.fma(x, 9.313225746154785e-10, 25165824.0)
    q = tl.fma(x, 9.313225746154785e-10, 25165824.0 - shifted)
    square = q * q
    s = tl.fma(square, 0.0001501699589425698, -0.004671237897127867)
    s = tl.fma(s, square, 0.0796881765127182)
    s = tl.fma(s, square, -0.6459634304046631)
    s = tl.fma(s, square, 0.5707963109016418)
    # 1 - q^2 has the zeros of the cosine, which keeps its error a part of it. A product is negated for nothing, as part
    # of the sum; Triton's minus is a subtraction from zero, an instruction of its own.
    c = tl.fma(square, 2.3599621272296645e-05, -0.000893543241545558)
    c = tl.fma(c, square, 0.01996862143278122)
    c = tl.fma(c, square, -0.23370051383972168)
    zeros = tl.fma(q * -1.0, q, 1.0)
    return tl.fma(zeros, c * square, zeros), tl.fma(q, s, q), shifted.to(tl.uint32, bitcast=True) << 31


@triton.jit
def box_muller(word_a, word_b):
    """Two standard normals from two 32-bit words."""
    u1 = tl.fma(word_a.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)
    # The approximate root is within 2^-23 of it.
    radius = tl.sqrt(minus_two_log(u1))
    cosine, sine, sign = cos_sin_turns(word_b.to(tl.float32))
    # A sum, for the top bit is free: the GPU shifts a word and adds it to another in one instruction.
    radius = tl.add(radius.to(tl.uint32, bitcast=True), sign, sanitize_overflow=False).to(tl.float32, bitcast=True)
    return radius * cosine, radius * sine


@triton.jit
def _multiply(a, FACTOR: tl.constexpr, BY_FACTOR: tl.constexpr):
    """Upper and lower 32 bits of the product of 32-bit words with a constant."""
    if _INTERPRETED:
        product = a.to(tl.uint64) * FACTOR
        high, low = (product >> 32).to(tl.uint32), product.to(tl.uint32)
    else:
        high, low = tl.inline_asm_elementwise(
            BY_FACTOR, "=r,=r,r", [a], dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1
        )
    return high, low


@triton.jit
def words(seed, stream, sample, b_block):
    """The four words of each Philox4x32-10 block of a sample. b_block: int32 or int64, element index // 4."""
    seed = tl.cast(seed, tl.uint64)
    sample = tl.cast(sample, tl.uint64)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0, c1 = b_block.to(tl.uint32), tl.cast(stream, tl.uint32)
    c2, c3 = sample.to(tl.uint32), (sample >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        high_a, low_a = _multiply(c0, 0xD2511F53, _TIMES_A)
        high_b, low_b = _multiply(c2, 0xCD9E8D57, _TIMES_B)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def normals(seed, stream, sample, b_block, b_lane):
    """The normals of elements of a sample, each by its Philox block and its lane of the four there.

    Written for each element by itself. Where a thread holds the elements of a block, as in a `tile`, the compiler finds
    what they have in common, and knows the lanes: it computes words once and nothing that is not chosen.
    """
    r0, r1, r2, r3 = words(seed, stream, sample, b_block)
    second = (b_lane & 2) != 0
    cosine, sine = box_muller(tl.where(second, r2, r0), tl.where(second, r3, r1))
    return tl.where((b_lane & 1) != 0, sine, cosine)
