"""Figures of a generator in the demo: its pictures for all 200 captions, at latents that training never draws."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache

import torch
from rewards import PictureName, convolutional, imagenet

from diffpp_fast import Noise, ops
from diffpp_fast.networks import Denoiser
from diffpp_fast.training.build import Sampler
from diffpp_fast.training.grids import decode, sample_latents

#: Trainings of the example have seed 0; evaluation has another key altogether.
SEED = 20250101
BATCH = 50


@dataclass(frozen=True)
class Figures:
    """Means over the captions.

    Attributes:
        optimised: the convolutional reward, which the optimiser sees.
        held_out: the ImageNet reward, which it never sees.
        shuffled: the held-out reward of the same pictures with each other's prompts.
        retrieved: share of pictures whose own caption is the held-out reward's first of all captions.
        distance: kernel distance to the reference's samples (below).
        spread: per-element standard deviation over latents, mean over 8 captions: 0 where the latent is ignored.
    """

    optimised: float
    held_out: float
    shuffled: float
    retrieved: float
    distance: float
    spread: float

    def asdict(self) -> dict[str, float]:
        return asdict(self)


@lru_cache(maxsize=1)
def judges() -> tuple[PictureName, PictureName]:
    return convolutional().eval().requires_grad_(False), imagenet().eval().requires_grad_(False)


def generator_images(sampler: Sampler, prompts: list[str], *, first: int = 0) -> torch.Tensor:
    """One picture per prompt, from sample numbers first, first + 1, ...: [N, 3, 64, 64], about [-1, 1]."""
    samples = torch.arange(first, first + len(prompts))
    latents = sample_latents(sampler, prompts, samples, seed=SEED, shape=(4, 16, 16), batch=BATCH)
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
    judge = judges()[1]
    parts = [ops.reward_pixels(part.clamp(-1, 1), 96, **judge.normalisation) for part in images.split(BATCH)]
    return torch.cat([judge.tower.features(part) for part in parts])


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


@torch.no_grad()
def embed(reward: PictureName, images: torch.Tensor) -> list[torch.Tensor]:
    """One embedding [N, 128] for each of the reward's views."""
    parts = [reward.embed_images(part.clamp(-1, 1)) for part in images.split(BATCH)]
    return [torch.cat(view) for view in zip(*parts, strict=True)]


@torch.no_grad()
def score_images(images: torch.Tensor, prompts: list[str], reference: torch.Tensor) -> dict[str, float]:
    """All figures but `spread`, of one picture per prompt; `reference` [N, 1280] are features of its samples."""
    optimised, held_out = judges()
    judged = embed(held_out, images)
    first = held_out.similarities(judged, prompts).argmax(1)
    return {
        "optimised": optimised.score(embed(optimised, images), prompts).mean().item(),
        "held_out": held_out.score(judged, prompts).mean().item(),
        "shuffled": held_out.score(judged, prompts[1:] + prompts[:1]).mean().item(),
        "retrieved": (first == torch.arange(len(prompts))).float().mean().item(),
        "distance": kernel_distance(features(images), reference),
    }


def evaluate(sampler: Sampler, prompts: list[str], reference: torch.Tensor) -> tuple[Figures, torch.Tensor]:
    """The generator's figures and the pictures that they were taken of, [N, 3, 64, 64]."""
    images = generator_images(sampler, prompts)
    some = [prompt for prompt in prompts[:: len(prompts) // 8][:8] for _ in range(8)]
    spread = generator_images(sampler, some, first=10_000).reshape(8, 8, -1).std(1).mean().item()
    return Figures(**score_images(images, prompts, reference), spread=spread), images
