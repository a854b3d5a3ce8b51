"""The conditioning of a sample: the prompts as text, for rewards, and their embeddings, for networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from diffpp_fast import transforms

#: Text and its mask, by their names in diffusers: what the mask leaves out has no share in attention, exactly.
TEXT, TEXT_MASK = "encoder_hidden_states", "encoder_attention_mask"

#: Keyword arguments of a diffusers network; values are tensors [B, ...] or such mappings (`added_cond_kwargs`).
Tensors = Mapping[str, Any]


@dataclass(frozen=True)
class Conditioning:
    """B prompts and what carries them into a network. Its length is B, and a slice of it holds some of the prompts.

    Attributes:
        prompts: B strings.
        tensors: the network's keyword arguments, each tensor with B in front.
    """

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


def network_arguments(
    conditioning: Conditioning | Tensors | torch.Tensor | None, *, whole: bool = True
) -> dict[str, Any]:
    """Keyword arguments for a diffusers network; a bare tensor is taken for `encoder_hidden_states`.

    Tensors are contiguous: of an expanded one, as the empty prompt's is, every layer would make a copy of its own. So
    torch.compile, which makes a graph for other strides and for views, meets one kind of tensor. With `whole` False
    they stay as they are, for a network that knows one prompt by its stride of 0.
    """
    if conditioning is None:
        return {}
    if isinstance(conditioning, Conditioning):
        conditioning = conditioning.tensors
    if isinstance(conditioning, torch.Tensor):
        conditioning = {"encoder_hidden_states": conditioning}
    if not whole:
        return dict(conditioning)
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


class Unjoinable(ValueError):
    """Conditionings that can't be put one after another."""


def join(conditionings: Sequence[Any], count: int) -> Any:
    """Return the conditionings of so many samples each as one, of all samples in order.

    Args:
        conditionings: tensors [B, ...], lists of B things, mappings, tuples and named tuples of such, `Conditioning`,
            or None; numbers and text must be equal. Text [B, N, C] of other lengths is padded where it has a mask
            [B, N] beside it, by the names that diffusers has for them.
        count: B.

    Raises Unjoinable, with the reason, for others: where it is not sure that samples stay apart, too.
    """
    return _join("the conditioning", conditionings, count)


def _join(name: str, values: Sequence[Any], count: int) -> Any:
    first = values[0]
    if any(type(value) is not type(first) for value in values):
        raise Unjoinable(f"{name} is {' and '.join(sorted({type(value).__name__ for value in values}))}")
    if isinstance(first, torch.Tensor):
        return _join_tensors(name, values, count)
    if isinstance(first, Conditioning):
        prompts: tuple[str, ...] = ("",) * sum(map(len, values))
        # Those of a run that is captured can't be read, and no network does.
        if all(isinstance(value.prompts, tuple) for value in values):
            prompts = tuple(prompt for value in values for prompt in value.prompts)
        return Conditioning(prompts, _join(name, [value.tensors for value in values], count))
    if isinstance(first, Mapping):
        if any(value.keys() != first.keys() for value in values):
            missing = set().union(*values) - set(first).intersection(*values)
            raise Unjoinable(f"only one of them has {', '.join(sorted(map(str, missing)))}")
        values = _padded(values)
        return {key: _join(str(key), [value[key] for value in values], count) for key in first}
    if isinstance(first, tuple | list):
        return _join_sequences(name, values, count)
    if first is None or isinstance(first, str | bool | int | float):
        if any(value != first for value in values):
            raise Unjoinable(f"{name} is {' and '.join(map(repr, values))}")
        return first
    raise Unjoinable(f"{name} is {type(first).__name__}")


def _join_tensors(name: str, values: Sequence[torch.Tensor], count: int) -> torch.Tensor:
    kinds = {(value.dtype, value.device, value.shape[1:]) for value in values}
    if len(kinds) > 1 or any(value.dim() == 0 or len(value) != count for value in values):
        shapes = " and ".join(f"{value.dtype} {list(value.shape)}" for value in values)
        raise Unjoinable(f"{name} is {shapes}, for {count} samples each")
    return torch.cat(list(values))


def _join_sequences(name: str, values: Sequence[Any], count: int) -> Any:
    first = values[0]
    if any(len(value) != len(first) for value in values):
        raise Unjoinable(f"{name} has {' and '.join(str(len(value)) for value in values)} entries")
    by_sample = len(first) == count and not hasattr(first, "_fields")
    if by_sample and any(isinstance(entry, torch.Tensor) for entry in first):
        # Entries of samples, or tensors of all samples of which there are as many: nobody can tell.
        raise Unjoinable(f"{name} has as many tensors as there are samples")
    if by_sample:
        return type(first)(entry for value in values for entry in value)
    entries = [_join(f"entry {place} of {name}", parts, count) for place, parts in enumerate(zip(*values, strict=True))]
    return type(first)(*entries) if hasattr(first, "_fields") else type(first)(entries)


def _padded(values: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Text of one length, where a mask tells of each which tokens are padding."""
    shapes = {text.shape for value in values if isinstance(text := value.get(TEXT), torch.Tensor)}
    if len(shapes) < 2:
        return values  # and no mask is read, for which a GPU would be waited for
    pairs = [_text_of(value) for value in values]
    lengths = {text.shape[1] for text, _ in filter(None, pairs)}
    if None in pairs:
        return values
    padded = []
    for value, (text, mask) in zip(values, filter(None, pairs), strict=True):
        more = max(lengths) - text.shape[1]
        padded.append({**value, TEXT: pad(text, (0, 0, 0, more)), TEXT_MASK: pad(mask, (0, more))})
    return padded


def _text_of(value: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Text [B, N, C] and its mask [B, N], of which every sample has a token."""
    text, mask = value.get(TEXT), value.get(TEXT_MASK)
    if not isinstance(text, torch.Tensor) or not isinstance(mask, torch.Tensor):
        return None
    fits = text.dim() == 3 and mask.shape == text.shape[:2]
    # Who may attend to nothing attends to all alike, padding too.
    return (text, mask) if fits and bool(mask.any(1).all()) else None
