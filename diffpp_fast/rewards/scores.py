"""The rewards: each the score of its official scorer, with the preprocessing of that scorer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffpp_fast.precision import widen
from diffpp_fast.rewards.base import ImageBatch, Preprocessing, Reward
from diffpp_fast.rewards.clip_model import Clip
from diffpp_fast.rewards.files import fit, read_tensors
from diffpp_fast.rewards.text import PromptCache, PromptTokenizer
from diffpp_fast.rewards.towers import SelfAttention, TextAttention, recompute

#: ImageReward: BLIP with ViT-L/16 (salesforce/BLIP models/blip.py, vit.py; med_config.json of THUDM/ImageReward).
IMAGEREWARD: dict[str, Any] = {
    "vision": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 16,
        "image_size": 224,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    },
    "text": {
        "vocab_size": 30524,
        "hidden_size": 768,
        "encoder_hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 512,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "pad_token_id": 0,
    },
}


class CosineReward(Reward):
    """factor cos(image features, text features) of a CLIP.

    Args:
        clip: the towers; rewards that hold the same ones share the image features.
        factor: what the cosine is multiplied by.
        preprocessing: of the images.
        name: for messages.
    """

    def __init__(self, clip: Clip, factor: float, preprocessing: Preprocessing, name: str) -> None:
        super().__init__()
        self.clip, self.factor, self.preprocessing, self.name = clip, factor, preprocessing, name
        self.freeze()

    def score(self, batch: ImageBatch, prompts: tuple[str, ...]) -> Tensor:
        image = self.clip.image_features(batch, self.preprocessing)
        return widen(self.factor * (image * self.clip.text_features(prompts)).sum(1))


class AestheticReward(Reward):
    """LAION's aesthetic predictor: an affine chain on unit image features of CLIP ViT-L/14. It ignores the prompts.

    Source: simple_inference.py of christophschuhmann/improved-aesthetic-predictor.
    """

    name = "aesthetic"

    def __init__(self, clip: Clip, head: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.clip, self.head, self.preprocessing = clip, head, preprocessing
        self.freeze()

    def score(self, batch: ImageBatch, prompts: tuple[str, ...]) -> Tensor:
        return apply_head(self.head, self.clip.image_features(batch, self.preprocessing))


class ImageReward(Reward):
    """BLIP's text encoder, attending to the image at every layer, and a head on its first token.

    Source: ImageReward/ImageReward.py of THUDM/ImageReward. Prompts' tokens are cached; all else depends on the image.

    Args:
        vision: transformers' `BlipVisionModel`.
        text: transformers' `BlipTextModel` with cross-attention.
        head: features -> one number.
        tokenizer: BERT's with BLIP's two tokens more.
        mean, std: that the head's output is normalised by.
        length: tokens per prompt.
        checkpoint: compute each layer of both towers again in the backward pass.
        capacity: prompts whose tokens are kept.
    """

    name = "imagereward"

    def __init__(
        self,
        vision: Any,
        text: Any,
        head: nn.Module,
        tokenizer: Any,
        preprocessing: Preprocessing,
        *,
        mean: float = 0.16717362830052426,
        std: float = 1.0333394966054072,
        length: int = 35,
        checkpoint: bool = False,
        capacity: int = 65536,
    ) -> None:
        super().__init__()
        self.vision, self.text, self.head, self.preprocessing = vision, text, head, preprocessing
        self.mean, self.std = mean, std
        self.tokenize = PromptTokenizer(tokenizer, length, self.name)
        self.cache = PromptCache(capacity)
        for layer in vision.encoder.layers:
            layer.self_attn = SelfAttention(layer.self_attn)
        for layer in text.encoder.layer:
            for attention in (layer.attention, layer.crossattention):
                attention.self = TextAttention(attention.self)
        if checkpoint:
            recompute([*vision.encoder.layers, *text.encoder.layer])
        self.freeze()

    def score(self, batch: ImageBatch, prompts: tuple[str, ...]) -> Tensor:
        pixels = batch.pixels(self.preprocessing, self.vision.post_layernorm.weight.dtype)
        ids, mask = self.cache(prompts, self._tokens).unbind(1)
        hidden = self.text(
            input_ids=ids,
            attention_mask=mask.bool()[:, None, None],  # in its last form: transformers would ask the device about it
            encoder_hidden_states=self.vision(pixel_values=pixels).last_hidden_state,
            is_decoder=False,
        ).last_hidden_state
        return (apply_head(self.head, hidden[:, 0]) - self.mean) / self.std

    def _tokens(self, prompts: Sequence[str]) -> Tensor:
        """Ids and mask, [B, 2, length] int64."""
        return torch.stack(self.tokenize(prompts), 1).to(self.vision.post_layernorm.weight.device)

    def _apply(self, fn: Any, recurse: bool = True) -> ImageReward:
        self.cache.clear()
        super()._apply(fn, recurse)
        return self


class Head(nn.Module):
    """Features [B, width] -> [B, 1]: five linear layers without activations, as ImageReward and the aesthetic predictor
    have them. Their dropout does nothing at scoring; its places stay, for the keys count them.
    """

    def __init__(self, width: int = 768) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(width, 1024), nn.Identity(), nn.Linear(1024, 128), nn.Identity()),
            *(nn.Linear(128, 64), nn.Identity(), nn.Linear(64, 16), nn.Linear(16, 1)),
        )

    def forward(self, features: Tensor) -> Tensor:
        scores: Tensor = self.layers(features)
        return scores


def apply_head(head: nn.Module, features: Tensor) -> Tensor:
    """[B, D] -> [B], in the head's own dtype, and float32 at least."""
    scores: Tensor = head(features.to(next(head.parameters()).dtype))
    return widen(scores.squeeze(1))


def load_head(path: Path, what: str, dtype: torch.dtype, width: int = 768) -> Head:
    """The aesthetic predictor's head; float32 unless `dtype` is float64, for it is small and the score hangs on it."""
    with torch.device("meta"):
        head = Head(width)
    fit(head, read_tensors(path, what), path, what, dtype=head_dtype(dtype))
    return head


def load_imagereward(
    path: Path, what: str, dtype: torch.dtype, architecture: Any = IMAGEREWARD
) -> tuple[Any, Any, Head]:
    """Both towers and the head of an ImageReward.pt."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    parts = nn.Module()
    # transformers builds cross-attention into what it calls a decoder only.
    text_config = BlipTextConfig(**architecture["text"], is_decoder=True)
    with torch.device("meta"):
        parts.vision = BlipVisionModel(BlipVisionConfig(**architecture["vision"]))
        parts.text = BlipTextModel(text_config, add_pooling_layer=False)
        parts.head = Head(architecture["text"]["hidden_size"])
    spare = (r"^blip\.(vision|text)_proj\.",)  # of BLIP's pretraining; the reward has no use for them
    fit(parts, read_tensors(path, what), path, what, source=_from_blip, spare=spare, dtype=head_dtype(dtype))
    return parts.vision.to(dtype), parts.text.to(dtype), parts.head


def head_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# Keys of the parts -> those of THUDM/ImageReward, whose visual encoder is salesforce/BLIP's models/vit.py.
_BLIP = (
    ("vision.embeddings.class_embedding", "blip.visual_encoder.cls_token"),
    ("vision.embeddings.position_embedding", "blip.visual_encoder.pos_embed"),
    ("vision.embeddings.patch_embedding.", "blip.visual_encoder.patch_embed.proj."),
    ("vision.post_layernorm.", "blip.visual_encoder.norm."),
    ("vision.encoder.layers.", "blip.visual_encoder.blocks."),
    (".self_attn.qkv.", ".attn.qkv."),
    (".self_attn.projection.", ".attn.proj."),
    (".layer_norm1.", ".norm1."),
    (".layer_norm2.", ".norm2."),
    ("text.", "blip.text_encoder."),
    ("head.", "mlp."),
)


def _from_blip(key: str) -> tuple[str, Callable[[Tensor], Tensor]]:
    name = key
    for ours, theirs in _BLIP:
        if ours.startswith(".") or name.startswith(ours):
            name = name.replace(ours, theirs, 1)
    return name, lambda value: value
