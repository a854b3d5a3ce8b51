"""Frozen networks with the weights of their transformer blocks in 8 or 4 bits, in place.

A layer keeps its path, its bias and its class's bases; its weight is stored in fewer bits and taken as it is computed
with: "int8" and "nf4" by bitsandbytes' layers, "float8" by torch's float8_e4m3fn with a float32 scale per output.
Gradients go through to the input, and nothing of the input is kept for them.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from diffpp_fast.few_bits import BLOCK, SMALLEST, bitsandbytes_layer, computed_in, need_bitsandbytes
from diffpp_fast.networks.decoder import layers
from diffpp_fast.networks.fusion import BEFORE

logger = logging.getLogger("diffpp_fast")

#: Kinds of stored weights, by the names that `quantize` takes.
KINDS = ("int8", "nf4", "float8")
#: Blocks whose linear layers are meant, by the lists that diffusers has them in, and those whose convolutions are.
TRANSFORMERS = ("transformer_blocks", "single_transformer_blocks", "layers", "noise_refiner", "context_refiner")
RESNETS = "resnets"
#: Float8's largest number.
LARGEST = 448.0
FLOAT8 = torch.float8_e4m3fn


class QuantizationRow(NamedTuple):
    """A linear layer or convolution: whether its weight is stored in fewer bits and, if not, why."""

    name: str  # its path in the module
    kind: str  # the class of torch
    quantized: bool
    reason: str | None


def quantize(module: nn.Module, kind: str, device: torch.device | str | None = None) -> int:
    """Store the weights of a frozen network in fewer bits, in place; they can't be had back.

    Meant are the linear layers of transformer blocks and, with "float8", the convolutions of residual blocks as well.
    All else stays: norms and their modulation, embeddings of time, text and position, first and last layers, and layers
    of fewer than 4096 weights. The same weights always give the same bits on one kind of device. Quantise before
    adapters are added and before the network is frozen; `quantization_report` says what was left and why.

    Args:
        module: a UNet or a transformer of diffusers.
        kind: "int8" or "nf4", for which bitsandbytes must be installed, or "float8".
        device: where the layers go, one after the other, as bitsandbytes quantises on the device; None: they stay.

    Returns:
        How many layers this call has quantised: 0 the second time.

    Raises:
        ValueError: unknown `kind`, a network that is trained or frozen by `freeze`, float8 of a float16 network, and
            bitsandbytes missing. Nothing is changed then.
    """
    refuse_kind(kind)
    _refuse(module, kind)
    module.requires_grad_(False)
    count = 0
    for name, layer in list(module.named_modules()):
        if reason_against(name, layer, kind) is None:
            parent, _, own = name.rpartition(".")
            setattr(module.get_submodule(parent), own, quantized_layer(layer, kind, device))
            count += 1
    for sentence in _in_words(quantization_report(module, kind)):
        logger.info("quantize %s: %s", type(module).__name__, sentence)
    return count


def quantization_report(module: nn.Module, kind: str) -> list[QuantizationRow]:
    """Return a row for every linear layer and convolution of `module`, as `quantize` of this `kind` sees it."""
    rows = []
    for name, layer in module.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            reason = reason_against(name, layer, kind)
            done = is_quantized(layer)
            rows.append(
                QuantizationRow(name, _kind_of(layer), done, None if done else reason or "quantize was not called")
            )
    return rows


def refuse_kind(kind: str) -> None:
    """Raise ValueError for an unknown kind, and where bitsandbytes is needed and missing."""
    if kind not in KINDS:
        raise ValueError(f"quantize: {kind!r} is unknown; known: {', '.join(KINDS)}")
    if kind != "float8":
        need_bitsandbytes(kind)


def reason_against(name: str, layer: nn.Module, kind: str) -> str | None:
    """Return why the weight of a layer with this path is left; None: it is to be quantised."""
    places = name.split(".")
    if is_quantized(layer):
        return "it is already"
    if type(layer) is nn.Conv2d:
        if RESNETS not in places:
            return "it is in no residual block"
        if kind != "float8":
            return f"{kind} has no convolutions"
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            return f"its padding is {layer.padding_mode!r}, {layer.padding!r}"
    elif type(layer) is not nn.Linear:
        return f"it is a {type(layer).__name__}"
    elif not any(place in TRANSFORMERS for place in places):
        return "it is in no transformer block"
    elif any("norm" in place or place.startswith("adaLN") for place in places):
        return "it modulates a norm"
    if layer.weight.numel() < SMALLEST:
        return f"it has fewer than {SMALLEST} weights"
    return None


def is_quantized(layer: nn.Module) -> bool:
    """Return whether a layer's weight is stored in fewer bits."""
    return getattr(layer, "quantized_as", None) is not None


def stored_bytes(shape: torch.Size, kind: str) -> int:
    """Return the bytes that a quantised weight of this shape takes, scales included."""
    count = shape.numel()
    if kind == "nf4":
        # A table of 16 numbers belongs to each layer.
        return math.ceil(count / 2) + 4 * math.ceil(count / BLOCK) + 4 * 16
    return count + 4 * shape[0]


def quantized_size(module: nn.Module, kind: str) -> tuple[int, int]:
    """Return the bytes of the weights that `quantize` would store, and their elements, of a network as it was."""
    meant: list[Any] = [layer for name, layer in module.named_modules() if reason_against(name, layer, kind) is None]
    shapes: list[torch.Size] = [layer.weight.shape for layer in meant]
    return sum(stored_bytes(shape, kind) for shape in shapes), sum(shape.numel() for shape in shapes)


class Float8Linear(nn.Linear):
    """A linear layer with a float8 weight [out, in] and a scale [out] per output."""

    quantized_as = "float8"
    weight_scale: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """input [..., in] -> [..., out]."""
        x, layer = computed_in(input), cast(Any, _WithoutBias(self.weight))
        return _scaled(layers.linear(x, layer), self.weight_scale, self.bias)


class Float8Conv2d(nn.Conv2d):
    """A convolution with a float8 weight [out, in, H, W] and a scale [out] per output channel."""

    quantized_as = "float8"
    weight_scale: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """input [B, in, H, W] -> [B, out, H', W']."""
        x = computed_in(input)
        layer: Any = _WithoutBias(self.weight, self.stride, self.padding, self.dilation, self.groups)
        bias = None if self.bias is None else self.bias[:, None, None]
        return _scaled(layers.convolution(x, layer), self.weight_scale[:, None, None], bias)


class _WithoutBias(NamedTuple):
    """A layer as the functions of `layers` read it; they cast the weight to the input's dtype at every use."""

    weight: Tensor
    stride: Any = None
    padding: Any = None
    dilation: Any = None
    groups: Any = None
    bias: None = None


def _scaled(y: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    scale = scale.to(y.dtype)
    return y * scale if bias is None else torch.addcmul(bias.to(y.dtype), y, scale)


def quantized_layer(layer: Any, kind: str, device: torch.device | str | None = None) -> nn.Module:
    """Return the layer with a weight in fewer bits, and the layer's own bias."""
    device = layer.weight.device if device is None else torch.device(device)
    weight = layer.weight.detach()
    new = _float8(layer, weight.to(device)) if kind == "float8" else bitsandbytes_layer(layer, kind)
    new.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)
    # bitsandbytes quantises on the way.
    return new.to(device).train(layer.training)


def _float8(layer: Any, weight: Tensor) -> Any:
    with torch.device("meta"):
        if isinstance(layer, nn.Linear):
            new: Any = Float8Linear(layer.in_features, layer.out_features, bias=False)
        else:
            geometry = layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups
            new = Float8Conv2d(layer.in_channels, layer.out_channels, *geometry, bias=False)
    largest = weight.flatten(1).abs().amax(1).float()
    scale = torch.where(largest > 0, largest / LARGEST, 1.0)
    each = scale.view(-1, *[1] * (weight.dim() - 1))
    new.weight = nn.Parameter((weight.float() / each).clamp_(-LARGEST, LARGEST).to(FLOAT8), requires_grad=False)
    new.register_buffer("weight_scale", scale)
    return new


def _refuse(module: nn.Module, kind: str) -> None:
    """Raise ValueError for a network that is trained, frozen, or of a dtype that does not serve."""
    name = type(module).__name__
    held = next((path for path, weight in module.named_parameters() if weight.grad is not None), None)
    if held is not None:
        raise ValueError(
            f"quantize: {name} is trained: {held} holds a gradient, and weights of few bits can't be updated. Quantise "
            "a frozen network, and train adapters on it (LoRA)"
        )
    adapted = next((path for path, part in module.named_modules() if hasattr(part, "base_layer")), None)
    if adapted is not None:
        raise ValueError(f"quantize: {name} has adapters, as in {adapted}: quantise it before they come")
    if any(BEFORE in vars(part) for part in module.modules()):
        raise ValueError(f"quantize: {name} is frozen: call networks.unfreeze, quantise it, and freeze it again")
    if kind == "float8" and any(weight.dtype == torch.float16 for weight in module.parameters()):
        raise ValueError(
            f"quantize: {name} is in float16, in which sums over float8's numbers overflow: use bfloat16 or float32"
        )


def _kind_of(layer: nn.Module) -> str:
    return "Conv2d" if isinstance(layer, nn.Conv2d) else "Linear"


def _in_words(rows: list[QuantizationRow]) -> Iterator[str]:
    """How many layers are quantised, by kind, and how many are left, by kind and reason."""
    done = ", ".join(f"{count} {kind}" for kind, count in Counter(row.kind for row in rows if row.quantized).items())
    yield f"quantised: {done or 'no layer'}"
    for (kind, reason), count in Counter((row.kind, row.reason) for row in rows if not row.quantized).items():
        yield f"{count} {kind} left: {reason}"
