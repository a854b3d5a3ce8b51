"""PixArt's weights by its authors' names, as SIM's one-step generator has them, read as diffusers calls them.

Their matrices for queries, keys and values are one, of which each is a third (or, of text, keys and values a half).
What diffusers computes (positions) or draws from the empty prompt (the embedding of no caption) is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import Tensor

from diffpp_fast.tensor_files import shapes_of

#: A tensor that only such weights have.
SIGN = "x_embedder.proj.weight"
#: Names of the authors, and diffusers' for the parts that they hold, one after the other.
NAMES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"x_embedder\.proj", ("pos_embed.proj",)),
    (r"y_embedder\.y_proj\.fc(\d)", (r"caption_projection.linear_\1",)),
    (r"t_embedder\.mlp\.0", ("adaln_single.emb.timestep_embedder.linear_1",)),
    (r"t_embedder\.mlp\.2", ("adaln_single.emb.timestep_embedder.linear_2",)),
    (r"csize_embedder\.mlp\.0", ("adaln_single.emb.resolution_embedder.linear_1",)),
    (r"csize_embedder\.mlp\.2", ("adaln_single.emb.resolution_embedder.linear_2",)),
    (r"ar_embedder\.mlp\.0", ("adaln_single.emb.aspect_ratio_embedder.linear_1",)),
    (r"ar_embedder\.mlp\.2", ("adaln_single.emb.aspect_ratio_embedder.linear_2",)),
    (r"t_block\.1", ("adaln_single.linear",)),
    (r"blocks\.(\d+)\.attn\.qkv", tuple(rf"transformer_blocks.\1.attn1.to_{part}" for part in "qkv")),
    (r"blocks\.(\d+)\.attn\.proj", (r"transformer_blocks.\1.attn1.to_out.0",)),
    (r"blocks\.(\d+)\.cross_attn\.q_linear", (r"transformer_blocks.\1.attn2.to_q",)),
    (r"blocks\.(\d+)\.cross_attn\.kv_linear", tuple(rf"transformer_blocks.\1.attn2.to_{part}" for part in "kv")),
    (r"blocks\.(\d+)\.cross_attn\.proj", (r"transformer_blocks.\1.attn2.to_out.0",)),
    (r"blocks\.(\d+)\.mlp\.fc1", (r"transformer_blocks.\1.ff.net.0.proj",)),
    (r"blocks\.(\d+)\.mlp\.fc2", (r"transformer_blocks.\1.ff.net.2",)),
    (r"final_layer\.linear", ("proj_out",)),
)
TABLES = (
    (r"blocks\.(\d+)\.scale_shift_table", r"transformer_blocks.\1.scale_shift_table"),
    (r"final_layer\.scale_shift_table", "scale_shift_table"),
)
LEFT_OUT = ("pos_embed", "y_embedder.y_embedding")


class Parts(Mapping[str, Tensor]):
    """Tensors of another mapping, or parts of their rows, by other names; each is made when it is asked for.

    Args:
        source: has them.
        places: by name here: the name there, which part, and of how many.
    """

    def __init__(self, source: Mapping[str, Tensor], places: Mapping[str, tuple[str, int, int]]) -> None:
        self._source = source
        self.places = places

    def __getitem__(self, name: str) -> Tensor:
        other, part, count = self.places[name]
        return self._source[other].chunk(count)[part]

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes by name; those that are stored are not read."""
        whole = shapes_of(self._source)
        found = {}
        for name, (other, _, count) in self.places.items():
            rows, *rest = whole[other]
            found[name] = (rows // count, *rest)
        return found


def from_authors(tensors: Mapping[str, Tensor]) -> Parts | None:
    """Return PixArt's weights by diffusers' names; None for tensors by other names.

    The network may lie inside a larger module, whose further tensors (SIM's table of noise levels) are left out.
    """
    sign = next((name for name in tensors if name == SIGN or name.endswith(f".{SIGN}")), None)
    if sign is None:
        return None
    inside = sign.removesuffix(SIGN)
    places = {}
    for name in tensors:
        if name.startswith(inside):
            for number, new in enumerate(found := _renamed(name.removeprefix(inside))):
                places[new] = (name, number, len(found))
    return Parts(tensors, places)


def _renamed(name: str) -> tuple[str, ...]:
    """Diffusers' names for a tensor; one that is not known keeps its own, which no network of diffusers has."""
    if name in LEFT_OUT:
        return ()
    for old, new in TABLES:
        if re.fullmatch(old, name):
            return (re.sub(old, new, name),)
    layer, _, kind = name.rpartition(".")
    for old, parts in NAMES:
        found = re.fullmatch(old, layer)
        if found is not None:
            return tuple(f"{found.expand(part)}.{kind}" for part in parts)
    return (name,)
