"""Random numbers with an address: a function of (seed, stream, sample number, element), never of a global generator."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffpp_fast import philox, transforms
from diffpp_fast.arguments import integer, shown
from diffpp_fast.availability import fake
from diffpp_fast.backends import kernels, register

#: The streams that no code of this package draws from, nor ever will: they are the users' own. The package's are the
#: others, of which it uses 0 to 9 and 2^31 to 2^31 + 17.
USER_STREAMS = range(10, 2**31)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Noise:
    """The random numbers of a batch of samples.

    Element i of sample b, in logical row-major order whatever the memory format, is a lane of the Philox4x32-10 block
    with key `seed` and counter (i // 4, stream, samples[b]). So a sample's numbers depend neither on the batch it
    is in, nor on the device, the layout or the number of processes.

    Random numbers have no derivative. `torch.func.vmap` over sample numbers draws each row's own, and inside transforms
    plain torch draws: integers and uniform numbers to the same bits, normals to the last.

    Args:
        seed: the run's seed, in [0, 2^64).
        samples: int64 [B], the sample numbers, on the device where the numbers are wanted. They are read as 64-bit
            patterns, so -1 is 2^64 - 1. Overwriting the tensor in place moves the address, which is how a captured
            CUDA graph replays with fresh noise.
        stream: what the numbers are for, in [0, 2^32): 0 latents, 1 diffusion noise, 2 timesteps, 3 prompt order,
            4 to 9 other uses of networks and methods (docs/randomness.md). `USER_STREAMS`, 10 to 2^31 - 1, are the
            users'; those above are the package's again.

    Raises:
        TypeError: `samples` is not an int64 tensor, or `seed` or `stream` not an integer.
        ValueError: `samples` is not 1-D, or `seed` or `stream` is out of range.
    """

    __slots__ = ("samples", "seed", "stream")

    def __init__(self, seed: int, samples: Tensor, stream: int = 1) -> None:
        if not isinstance(samples, Tensor) or samples.dtype != torch.int64:
            got = samples.dtype if isinstance(samples, Tensor) else type(samples).__name__
            raise TypeError(f"Noise: samples must be an int64 tensor, got {got}")
        if samples.layout is not torch.strided or samples.is_nested:
            raise TypeError("Noise: samples must be a dense tensor")
        if samples.dim() != 1:
            raise ValueError(f"Noise: samples must have shape [B], got {list(samples.shape)}")
        self.seed = integer("Noise", "seed", seed)
        self.samples = samples
        self.stream = integer("Noise", "stream", stream)
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"Noise: seed must be in [0, 2^64), got {seed}")
        if not 0 <= self.stream < 2**32:
            raise ValueError(f"Noise: stream must be in [0, 2^32), got {stream}")

    @property
    def seed_bits(self) -> int:
        """The seed as registered operators take it: the int64 of the same bits."""
        return philox.signed(self.seed)

    def normal(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normals.

        Args:
            shape: the shape of one sample, without the batch; less than 2^34 elements.
            dtype: float32, bfloat16, float16 or float64. The numbers are made in float32 and then cast.

        Returns:
            [B, *shape], contiguous.

        Raises:
            TypeError: `shape` is not a sequence of integers, or `dtype` none of these.
            ValueError: a size is negative, or a sample has too many elements.
        """
        op = "Noise.normal"
        try:
            shape = torch.Size(shape)
        except TypeError as error:
            raise TypeError(f"{op}: shape must be a sequence of integers, got {shown(shape)}") from error
        if min(shape, default=0) < 0:
            raise ValueError(f"{op}: negative size in shape {list(shape)}")
        if shape.numel() >= 2**34:
            raise ValueError(f"{op}: a sample has less than 2^34 elements, got shape {list(shape)}")
        if dtype not in DTYPES:
            known = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
            raise TypeError(f"{op}: dtype must be a floating-point type, one of {known}; got {dtype}")
        drawn: Tensor = self._kernels(shape.numel()).normal(
            self.samples, self.seed_bits, self.stream, shape.numel(), dtype
        )
        return drawn.view(self.samples.shape[0], *shape)

    def uniform(self) -> Tensor:
        """[B] float32, uniform in [0, 1), from element 0 of each sample."""
        drawn: Tensor = self._kernels(1).uniform(self.samples, self.seed_bits, self.stream)
        return drawn

    def integers(self, low: int, high: int) -> Tensor:
        """[B] int64, uniform in [low, high), from element 0 of each sample; high - low at most 2^32."""
        low, high = integer("Noise.integers", "low", low), integer("Noise.integers", "high", high)
        if low >= high:
            raise ValueError(f"Noise.integers: low must be below high, got low {low} and high {high}")
        if high - low > 2**32:
            raise ValueError(f"Noise.integers: high - low must be at most 2^32, got {high - low}")
        if low < -(2**63) or high > 2**63:
            raise ValueError(f"Noise.integers: [{low}, {high}) does not fit in int64")
        drawn: Tensor = self._kernels(1).integers(self.samples, self.seed_bits, self.stream, low, high - low)
        return drawn

    def __repr__(self) -> str:
        return f"Noise(seed={self.seed}, samples={self.samples}, stream={self.stream})"

    def _kernels(self, count: int) -> Any:
        if transforms.functional():
            return philox
        return kernels("philox", self.samples.device, torch.float32, self.samples.shape[0] * count)


register("philox", normal=philox.normal, uniform=philox.uniform, integers=philox.integers)
fake("normal", lambda samples, seed, stream, count, dtype: samples.new_empty((samples.shape[0], count), dtype=dtype))
fake("uniform", lambda samples, seed, stream: samples.new_empty(samples.shape, dtype=torch.float32))
fake("integers", lambda samples, *others: samples.new_empty(samples.shape))
