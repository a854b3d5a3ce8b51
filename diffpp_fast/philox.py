"""Addressed random numbers in plain torch: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
2011) and what is drawn from it.

An address is three arguments, the same from an operator's definition to the registered operator and its kernels:

    samples  int64 [B], the sample numbers
    seed     int64, the 64 bits of the seed
    stream   in [0, 2^32)

Element i of sample b is lane i % 4 of the block Philox(key = seed (low, high), counter = (i // 4, stream,
samples[b] low, samples[b] high)), with i the element's index within the sample in logical row-major order, whatever the
memory format. `Noise` is the checked public form of an address.

An operator that takes noise takes `noise, seed, stream`: an address if `noise` is int64, else eps itself, and then the
other two say nothing.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter: Sequence[Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words per counter. All are int64 tensors with values in [0, 2^32); the counters broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1, c2, c3


def blocks(samples: Tensor, seed: int, stream: int, count: int) -> Tensor:
    """Return the first `count` blocks of every sample: int64 [B, count, 4] with values in [0, 2^32)."""
    samples = samples.unsqueeze(1)
    index = torch.arange(count, device=samples.device).unsqueeze(0)
    counter = (index, torch.full_like(index, stream), samples & WORD, (samples >> 32) & WORD)
    words = philox4x32(counter, (seed & WORD, (seed >> 32) & WORD))
    return torch.stack(words, dim=-1)


def normal(samples: Tensor, seed: int, stream: int, count: int, dtype: torch.dtype) -> Tensor:
    """Draw standard normals [B, count] by Box-Muller on the lane pairs (0, 1) and (2, 3), in float32."""
    words = blocks(samples, seed, stream, -(-count // 4))
    u1 = words[..., 0::2].to(torch.float32) * 2.0**-32 + 2.0**-33
    u2 = words[..., 1::2].to(torch.float32) * 2.0**-32
    radius = torch.sqrt(-2.0 * torch.log(u1))
    angle = (2.0 * math.pi) * u2
    lanes = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return lanes.flatten(1)[:, :count].contiguous().to(dtype)


def uniform(samples: Tensor, seed: int, stream: int) -> Tensor:
    """Draw [B] float32 in [0, 1): the upper 24 bits of lane 0 of block 0."""
    return (blocks(samples, seed, stream, 1)[:, 0, 0] >> 8).to(torch.float32) * 2.0**-24


def integers(samples: Tensor, seed: int, stream: int, low: int, span: int) -> Tensor:
    """Draw [B] int64 in [low, low + span): low + floor(lane 0 of block 0 * span / 2^32)."""
    offset, _ = _multiply(blocks(samples, seed, stream, 1)[:, 0, 0], span)
    return low + offset


def normal_like(noise: Tensor, seed: int, stream: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the noise of [B, ...] tensor `like`: drawn if `noise` holds sample numbers, else `noise` itself."""
    if is_drawn(noise):
        return normal(noise, seed, stream, like.shape[1:].numel(), dtype).reshape(like.shape)
    return noise.to(dtype)


def is_drawn(noise: Tensor) -> bool:
    """Whether `noise` holds the sample numbers of an address, and not eps."""
    return noise.dtype == torch.int64


def signed(word: int) -> int:
    """Return the int64 of the bits of an unsigned 64-bit number: schemas know no other integer."""
    return word - 2**64 if word >= 2**63 else word


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Upper and lower 32 bits of a * b for a < 2^32, b <= 2^32.

    The product of two 32-bit words overflows int64, so `a` is split into 16-bit halves.
    """
    low = (a & 0xFFFF) * b
    middle = (a >> 16) * b + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)
