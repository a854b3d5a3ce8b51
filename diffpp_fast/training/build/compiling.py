"""torch.compile of a denoiser, in place: of its repeated blocks, with one graph for all that are alike, or whole."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

Mode = Literal["regional", "whole"]

#: The blocks of which networks of diffusers have many, by class.
REPEATED = {
    "BasicTransformerBlock",
    "JointTransformerBlock",
    "FluxTransformerBlock",
    "FluxSingleTransformerBlock",
    "Flux2TransformerBlock",
    "Flux2SingleTransformerBlock",
    "QwenImageTransformerBlock",
    "SanaTransformerBlock",
    "ZImageTransformerBlock",
}
#: Graphs of one function, at least. torch's own limit of 8, beyond which it computes uncompiled, is for a network: here
#: three share their functions, each with and without gradient, by weights or samples, and blocks come in widths.
GRAPHS = 64


def compile_network(network: Any, mode: Mode) -> int:
    """Let torch compile a network, or its blocks, at their next calls; names in its state stay.

    Args:
        network: from diffusers, fused or not.
        mode: "regional" or "whole"; a network without repeated blocks is always compiled whole.

    Returns:
        How many modules are compiled.
    """
    import torch._dynamo.config as dynamo

    dynamo.recompile_limit = max(dynamo.recompile_limit, GRAPHS)
    blocks = repeated_blocks(network) if mode == "regional" else []
    for block in blocks:
        # Widths and resolutions of blocks are fixed: dynamic ones, after the second, would make slower code.
        block.compile(dynamic=False)
    if not blocks:
        network.compile()
    return max(len(blocks), 1)


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """Return the blocks that `compile_network` compiles for themselves."""
    # Fused and frozen classes derive from diffusers' own.
    return [part for part in network.modules() if any(kind.__name__ in REPEATED for kind in type(part).__mro__)]
