"""Addresses as the operators take them that are not yet made of one file."""

from typing import NamedTuple

from torch import Tensor

from diffpp_fast import philox


class Address(NamedTuple):
    """An address of random numbers, with an unsigned seed."""

    seed: int  # [0, 2^64)
    samples: Tensor  # int64 [B]
    stream: int  # [0, 2^32)


def flat(noise: Tensor | Address) -> tuple[Tensor, int, int]:
    """Return noise as registered operators take it: eps, or the sample numbers with the seed's bits and the stream."""
    if isinstance(noise, Address):
        return noise.samples, philox.signed(noise.seed), noise.stream
    return noise, 0, 0
