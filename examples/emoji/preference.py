"""Two preference judges of different backbones: one to optimise, one to hold out.

A judge gives a picture and its prompt a score; of two pictures it prefers A to B with probability sigmoid(score of A -
score of B) (Bradley and Terry). It has learnt that from pairs (train_judges.py). `judge` looks at features of a frozen
EfficientNet-Lite0 that ImageNet trained, `second_judge` at features of the example's own frozen autoencoder. Each has
seen its own views, samples, and forms of the kinds of fault. Both share the sentence encoder (MiniLM). A score of 0 is
the mean of the shipped generator's pictures, and 1 is one standard deviation of theirs above it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from rewards import CENTRED, HERE, IMAGENET, imagenet_backbone, sentence_encoder
from safetensors.torch import load_file
from torch import nn

from diffpp_fast import ops


class Head(nn.Module):
    """Picture features [B, F] and sentences [B, 384] -> scores [B]."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.picture = nn.Linear(features, hidden)
        self.text = nn.Linear(384, hidden)
        self.score = nn.Sequential(nn.Linear(2 * hidden, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, features: torch.Tensor, sentences: torch.Tensor) -> torch.Tensor:
        """Pair features [..., F] with sentences [..., 384], broadcast: [...]."""
        picture, text = torch.broadcast_tensors(F.silu(self.picture(features)), self.text(sentences))
        return self.score(torch.cat([picture, picture * text], -1)).squeeze(-1)


@lru_cache(maxsize=1)
def autoencoder() -> nn.Module:
    """Return the example's own autoencoder, frozen."""
    from diffusers import AutoencoderKL

    loaded = AutoencoderKL.from_pretrained(HERE / "weights" / "vae", torch_dtype=torch.float32)
    return loaded.eval().requires_grad_(False).to(memory_format=torch.channels_last)


class AutoencoderFeatures(nn.Module):
    """Features of the frozen encoder of the example's own autoencoder: [B, 3, 64, 64] -> [B, 1408].

    Means and deviations over the picture of 32 channels of full size, 32 of half and twice 64 of a quarter of it, and
    the last ones' means over 4 x 4 cells.
    """

    SIZE = 2 * (32 + 32 + 64 + 64) + 16 * 64

    def __init__(self) -> None:
        super().__init__()
        self._encoder = [autoencoder().encoder]  # in a plain list for the reason given below
        self.register_buffer("mean", torch.zeros(self.SIZE))
        self.register_buffer("deviation", torch.ones(self.SIZE))

    def raw(self, pixels: torch.Tensor) -> torch.Tensor:
        encoder = self._encoder[0]
        layers = [encoder.conv_in(pixels.contiguous(memory_format=torch.channels_last))]
        for block in (*encoder.down_blocks[:2], nn.Sequential(encoder.down_blocks[2], encoder.mid_block)):
            layers.append(block(layers[-1]))
        found = [statistic for x in layers for statistic in (x.mean((2, 3)), x.std((2, 3)))]
        return torch.cat([*found, F.adaptive_avg_pool2d(layers[-1], 4).flatten(1)], 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return (self.raw(pixels) - self.mean) / self.deviation


class ImageNetFeatures(nn.Module):
    """Means and deviations over the picture of a frozen EfficientNet-Lite0's layers: [B, 3, H, W] -> [B, 1632]."""

    #: Blocks whose outputs are looked at: 24 channels at a quarter of the size, 40 at an eighth, 112 at a sixteenth.
    BLOCKS = (2, 4, 10)
    SIZE = 2 * (24 + 40 + 112) + 1280

    def __init__(self) -> None:
        super().__init__()
        # A plain list keeps the backbone out of the state dict: its weights come from their own package.
        self._backbone = [imagenet_backbone()]
        self.register_buffer("mean", torch.zeros(self.SIZE))
        self.register_buffer("deviation", torch.ones(self.SIZE))

    def raw(self, pixels: torch.Tensor) -> torch.Tensor:
        net = self._backbone[0]
        x = net._swish(net._bn0(net._conv_stem(pixels)))
        found = []
        for number, block in enumerate(net._blocks):
            x = block(x)
            if number in self.BLOCKS:
                found += [x.mean((2, 3)), x.std((2, 3))]
        return torch.cat([*found, net._swish(net._bn1(net._conv_head(x))).mean((2, 3))], 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return (self.raw(pixels) - self.mean) / self.deviation


class Member(nn.Module):
    """One network and the sizes at which it looks at a picture and at its mirror image."""

    def __init__(self, tower: nn.Module, head: Head, sizes: Sequence[int], normalisation: dict) -> None:
        super().__init__()
        self.tower, self.head = tower, head
        self.sizes, self.normalisation = tuple(sizes), normalisation

    def views(self, images: torch.Tensor) -> list[torch.Tensor]:
        views = [ops.reward_pixels(images, size, **self.normalisation) for size in self.sizes]
        return views + [view.flip(3) for view in views]

    def forward(self, images: torch.Tensor, sentences: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.head(self.tower(view), sentences) for view in self.views(images)]).mean(0)


class Judge(nn.Module):
    """The mean score of its members."""

    def __init__(self, members: Sequence[Member]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.register_buffer("offset", torch.zeros(len(members)))
        self.register_buffer("unit", torch.ones(len(members)))

    def by_member(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Return the scores of images [B, 3, H, W] in [-1, 1] and their B prompts: [members, B]."""
        sentences = sentence_encoder()(prompts).to(images.device)
        scores = torch.stack([member(images, sentences) for member in self.members])
        return (scores - self.offset.unsqueeze(1)) / self.unit.unsqueeze(1)

    def forward(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return self.by_member(images, prompts).mean(0)


def autoencoder_judge() -> Judge:
    return Judge([Member(AutoencoderFeatures(), Head(AutoencoderFeatures.SIZE, 96), (64,), CENTRED)])


def imagenet_judge() -> Judge:
    return Judge([Member(ImageNetFeatures(), Head(ImageNetFeatures.SIZE, 96), (96,), IMAGENET)])


def judge(weights: str = str(HERE / "weights" / "judge.safetensors")) -> Judge:
    """The reward to optimise."""
    return _load(imagenet_judge(), weights)


def second_judge(weights: str = str(HERE / "weights" / "second_judge.safetensors")) -> Judge:
    """The reward to hold out."""
    return _load(autoencoder_judge(), weights)


def _load(judge: Judge, weights: str | Path) -> Judge:
    judge.load_state_dict({name: tensor.float() for name, tensor in load_file(weights).items()})
    return judge
