"""What a GPU would do that meta does not: CUDA's autocast and its attention kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

#: CUDA's autocast, as far as the layers of networks meet it (aten/src/ATen/autocast_mode.h).
LOWER = ("linear", "conv1d", "conv2d", "conv3d", "conv_transpose2d", "scaled_dot_product_attention")
FLOAT32 = ("layer_norm", "group_norm", "softmax", "log_softmax", "interpolate", "normalize", "cosine_similarity")


class GpuSemantics:
    """Fused attention, which keeps no table of weights, and autocast where a network is called under it.

    torch has no autocast for meta, and takes the unfused attention there. While `active`, functions of
    torch.nn.functional are replaced by such that do as on a GPU, also where a backward pass recomputes: a mode of
    torch's would be off in there.
    """

    def __init__(self) -> None:
        self._autocast = False
        self._copies: dict[int, Tensor] | None = None

    @contextmanager
    def active(self) -> Iterator[None]:
        functions: dict[str, Callable[..., Any]] = {name: getattr(F, name) for name in (*LOWER, *FLOAT32)}
        functions["scaled_dot_product_attention"] = _fused_attention
        with ExitStack() as stack:
            for name, function in functions.items():
                cast = self._lowered if name in LOWER else self._raised
                stack.enter_context(patch.object(F, name, partial(self._call, function, cast)))
            yield

    @contextmanager
    def autocast(self, enabled: bool, *, cached: bool = True) -> Iterator[None]:
        """Inside, functions take the dtype that bfloat16 autocast on CUDA gives them, if `enabled`.

        Args:
            cached: keep the copies of weights to the end, as torch does for leaves that require a gradient. What is
                recomputed in a backward pass has short caches of its own.
        """
        before = self._autocast, self._copies
        self._autocast, self._copies = enabled, {} if cached else None
        try:
            yield
        finally:
            self._autocast, self._copies = before

    def recompute(self, enabled: bool) -> None:
        """From here on, outside of `autocast`, functions do as inside it, without a cache, if `enabled`."""
        self._autocast, self._copies = enabled, None

    def _call(self, function: Callable[..., Any], cast: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        if self._autocast:
            args, kwargs = tree_map_only(Tensor, cast, (args, kwargs))
        return function(*args, **kwargs)

    def _lowered(self, tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float32:
            return tensor
        if self._copies is None or not (tensor.is_leaf and tensor.requires_grad):
            return tensor.to(torch.bfloat16)
        if id(tensor) not in self._copies:
            self._copies[id(tensor)] = tensor.to(torch.bfloat16)
        return self._copies[id(tensor)]

    def _raised(self, tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Keeps q, k, v, the output and a number per row. The efficient kernel serves every head dimension and mask."""
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    attended: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]
    return attended
