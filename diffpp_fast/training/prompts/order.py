"""The order in which a run meets its prompts, and users' images."""

from __future__ import annotations

from functools import lru_cache

import torch

from diffpp_fast.methods.base import PROMPT_ORDER
from diffpp_fast.noise import Noise


class PromptOrder:
    """Which prompt a sample has, as a function of (seed, sample number).

    Every `count` consecutive samples, from a multiple of `count` on, are one epoch: each prompt once, in an order of
    its own. An order is never stored: it is a Feistel network over the smallest 4^h >= count numbers, keyed by the
    addressed randomness of (epoch, round), walked until it lands below `count` (four walks on average at worst).
    """

    ROUNDS = 8
    #: Samples that are looked up together: many small draws cost more than their numbers.
    BLOCK = 1024

    def __init__(self, seed: int, count: int, stream: int = PROMPT_ORDER) -> None:
        if count < 1:
            raise ValueError(f"an order needs at least one prompt, got {count}")
        self.seed = seed
        self.count = count
        self.stream = stream
        self.half_bits = max(1, ((count - 1).bit_length() + 1) // 2)
        self._block = lru_cache(maxsize=2)(self._look_up_block)

    def __call__(self, samples: torch.Tensor) -> torch.Tensor:
        """samples: int64 [B] on the CPU -> indices of prompts, int64 [B]."""
        blocks, places = samples // self.BLOCK, samples % self.BLOCK
        indices = torch.empty_like(samples)
        for block in blocks.unique().tolist():
            inside = blocks == block
            indices[inside] = self._block(block)[places[inside]]
        return indices

    def _look_up_block(self, block: int) -> torch.Tensor:
        samples = torch.arange(block * self.BLOCK, (block + 1) * self.BLOCK)
        epoch, index = samples // self.count, samples % self.count
        index = self._permute(epoch, index)
        while (outside := index >= self.count).any():
            index = torch.where(outside, self._permute(epoch, index), index)
        return index

    def _permute(self, epoch: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """A bijection of [0, 4^half_bits) for every epoch."""
        bits = self.half_bits
        left, right = index >> bits, index & ((1 << bits) - 1)
        for number in range(self.ROUNDS):
            address = ((epoch * self.ROUNDS + number) << bits) | right
            key = Noise(self.seed, address, stream=self.stream).integers(0, 1 << bits)
            left, right = right, left ^ key
        return (left << bits) | right
