"""Floor 3: reward models, (images in [-1, 1], prompts) -> scores; transformers is imported when one is loaded."""

from diffpp_fast.rewards.base import ImageBatch, Preprocessing, Reward, Scorer, score
from diffpp_fast.rewards.clip_model import Clip
from diffpp_fast.rewards.combine import Margin, Mixture, Normalized
from diffpp_fast.rewards.factories import (
    aesthetic,
    clip,
    hpsv2,
    hpsv3,
    imagereward,
    load,
    load_clip,
    mixture,
    mps,
    pickscore,
    vqascore,
)
from diffpp_fast.rewards.text import PromptCache

__all__ = [
    "Clip",
    "ImageBatch",
    "Margin",
    "Mixture",
    "Normalized",
    "Preprocessing",
    "PromptCache",
    "Reward",
    "Scorer",
    "aesthetic",
    "clip",
    "hpsv2",
    "hpsv3",
    "imagereward",
    "load",
    "load_clip",
    "mixture",
    "mps",
    "pickscore",
    "score",
    "vqascore",
]
