"""Frozen transformer towers: what autograd keeps of them for the gradient to the pixels, and no more."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from diffpp_fast import transforms


class QuickGelu(nn.Module):
    """x sigmoid(1.702 x), as OpenAI's CLIP has it, keeping one tensor for the backward pass instead of two."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(1.702 * x) / 1.702


class SelfAttention(nn.Module):
    """transformers' `BlipAttention` without its table of all attention weights; same keys."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.qkv, self.projection = attention.qkv, attention.projection
        self.heads = attention.num_heads

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        q, k, v = self.qkv(hidden_states).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        context = F.scaled_dot_product_attention(q, k, v)
        return self.projection(context.transpose(1, 2).flatten(2)), None


class TextAttention(nn.Module):
    """transformers' `BlipTextSelfAttention`, self or cross, likewise."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.query, self.key, self.value = attention.query, attention.key, attention.value
        self.heads = attention.num_attention_heads

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        cross = encoder_hidden_states is not None
        source = encoder_hidden_states if cross else hidden_states
        q, k, v = (
            projection(states).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for projection, states in ((self.query, hidden_states), (self.key, source), (self.value, source))
        )
        mask = encoder_attention_mask if cross else attention_mask
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return context.transpose(1, 2).flatten(2), None


def recompute(layers: Iterable[nn.Module]) -> None:
    """Each layer keeps its input alone, and is computed once more in the backward pass."""
    for layer in layers:
        kind: Any = type(layer)
        layer.__class__ = _recomputing(kind)


def run_block(block: Callable[..., Tensor], *inputs: Any, checkpoint: bool) -> Tensor:
    """Call a function of a block; with `checkpoint` autograd keeps its inputs alone, and calls it again in the backward
    pass."""
    if not (checkpoint and torch.is_grad_enabled()) or transforms.active():
        return block(*inputs)
    # No block draws random numbers.
    result: Tensor = recomputed(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return result


def rms_normed(norm: Any, x: Tensor) -> Tensor:
    """Apply a T5's or Qwen2's norm; transformers' own keeps copies in float32, needlessly for the backward pass."""
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


# transformers' own recomputation works in training mode only, in which a frozen tower never is.
@lru_cache
def _recomputing(kind: Any) -> Any:
    def forward(self: nn.Module, *inputs: Any, **options: Any) -> Any:
        if transforms.active():  # transforms know no recomputation
            return kind.forward(self, *inputs, **options)
        # No layer draws random numbers.
        return recomputed(
            partial(kind.forward, self), *inputs, use_reentrant=False, preserve_rng_state=False, **options
        )

    return type(f"Recomputing{kind.__name__}", (kind,), {"forward": forward})
