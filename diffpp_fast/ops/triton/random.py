"""Addressed noise inside Triton kernels: the words and the formula of csrc/common/cpu_noise.h."""

import triton
import triton.language as tl


@triton.jit
def log_normal(x):
    """ln x for positive normal float32 x, within 1 ulp (Triton's own tl.log is an approximation)."""
    pattern = x.to(tl.int32, bitcast=True)
    exponent = (pattern - 0x3F3504F3) >> 23
    f = (pattern - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    e = exponent.to(tl.float32)
    p = tl.fma(f, 7.0376836292e-2, -1.1514610310e-1)
    p = tl.fma(p, f, 1.1676998740e-1)
    p = tl.fma(p, f, -1.2420140846e-1)
    p = tl.fma(p, f, 1.4249322787e-1)
    p = tl.fma(p, f, -1.6668057665e-1)
    p = tl.fma(p, f, 2.0000714765e-1)
    p = tl.fma(p, f, -2.4999993993e-1)
    p = tl.fma(p, f, 3.3333331174e-1)
    square = f * f
    y = tl.fma(e, -2.12194440e-4, p * f * square)
    y = tl.fma(square, -0.5, y)
    return tl.fma(e, 0.693359375, f + y)


@triton.jit
def cos_sin_turns(u):
    """cos(2 pi u) and sin(2 pi u) for float32 u in [0, 1], reduced exactly to an eighth of a turn."""
    quarters = u * 4.0
    quadrant = (quarters + 0.5).to(tl.int32)
    f = (quarters - quadrant.to(tl.float32)) * 1.5707963267948966
    square = f * f
    s = tl.fma(square, -1.9515295891e-4, 8.3321608736e-3)
    s = tl.fma(s, square, -1.6666654611e-1)
    s = tl.fma(s * square, f, f)
    c = tl.fma(square, 2.443315711809948e-5, -1.388731625493765e-3)
    c = tl.fma(c, square, 4.166664568298827e-2)
    c = tl.fma(c, square * square, tl.fma(square, -0.5, 1.0))
    odd = (quadrant & 1) != 0
    along, across = tl.where(odd, s, c), tl.where(odd, c, s)
    cosine = tl.where(((quadrant + 1) & 2) != 0, -along, along)
    sine = tl.where((quadrant & 2) != 0, -across, across)
    return cosine, sine


@triton.jit
def box_muller(word_a, word_b):
    """Two standard normals from two 32-bit words."""
    u1 = word_a.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    u2 = word_b.to(tl.float32) * 2.3283064365386963e-10
    radius = tl.sqrt_rn(-2.0 * log_normal(u1))
    cosine, sine = cos_sin_turns(u2)
    return radius * cosine, radius * sine


@triton.jit
def words(seed, stream, sample, b_block):
    """The four words of each Philox4x32-10 block of a sample. b_block: int32 or int64 [N], element index // 4."""
    low = (sample & 0xFFFFFFFF).to(tl.uint32)
    high = ((sample >> 32) & 0xFFFFFFFF).to(tl.uint32)
    index = b_block.to(tl.uint32)
    zero = index ^ index
    return tl.philox(seed, index, zero + tl.cast(stream, tl.uint32), zero + low, zero + high)


@triton.jit
def _normals(seed, stream, sample, b_block):
    """The normals of Philox blocks [..., N] of a sample: float32 [..., 4 N]."""
    r0, r1, r2, r3 = words(seed, stream, sample, b_block)
    n0, n1 = box_muller(r0, r1)
    n2, n3 = box_muller(r2, r3)
    # Element 4 j + l is lane l of block j.
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit
def normals(seed, stream, sample, first, BLOCK: tl.constexpr):
    """The normals of the elements [first, first + BLOCK) of a sample: float32 [BLOCK], both multiples of 4."""
    return _normals(seed, stream, sample, first // 4 + tl.arange(0, BLOCK // 4))


@triton.jit
def normals_of_pixels(seed, stream, sample, first, pixels, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """The normals of the elements [first, first + BLOCK) of a channels_last sample in memory: float32 [BLOCK].

    They are whole pixels. CHANNELS is a power of two; `first` and BLOCK are multiples of 4 CHANNELS, `pixels` of 4.
    """
    b_channel = tl.arange(0, CHANNELS)[:, None] * (pixels // 4)
    b_pixel = (first // CHANNELS // 4 + tl.arange(0, BLOCK // CHANNELS // 4))[None, :]
    return tl.reshape(tl.trans(_normals(seed, stream, sample, b_channel + b_pixel)), [BLOCK])
