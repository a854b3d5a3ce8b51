"""Pictures by address: a function of weights, prompt, seed and sample number, and files that say so themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from diffpp_fast.errors import ConfigurationError, NonFiniteError
from diffpp_fast.evaluation.models import LoadedModel, ModelSource
from diffpp_fast.evaluation.prompts import Prompt
from diffpp_fast.training.grids import decode, sample_latents, to_bytes
from diffpp_fast.user_paths import refuse_no_folder
from diffpp_fast.version import __version__

#: Trainings begin with seed 0: evaluation has another key altogether, so that no training has drawn its latents.
SEED = 20250101
#: The distance between the sample numbers of a prompt's pictures: more of them leave the first ones as they are.
STRIDE = 2**32


class PictureAddress(NamedTuple):
    """A picture to draw: the prompt and its number, which of its pictures, and the sample number of its noise."""

    number: int
    prompt: Prompt
    image: int
    sample: int


@dataclass(frozen=True)
class EvaluationPlan:
    """The pictures of an evaluation. Their prompts and latents are the same for every model.

    Attributes:
        sources: the models, in the order of the tables; differences are also taken in it.
        prompts, prompt_file: every model's prompts, and where they are from.
        device: where everything is computed.
        images_per_prompt: image k of prompt p has the sample number first_sample + p + k 2^32.
        seed, first_sample: the latents' address.
        batch: pictures that are drawn and scored at a time.
        keep_images: write the pictures.
        stream: encode all prompts ahead, by streamed text encoders.
        embeddings: of the prompts, in place of text encoders.
    """

    sources: Sequence[ModelSource]
    prompts: Sequence[Prompt]
    prompt_file: str
    device: torch.device
    images_per_prompt: int = 1
    seed: int = SEED
    first_sample: int = 0
    batch: int = 8
    keep_images: bool = True
    stream: bool = False
    embeddings: Path | None = None

    def load(self, source: ModelSource) -> LoadedModel:
        """Load one of the models."""
        ahead = [prompt.text for prompt in self.prompts] if self.stream else None
        return source.load(self.device, ahead=ahead, embeddings=self.embeddings)

    def batches(self) -> Iterator[list[PictureAddress]]:
        """Yield the addresses of a model's pictures, prompt by prompt."""
        each = self.images_per_prompt
        total = len(self.prompts) * each
        for start in range(0, total, self.batch):
            numbers = [divmod(at, each) for at in range(start, min(start + self.batch, total))]
            yield [
                PictureAddress(number, self.prompts[number], image, self.first_sample + number + image * STRIDE)
                for number, image in numbers
            ]


def draw(model: LoadedModel, prompts: Sequence[str], samples: Sequence[int], *, seed: int) -> torch.Tensor:
    """Draw one picture for each of B prompts, in one batch.

    Args:
        model: the generator.
        prompts: B of them.
        samples: B sample numbers: picture b comes from the latent `Noise(seed, samples[b], stream=0)`, and further
            noise of that number where the generator draws some, whatever else is in the batch.
        seed: in [0, 2^64).

    Returns uint8 [B, 3, H, W] on the CPU: the pixels that go into files and are scored.

    Raises NonFiniteError, naming the prompt, for a picture with NaN or infinity.
    """
    sampler, device = model.sampler, next(model.sampler.trained.network.parameters()).device
    numbers = torch.tensor(samples, dtype=torch.int64, device=device)
    shape = model.config.models.latent_shape
    latents = sample_latents(sampler, prompts, numbers, seed=seed, shape=shape, batch=len(prompts))
    images = decode(sampler, latents, batch=len(prompts))
    for prompt, finite in zip(prompts, images.flatten(1).isfinite().all(1).tolist(), strict=True):
        if not finite:
            raise NonFiniteError(f"{model.name}: the picture of {prompt!r} is not finite")
    return to_bytes(images)


def facts_of(model: LoadedModel, prompt: str, *, seed: int, sample: int) -> dict[str, str]:
    """Return all that a picture is a function of, as text for its file."""
    return {
        "prompt": prompt,
        "seed": str(seed),
        "sample": str(sample),
        "model": model.origin,
        "weights": f"sha256:{model.fingerprint}",
        **{key: str(value) for key, value in model.config.models.generator.call().items()},
        "precision": model.config.precision,
        "Software": f"diffpp-fast {__version__}",
    }


def refuse_foreign_pictures(paths: Iterable[Path]) -> None:
    """Raise ConfigurationError for a file that a picture would replace and that is none of this program's.

    So it does where a folder for the pictures can't be made.
    """
    paths = list(paths)
    for folder in {path.parent for path in paths}:
        refuse_no_folder("pictures into", folder)
    for path in paths:
        try:
            own = not path.exists() or "weights" in read_facts(path)
        except (OSError, ValueError, SyntaxError):
            own = False
        if not own:
            raise ConfigurationError(
                f"{path} exists and was not drawn by diffpp-fast: choose another place for the pictures"
            )


def read_facts(path: Path) -> dict[str, str]:
    """Return what the PNG file at `path` says of how it was made, by name: prompt, seed, sample, weights, ..."""
    with Image.open(path) as image:
        image.load()  # text may come after the pixels
        text: dict[str, str] = getattr(image, "text", {})
        return {name: str(value) for name, value in text.items()}


def read_picture(path: Path) -> torch.Tensor:
    """Return a picture file as uint8 [3, H, W], RGB. Raises ConfigurationError for what can't be read."""
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ConfigurationError(f"can't read the picture {path}: {error}") from None
