"""Figures of a generator in the demo: its pictures for all 200 captions, at latents that training never draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from pairs import grey
from preference import Judge, judge, second_judge
from rewards import PictureName, captions, imagenet

from diffpp_fast import Noise, ops
from diffpp_fast.networks import Denoiser
from diffpp_fast.training.build import Sampler
from diffpp_fast.training.grids import decode, sample_latents

#: Trainings of the example have seed 0; evaluation has another key altogether.
SEED = 20250101
#: Everything was chosen at latents of this seed, by every fifth caption; the demo's table never uses that seed.
CHOOSING_SEED = 404
CHOOSING_STRIDE = 5
BATCH = 50


@lru_cache(maxsize=1)
def judges() -> tuple[Judge, Judge, PictureName]:
    """Return the judge to optimise, the one held out, and the one that knows names."""
    optimised, held_out, names = (build().eval().requires_grad_(False) for build in (judge, second_judge, imagenet))
    return optimised, held_out, names


def generator_images(sampler: Sampler, prompts: list[str], *, first: int = 0, seed: int = SEED) -> torch.Tensor:
    """One picture per prompt, from sample numbers first, first + 1, ...: [N, 3, 64, 64], about [-1, 1]."""
    samples = torch.arange(first, first + len(prompts))
    latents = sample_latents(sampler, prompts, samples, seed=seed, shape=(4, 16, 16), batch=BATCH)
    return decode(sampler, latents, batch=BATCH)


@torch.no_grad()
def reference_images(
    sampler: Sampler, reference: Denoiser, scheduler: object, prompts: list[str], *, guidance_scale: float, steps: int
) -> torch.Tensor:
    """DDIM samples of the reference with classifier-free guidance: [N, 3, 64, 64]."""
    parts = []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        scheduler.set_timesteps(steps)  # type: ignore[attr-defined]
        x = Noise(SEED, torch.arange(start, start + len(part)), stream=0).normal((4, 16, 16))
        conditional, empty = sampler.encode(part), sampler.encode([""]).expand(len(part))
        for t in scheduler.timesteps:  # type: ignore[attr-defined]
            times = t.expand(len(x))
            uncond = reference(x, times, empty)
            prediction = uncond + guidance_scale * (reference(x, times, conditional) - uncond)
            x = scheduler.step(prediction, t, x).prev_sample  # type: ignore[attr-defined]
        parts.append(x)
    return decode(sampler, torch.cat(parts), batch=BATCH)


@torch.no_grad()
def features(images: torch.Tensor) -> torch.Tensor:
    """ImageNet features of pictures: [N, 1280]."""
    names = judges()[2]
    parts = [ops.reward_pixels(part.clamp(-1, 1), 96, **names.normalisation) for part in images.split(BATCH)]
    return torch.cat([names.tower.features(part) for part in parts])


def kernel_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The squared MMD with kernel (x.y / D + 1)^3, the kernel inception distance's (arXiv 1801.01401).

    a, b: [N, D], one sample for each of the same N captions. Pairs of one caption are left out of all three means, so
    that two samples of the same generator are at distance 0 on average, and sometimes a little below.
    """
    a, b = a.double(), b.double()

    def mean_of_other_captions(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        kernel = (x @ y.T / x.shape[1] + 1) ** 3
        return (kernel.sum() - kernel.diagonal().sum()) / (len(x) * (len(x) - 1))

    within = mean_of_other_captions(a, a) + mean_of_other_captions(b, b)
    return float(within - 2 * mean_of_other_captions(a, b))


def subject(images: torch.Tensor) -> torch.Tensor:
    """Return where a picture [N, 3, H, W] isn't its white ground: [N, 1, H, W], 0 or 1."""
    return (images.amin(1, keepdim=True) < 0.8).float()


def edge_energy(images: torch.Tensor) -> torch.Tensor:
    """Return the mean squared luminance step between neighbours inside the subject, per picture: [N].

    Both neighbours are the subject's, so that neither its outline nor a hole in it counts.
    """
    luminance, inside = grey(images.clamp(-1, 1)), subject(images)
    total, count = 0.0, 0.0
    for axis in (2, 3):
        both = inside.narrow(axis, 1, 63) * inside.narrow(axis, 0, 63)
        total = total + (luminance.diff(dim=axis).square() * both).sum((1, 2, 3))
        count = count + both.sum((1, 2, 3))
    return total / count.clamp(min=1)


def saturation(images: torch.Tensor) -> torch.Tensor:
    """Return the mean distance of the largest channel from the smallest over the subject, in [0, 2]: [N]."""
    images, inside = images.clamp(-1, 1), subject(images)
    chroma = images.amax(1, keepdim=True) - images.amin(1, keepdim=True)
    return (chroma * inside).sum((1, 2, 3)) / inside.sum((1, 2, 3)).clamp(min=1)


#: What is measured of every picture, in the table's order. Nobody trained the last two.
BY_PICTURE = ("optimised", "held_out", "own_first", "edges", "saturation")


@torch.no_grad()
def score_images(images: torch.Tensor, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return the figures of BY_PICTURE of N pictures with their N prompts, each [N]."""
    optimised, held_out, names = judges()
    found = []
    for start in range(0, len(images), BATCH):
        part, own = images[start : start + BATCH].clamp(-1, 1), list(prompts[start : start + BATCH])
        first = names.similarities(names.embed_images(part), captions()).argmax(1)
        right = torch.tensor([captions()[place] == name for place, name in zip(first.tolist(), own, strict=True)])
        scores = (optimised(part, own), held_out(part, own), right.float(), edge_energy(part), saturation(part))
        found.append(torch.stack(scores))
    return dict(zip(BY_PICTURE, torch.cat(found, 1), strict=True))


@dataclass(frozen=True)
class Measured:
    """A generator's figures.

    Attributes:
        by_picture: of BY_PICTURE, each [latents, captions].
        distance: kernel distance of the first picture of each caption to the reference's samples; None without them.
        spread: per-element standard deviation over latents, mean over 8 captions: 0 where the latent is ignored.
        images: the first picture of each caption, [captions, 3, 64, 64].
    """

    by_picture: dict[str, torch.Tensor]
    distance: float | None
    spread: float
    images: torch.Tensor

    def means(self) -> dict[str, float]:
        found = {name: values.mean().item() for name, values in self.by_picture.items()}
        return {**found, "spread": self.spread, **({} if self.distance is None else {"distance": self.distance})}


def evaluate(
    sampler: Sampler, prompts: list[str], reference: torch.Tensor | None = None, *, latents: int = 4, seed: int = SEED
) -> Measured:
    """Measure a generator at `latents` latents for every prompt; `reference` [N, 1280] are features of its samples."""
    drawn = [generator_images(sampler, prompts, first=len(prompts) * number, seed=seed) for number in range(latents)]
    parts = [score_images(images, prompts) for images in drawn]
    some = [prompt for prompt in prompts[:: len(prompts) // 8][:8] for _ in range(8)]
    spread = generator_images(sampler, some, first=10_000, seed=seed).reshape(8, 8, -1).std(1).mean().item()
    distance = None if reference is None else kernel_distance(features(drawn[0]), reference)
    return Measured(
        {name: torch.stack([part[name] for part in parts]) for name in BY_PICTURE}, distance, spread, drawn[0]
    )


class Estimate(NamedTuple):
    """A mean over captions and the half-width of its 95 % interval."""

    mean: float
    half: float


def estimate(values: torch.Tensor) -> Estimate:
    """Estimate the mean of values [latents, captions]: latents of one caption are one observation."""
    by_caption = values.mean(0)
    return Estimate(by_caption.mean().item(), 1.96 * by_caption.std().item() / len(by_caption) ** 0.5)


def paired_difference(one: Measured, other: Measured, name: str) -> Estimate:
    """Estimate how much more a figure is of one generator, at the same captions and latents."""
    return estimate(one.by_picture[name] - other.by_picture[name])


def win_rate(one: Measured, other: Measured, chosen: list[int] | slice = slice(None)) -> Estimate:
    """Estimate how often the held-out judge prefers one generator's picture to the other's; a draw is half a win."""
    gap = (one.by_picture["held_out"] - other.by_picture["held_out"])[:, chosen]
    return estimate((gap.sign() + 1) / 2)
