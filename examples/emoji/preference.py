"""Two preference judges of different backbones: one to optimise, one to hold out.

A judge gives a picture and its prompt a score; of two pictures it prefers A to B with probability sigmoid(score of A -
score of B) (Bradley and Terry). It has learnt that from pairs (train_judges.py). `judge` looks at features of a frozen
EfficientNet-Lite0 that ImageNet trained. `second_judge` is an ensemble of two small convolutional networks, trained
from scratch, each averaged over its own views; it has seen other views, other samples and other faults. Both share the
sentence encoder (MiniLM) and nothing else. A score of 0 is the mean of the shipped generator's pictures, and 1 is one
standard deviation of theirs above it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from rewards import CENTRED, HERE, IMAGENET, Residual, imagenet_backbone, sentence_encoder
from safetensors.torch import load_file
from torch import nn

from diffpp_fast import ops

TEXT = 64


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


class ConvolutionalFeatures(nn.Sequential):
    """[B, 3, H, W] -> [B, 80]; any size from 32 up."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 3, stride=2, padding=1),
            Residual(16),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            Residual(32),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            Residual(64),
            nn.Conv2d(64, 80, 3, stride=2, padding=1),
            Residual(80),
            nn.GroupNorm(8, 80),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )


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


def convolutional_judge() -> Judge:
    return Judge([Member(ConvolutionalFeatures(), Head(80, TEXT), sizes, CENTRED) for sizes in ((64, 44), (56, 50))])


def imagenet_judge() -> Judge:
    return Judge([Member(ImageNetFeatures(), Head(ImageNetFeatures.SIZE, 96), (96,), IMAGENET)])


def judge(weights: str = str(HERE / "weights" / "judge.safetensors")) -> Judge:
    """The reward to optimise."""
    return _load(imagenet_judge(), weights)


def second_judge(weights: str = str(HERE / "weights" / "second_judge.safetensors")) -> Judge:
    """The reward to hold out."""
    return _load(convolutional_judge(), weights)


def _load(judge: Judge, weights: str | Path) -> Judge:
    judge.load_state_dict({name: tensor.float() for name, tensor in load_file(weights).items()})
    return judge
