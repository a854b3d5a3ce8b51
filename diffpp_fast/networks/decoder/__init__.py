"""The frozen decoder: layers that keep nothing for weights, the walk over diffusers' modules, and the class."""

from diffpp_fast.networks.decoder.frozen import FrozenDecoder

__all__ = ["FrozenDecoder"]
