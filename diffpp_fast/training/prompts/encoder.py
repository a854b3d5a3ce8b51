"""Encodings of prompts, made in batches whose composition the run's past does not change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from diffpp_fast.networks import Conditioning
from diffpp_fast.training.prompts.source import PromptSource

#: Prompts that are encoded at a time.
BATCH = 16
#: Bytes of encodings that are kept, and prompts among which it is worth asking whether they fit.
CAPACITY, MOST_KNOWN = 256 * 2**20, 2**14


class PromptEncoder:
    """Encodings of prompts; those of a source that fits into `capacity` bytes are made once and kept.

    The last bits of an encoding depend on its neighbours in the batch. If a batch held what a cache happens to lack, a
    resumed run would differ from an uninterrupted one. So the prompts of a small source are encoded in groups of
    `batch` by their places in it, and all others with those that they are asked for with, and forgotten.

    Args:
        encoder: B prompts -> their conditioning.
        source: the prompts of the run; None: nothing is kept.
        capacity: bytes of encodings to keep.
        batch: prompts that are encoded at a time.
    """

    def __init__(
        self,
        encoder: Callable[[Sequence[str]], Conditioning],
        source: PromptSource | None = None,
        *,
        capacity: int = CAPACITY,
        batch: int = BATCH,
    ) -> None:
        self.encoder = encoder
        self.capacity = capacity
        self.batch = batch
        known: list[str] = []
        if source is not None and len(source) <= MOST_KNOWN:
            known = source[range(len(source))]
        self._groups = [known[start : start + batch] for start in range(0, len(known), batch)]
        #: By prompt: the group of its first place in the source.
        self._group_of = {prompt: place // batch for place, prompt in reversed(list(enumerate(known)))}
        self._kept: dict[str, Mapping[str, Any]] = {}

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """B prompts -> their conditioning, on the encoder's device."""
        for prompt in prompts:
            if prompt in self._group_of and prompt not in self._kept:
                self._encode_group(self._group_of[prompt])
        strangers = list(dict.fromkeys(prompt for prompt in prompts if prompt not in self._kept))
        encoded = dict(self._kept)
        for start in range(0, len(strangers), self.batch):
            encoded |= self._encode(strangers[start : start + self.batch])
        return Conditioning(tuple(prompts), concatenate([encoded[prompt] for prompt in prompts]))

    def _encode_group(self, number: int) -> None:
        encoded = self._encode(self._groups[number])
        if sum(map(_bytes, encoded.values())) / len(encoded) * len(self._group_of) > self.capacity:
            self._group_of, self._groups = {}, []
            return
        # A prompt that stands in an earlier group, too, is what it is there.
        self._kept |= {prompt: tensors for prompt, tensors in encoded.items() if self._group_of[prompt] == number}

    def _encode(self, prompts: Sequence[str]) -> dict[str, Mapping[str, Any]]:
        tensors = self.encoder(prompts).tensors
        return {prompt: _row(tensors, place) for place, prompt in enumerate(prompts)}


class EncodedAhead:
    """Encodings of prompts that were made before they are asked for.

    Args:
        encodings: of all prompts that will be asked for.
        device: where they go then.
    """

    def __init__(self, encodings: Iterable[Conditioning], device: torch.device) -> None:
        self.device = device
        self._rows = {
            prompt: _row(part.tensors, place) for part in encodings for place, prompt in enumerate(part.prompts)
        }

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """B prompts -> their conditioning, on the device."""
        tensors = concatenate([self._rows[prompt] for prompt in prompts])
        return Conditioning(tuple(prompts), tensors).to(self.device)


def _row(tensors: Mapping[str, Any], place: int) -> dict[str, Any]:
    """Return the encoding of one prompt of a batch, with memory of its own."""
    return {
        name: _row(value, place) if isinstance(value, Mapping) else value[place : place + 1].clone()
        for name, value in tensors.items()
    }


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
