"""How a call lays out its tensors, and what kernels compute of it: the twin of `Order` in csrc/common/binding.h."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffpp_fast.philox import is_drawn

#: Beyond this many elements in a sample, indices within it need 64 bits.
INT32_ELEMENTS = 2**31 - 2**16
#: Programs along the second axis of a grid, at most; the first has room for 2^31.
MOST_PROGRAMS = 65535
#: With more, a block would hold fewer than a Philox block of each channel's elements.
MOST_PIXEL_CHANNELS = 512

#: Elements of a tile that a thread has: four Philox blocks, whose keys and addresses are computed once.
PER_THREAD = tl.constexpr(16)

#: Which dimension of a tile Triton spreads over threads, of two that are not contiguous: the later one, before 3.7 the
#: earlier one.
_ROWS_FIRST = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7))
_MOST_PROGRAMS = tl.constexpr(MOST_PROGRAMS)


class Order:
    """Row-major, or channels_last if the first tensor is and has more than one channel and pixel.

    Tensors in another order are copied into this one.
    """

    def __init__(self, like: Tensor) -> None:
        self.memory_format = torch.contiguous_format
        if not like.is_contiguous():
            for dim, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
                if like.dim() == dim and like.is_contiguous(memory_format=memory_format):
                    self.memory_format = memory_format
        self.batch = like.shape[0]
        self.sample = like.shape[1:].numel()
        self.channels = like.shape[1] if self.channels_last else 1

    @property
    def channels_last(self) -> bool:
        return self.memory_format is not torch.contiguous_format

    @property
    def wide(self) -> bool:
        """Whether an index within a sample needs 64 bits."""
        return self.sample >= INT32_ELEMENTS

    def grid(self, block: int) -> tuple[int, int, int]:
        """Programs for the samples, and for the blocks of each: `block_of_sample` says which one a program has."""
        blocks = triton.cdiv(self.sample, block)
        return self.batch, min(blocks, MOST_PROGRAMS), triton.cdiv(blocks, MOST_PROGRAMS)

    def walk(self, drawn: bool) -> tuple[int, bool]:
        """PIXEL and CHANNELS_LAST of a `tile`.

        Only drawn noise depends on the logical index of an element: all else goes through memory in its order. Noise
        can too where a Philox block stays within a row of pixels, and whole pixels fit in a block of elements.
        """
        if not drawn or not self.channels_last:
            # Without 16-byte accesses a thread has no neighbours in memory: it gets Philox blocks all the same.
            return 0, drawn and self.sample % 16 != 0
        channels, pixels = self.channels, self.sample // self.channels
        by_pixel = channels & (channels - 1) == 0 and channels <= MOST_PIXEL_CHANNELS and pixels % 4 == 0
        return (channels, False) if by_pixel else (0, True)

    def of(self, tensor: Tensor) -> Tensor:
        """The tensor itself, or a copy in this order."""
        return tensor.contiguous(memory_format=self.memory_format)

    def result(self, like: Tensor) -> Tensor:
        """Where a kernel writes a result shaped as `like`."""
        return torch.empty_like(like, memory_format=self.memory_format)

    def finish(self, result: Tensor, like: Tensor) -> Tensor:
        """The result in the memory format that `torch.empty_like(like)` has."""
        expected = torch.empty_like(like, device="meta").stride()
        return result if result.stride() == expected else torch.empty_like(like).copy_(result)


def ordered_noise(noise: Tensor, order: Order) -> Tensor:
    """Return eps in the order of the call; the sample numbers of an address one after the other."""
    return noise.contiguous() if is_drawn(noise) else order.of(noise)


@triton.jit
def as_float(number):
    """An integer argument as float32. One that is 1 is a constant to Triton, and a constant has no `.to`.

    Also where a kernel asks that it be none: torch.compile does not listen.
    """
    return tl.cast(number, tl.float32)


@triton.jit
def block_of_sample():
    """The block of a sample that this program of `Order.grid` has; the sample is `tl.program_id(0)`."""
    return tl.program_id(1) + tl.program_id(2) * _MOST_PROGRAMS


@triton.jit
def tile(
    block,
    sample,
    channels,
    DTYPE: tl.constexpr,
    PIXEL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where the elements of a block are in the sample's memory, which are inside it, and what each is drawn from.

    All are [rows, threads, vector] (`_ROWS_FIRST`): a thread has 16 elements, in rows of neighbours in memory. The last
    are two, the Philox block and the lane there; a thread holds whole Philox blocks, in any order of memory.

    Args:
        DTYPE: of the tensor in memory, for the width of accesses. With the tensor in its place torch.compile would take
            that one for written, since writes go to places from here.
        PIXEL: the channels of a channels_last sample, a power of two, whose pixels a multiple of 4 is; else 0.
        CHANNELS_LAST: whether it is another such sample, of which noise is drawn. BLOCK counts logical elements then.
        EVEN: whether all blocks are whole. The compiler drops the masks then.
    """
    # Not an early return: what follows it is compiled too, and one function has one type.
    first = (tl.cast(block, tl.int64) if WIDE else block) * BLOCK
    # 16 bytes, as wide as an access may be; but where a pixel has more channels, 4 of each of 4 pixels.
    WIDEST: tl.constexpr = 8 if DTYPE.primitive_bitwidth == 16 else 4
    VECTOR: tl.constexpr = 1 if CHANNELS_LAST else 4 if PIXEL > 4 else WIDEST
    THREADS: tl.constexpr = BLOCK // PER_THREAD
    if _ROWS_FIRST:
        b_row = tl.arange(0, PER_THREAD // VECTOR)[:, None, None]
        b_thread = tl.arange(0, THREADS)[None, :, None]
    else:
        b_row = tl.arange(0, PER_THREAD // VECTOR)[None, :, None]
        b_thread = tl.arange(0, THREADS)[:, None, None]
    b_element = tl.arange(0, VECTOR)[None, None, :]
    # Lanes come from rows and elements alone, of which a thread's are known when it is compiled.
    if PIXEL:
        if PIXEL > 4:
            GROUPS: tl.constexpr = PIXEL // 4
            b_four = b_thread // GROUPS
            b_lane = b_row
            b_channel = b_thread % GROUPS * 4 + b_element
            b_at = first + (b_four * (4 * PIXEL) + b_thread % GROUPS * 4 + b_row * PIXEL + b_element)
        else:
            b_own = b_row * VECTOR + b_element
            b_four = b_thread * (PER_THREAD // 4 // PIXEL) + b_own // (4 * PIXEL)
            b_lane = b_own // PIXEL % 4
            b_channel = b_own % PIXEL
            b_at = first + (b_thread * PER_THREAD + b_own)
        b_block = b_channel * (sample // (4 * PIXEL)) + (first // (4 * PIXEL) + b_four)
        b_within = b_at
    elif CHANNELS_LAST:
        b_lane = b_row % 4 + b_element
        b_block = first // 4 + (b_row // 4 * THREADS + b_thread)
        b_within = 4 * b_block + b_lane
        pixels = sample // channels
        b_at = b_within % pixels * channels + b_within // pixels
    else:
        b_lane = b_element % 4
        b_block = first // 4 + ((b_row * THREADS + b_thread) * (VECTOR // 4) + b_element // 4)
        b_at = first + ((b_row * THREADS + b_thread) * VECTOR + b_element)
        b_within = b_at
    m_inside = tl.full(b_within.shape, True, tl.int1) if EVEN else b_within < sample
    return b_at, m_inside, b_block, b_lane


@triton.jit
def in_order(block, sample, DTYPE: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Where the elements of a block are in the sample's memory, and which are inside it."""
    b_at, m_inside, _, _ = tile(block, sample, 1, DTYPE, 0, False, EVEN, WIDE, BLOCK)
    return b_at, m_inside


@triton.jit
def fold(b_values):
    """The sum [threads] of the values of each thread of a `tile`."""
    return tl.sum(tl.sum(b_values, axis=2), axis=0 if _ROWS_FIRST else 1)
