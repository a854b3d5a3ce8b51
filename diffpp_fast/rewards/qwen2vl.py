"""Qwen2-VL as a frozen function of pixels: the official preprocessing, differentiable, and both towers in batches.

Images of a batch have one size, so that no table of lengths is read from the device, and attention needs no mask.
Source: image_processing_qwen2_vl.py and modeling_qwen2_vl.py of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpp_fast.precision import widen
from diffpp_fast.rewards.base import CLIP_MEAN, CLIP_STD, ImageBatch, Preprocessing, per_channel
from diffpp_fast.rewards.towers import rms_normed, run_block

#: Qwen2-VL 7B (config.json of Qwen/Qwen2-VL-7B-Instruct); the vocabulary is that of the file of weights.
QWEN2_VL_7B: dict[str, Any] = {
    "text_config": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "vocab_size": 152064,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": 3584,
        "mlp_ratio": 4,
        "num_heads": 16,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}


def smart_size(height: int, width: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """Return the multiples of `factor` to which Qwen2-VL resizes, with `least` to `most` pixels; it keeps the aspect
    ratio as far as they let it."""
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"images of {height} x {width} pixels are too long for Qwen2-VL: at most 200 to 1")
    new_height, new_width = (max(factor, round(side / factor) * factor) for side in (height, width))
    if new_height * new_width > most:
        shrink = math.sqrt(height * width / most)
        new_height, new_width = (max(factor, math.floor(s / shrink / factor) * factor) for s in (height, width))
    elif new_height * new_width < least:
        grow = math.sqrt(least / (height * width))
        new_height, new_width = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return new_height, new_width


def resized(batch: ImageBatch, size: tuple[int, int], clamp: str, dtype: torch.dtype) -> Tensor:
    """The images at another size, in any aspect ratio, normalised as CLIP's: [B, 3, *size].

    `ops.reward_pixels` keeps aspect ratios, so it does square images alone.
    """
    height, width = batch.images.shape[2:]
    if height == width and size[0] == size[1]:
        return batch.pixels(Preprocessing(size[0], clamp=clamp), dtype)

    def stretch() -> Tensor:
        images = batch.images if batch.images.dtype == torch.float64 else batch.images.float()
        unit = images / 2 + 0.5
        inside = unit.clamp(0.0, 1.0)
        unit = {"hard": inside, "straight_through": unit + (inside - unit).detach(), "none": unit}[clamp]
        new = F.interpolate(unit, size, mode="bicubic", antialias=True)
        mean, std = (per_channel(values, new) for values in (CLIP_MEAN, CLIP_STD))
        return ((new - mean) / std).to(dtype)

    return batch.once(("stretch", size, clamp, dtype), stretch)


class Qwen2VL(nn.Module):
    """Both towers of a `Qwen2VLModel`, frozen.

    Args:
        model: transformers'; its submodules are called, its own forward is not.
        checkpoint: compute each block of both towers again in the backward pass, and keep its input alone.
    """

    def __init__(self, model: Any, checkpoint: bool) -> None:
        super().__init__()
        self.visual, self.language_model = model.visual, model.language_model
        for part in (self.visual, self.language_model):  # tables that no file holds
            for name in ("rotary_pos_emb", "rotary_emb"):
                part._modules.pop(name, None)
        self.checkpoint = checkpoint
        vision, text = model.config.vision_config, model.config.text_config
        self.patch, self.merge, self.frames = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        self.vision_heads, self.heads = vision.num_heads, text.num_attention_heads
        self.key_heads: int = text.num_key_value_heads
        self.theta: float = text.rope_parameters["rope_theta"]
        self._tables: dict[Any, tuple[Tensor, Tensor]] = {}

    @property
    def dtype(self) -> torch.dtype:
        weight: Tensor = self.language_model.norm.weight
        return weight.dtype

    def embed(self, ids: Tensor) -> Tensor:
        """ids [B, L] -> [B, L, D], without gradient."""
        tokens: Tensor = self.language_model.embed_tokens(ids)
        return tokens

    def image_tokens(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W], normalised, of multiples of patch x merge -> [B, N, D] of the language model."""
        rows, columns = (side // self.patch for side in pixels.shape[2:])
        weight = self.visual.patch_embed.proj.weight
        x = F.linear(self._patches(pixels), weight.flatten(1))
        cos, sin = self._table(("vision", rows, columns), x.device)
        for block in self.visual.blocks:
            x = run_block(self._vision_block, block, x, cos, sin, checkpoint=self.checkpoint)
        merger = self.visual.merger
        merged: Tensor = merger.mlp(merger.ln_q(x).unflatten(1, (-1, self.merge**2)).flatten(2))
        return merged

    def forward(self, x: Tensor, place: Tensor) -> Tensor:
        """Embeddings [B, L, D] and places [B] in them -> the language model's output at the places, [B, D].

        Positions count from 0 on, and attention is causal: what stands behind a place has no effect on it.
        """
        cos, sin = (table.to(x.dtype) for table in self._table(("text", x.shape[1]), x.device))
        for layer in self.language_model.layers:
            x = run_block(self._text_layer, layer, x, cos, sin, checkpoint=self.checkpoint)
        taken = x.gather(1, place[:, None, None].expand(-1, 1, x.shape[2])).squeeze(1)
        return rms_normed(self.language_model.norm, taken)

    def _patches(self, pixels: Tensor) -> Tensor:
        """[B, N, 3 * frames * patch * patch]: blocks of merge x merge patches one after the other, an image as frames
        that are alike."""
        patch, merge = self.patch, self.merge
        x = pixels.unflatten(3, (-1, merge, patch)).unflatten(2, (-1, merge, patch))
        # batch, colour, block row, row, y, block column, column, x
        x = x.permute(0, 2, 5, 3, 6, 1, 4, 7).flatten(1, 4)
        return x[:, :, :, None].expand(-1, -1, -1, self.frames, -1, -1).flatten(2)

    def _vision_block(self, block: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        attention = block.attn
        q, k, v = attention.qkv(block.norm1(x)).unflatten(2, (3, self.vision_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = (_rotated(widen(part), cos, sin).to(x.dtype) for part in (q, k))
        x = x + attention.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        output: Tensor = x + block.mlp(block.norm2(x))
        return output

    def _text_layer(self, layer: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        attention, normed = layer.self_attn, rms_normed(layer.input_layernorm, x)
        q = attention.q_proj(normed).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k = attention.k_proj(normed).unflatten(2, (self.key_heads, -1)).transpose(1, 2)
        v = attention.v_proj(normed).unflatten(2, (self.key_heads, -1)).transpose(1, 2)
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        k, v = (part.repeat_interleave(self.heads // self.key_heads, 1) for part in (k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + attention.o_proj(attended.transpose(1, 2).flatten(2))
        output: Tensor = x + layer.mlp(rms_normed(layer.post_attention_layernorm, x))
        return output

    def _table(self, key: tuple[Any, ...], device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions, kept: those of patches in two directions, or those of tokens."""
        if (key, device) not in self._tables:
            kind, *sizes = key
            make: Callable[..., tuple[Tensor, Tensor]] = self._vision_table if kind == "vision" else self._text_table
            self._tables[key, device] = make(*sizes, device)
        return self._tables[key, device]

    def _vision_table(self, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
        width = self.visual.config.embed_dim // self.vision_heads
        places = torch.stack(
            torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
        )
        places = places.unflatten(2, (-1, self.merge)).unflatten(1, (-1, self.merge)).transpose(2, 3).flatten(1)
        angles = (places[..., None] * _frequencies(10000.0, width // 2, device)).transpose(0, 1).flatten(1).repeat(1, 2)
        return angles.cos(), angles.sin()

    def _text_table(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        width = self.language_model.config.hidden_size // self.heads
        angles = torch.arange(count, device=device)[:, None] * _frequencies(self.theta, width, device)
        angles = angles.repeat(1, 2)
        return angles.cos(), angles.sin()


def _frequencies(theta: float, width: int, device: torch.device) -> Tensor:
    return theta ** (-torch.arange(0, width, 2, device=device) / width)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin
