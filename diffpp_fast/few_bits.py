"""Linear layers with weights in 8 or 4 bits, by bitsandbytes: for networks and for rewards."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from diffpp_fast import install
from diffpp_fast.precision import autocast_dtype

#: Layers with fewer weights stay as they are: they are nothing beside the rest.
SMALLEST = 4096
#: Weights that share a scale in nf4.
BLOCK = 64


def need_bitsandbytes(kind: str) -> None:
    """Raise ValueError where bitsandbytes, of which this kind is, is missing."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"quantize: {kind} is bitsandbytes', which is not there ({error}): {install.extra('gpu')}, or use "
            "float8, which is torch's"
        ) from None


def quantize_linears(module: nn.Module, kind: str, device: torch.device | str | None = None) -> int:
    """Store the weights of all linear layers of 4096 weights and more in fewer bits, in place, and freeze the module.

    Args:
        module: that computes without autocast, in its weights' dtype.
        kind: "int8" or "nf4".
        device: where the layers go, one after the other; None: they stay.

    Returns how many were quantised. Raises ValueError like `need_bitsandbytes`.
    """
    need_bitsandbytes(kind)
    module.requires_grad_(False)
    large = linears_of(module)
    for name, layer in large.items():
        new = bitsandbytes_layer(layer, kind)
        new.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)
        parent, _, own = name.rpartition(".")
        # bitsandbytes quantises on the way.
        setattr(module.get_submodule(parent), own, new.to(layer.weight.device if device is None else device).eval())
    return len(large)


def linears_of(module: nn.Module) -> dict[str, nn.Linear]:
    """Return, by path, the layers that `quantize_linears` would store in fewer bits."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if type(layer) is nn.Linear and layer.weight.numel() >= SMALLEST
    }


def bitsandbytes_layer(layer: nn.Linear, kind: str) -> Any:
    """Return bitsandbytes' layer with the weight of another, without its bias; a move to a device quantises it."""
    int8, nf4 = _classes()
    return (int8 if kind == "int8" else nf4)(layer.in_features, layer.out_features, layer.weight.detach())


def computed_in(x: Tensor) -> Tensor:
    """The input as autocast has it, which knows no layers but torch's."""
    dtype = autocast_dtype(x.device)
    return x if dtype is None else x.to(dtype)


@cache
def _classes() -> tuple[Any, Any]:
    """The layers of bitsandbytes, made so that they compute in autocast's dtype and keep nothing of their input."""
    from bitsandbytes import functional
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    # Said at every call: inputs go through float16 on their way to 8 bits.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)

    class Int8Linear(Linear8bitLt):
        """LLM.int8() without outliers: the weight by output and the input by row are rounded to 8 bits."""

        quantized_as = "int8"

        def __init__(self, inputs: int, outputs: int, weight: Tensor) -> None:
            with torch.device("meta"):
                super().__init__(inputs, outputs, bias=False, has_fp16_weights=False)
            self.weight = Int8Params(weight, requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            x = computed_in(x)
            if not (torch.is_grad_enabled() and x.requires_grad):
                result: Tensor = super().forward(x)
                return result
            # Its own graph keeps the input for the gradient of a weight that has none.
            y: Tensor = _Through.apply(x, super().forward, self.state)
            return y

    class _Through(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, product: Any, state: Any) -> Tensor:
            y: Tensor = product(x.detach())
            ctx.save_for_backward(state.CB, state.SCB)
            return y

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
            weight = functional.int8_vectorwise_dequant(*ctx.saved_tensors).to(grad.dtype)
            return grad @ weight, None, None

    class Nf4Linear(Linear4bit):
        """QLoRA's 4-bit normal floats in blocks of 64; the weight is taken back to the input's dtype at every use."""

        quantized_as = "nf4"

        def __init__(self, inputs: int, outputs: int, weight: Tensor) -> None:
            with torch.device("meta"):
                super().__init__(inputs, outputs, bias=False, quant_type="nf4", compress_statistics=False)
            # Once packed for inference on a CPU, the weight would give no gradient.
            self.support_avx512bf16_for_cpu = False
            self.weight = Params4bit(
                weight, requires_grad=False, quant_type="nf4", compress_statistics=False, blocksize=BLOCK, module=self
            )

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = super().forward(computed_in(x))
            return result

    return Int8Linear, Nf4Linear
