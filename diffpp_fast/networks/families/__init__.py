"""Families of networks that are called in a way of their own, one small file each, found by the network's class."""

from __future__ import annotations

from typing import Any

from torch import nn

from diffpp_fast.networks.families.base import GUIDANCE, POOLED, EncoderKind, Family, FamilyText, Inputs
from diffpp_fast.networks.families.flux import Flux
from diffpp_fast.networks.families.flux_2 import Flux2
from diffpp_fast.networks.families.qwen_image import QwenImage
from diffpp_fast.networks.families.sana import Sana
from diffpp_fast.networks.families.stable_diffusion_3 import StableDiffusion3
from diffpp_fast.networks.families.z_image import ZImage

__all__ = [
    "FAMILIES",
    "GUIDANCE",
    "POOLED",
    "EncoderKind",
    "Family",
    "FamilyText",
    "Inputs",
    "family_named",
    "family_of",
]

#: All of them. A family that is new gets a file and a place here.
FAMILIES: tuple[Family, ...] = (ZImage(), StableDiffusion3(), Sana(), Flux(), Flux2(), QwenImage())


def family_named(kind: Any) -> Family | None:
    """Return the family of a network by the name of its class; None for networks without one."""
    return next((family for family in FAMILIES if kind in family.kinds), None)


def family_of(network: nn.Module) -> Family | None:
    """Return the family of a network, also where its class is one that was made of diffusers' own."""
    names = [kind.__name__ for kind in type(network).__mro__]
    return next((family for family in FAMILIES if any(name in family.kinds for name in names)), None)
