"""Prompts: the file, the order in which a run meets them, and their encodings."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.methods.base import PROMPT_ORDER
from diffpp_fast.networks import Conditioning
from diffpp_fast.noise import Noise


def read_prompts(path: str | Path) -> list[str]:
    """One prompt per line, UTF-8; blank lines are skipped, and so is white space around a prompt."""
    prompts = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    prompt = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                except UnicodeDecodeError as error:
                    raise ConfigurationError(f"prompts: {path}, line {number}, is not UTF-8: {error.reason}") from None
                if prompt:
                    prompts.append(prompt)
    except OSError as error:
        raise ConfigurationError(f"prompts: can't read {path}: {error.strerror}") from None
    if not prompts:
        raise ConfigurationError(f"prompts: {path} holds no prompt: write one per line")
    return prompts


class PromptOrder:
    """Which prompt a sample has, as a function of (seed, sample number).

    Every `count` consecutive samples, from a multiple of `count` on, are one epoch: each prompt once, in an order of
    its own. An order is never stored: it is a Feistel network over the smallest 4^h >= count numbers, keyed by the
    addressed randomness of (epoch, round), walked until it lands below `count` (four walks on average at worst).
    """

    ROUNDS = 8
    #: Samples that are looked up together: many small draws cost more than their numbers.
    BLOCK = 1024

    def __init__(self, seed: int, count: int) -> None:
        if count < 1:
            raise ValueError(f"an order needs at least one prompt, got {count}")
        self.seed = seed
        self.count = count
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
            key = Noise(self.seed, address, stream=PROMPT_ORDER).integers(0, 1 << bits)
            left, right = right, left ^ key
        return (left << bits) | right


class PromptEncoder:
    """Encodings of prompts, made when they are first asked for; the last ones stay, up to `capacity` bytes.

    A prompt is encoded by itself: in a batch its last bits would depend on its neighbours, and with them on what the
    cache happens to hold, so that a resumed run would differ from an uninterrupted one.
    """

    def __init__(self, encoder: Callable[[Sequence[str]], Conditioning], capacity: int = 256 * 2**20) -> None:
        self.encoder = encoder
        self.capacity = capacity
        self._kept: OrderedDict[str, Conditioning] = OrderedDict()
        self._bytes = 0

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """B prompts -> their conditioning, on the encoder's device."""
        tensors = [self._encode(prompt).tensors for prompt in prompts]
        return Conditioning(tuple(prompts), _concatenate(tensors))

    def _encode(self, prompt: str) -> Conditioning:
        if prompt in self._kept:
            self._kept.move_to_end(prompt)
            return self._kept[prompt]
        encoded = self._kept[prompt] = self.encoder([prompt])
        self._bytes += _bytes(encoded.tensors)
        while self._bytes > self.capacity:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= _bytes(oldest.tensors)
        return encoded


def _bytes(tensors: Mapping[str, Any]) -> int:
    return sum(_bytes(value) if isinstance(value, Mapping) else value.nbytes for value in tensors.values())


def _concatenate(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        name: _concatenate([part[name] for part in parts])
        if isinstance(value, Mapping)
        else torch.cat([part[name] for part in parts])
        for name, value in parts[0].items()
    }
