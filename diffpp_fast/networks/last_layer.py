"""The last layer of a diffusers network with sums and output in float32, however low the rest computes.

Methods subtract predictions from each other: at high noise what is left is as small as the rounding of a bfloat16
prediction. The last layer is a convolution to a few channels, or a linear layer to a few per token, so that its float32
arithmetic is a small share of a call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from diffpp_fast.precision import autocast_dtype

#: What diffusers calls it, the last one first where a network has several.
NAMES = ("proj_out_2", "proj_out", "conv_out")


def widen_last_layer(network: nn.Module, path: str | None = None) -> bool:
    """Lets the last layer of a network compute and return float32, in place.

    Only the layer's class changes: its weights stay in the dtype in which they are kept, `state_dict` keys, hooks,
    adapters and what `save_pretrained` writes stay what they are. Under autocast its weights are rounded to autocast's
    dtype as those of all layers are, so that a network under autocast and one with low weights predict the same. A
    float64 network stays one.

    Args:
        network: from diffusers, before it is sharded.
        path: of the layer; None: the first of `NAMES` that the network has.

    Returns:
        Whether the layer was found, or had been widened before.
    """
    layer: Any = next((found for name in NAMES if (found := getattr(network, name, None)) is not None), None)
    if path is not None:
        layer = network.get_submodule(path)
    layer = getattr(layer, "base_layer", layer)
    if type(layer) in _CLASSES and getattr(layer, "padding_mode", "zeros") == "zeros":
        layer.__class__ = _CLASSES[type(layer)]
    return isinstance(layer, _Wide)


class _Wide(nn.Module):
    def forward(self: Any, input: Tensor) -> Tensor:
        low = autocast_dtype(input.device)
        if low is None:
            return self._compute(input, self.weight, self.bias)
        weight, bias = (
            None if value is None else value if value.dtype == torch.float64 else value.to(low)
            for value in (self.weight, self.bias)
        )
        with torch.autocast(input.device.type, enabled=False):
            return self._compute(input, weight, bias)

    def _compute(self: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        dtype = torch.promote_types(torch.promote_types(input.dtype, weight.dtype), torch.float32)
        return self._apply_weights(input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


class WideConv2d(_Wide, nn.Conv2d):
    """A convolution with sums and output in float32."""

    def _apply_weights(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return conv2d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class WideLinear(_Wide, nn.Linear):
    """A linear layer with sums and output in float32."""

    def _apply_weights(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear(input, weight, bias)


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: WideConv2d, nn.Linear: WideLinear}
