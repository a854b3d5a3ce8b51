"""Text encoders with the weights of their blocks in 8 or 4 bits."""

from __future__ import annotations

from torch import nn

from diffpp_fast.few_bits import linears_of
from diffpp_fast.networks.quantization import stored_bytes

#: Overflow in float16; bfloat16 has the range of float32.
OVERFLOWING = ("gemma2", "mt5", "t5", "umt5")
#: Layers that stay: transformers casts what goes into T5's last ones to the dtype of their weights.
KEPT = ("wo",)


def refuse_text_kind(path: str, kind: str, model_type: str, dtype: str) -> None:
    """Raise ValueError for a kind of weights that does not serve the encoder at `path`."""
    if kind == "int8" and model_type in OVERFLOWING:
        raise ValueError(
            f"{path} is a {model_type}, which overflows in float16, and int8 takes inputs through it: "
            "use quantization float8 or nf4"
        )
    if kind == "float8" and dtype == "float16":
        raise ValueError(
            f"{path} is in float16, in which sums over float8's numbers overflow: use dtype bfloat16 or float32"
        )


def few_bit_layers(block: nn.Module) -> dict[str, nn.Linear]:
    """Return, by path, the layers of an encoder's block whose weights are stored in fewer bits."""
    return {name: layer for name, layer in linears_of(block).items() if name.rpartition(".")[2] not in KEPT}


def saved_bytes(blocks: list[nn.Module], kind: str, width: int) -> int:
    """Return the bytes that few-bit weights of these blocks save of those with elements of `width` bytes."""
    shapes = [layer.weight.shape for block in blocks for layer in few_bit_layers(block).values()]
    return sum(width * shape.numel() - stored_bytes(shape, kind) for shape in shapes)
