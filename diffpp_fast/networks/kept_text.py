"""Projections of the empty prompt in a frozen network, computed once: they are the same in every call of a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffpp_fast.precision import autocast_dtype


def keep_text(network: nn.Module) -> int:
    """Let a frozen diffusers network keep the cross-attention keys and values, and captions' projection, of one prompt.

    It is a prompt that is expanded to several samples without copying, as the empty one is: its batch has stride 0.
    What is kept is computed again where text, weights or precision have changed; other text goes the usual way. In
    place, and exact: only the layers' classes change.

    Args:
        network: frozen, without adapters, and whole in this process.

    Returns how many layers were found.
    """
    found = 0
    for name, layer in list(network.named_modules()):
        if type(layer).__name__ in _KINDS and _is_of_text(name):
            if not isinstance(layer, _Kept):
                layer.__class__ = _kept(type(layer))
            found += 1
    network._keeps_text = found > 0  # type: ignore[assignment]
    return found


def keeps_text(network: nn.Module) -> bool:
    """Return whether `keep_text` has found layers in a network."""
    return getattr(network, "_keeps_text", False)


def _is_of_text(name: str) -> bool:
    return name.endswith(("attn2.to_k", "attn2.to_v")) or name == "caption_projection"


#: Layers whose output is a function of text and weights alone. Those that compute more have other classes.
_KINDS = ("Linear", "PixArtAlphaTextProjection")


class _Kept:
    """A layer that keeps its output for text of one prompt: (what it depends on, the text itself, the output)."""

    kept: tuple[Any, Tensor, Tensor] | None = None

    def forward(self: Any, text: Tensor) -> Tensor:
        if not _is_one_prompt(text) or any(weight.requires_grad for weight in self.parameters()):
            plain: Tensor = self._plain(text)
            return plain
        key = (_identity(text), autocast_dtype(text.device), *map(_identity, self.parameters()))
        if self.kept is None or self.kept[0] != key:
            # The text is kept too, so that no other gets its place in memory.
            self.kept = key, text, self._plain(text[:1])
        output: Tensor = self.kept[2]
        return output.expand(len(text), *output.shape[1:])


def _is_one_prompt(text: Tensor) -> bool:
    constant = not (text.requires_grad or text.is_meta or text.is_inference() or torch.compiler.is_compiling())
    return constant and text.dim() > 1 and len(text) > 1 and text.stride(0) == 0


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor is, and how often it was changed there."""
    return tensor.data_ptr(), tensor._version, tensor.dtype, tensor.shape[1:], tensor.stride()[1:]


_CLASSES: dict[type, type] = {}


def _kept(kind: Any) -> type:
    if kind not in _CLASSES:
        _CLASSES[kind] = type(kind.__name__, (_Kept, kind), {"_plain": kind.forward, "__module__": kind.__module__})
    return _CLASSES[kind]
