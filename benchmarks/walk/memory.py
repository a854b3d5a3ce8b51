"""Tensors of a launch, as far as their addresses and values are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]


class Region(NamedTuple):
    """The memory of a tensor."""

    name: str
    begin: int
    size: int  # bytes
    content: NDArray[np.uint8] | None = None  # where its values are known


class Memory:
    """The tensors of a launch."""

    def __init__(self, regions: Sequence[Region]) -> None:
        self.regions = sorted(regions, key=lambda region: (region.begin, region.size))
        self._begins = np.array([region.begin for region in self.regions], dtype=np.uint64)
        self._ends = np.array([region.begin + region.size for region in self.regions], dtype=np.uint64)

    def find(self, addresses: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Return the number of the region that holds each address, -1 where none does."""
        if not self.regions:
            return np.full(addresses.shape, -1)
        at = np.searchsorted(self._begins, addresses, side="right").astype(np.int64) - 1
        return np.where((at >= 0) & (addresses < self._ends[np.maximum(at, 0)]), at, -1)

    def read(self, addresses: NDArray[np.uint64], words: int, bits: int) -> list[Words] | None:
        """Return what lies at each address, as words; None where it isn't known."""
        at = self.find(addresses)
        if (at != at[0]).any() or at[0] < 0:
            return None
        _, begin, size, content = self.regions[at[0]]
        offsets = (addresses - np.uint64(begin)).astype(np.int64)
        nbytes = min(bits // 8, 4)
        if content is None or int(offsets.max()) + bits // 8 > size:
            return None
        found = []
        for word in range(words):
            value = np.zeros(len(addresses), np.uint32)
            for byte in range(nbytes):
                value |= content[offsets + 4 * word + byte].astype(np.uint32) << np.uint32(8 * byte)
            found.append(value)
        return found
