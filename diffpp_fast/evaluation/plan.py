"""The plan of an evaluation: prompts, and the addresses of their latents, which are the same for every model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from diffpp_fast.evaluation.models import Source
from diffpp_fast.evaluation.prompts import Prompt

#: Trainings begin with seed 0: evaluation has another key altogether, so that no training has drawn its latents.
SEED = 20250101
#: Between the sample numbers of a prompt's pictures, so that more of them leave those that were there as they are.
STRIDE = 2**32


class Place(NamedTuple):
    """A picture to draw: the prompt's number and text, which of its pictures, and the sample number of its latent."""

    number: int
    prompt: Prompt
    image: int
    sample: int


@dataclass(frozen=True)
class Plan:
    """A plan of what is drawn, by whom and where.

    Attributes:
        sources: the models, in the order of the tables; differences are also taken in it.
        prompts, prompt_file: of all models, and where they are from.
        device: of everything.
        images_per_prompt: image k of prompt p has the sample number first_sample + p + k 2^32.
        seed, first_sample: of the latents.
        batch: pictures that are drawn and scored at a time.
        keep_images: write the pictures.
    """

    sources: Sequence[Source]
    prompts: Sequence[Prompt]
    prompt_file: str
    device: torch.device
    images_per_prompt: int = 1
    seed: int = SEED
    first_sample: int = 0
    batch: int = 8
    keep_images: bool = True

    def batches(self) -> Iterator[list[Place]]:
        """All pictures of a model, prompt by prompt."""
        each = self.images_per_prompt
        total = len(self.prompts) * each
        for start in range(0, total, self.batch):
            numbers = [divmod(at, each) for at in range(start, min(start + self.batch, total))]
            yield [
                Place(number, self.prompts[number], image, self.first_sample + number + image * STRIDE)
                for number, image in numbers
            ]
