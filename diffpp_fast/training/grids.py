"""Pictures to look at: a generator's samples of given prompts, laid out in a grid."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffpp_fast.methods import Batch
from diffpp_fast.methods.base import LATENT, finite_statistics
from diffpp_fast.networks import Conditioning
from diffpp_fast.networks.few_step import draw_options
from diffpp_fast.noise import Noise
from diffpp_fast.training.build import Run, Sampler
from diffpp_fast.training.config import Config
from diffpp_fast.training.durable import move
from diffpp_fast.training.layout import columns_of
from diffpp_fast.training.prompts import PromptSource
from diffpp_fast.training.rewards import LatentReward

#: Grid pictures have these sample numbers: training counts up from 0 and never gets there.
FIRST_GRID_SAMPLE = 2**62


@torch.no_grad()
def sample_latents(
    sampler: Sampler, prompts: Sequence[str], samples: torch.Tensor, *, seed: int, shape: tuple[int, ...], batch: int
) -> torch.Tensor:
    """One sample per prompt.

    Args:
        prompts: N of them.
        samples: int64 [N] on the generator's device, the sample numbers whose latents are used, and whose noise.
        seed: of those.
        shape: of one latent.
        batch: how many are computed at a time.

    Returns float32 [N, *shape].
    """
    latents = []
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        noise = partial(Noise, seed, samples[part])
        conditioning = sampler.encode(prompts[part])
        drawn = draw_options(sampler.generator, noise)
        latents.append(sampler.generator(noise(LATENT).normal(shape), conditioning, **drawn))
    return torch.cat(latents)


@torch.no_grad()
def decode(sampler: Sampler, latents: torch.Tensor, *, batch: int) -> torch.Tensor:
    """latents [N, C, h, w] -> images [N, 3, H, W], float32, about [-1, 1]."""
    assert sampler.decoder is not None
    return torch.cat([sampler.decoder(part).float() for part in latents.split(batch)])


class Grid:
    """The run's fixed prompts at fixed latents: always the same pictures, as the generator draws them now.

    Args:
        config: names the prompts, the seed and how many are computed at a time.
        run: the sampler, and the rewards that look at its pictures.
        prompts: of the run, for a number of them from the top.
        device: of the networks.
    """

    def __init__(self, config: Config, run: Run, prompts: PromptSource, device: torch.device) -> None:
        wanted = config.training.grid_prompts
        self.config = config
        self.run = run
        self.prompts = prompts[range(min(wanted, len(prompts)))] if isinstance(wanted, int) else list(wanted)
        self.samples = torch.arange(FIRST_GRID_SAMPLE, FIRST_GRID_SAMPLE + len(self.prompts), device=device)
        self.batch = config.training.micro_batch or config.training.global_batch

    def batches(self, null: Conditioning | None) -> Iterator[Batch]:
        """The grid's prompts and latents, for a method or a sampler.

        Args:
            null: the empty prompt's conditioning, of one sample, or None.
        """
        for part in self._parts():
            yield Batch(
                self.samples[part],
                self.run.sampler.encode(self.prompts[part]),
                seed=self.config.seed,
                shape=self.config.models.latent_shape,
                null_conditioning=None if null is None else null.expand(len(self.prompts[part])),
            )

    def draw(self) -> tuple[torch.Tensor, dict[str, float], list[str]]:
        """The pictures as one, [H, W, 3] uint8, the mean of each reward over them, as scalars to log, and troubles.

        What is not finite is in no mean, black in the picture, and a trouble, in words.
        """
        run = self.run
        latents = sample_latents(
            run.sampler,
            self.prompts,
            self.samples,
            seed=self.config.seed,
            shape=self.config.models.latent_shape,
            batch=self.batch,
        )
        images = decode(run.sampler, latents, batch=self.batch)
        named = {"grid/reward": run.reward, "grid/held_out": run.held_out}
        rewards = {name: reward for name, reward in named.items() if reward is not None}
        scores = {name: self._score(reward, images) for name, reward in rewards.items()}
        finite = {"the picture": images.flatten(1).isfinite().all(1)}
        finite.update({rewards[name].name: values.isfinite() for name, values in scores.items()})
        troubles = [
            f"{name} is not finite for {len(places)} of the grid's {len(self.prompts)} prompts: "
            + ", ".join(repr(self.prompts[place]) for place in places[:4])
            for name, flags in finite.items()
            if (places := (~flags).nonzero().flatten().tolist())
        ]
        means = {name: float(finite_statistics(values)[0]) for name, values in scores.items()}
        return tile(images, columns=columns_of(len(self.prompts))), means, troubles

    @torch.no_grad()
    def _score(self, reward: LatentReward, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([reward.score(images[part], self.prompts[part]).float() for part in self._parts()])

    def _parts(self) -> list[slice]:
        return [slice(start, start + self.batch) for start in range(0, len(self.prompts), self.batch)]


def tile(images: torch.Tensor, columns: int) -> torch.Tensor:
    """images [N, 3, H, W] about [-1, 1] -> one [rows H, columns W, 3] uint8 on the CPU; a short last row ends white."""
    return tile_bytes(to_bytes(images), columns)


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    """images [N, 3, H, W] about [-1, 1] -> uint8 on the CPU, of the same shape; NaN becomes 0."""
    return ((images.float().nan_to_num(-1.0).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def tile_bytes(pixels: torch.Tensor, columns: int) -> torch.Tensor:
    """pixels [N, 3, H, W] uint8 -> one [rows H, columns W, 3]; a short last row ends white."""
    count, channels, height, width = pixels.shape
    rows = -(-count // columns)
    missing = pixels.new_full((rows * columns - count, channels, height, width), 255)
    cells = torch.cat([pixels, missing]).view(rows, columns, channels, height, width)
    return cells.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, channels)


def write_png(path: Path, pixels: torch.Tensor, facts: Mapping[str, str] | None = None) -> None:
    """pixels: [H, W, 3] uint8; facts: text that goes into the file; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = PngInfo()
    for name, value in (facts or {}).items():
        text.add_itxt(name, value)
    # A link is replaced, and not what it points to.
    partial = path.with_name(f".{path.name}.partial")
    Image.fromarray(pixels.numpy()).save(partial, format="PNG", pnginfo=text)
    move(partial, path)
