"""How a call lays out its tensors, and what kernels compute of it: the twin of `Order` in csrc/common/binding.h."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffpp_fast.philox import is_drawn

#: Beyond this many elements in a sample, indices within it need 64 bits.
INT32_ELEMENTS = 2**31 - 2**16


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

    def grid(self, block: int) -> tuple[int]:
        """Programs for the blocks of a sample, times the batch: on one axis, for the others end at 65535."""
        return (triton.cdiv(self.sample, block) * self.batch,)

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
def place(sample, BLOCK: tl.constexpr):
    """The sample of this program of `Order.grid`, and its block there."""
    blocks = tl.cdiv(sample, BLOCK)
    return tl.program_id(0) // blocks, tl.program_id(0) % blocks


@triton.jit
def sample_index(block, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """The first element of a block within its sample, in as many bits as it needs."""
    # Not an early return: what follows it is compiled too, and one function has one type.
    return (block.to(tl.int64) if WIDE else block) * BLOCK


@triton.jit
def in_memory(b_index, channels, pixels, CHANNELS_LAST: tl.constexpr):
    """Where elements of logical index `b_index` are in memory, counted from the start of their sample."""
    if CHANNELS_LAST:
        return b_index % pixels * channels + b_index // pixels
    return b_index
