"""Encodings of prompts, made when they are first asked for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from diffpp_fast.networks import Conditioning


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
        return Conditioning(tuple(prompts), concatenate(tensors))

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


def concatenate(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Nested mappings of tensors [B_i, ...] with the same names -> one of tensors [sum of B_i, ...]."""
    return {
        name: concatenate([part[name] for part in parts])
        if isinstance(value, Mapping)
        else torch.cat([part[name] for part in parts])
        for name, value in parts[0].items()
    }
