"""A diffusers UNet or transformer as `(x_t, t, conditioning) -> prediction`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from diffpp_fast.networks.conditioning import network_arguments
from diffpp_fast.networks.families import GUIDANCE, family_of
from diffpp_fast.networks.kept_text import keeps_text
from diffpp_fast.networks.last_layer import widen_last_layer
from diffpp_fast.networks.lora import Adapters, Part
from diffpp_fast.precision import autocast_dtype, widen


class Denoiser(nn.Module):
    """Calls a diffusers network, as one of the roles that it serves, and gives back its raw prediction.

    The prediction has the shape of x_t and is float32 (float64 of a float64 network), whatever the network computes in:
    its last layer is changed in place, see `last_layer`. Networks that also predict a variance (PixArt-alpha: 8
    channels for 4) have it cut off. Networks of `families` are called as their pipelines call them.

    Args:
        network: from diffusers; several denoisers may call one.
        dtype: what autocast computes in, whatever the weights are; None: as autocast is where it is called.
        adapters: of the network, where it has any.
        adapter: the name of the one that is computed with; None: none of them.
        guidance: the guidance scale that a network with an embedding of it is told; None: as its pipeline has it.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        dtype: torch.dtype | None = None,
        adapters: Adapters | None = None,
        adapter: str | None = None,
        guidance: float | None = None,
    ) -> None:
        super().__init__()
        self.family = family_of(network)
        if self.family is not None:
            self.family.prepare(network)
        widen_last_layer(network, None if self.family is None else self.family.last_layer)
        self.network = network
        self.dtype = dtype
        self.adapters = adapters
        self.adapter = adapter
        told = None if self.family is None else self.family.told(network.config)
        self.guidance = told if told is None or guidance is None else guidance

    def joins(self, other: object) -> bool:
        """Whether a call of this role can predict as `other` for a part of its samples: an adapter on its weights."""
        return (
            self.adapters is not None
            and self.adapters is getattr(other, "adapters", None)
            and self.adapter is None
            and getattr(other, "adapter", None) is not None
            and self.dtype == getattr(other, "dtype", None)
        )

    def forward(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        conditioning: Any = None,
        *,
        first: tuple[Denoiser, int] | None = None,
    ) -> torch.Tensor:
        """x_t [B, C, H, W], cast to the network's dtype unless autocast does that, and t [B] int64 -> [B, C, H, W].

        Args:
            x_t, t: the samples.
            conditioning: for B samples.
            first: a role that this one `joins`, and for how many samples, the first ones, it predicts instead.
        """
        role: AbstractContextManager[Any] = nullcontext()
        if first is not None and self.adapters is not None:
            role = self.adapters.active(first[0].adapter, Part(first[1], len(x_t)))
        elif self.adapters is not None:
            role = self.adapters.active(self.adapter)
        precision: AbstractContextManager[Any] = nullcontext()
        if self.dtype is not None:
            precision = torch.autocast(x_t.device.type, dtype=self.dtype)
        with role, precision:
            x = x_t if autocast_dtype(x_t.device) else x_t.to(next(self.network.parameters()).dtype)
            arguments = network_arguments(conditioning, whole=not keeps_text(self.network))
            if self.family is None:
                prediction = self.network(x, timestep=t, return_dict=False, **arguments)[0]
            else:
                arguments |= self._told(x_t, first)
                prediction = self.family.call(self.network, x, t, arguments)
            return widen(prediction[:, : x_t.shape[1]])

    def _told(self, x_t: torch.Tensor, first: tuple[Denoiser, int] | None) -> dict[str, torch.Tensor]:
        """Return the guidance scale of each sample, for a network that is told one."""
        if self.guidance is None:
            return {}
        scales = x_t.new_full((len(x_t),), self.guidance, dtype=torch.float32)
        if first is not None and first[0].guidance is not None:
            scales[: first[1]] = first[0].guidance
        return {GUIDANCE: scales}
