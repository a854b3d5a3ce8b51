"""What all methods share: the roles, the samples and their noise levels, and the teaching assistant's loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch

from diffpp_fast import ops
from diffpp_fast.methods.base import (
    DIFFUSION,
    LATENT,
    TIMESTEP,
    Batch,
    Denoiser,
    Generator,
    StepOutput,
    TimeFunction,
    check_choice,
    inject_gradient,
    input_gradient,
    norms,
)
from diffpp_fast.noise import Noise
from diffpp_fast.precision import widen
from diffpp_fast.schedule import NoiseSchedule

FakeWeighting = Literal["prediction", "x0", "score"]


class Noised(NamedTuple):
    """Samples at a drawn noise level: x_t [B, ...], t, alpha and sigma [B], and the noise by its address."""

    x_t: torch.Tensor
    t: torch.Tensor
    alpha: torch.Tensor
    sigma: torch.Tensor
    noise: Noise


class Method(ABC):
    """Moves a one-step generator by a gradient on its samples, and keeps a teaching assistant (TA) on them.

    A method says what that gradient is, in `_sample_gradient`; everything else is the same for all.

    Args:
        generator: (z, conditioning) -> x0; gets gradient in `generator_loss` only.
        fake: the TA, (x_t, t, conditioning) -> prediction; gets gradient in `fake_loss` only.
        reference: the frozen model, called like `fake`; never gets gradient.
        schedule: noise levels and the prediction type that `fake` and `reference` share.
        guidance_scale: w of classifier-free guidance of the reference, in diffusers' convention: 1 is none. Authors who
            call 0 none mean w - 1. Anything but 1 needs `Batch.null_conditioning` and costs one more reference call.
        t_range: diffusion times [low, high) to draw from, uniformly; None is the whole schedule.
        fake_rounds: TA updates per generator update. The method does not act on it: its caller does.
        fake_weighting: lambda(t) of the TA's denoising loss: of the prediction itself (1), of the x0 that it implies
            (k^2), of the score (k^2 alpha^2 / sigma^4); or a function of t.
    """

    #: Whether the arguments reward, reward_scale and reward_clip are there.
    takes_reward: ClassVar[bool] = False
    #: Whether the generator's loss is differentiated through the TA and the reference, and not under no_grad.
    differentiates_networks: ClassVar[bool] = False

    def __init__(
        self,
        generator: Generator,
        fake: Denoiser,
        reference: Denoiser,
        schedule: NoiseSchedule,
        *,
        guidance_scale: float = 1.0,
        t_range: tuple[int, int] | None = None,
        fake_rounds: int = 1,
        fake_weighting: FakeWeighting | TimeFunction = "prediction",
    ) -> None:
        check_choice("fake_weighting", fake_weighting, get_args(FakeWeighting))
        if fake_rounds < 1:
            raise ValueError(f"fake_rounds must be at least 1, got {fake_rounds}")
        self.generator = generator
        self.fake = fake
        self.reference = reference
        self.schedule = schedule
        self.guidance_scale = guidance_scale
        self.t_range = self._times_within("t_range", t_range)
        self.fake_rounds = fake_rounds
        #: (losses [B], x0) -> d sum of losses / dx0, through the networks; a trainer that times the pass wraps it.
        self.differentiate = input_gradient
        self.fake_weighting = fake_weighting
        self._refuse_infinite("fake_weighting", fake_weighting, self._fake_weight)

    def fake_loss(self, batch: Batch) -> StepOutput:
        """Denoising score matching of the TA on fresh samples of the generator (scalar; gradient to the TA only)."""
        with torch.no_grad():
            x0 = self._sample(batch)
        loss = self._denoising_loss(batch, x0)
        return StepOutput(loss, {"loss": loss.detach()})

    def generator_loss(self, batch: Batch) -> StepOutput:
        """A scalar whose gradient by x0[b] is the method's gradient on that sample / B (to the generator only).

        Its value is half the mean squared norm of these gradients, see `inject_gradient`.
        """
        x0 = self._sample(batch)
        gradient, metrics = self._sample_gradient(batch, x0.detach())
        loss = inject_gradient(x0, gradient)
        samples = x0.detach()
        metrics.update(loss=loss.detach(), x0_mean=samples.mean(), x0_std=samples.std(correction=0))
        return StepOutput(loss, metrics)

    @abstractmethod
    def _sample_gradient(self, batch: Batch, x0: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The gradient on each sample [B, ...], summed over elements and without graph, and what to log of it."""

    def _sample(self, batch: Batch) -> torch.Tensor:
        z = batch.noise(LATENT).normal(batch.shape)
        x0 = widen(self.generator(z, batch.conditioning))
        if x0.shape != z.shape:
            raise ValueError(f"the generator turned z of shape {tuple(z.shape)} into x0 of shape {tuple(x0.shape)}")
        return x0

    def _noised(
        self,
        batch: Batch,
        x0: torch.Tensor,
        *,
        t_range: tuple[int, int] | None = None,
        streams: tuple[int, int] = (TIMESTEP, DIFFUSION),
    ) -> Noised:
        """x0 at times of `t_range` (the method's, if None), drawn with the noise from these two streams."""
        times, diffusion = streams
        t = batch.noise(times).integers(*(t_range or self.t_range))
        alpha, sigma = self.schedule.coefficients(t)
        noise = batch.noise(diffusion)
        return Noised(ops.add_noise(x0, alpha, sigma, noise), t, alpha, sigma, noise)

    def _denoising_loss(self, batch: Batch, x0: torch.Tensor) -> torch.Tensor:
        at = self._noised(batch, x0)
        return ops.denoising_loss(
            self._ask_fake(batch, at),
            x0,
            at.noise,
            at.alpha,
            at.sigma,
            prediction_type=self.schedule.prediction_type,
            weight=self._fake_weight(at.t, at.alpha, at.sigma),
        )

    def _ask_fake(self, batch: Batch, at: Noised) -> torch.Tensor:
        return self._ask(self.fake, at, batch.conditioning)

    def _ask_reference(self, batch: Batch, at: Noised) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The reference's outputs with the prompt and, if guided, without."""
        cond = self._ask(self.reference, at, batch.conditioning)
        if self.guidance_scale == 1.0:
            return cond, None
        return cond, self._ask(self.reference, at, self._null(batch, "guidance_scale", self.guidance_scale))

    @staticmethod
    def _ask(network: Denoiser, at: Noised, conditioning: Any) -> torch.Tensor:
        """A prediction in float32 at least: what is computed with it, guidance and gap, is not rounded again."""
        return widen(network(at.x_t, at.t, conditioning))

    def _null(self, batch: Batch, name: str, scale: float) -> Any:
        """The unconditional conditioning, which a scale that is not 1 needs."""
        if batch.null_conditioning is None:
            raise ValueError(f"{name} {scale} needs Batch.null_conditioning, which is None")
        return batch.null_conditioning

    def _gap_metrics(self, gap_sq: torch.Tensor, gradient: torch.Tensor) -> dict[str, torch.Tensor]:
        """The root mean square of d, and the norm of the gradient that is made of it."""
        elements = gradient[0].numel()
        return {
            "score_gap": (gap_sq / elements).sqrt().mean(),
            "score_gradient_norm": norms(gradient).mean(),
        }

    def _times_within(self, name: str, t_range: tuple[int, int] | None) -> tuple[int, int]:
        low, high = (0, len(self.schedule)) if t_range is None else t_range
        if not 0 <= low < high <= len(self.schedule):
            raise ValueError(f"{name} must lie within [0, {len(self.schedule)}) and be non-empty, got [{low}, {high})")
        return low, high

    def _refuse_infinite(self, name: str, choice: object, weights_of: Any) -> None:
        """Named weightings divide by alpha or sigma, which are 0 at the ends of some schedules."""
        t = torch.arange(*self.t_range)
        weights = None if callable(choice) else weights_of(t, *self.schedule.coefficients(t))
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
