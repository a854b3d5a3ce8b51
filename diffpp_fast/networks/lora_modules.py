"""Layers of diffusers' transformers as their authors' code has them, whose modules LoRA files of other programs name.

That code computes projections of one input as one: its module holds the rows of several layers of diffusers, one after
the other. An update of such a module is an update of each layer, with its rows of B and all of A; updates of layers are
one of the module, with the blocks of B on the diagonal, whose rank is the sum of theirs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Rows of FLUX.1's feed-forward projection in a single block, for each of its input's channels; of others one.
ROWS = {"single_transformer_blocks.{}.proj_mlp": 4}


def _three(stem: str, added: bool = False) -> tuple[str, ...]:
    return tuple(f"{stem}.add_{part}_proj" if added else f"{stem}.to_{part}" for part in "qkv")


#: By the class of a network: each module, and the layers that it holds; `{}` is the number of a block.
_FLUX_BLOCKS = {
    "double_blocks.{}.img_attn.qkv": _three("transformer_blocks.{}.attn"),
    "double_blocks.{}.txt_attn.qkv": _three("transformer_blocks.{}.attn", added=True),
    "double_blocks.{}.img_attn.proj": ("transformer_blocks.{}.attn.to_out.0",),
    "double_blocks.{}.txt_attn.proj": ("transformer_blocks.{}.attn.to_add_out",),
}
_FLUX_OUTSIDE = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
_Z_IMAGE_BLOCKS = ("layers", "noise_refiner", "context_refiner")
MODULES: dict[str, dict[str, tuple[str, ...]]] = {
    "FluxTransformer2DModel": {
        **_FLUX_BLOCKS,
        **_FLUX_OUTSIDE,
        "double_blocks.{}.img_mlp.0": ("transformer_blocks.{}.ff.net.0.proj",),
        "double_blocks.{}.img_mlp.2": ("transformer_blocks.{}.ff.net.2",),
        "double_blocks.{}.txt_mlp.0": ("transformer_blocks.{}.ff_context.net.0.proj",),
        "double_blocks.{}.txt_mlp.2": ("transformer_blocks.{}.ff_context.net.2",),
        "double_blocks.{}.img_mod.lin": ("transformer_blocks.{}.norm1.linear",),
        "double_blocks.{}.txt_mod.lin": ("transformer_blocks.{}.norm1_context.linear",),
        "single_blocks.{}.linear1": (
            *_three("single_transformer_blocks.{}.attn"),
            "single_transformer_blocks.{}.proj_mlp",
        ),
        "single_blocks.{}.linear2": ("single_transformer_blocks.{}.proj_out",),
        "single_blocks.{}.modulation.lin": ("single_transformer_blocks.{}.norm.linear",),
        "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
        "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
        "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
        "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
        "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
        "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    },
    "Flux2Transformer2DModel": {
        **_FLUX_BLOCKS,
        **_FLUX_OUTSIDE,
        "double_blocks.{}.img_mlp.0": ("transformer_blocks.{}.ff.linear_in",),
        "double_blocks.{}.img_mlp.2": ("transformer_blocks.{}.ff.linear_out",),
        "double_blocks.{}.txt_mlp.0": ("transformer_blocks.{}.ff_context.linear_in",),
        "double_blocks.{}.txt_mlp.2": ("transformer_blocks.{}.ff_context.linear_out",),
        "single_blocks.{}.linear1": ("single_transformer_blocks.{}.attn.to_qkv_mlp_proj",),
        "single_blocks.{}.linear2": ("single_transformer_blocks.{}.attn.to_out",),
        "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
        "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
        "single_stream_modulation.lin": ("single_stream_modulation.linear",),
        "time_in.in_layer": ("time_guidance_embed.timestep_embedder.linear_1",),
        "time_in.out_layer": ("time_guidance_embed.timestep_embedder.linear_2",),
        "guidance_in.in_layer": ("time_guidance_embed.guidance_embedder.linear_1",),
        "guidance_in.out_layer": ("time_guidance_embed.guidance_embedder.linear_2",),
    },
    "SD3Transformer2DModel": {
        "joint_blocks.{}.x_block.attn.qkv": _three("transformer_blocks.{}.attn"),
        "joint_blocks.{}.x_block.attn2.qkv": _three("transformer_blocks.{}.attn2"),
        "joint_blocks.{}.context_block.attn.qkv": _three("transformer_blocks.{}.attn", added=True),
        "joint_blocks.{}.x_block.attn.proj": ("transformer_blocks.{}.attn.to_out.0",),
        "joint_blocks.{}.x_block.attn2.proj": ("transformer_blocks.{}.attn2.to_out.0",),
        "joint_blocks.{}.context_block.attn.proj": ("transformer_blocks.{}.attn.to_add_out",),
        "joint_blocks.{}.x_block.mlp.fc1": ("transformer_blocks.{}.ff.net.0.proj",),
        "joint_blocks.{}.x_block.mlp.fc2": ("transformer_blocks.{}.ff.net.2",),
        "joint_blocks.{}.context_block.mlp.fc1": ("transformer_blocks.{}.ff_context.net.0.proj",),
        "joint_blocks.{}.context_block.mlp.fc2": ("transformer_blocks.{}.ff_context.net.2",),
        "joint_blocks.{}.x_block.adaLN_modulation.1": ("transformer_blocks.{}.norm1.linear",),
        "joint_blocks.{}.context_block.adaLN_modulation.1": ("transformer_blocks.{}.norm1_context.linear",),
        "x_embedder.proj": ("pos_embed.proj",),
        "context_embedder": ("context_embedder",),
        "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
        "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
        "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
        "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
        "final_layer.linear": ("proj_out",),
        "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    },
    "ZImageTransformer2DModel": {
        **{f"{part}.{{}}.attention.qkv": _three(f"{part}.{{}}.attention") for part in _Z_IMAGE_BLOCKS},
        **{f"{part}.{{}}.attention.out": (f"{part}.{{}}.attention.to_out.0",) for part in _Z_IMAGE_BLOCKS},
        "x_embedder": ("all_x_embedder.2-1",),
        "final_layer.linear": ("all_final_layer.2-1.linear",),
        "final_layer.adaLN_modulation.1": ("all_final_layer.2-1.adaLN_modulation.1",),
    },
}
#: Layers that scale and shift, whose halves the authors' code has the other way round.
SWAPPED = ("norm_out.linear",)


class AuthorsModule(NamedTuple):
    """A module of the authors' code.

    Attributes:
        name: in that code.
        layers: of diffusers that it holds, in their order there.
        swapped: the halves of its rows stand the other way round.
    """

    name: str
    layers: tuple[str, ...]
    swapped: bool

    def rows(self, inputs: int, known: Mapping[str, int]) -> list[int]:
        """Return how many rows each layer has.

        Args:
            inputs: of the module.
            known: rows of some of the layers.
        """
        return [known.get(layer, ROWS.get(_numbered(layer)[0], 1) * inputs) for layer in self.layers]


def module_of(layer: str, kind: str, config: Mapping[str, Any]) -> AuthorsModule | None:
    """Return the module that holds a layer; None for a layer that is called the same there, or is not known.

    Args:
        layer: its name in diffusers.
        kind: the network's class.
        config: the network's.
    """
    template, number = _numbered(layer)
    name = _holders(kind).get(template)
    if name is None:
        return None
    layers = tuple(each.replace("{}", number) for each in MODULES[kind][name])
    # The text's last block of Stable Diffusion 3 has such a layer, too.
    last = f"transformer_blocks.{config.get('num_layers', 0) - 1}.norm1_context.linear"
    swapped = layer in SWAPPED or (kind == "SD3Transformer2DModel" and layer == last)
    return AuthorsModule(name.replace("{}", number), layers, swapped)


def swap_halves(up: Tensor) -> Tensor:
    """Return B of a layer that scales and shifts with its halves the other way round."""
    return torch.cat(up.chunk(2)[::-1])


def block_diagonal(factors: Sequence[tuple[Tensor, Tensor] | None], rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return A and B of a module, from those of its linear layers.

    Args:
        factors: of each layer; None: no update.
        rows: of each layer.

    All blocks have the largest rank of the layers: readers take A and B apart in equal parts.
    """
    present = [each for each in factors if each is not None]
    rank, (some, _) = max(len(down) for down, _ in present), present[0]
    down = some.new_zeros(rank * len(rows), some.shape[1])
    up = some.new_zeros(sum(rows), rank * len(rows))
    first = 0
    for number, (each, count) in enumerate(zip(factors, rows, strict=True)):
        if each is not None:
            own = slice(number * rank, number * rank + len(each[0]))
            down[own] = each[0]
            up[first : first + count, own] = each[1]
        first += count
    return down, up


def taken_apart(down: Tensor, up: Tensor, rows: Sequence[int]) -> list[tuple[Tensor, Tensor] | None]:
    """Return A and B of each linear layer in a module: its block where B has nothing outside of blocks, else all of A.

    None stands for a layer whose block is zeros in A and in B: nothing was trained there.
    """
    parts = up.split(list(rows))
    rank, rest = divmod(len(down), len(rows))
    blocks = [part.split(max(rank, 1), dim=1) for part in parts]
    if rest or any(other.any() for i, own in enumerate(blocks) for j, other in enumerate(own) if i != j):
        return [(down, part) for part in parts]
    found: list[tuple[Tensor, Tensor] | None] = []
    for number, block in enumerate(blocks):
        part = down[number * rank : (number + 1) * rank]
        live = (part != 0).any(1) | (block[number] != 0).any(0)
        found.append((part[live], block[number][:, live]) if live.any() else None)
    return found


@cache
def _holders(kind: str) -> dict[str, str]:
    """Return the module that holds each layer, of a class of networks."""
    return {layer: name for name, layers in MODULES.get(kind, {}).items() for layer in layers}


def _numbered(layer: str) -> tuple[str, str]:
    """Return a layer's name with {} in place of its block's number, and that number."""
    found = re.search(r"\.(\d+)\.", layer)
    return (layer, "") if found is None else (layer[: found.start(1)] + "{}" + layer[found.end(1) :], found[1])
