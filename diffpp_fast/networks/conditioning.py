"""The conditioning of a sample: the prompts as text, for rewards, and their embeddings, for networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from diffpp_fast import transforms

#: Keyword arguments of a diffusers network; values are tensors [B, ...] or such mappings (`added_cond_kwargs`).
Tensors = Mapping[str, Any]


@dataclass(frozen=True)
class Conditioning:
    """B prompts and the keyword arguments that carry them into a network, each tensor with B in front."""

    prompts: tuple[str, ...]
    tensors: Tensors

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, part: slice) -> Conditioning:
        return Conditioning(self.prompts[part], _map(self.tensors, lambda tensor: tensor[part]))

    def to(self, device: torch.device | str) -> Conditioning:
        return self.map(lambda tensor: tensor.to(device))

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Conditioning:
        """The same prompts with something done to every tensor."""
        return Conditioning(self.prompts, _map(self.tensors, function))

    def expand(self, count: int) -> Conditioning:
        """The same single prompt `count` times, without copying."""
        if len(self) != 1:
            raise ValueError(f"only one prompt can be expanded, this holds {len(self)}")
        return Conditioning(
            self.prompts * count, _map(self.tensors, lambda tensor: tensor.expand(count, *tensor.shape[1:]))
        )


def network_arguments(conditioning: Conditioning | Tensors | torch.Tensor | None) -> dict[str, Any]:
    """Keyword arguments for a diffusers network; a bare tensor is taken for `encoder_hidden_states`.

    Tensors are contiguous: of an expanded one, as the empty prompt's is, every layer would make a copy of its own. So
    torch.compile, which makes a graph for other strides and for views, meets one kind of tensor.
    """
    if conditioning is None:
        return {}
    if isinstance(conditioning, Conditioning):
        conditioning = conditioning.tensors
    if isinstance(conditioning, torch.Tensor):
        conditioning = {"encoder_hidden_states": conditioning}
    return _map(conditioning, lambda value: _whole(value) if isinstance(value, torch.Tensor) else value)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor contiguous and, where it has no derivative, as no view of another."""
    tensor = tensor.contiguous()
    return tensor if tensor.requires_grad or transforms.active() else tensor.detach()


def _map(tensors: Tensors, function: Callable[[Any], Any]) -> dict[str, Any]:
    return {
        name: _map(value, function) if isinstance(value, Mapping) else function(value)
        for name, value in tensors.items()
    }
