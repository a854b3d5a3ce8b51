"""Reward models on meta, by the names of `diffpp_fast.rewards`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.rewards.base import ImageBatch, Preprocessing
from diffpp_fast.rewards.clip_model import VIT_H_14, Clip
from diffpp_fast.rewards.scores import IMAGEREWARD
from diffpp_fast.rewards.towers import SelfAttention, TextAttention, recompute

#: openai/clip-vit-large-patch14.
VIT_L_14: dict[str, Any] = {
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 224,
    },
    "text_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "projection_dim": 768,
    },
    "projection_dim": 768,
}
#: By reward: what scores. Rewards with the same towers share them where `diffpp_fast.rewards.mixture` does.
TOWERS = {
    "pickscore": "PickScore's ViT-H/14",
    "hpsv2": "HPSv2's ViT-H/14",
    "hpsv2.1": "HPSv2's ViT-H/14",
    "clip": "CLIP ViT-L/14",
    "aesthetic": "CLIP ViT-L/14",
    "imagereward": "ImageReward's BLIP",
}
#: Tokens of a prompt that ImageReward reads.
IMAGEREWARD_TOKENS = 35


@dataclass(frozen=True)
class Towers:
    """What scores the images.

    Attributes:
        names: of `TOWERS`; none where the reward's own network is not known.
        dtype: of the weights, in which the towers compute.
        checkpoint: the towers compute their layers again in the backward pass.
        unknown: rewards that can't be planned, for the plan to say so.
    """

    names: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32
    checkpoint: bool = False
    unknown: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        strange = [name for name in self.names if name not in TOWERS]
        if strange:
            raise ConfigurationError(f"--reward: there is no {strange[0]!r}; known: {', '.join(TOWERS)}, none")


class Scorer(nn.Module):
    """The towers on meta: images [B, 3, H, W] -> [B]. A reward that is not known scores by the mean of the image."""

    def __init__(self, towers: Towers) -> None:
        super().__init__()
        kinds = dict.fromkeys(TOWERS[name] for name in towers.names)
        makers: dict[str, Callable[[bool], nn.Module]] = {
            TOWERS["pickscore"]: lambda checkpoint: _ClipScore(VIT_H_14, checkpoint),
            TOWERS["hpsv2"]: lambda checkpoint: _ClipScore(VIT_H_14, checkpoint),
            TOWERS["clip"]: lambda checkpoint: _ClipScore(VIT_L_14, checkpoint),
            TOWERS["imagereward"]: _ImageReward,
        }
        with torch.device("meta"):
            self.scores = nn.ModuleList(makers[kind](towers.checkpoint) for kind in kinds)
        self.to(towers.dtype).eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        images = images.float()
        batch = ImageBatch(images)
        total = images.mean((1, 2, 3)) if not len(self.scores) else images.new_zeros(len(images))
        for score in self.scores:
            total = total + score(batch)
        return total


class _ClipScore(nn.Module):
    """Image features of a CLIP. Its text tower is there, and idle: prompts are encoded once."""

    def __init__(self, architecture: dict[str, Any], checkpoint: bool) -> None:
        super().__init__()
        from transformers import CLIPConfig, CLIPModel

        model = CLIPModel(CLIPConfig(**architecture))
        self.idle = nn.ModuleList((model.text_model, model.text_projection))
        del model.text_model, model.text_projection
        self.clip = Clip(model, None, scale=1.0, checkpoint=checkpoint)
        self.preprocessing = Preprocessing(self.clip.image_size)

    def forward(self, batch: ImageBatch) -> Tensor:
        return self.clip.image_features(batch, self.preprocessing).square().sum(1).float()


class _ImageReward(nn.Module):
    def __init__(self, checkpoint: bool) -> None:
        super().__init__()
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        self.vision: Any = BlipVisionModel(BlipVisionConfig(**IMAGEREWARD["vision"]))
        text = BlipTextConfig(**IMAGEREWARD["text"], is_decoder=True)
        self.text: Any = BlipTextModel(text, add_pooling_layer=False)
        for layer in self.vision.encoder.layers:
            layer.self_attn = SelfAttention(layer.self_attn)
        for layer in self.text.encoder.layer:
            for attention in (layer.attention, layer.crossattention):
                attention.self = TextAttention(attention.self)
        if checkpoint:
            recompute([*self.vision.encoder.layers, *self.text.encoder.layer])
        self.preprocessing = Preprocessing(self.vision.config.image_size)

    def forward(self, batch: ImageBatch) -> Tensor:
        pixels = batch.pixels(self.preprocessing, self.vision.post_layernorm.weight.dtype)
        ids = torch.zeros(len(batch), IMAGEREWARD_TOKENS, dtype=torch.int64, device=pixels.device)
        hidden = self.text(
            input_ids=ids,
            attention_mask=ids.bool()[:, None, None],
            encoder_hidden_states=self.vision(pixel_values=pixels).last_hidden_state,
            is_decoder=False,
        ).last_hidden_state
        return hidden[:, 0].float().square().sum(1)
