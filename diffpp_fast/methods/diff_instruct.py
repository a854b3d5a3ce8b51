"""Diff-Instruct (arXiv 2305.18455) and Diff-Instruct++ (arXiv 2410.18881).

Both move a one-step generator by a known gradient on its samples, with networks under no_grad:

    dL/dx0 = h(t) d - reward_scale dr/dx0,    d = uncond + guidance_scale (cond - uncond) - fake

and both keep a "teaching assistant" (the fake score) on the generator's current samples by denoising score matching.
The derivation, and what of the paper could not be verified, is in docs/method.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch

from diffpp_fast import ops
from diffpp_fast.methods.base import (
    DIFFUSION,
    LATENT,
    TIMESTEP,
    Batch,
    Denoiser,
    Generator,
    Reward,
    StepOutput,
    inject_gradient,
)
from diffpp_fast.schedule import NoiseSchedule

Weighting = Literal["x0", "score", "unit", "mean_abs"]
FakeWeighting = Literal["prediction", "x0", "score"]
#: t [B] int64 -> one weight per sample [B]
TimeFunction = Callable[[torch.Tensor], torch.Tensor]


class DiffInstruct:
    """Distils a reference diffusion model into a one-step generator by the integral of KL over noise levels.

    Args:
        generator: (z, conditioning) -> x0; gets gradient in `generator_loss` only.
        fake: the TA, (x_t, t, conditioning) -> prediction; gets gradient in `fake_loss` only.
        reference: the frozen model, called like `fake`; never gets gradient.
        schedule: noise levels and the prediction type that `fake` and `reference` share.
        guidance_scale: w of classifier-free guidance in diffusers' convention: 1 is none, and w is an implicit
            reward of scale w - 1. Anything but 1 needs `Batch.null_conditioning` and costs one more reference call.
        weighting: h(t) of the gradient. "x0": h = k, so that dL/dx0 = X_fake - X_guided; "score": w(t) = 1 before
            the difference of scores; "unit": h = sign k; "mean_abs": sign k / mean|r| (DMD's normaliser); or a
            function w(t) for the difference of scores.
        t_range: diffusion times [low, high) to draw from, uniformly; None is the whole schedule.
        fake_rounds: TA updates per generator update (K_TA). The method does not act on it: its caller does.
        fake_weighting: lambda(t) of the TA's denoising loss: of the prediction itself (1), of the x0 that it implies
            (k^2), of the score (k^2 alpha^2 / sigma^4); or a function of t.
    """

    def __init__(
        self,
        generator: Generator,
        fake: Denoiser,
        reference: Denoiser,
        schedule: NoiseSchedule,
        *,
        guidance_scale: float = 1.0,
        weighting: Weighting | TimeFunction = "x0",
        t_range: tuple[int, int] | None = None,
        fake_rounds: int = 1,
        fake_weighting: FakeWeighting | TimeFunction = "prediction",
    ) -> None:
        _check_choice("weighting", weighting, get_args(Weighting))
        _check_choice("fake_weighting", fake_weighting, get_args(FakeWeighting))
        low, high = (0, len(schedule)) if t_range is None else t_range
        if not 0 <= low < high <= len(schedule):
            raise ValueError(f"t_range must lie within [0, {len(schedule)}) and be non-empty, got [{low}, {high})")
        if fake_rounds < 1:
            raise ValueError(f"fake_rounds must be at least 1, got {fake_rounds}")
        self.generator = generator
        self.fake = fake
        self.reference = reference
        self.schedule = schedule
        self.guidance_scale = guidance_scale
        self.weighting = weighting
        self.t_range = (low, high)
        self.fake_rounds = fake_rounds
        self.fake_weighting = fake_weighting
        self._refuse_infinite_weights()

    def fake_loss(self, batch: Batch) -> StepOutput:
        """Denoising score matching of the TA on fresh samples of the generator (scalar; gradient to the TA only)."""
        with torch.no_grad():
            x0 = self._sample(batch)
        t, alpha, sigma = self._times(batch)
        noise = batch.noise(DIFFUSION)
        x_t = ops.add_noise(x0, alpha, sigma, noise)
        prediction = self.fake(x_t, t, batch.conditioning)
        loss = ops.denoising_loss(
            prediction,
            x0,
            noise,
            alpha,
            sigma,
            prediction_type=self.schedule.prediction_type,
            weight=self._fake_weight(t, alpha, sigma),
        )
        return StepOutput(loss, {"loss": loss.detach()})

    def generator_loss(self, batch: Batch) -> StepOutput:
        """The generator's loss: its gradient by x0[b] is (h d - reward_scale dr/dx0)[b] / B (to the generator only)."""
        x0 = self._sample(batch)
        gradient, metrics = self._score_gradient(batch, x0.detach())
        reward_gradient = self._reward_gradient(batch, x0.detach(), gradient, metrics)
        if reward_gradient is not None:
            gradient = gradient - reward_gradient
        loss = inject_gradient(x0, gradient)
        samples = x0.detach().float()
        metrics.update(loss=loss.detach(), x0_mean=samples.mean(), x0_std=samples.std())
        return StepOutput(loss, metrics)

    def _sample(self, batch: Batch) -> torch.Tensor:
        z = batch.noise(LATENT).normal(batch.shape)
        x0 = self.generator(z, batch.conditioning)
        if x0.shape != z.shape:
            raise ValueError(f"the generator turned z of shape {tuple(z.shape)} into x0 of shape {tuple(x0.shape)}")
        return x0

    def _times(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        t = batch.noise(TIMESTEP).integers(*self.t_range)
        return t, *self.schedule.coefficients(t)

    @torch.no_grad()
    def _score_gradient(self, batch: Batch, x0: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """h d per element, and the norms to log."""
        t, alpha, sigma = self._times(batch)
        noise = batch.noise(DIFFUSION)
        x_t = ops.add_noise(x0, alpha, sigma, noise)
        fake = self.fake(x_t, t, batch.conditioning)
        cond = self.reference(x_t, t, batch.conditioning)
        uncond = None
        if self.guidance_scale != 1.0:
            if batch.null_conditioning is None:
                raise ValueError(f"guidance_scale {self.guidance_scale} needs Batch.null_conditioning, which is None")
            uncond = self.reference(x_t, t, batch.null_conditioning)
        # Only the normaliser needs the target; without it nothing regenerates the noise.
        target: dict[str, Any] = {}
        if self.weighting == "mean_abs":
            target = {"normalizer": "mean_abs", "x0": x0, "noise": noise, "alpha": alpha, "sigma": sigma}
        gap = ops.score_gap(
            fake,
            cond,
            uncond,
            guidance_scale=self.guidance_scale,
            scale=self._scale(t, alpha, sigma),
            prediction_type=self.schedule.prediction_type,
            **target,
        )
        elements = x0[0].numel()
        return gap.gradient, {
            "score_gap": (gap.gap_sq / elements).sqrt().mean(),
            "score_gradient_norm": _norms(gap.gradient).mean(),
        }

    def _reward_gradient(
        self, batch: Batch, x0: torch.Tensor, score_gradient: torch.Tensor, metrics: dict[str, torch.Tensor]
    ) -> torch.Tensor | None:
        """What the reward subtracts from the gradient: nothing in plain Diff-Instruct."""
        return None

    def _scale(self, t: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        k = self.schedule.gap_scale(t)
        if self.weighting == "x0":
            return k
        if self.weighting in ("unit", "mean_abs"):
            return k.sign()
        # score_fake - score_guided = alpha k d / sigma^2, and x_t = alpha x0 + ... gives the second alpha.
        weight = self.weighting(t) if callable(self.weighting) else 1.0
        return alpha.square() * k / sigma.square() * weight

    def _refuse_infinite_weights(self) -> None:
        """Named weightings divide by alpha or sigma, which are 0 at the ends of some schedules."""
        t = torch.arange(*self.t_range)
        coefficients = self.schedule.coefficients(t)
        for name, weights_of in (("weighting", self._scale), ("fake_weighting", self._fake_weight)):
            choice = getattr(self, name)
            weights = None if callable(choice) else weights_of(t, *coefficients)
            if weights is not None and not weights.isfinite().all():
                bad = t[~weights.isfinite()].tolist()
                raise ValueError(f"{name} {choice!r} is not finite at t = {bad}: leave such times out by t_range")

    def _fake_weight(self, t: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor | None:
        if callable(self.fake_weighting):
            return self.fake_weighting(t)
        if self.fake_weighting == "prediction":
            return None
        k_squared = self.schedule.gap_scale(t).square()
        return k_squared if self.fake_weighting == "x0" else k_squared * alpha.square() / sigma**4


class DiffInstructPP(DiffInstruct):
    """Diff-Instruct with a reward: aligns the generator with human preference while the KL keeps it near the reference.

    Args, beyond those of `DiffInstruct`:
        reward: (x0, conditioning) -> [B]; None is plain Diff-Instruct. Differentiated by x0 only.
        reward_scale: alpha_rew. With 0 the reward is still evaluated and logged, without gradient.
        reward_clip: the most that the norm of a sample's reward term alpha_rew dr/dx0 may be, in norms of its score
            term h d: a longer one is shortened, in its direction. None: as long as it is. By sample, so that it
            depends on no other of the batch. The norms that are logged are those before.

    The reward's graph is differentiated and freed inside `generator_loss`, so that only one vector of x0's size of it
    meets the generator's own backward pass.
    """

    def __init__(
        self,
        generator: Generator,
        fake: Denoiser,
        reference: Denoiser,
        schedule: NoiseSchedule,
        reward: Reward | None = None,
        reward_scale: float = 0.0,
        guidance_scale: float = 1.0,
        weighting: Weighting | TimeFunction = "x0",
        t_range: tuple[int, int] | None = None,
        fake_rounds: int = 1,
        fake_weighting: FakeWeighting | TimeFunction = "prediction",
        reward_clip: float | None = None,
    ) -> None:
        super().__init__(
            generator,
            fake,
            reference,
            schedule,
            guidance_scale=guidance_scale,
            weighting=weighting,
            t_range=t_range,
            fake_rounds=fake_rounds,
            fake_weighting=fake_weighting,
        )
        if reward is None and reward_scale != 0.0:
            raise ValueError(f"reward_scale is {reward_scale}, but no reward was given")
        if reward_clip is not None and not reward_clip > 0.0:
            raise ValueError(f"reward_clip must be above 0, or None, got {reward_clip}")
        self.reward = reward
        self.reward_scale = reward_scale
        self.reward_clip = reward_clip

    def _reward_gradient(
        self, batch: Batch, x0: torch.Tensor, score_gradient: torch.Tensor, metrics: dict[str, torch.Tensor]
    ) -> torch.Tensor | None:
        if self.reward is None:
            return None
        optimised = self.reward_scale != 0.0
        with torch.set_grad_enabled(optimised):
            x0 = x0.requires_grad_(optimised)
            reward = self.reward(x0, batch.conditioning)
        if reward.shape != batch.samples.shape:
            raise ValueError(
                f"the reward must give one number per sample, shape ({len(batch)},), got {tuple(reward.shape)}"
            )
        metrics["reward"] = reward.detach().float().mean()
        metrics["reward_std"] = reward.detach().float().std(correction=0)
        if not optimised:
            return None
        if not reward.requires_grad:
            raise ValueError("the reward has no gradient by x0: it must be differentiable, or reward_scale 0")
        (gradient,) = torch.autograd.grad(reward.sum(), x0)
        gradient = self.reward_scale * gradient.float()
        norms = _norms(gradient)
        metrics["reward_gradient_norm"] = norms.mean()
        metrics["gradient_cosine"] = _cosines(score_gradient, -gradient).mean()
        if self.reward_clip is not None:
            share = self.reward_clip * _norms(score_gradient) / norms
            metrics["reward_clipped"] = (share < 1.0).float().mean()
            # A sample without a reward gradient has nothing to shorten.
            share = torch.where(norms == 0.0, 1.0, share).clamp(max=1.0)
            gradient = gradient * share.reshape(-1, *[1] * (gradient.dim() - 1))
        return gradient


def _check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known and not callable(value):
        raise ValueError(f"{name} must be one of {', '.join(known)} or a function of t, got {value!r}")


def _norms(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.float().flatten(1).norm(dim=1)


def _cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(a.float().flatten(1), b.float().flatten(1), dim=1)
