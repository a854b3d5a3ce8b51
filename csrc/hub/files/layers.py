"""Layers whose forward `kernels.kernelize` gives to other modules. The annotations say what a module has to have."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .ops import ada_layer_norm, gated_residual_norm, geglu, group_norm_silu, rms_norm_rope


class GroupNorm(nn.Module):
    """`torch.nn.GroupNorm`."""

    has_backward = True
    can_torch_compile = True
    num_groups: int
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def forward(self, input: Tensor) -> Tensor:
        """input [B, C, ...] -> the same shape."""
        return group_norm_silu(input, self.num_groups, self.weight, self.bias, self.eps, "identity")


class GroupNormSiLU(nn.Module):
    """A group norm and the SiLU of its output; has what `torch.nn.GroupNorm` has."""

    has_backward = True
    can_torch_compile = True
    num_groups: int
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def forward(self, input: Tensor) -> Tensor:
        """input [B, C, ...] -> the same shape."""
        return group_norm_silu(input, self.num_groups, self.weight, self.bias, self.eps)


class GEGLU(nn.Module):
    """diffusers' `GEGLU`: a projection, and the gate of its two halves."""

    has_backward = True
    can_torch_compile = True
    proj: nn.Module

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        """hidden_states [..., D] -> [..., D']."""
        return geglu(self.proj(hidden_states))


class GEGLUGate(nn.Module):
    """The gate alone: the first half of the last dimension, times the exact gelu of the second."""

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        """x [..., 2 D] -> [..., D]."""
        return geglu(x)


class AdaLayerNorm(nn.Module):
    """A layer norm without parameters, and its modulation."""

    has_backward = True
    can_torch_compile = True
    eps: float

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """x [B, ..., D], scale and shift [B, D] or [B, 1, D] -> norm(x) (1 + scale) + shift."""
        return ada_layer_norm(x, scale, shift, self.eps)


class AdaLayerNormZeroSingle(nn.Module):
    """diffusers' `AdaLayerNormZeroSingle`, which FLUX has."""

    has_backward = True
    can_torch_compile = True
    silu: nn.Module
    linear: nn.Module
    norm: nn.LayerNorm

    def forward(self, x: Tensor, emb: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B, N, D], emb [B, E] -> the modulated norm, and the gate of what follows, [B, D]."""
        shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
        return ada_layer_norm(x, scale, shift, self.norm.eps), gate


class GatedResidualNorm(nn.Module):
    """A gated residual, the layer norm of the sum, and its modulation."""

    has_backward = True
    can_torch_compile = True
    eps: float

    def forward(
        self, residual: Tensor, branch: Tensor, gate: Tensor | None, scale: Tensor | None, shift: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """residual and branch [B, ..., D], the others [B, D] or None -> residual + gate branch, its modulated norm."""
        return gated_residual_norm(residual, branch, gate, scale, shift, eps=self.eps)


class RMSNormRoPE(nn.Module):
    """The RMS norm of queries or keys and their rotation in pairs of neighbours; has what `torch.nn.RMSNorm` has."""

    has_backward = True
    can_torch_compile = True
    weight: Tensor | None
    eps: float | None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, T, H, D], cos and sin [T, D] or [B, T, D] -> the same shape as x."""
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return rms_norm_rope(x, cos, sin, self.weight, eps=eps)
