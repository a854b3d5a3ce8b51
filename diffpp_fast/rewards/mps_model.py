"""MPS, the Multi-dimensional Preference Score: a CLIP whose image tokens attend to what a condition asks of the prompt.

Source: README.md, trainer/models/clip_model.py and cross_modeling.py of Kwai-Kolors/MPS.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpp_fast.precision import widen
from diffpp_fast.rewards.base import ImageBatch, Preprocessing, Reward
from diffpp_fast.rewards.clip_model import VIT_H_14, unit
from diffpp_fast.rewards.files import fit, read_tensors
from diffpp_fast.rewards.text import PromptCache, PromptTokenizer
from diffpp_fast.rewards.towers import recompute

#: The condition of the released, overall checkpoint.
OVERALL = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
    "texture, quantity, attributes, position, number, location, word, things."
)
#: Layers of the cross attention, its heads and their width, and how much wider the feedforward part is.
LAYERS, HEADS, HEAD, WIDER = 4, 16, 64, 4
#: A prompt's token counts where its likeness to the condition is above this share of the largest.
THRESHOLD = 0.01


class MPS(Reward):
    """exp(logit_scale) cos(image, prompt) of a CLIP, the image's first token after cross attention to the prompt's.

    The condition's tokens choose which of the prompt's are attended to: those whose features' largest product with a
    token of the condition is above a hundredth of the largest of the prompt. All of that depends on the prompt alone
    and is cached.

    Args:
        model: transformers' `CLIPModel`.
        cross: the cross attention.
        tokenizer: the model's.
        scale: exp(logit_scale) of the checkpoint.
        condition: what is asked for, in words.
        preprocessing: of the images.
        checkpoint: compute each layer of image tower and cross attention again in the backward pass.
        capacity: prompts whose features are kept.
    """

    name = "mps"

    def __init__(
        self,
        model: Any,
        cross: nn.ModuleList,
        tokenizer: Any,
        *,
        scale: float,
        condition: str,
        preprocessing: Preprocessing,
        checkpoint: bool = False,
        capacity: int = 512,
    ) -> None:
        super().__init__()
        self.vision_model, self.visual_projection = model.vision_model, model.visual_projection
        self.text_model, self.text_projection = model.text_model, model.text_projection
        self.cross, self.scale, self.condition, self.preprocessing = cross, scale, condition, preprocessing
        self.length: int = model.config.text_config.max_position_embeddings
        self.tokenize = PromptTokenizer(tokenizer, self.length, self.name)
        self.cache = PromptCache(capacity)
        if checkpoint:
            recompute([*self.vision_model.encoder.layers, *cross])
        self.freeze()

    def score(self, batch: ImageBatch, prompts: tuple[str, ...]) -> Tensor:
        image = self.image_tokens(batch)
        rows = self.cache(prompts, self._encode)
        text, end, chosen = rows[:, : self.length], rows[:, self.length], rows[:, self.length + 1, : self.length] > 0
        for layer in self.cross:
            image = layer(image, text, chosen[:, None, None])
        return widen(self.scale * (unit(image[:, 0]) * unit(end)).sum(1))

    def image_tokens(self, batch: ImageBatch) -> Tensor:
        """The projected tokens [B, 1 + patches, D] of a batch, computed once per batch."""

        def encode() -> Tensor:
            pixels = batch.pixels(self.preprocessing, self.visual_projection.weight.dtype)
            # The last layer's output, without the norm that CLIP has before its projection.
            return self.visual_projection(self.vision_model(pixel_values=pixels).last_hidden_state)

        return batch.once((id(self), self.preprocessing), encode)

    def _encode(self, prompts: Sequence[str]) -> Tensor:
        """[B, length + 2, D]: the prompt's tokens, its end, and 1 in the places of tokens that are attended to."""
        text, end = self._text([*prompts, self.condition])
        text, condition = text[:-1], text[-1]
        likeness = (widen(text) @ widen(condition).T).amax(2)
        chosen = likeness / likeness.amax(1, keepdim=True) > THRESHOLD
        row = F.pad(chosen.to(text.dtype), (0, text.shape[2] - self.length))
        return torch.cat((text, end[:-1, None], row[:, None]), 1)

    def _text(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids, _ = self.tokenize(prompts)
        # No mask: attention is causal. What stands behind the end is attended to like the rest, as in the source.
        output = self.text_model(input_ids=ids.to(self.text_projection.weight.device))
        return self.text_projection(output.last_hidden_state), self.text_projection(output.pooler_output)

    def _apply(self, fn: Any, recurse: bool = True) -> MPS:
        self.cache.clear()
        super()._apply(fn, recurse)
        return self


class CrossLayer(nn.Module):
    """Image tokens attend to the prompt's, then to each other; each with a feedforward part beside the attention.

    Keys and values have one head. The norms have no bias.
    """

    def __init__(self, width: int, heads: int = HEADS) -> None:
        super().__init__()
        self.heads = heads
        inner, wide = heads * HEAD, WIDER * width

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False)

        self.norm = nn.LayerNorm(width, bias=False)
        self.query, self.key_value, self.out = linear(width, inner), linear(width, 2 * HEAD), linear(inner, width)
        self.wide, self.narrow = linear(width, 2 * wide), linear(wide, width)
        self.self_norm = nn.LayerNorm(width, bias=False)
        self.self_split = inner, HEAD, HEAD, 2 * wide
        self.self_in, self.self_out = linear(width, sum(self.self_split)), linear(inner, width)
        self.self_narrow = linear(wide, width)

    def forward(self, image: Tensor, text: Tensor, chosen: Tensor) -> Tensor:
        """image [B, N, D], text [B, L, D] and chosen [B, 1, 1, L], whether a token is attended to -> [B, N, D]."""
        x = self.norm(image)
        key, value = self.key_value(text).chunk(2, 2)
        image = image + self.out(self._attend(self.query(x), key, value, chosen)) + self.narrow(_gated(self.wide(x)))
        query, key, value, wide = self.self_in(self.self_norm(image)).split(self.self_split, 2)
        query = _rotate(query.unflatten(2, (self.heads, HEAD)).transpose(1, 2)).transpose(1, 2).flatten(2)
        return image + self.self_out(self._attend(query, _rotate(key), value)) + self.self_narrow(_gated(wide))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, chosen: Tensor | None = None) -> Tensor:
        q = query.unflatten(2, (self.heads, HEAD)).transpose(1, 2)
        k, v = (tensor[:, None].expand(-1, self.heads, -1, -1) for tensor in (key, value))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=chosen).transpose(1, 2).flatten(2)


def _gated(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, -1)
    return F.silu(gate) * value


def _rotate(x: Tensor) -> Tensor:
    """Rotary positions of tokens, [..., N, D], in the last two dimensions."""
    count, width = x.shape[-2:]
    exact = partial(torch.arange, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    angles = exact(count)[:, None] * 10000.0 ** (-exact(0, width, 2) / width)
    cos, sin = (table.repeat(1, 2).to(x.dtype) for table in (angles.cos(), angles.sin()))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def load_mps(
    file: Path, what: str, dtype: torch.dtype, architecture: Mapping[str, Any] = VIT_H_14
) -> tuple[Any, nn.ModuleList, float]:
    """CLIP, cross attention and exp(logit_scale) of a state dict with the keys of MPS's own `CLIPModel`."""
    from transformers import CLIPConfig, CLIPModel

    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(**architecture))
        cross = nn.ModuleList(CrossLayer(architecture["projection_dim"]) for _ in range(LAYERS))
        whole = nn.ModuleDict({"model": model, "cross": cross})
    tensors = read_tensors(file, what)
    # Zeros and tables that the source keeps as buffers.
    spare = (r"^cross_model\..*\.norm\.bias$", r"^cross_model\..*\.inv_freq$", r"^cross_model\..*\.pos_emb$")
    fit(whole, tensors, file, what, source=_from_mps, spare=spare, dtype=dtype)
    return model, cross, float(tensors["model.logit_scale"].double().exp())


# Our keys of a cross layer -> the source's.
_CROSS = {
    "norm": "0.fn.norm",
    "query": "0.fn.to_q",
    "key_value": "0.fn.to_kv",
    "out": "0.fn.to_out",
    "wide": "0.fn.ff.0",
    "narrow": "0.fn.ff.2",
    "self_norm": "1.fn.norm",
    "self_in": "1.fn.fused_attn_ff_proj",
    "self_out": "1.fn.attn_out",
    "self_narrow": "1.fn.ff_out.1",
}


def _from_mps(key: str) -> tuple[str, Callable[[Tensor], Tensor]]:
    found = re.fullmatch(r"cross\.(\d+)\.(\w+)\.weight", key)
    name = key if found is None else f"cross_model.layers.{found[1]}.{_CROSS[found[2]]}.weight"
    return name, lambda value: value
