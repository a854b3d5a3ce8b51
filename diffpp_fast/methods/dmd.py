"""DMD2, improved distribution matching distillation (arXiv 2405.14867).

The distribution-matching gradient on a sample is (X_fake - X_guided) / mean|x0 - X_guided|. The TA learns several
rounds per generator step ("two time scales"), and a discriminator on the TA's features can pull towards real latents.
Checked against the published code; docs/method.md says where this differs from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F

from diffpp_fast import ops
from diffpp_fast.methods.base import (
    REAL_DIFFUSION,
    SECOND_DIFFUSION,
    SECOND_TIMESTEP,
    Batch,
    Discriminator,
    SampleGradient,
    StepOutput,
    norms,
    per_sample,
)
from diffpp_fast.methods.method import Method, Noised, mean_abs_lengths
from diffpp_fast.methods.outputs import check_differentiable, check_per_sample
from diffpp_fast.methods.through_networks import gradient_through
from diffpp_fast.precision import widen

Normalizer = Literal["sample", "batch"]


@dataclass(eq=False, repr=False, kw_only=True)
class DMD2(Method):
    """Distribution matching with the published normaliser; without a discriminator it needs no images.

    Beyond the arguments of `Method`:

    Args:
        fake_rounds: 5, as in the published scripts for SDXL; those for Stable Diffusion 1.5 have 10.
        normalizer: mean|x0 - X_guided| is taken over each sample ("sample", as published), or over all samples of the
            update ("batch"), as FastVideo does with those that a GPU computes at a time. Who splits an update takes the
            mean of `normalizers` over all of it first, and gives that to every part as `Batch.normalizer`.
        normalizer_floor: the least that the normaliser may be, in units of x0. None is 1e-6; for "sample" that of
            mean|r| instead, in one pass with the gradient.
        discriminator: (x_t, t, conditioning) -> logits [B], on features of the TA; needs `Batch.real`. It learns in
            `fake_loss`, so its own parameters belong into the TA's optimizer. networks.MiddleBlockDiscriminator is one.
        gan_weight: of softplus(-logit) in the generator's loss, per sample, against the sum over elements of the
            distribution-matching gradient. The published weight stands against its mean: multiply it by the elements.
        fake_gan_weight: of softplus(logit of generated) + softplus(-logit of real) in the TA's loss; 1e-2 as published.
        gan_t_range: diffusion times at which the discriminator looks, each equally often; None is `t_range`.
    """

    fake_rounds: int = 5
    normalizer: Normalizer = "sample"
    normalizer_floor: float | None = None
    discriminator: Discriminator | None = None
    gan_weight: float = 1.0
    fake_gan_weight: float = 1e-2
    gan_t_range: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalizer not in get_args(Normalizer):
            raise ValueError(f"normalizer must be one of {', '.join(get_args(Normalizer))}, got {self.normalizer!r}")
        if self.normalizer_floor is not None and not self.normalizer_floor > 0.0:
            raise ValueError(f"normalizer_floor must be above 0, or None, got {self.normalizer_floor}")
        if self.normalizer_floor is None and self.normalizer == "batch":
            self.normalizer_floor = 1e-6
        self.gan_times = self._times("gan_t_range", self.gan_t_range or self.t_range)
        self.gan_t_range = self.gan_times.range
        if self.normalizer_floor is not None:  # else k cancels but for its sign
            self._refuse_large_gap_scale("the normalizer", self.times)

    @property
    def normalizes_update(self) -> bool:
        return self.normalizer == "batch"

    @torch.no_grad()
    def normalizers(self, batch: Batch) -> torch.Tensor:
        """mean|x0 - X_guided| of each sample, [B]."""
        x0 = self._sample(batch)
        at = self._noised(batch, x0)
        cond, uncond, scale = self._ask_reference(batch, at)
        gap = ops.score_gap(cond, cond, uncond, guidance_scale=scale, **self._target(x0, at))
        return self._distance(at, gap)

    def _fake_loss(self, batch: Batch) -> StepOutput:
        """The TA's denoising loss and, where there is a discriminator, its own (gradient to both of them only)."""
        if self.discriminator is None:
            return super()._fake_loss(batch)
        if batch.real is None or batch.real.shape != (len(batch), *batch.shape):
            got = None if batch.real is None else tuple(batch.real.shape)
            raise ValueError(
                f"the discriminator needs Batch.real, {(len(batch), *batch.shape)} real latents, got {got}"
            )
        x0 = self._fake_samples(batch)
        denoising = self._denoising_loss(batch, x0)
        generated, real = self._logits(batch, x0, SECOND_DIFFUSION), self._logits(batch, batch.real, REAL_DIFFUSION)
        adversarial = (F.softplus(generated) + F.softplus(-real)).mean()
        loss = denoising + self.fake_gan_weight * adversarial
        metrics = {
            "denoising_loss": denoising,
            "gan_loss": adversarial,
            "logit": generated.mean(),
            "real_logit": real.mean(),
        }
        return StepOutput(loss, {name: value.detach() for name, value in {"loss": loss, **metrics}.items()})

    def _sample_gradient(self, batch: Batch, x0: torch.Tensor) -> SampleGradient:
        """(X_fake - X_guided) / mean|x0 - X_guided|, and what pulls the discriminator's logits up."""
        gradient, gap_sq, lengths = self._matching_gradient(batch, x0)
        metrics = self._gap_metrics(gap_sq, gradient, lengths)
        if self.discriminator is None:
            return SampleGradient(gradient, metrics, lengths=lengths)
        losses, adversarial = gradient_through(
            (self.fake, self.discriminator),
            lambda x0: F.softplus(-self._logits(batch, x0, SECOND_DIFFUSION)),
            x0,
            self.differentiate,
        )
        adversarial = self.gan_weight * adversarial
        metrics.update(gan_loss=losses.mean(), gan_gradient_norm=norms(adversarial).mean())
        return SampleGradient(gradient + adversarial, metrics)

    @torch.no_grad()
    def _matching_gradient(self, batch: Batch, x0: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The gradient of distribution matching, and per sample sum d^2 and the gradient's norm."""
        at = self._noised(batch, x0)
        fake, (cond, uncond, scale) = self._ask(batch, at)
        # Over one sample k cancels but for its sign.
        fused = self.normalizer_floor is None
        factor = at.k.sign() if fused else at.k
        gap = ops.score_gap(
            fake,
            cond,
            uncond,
            guidance_scale=scale,
            scale=factor,
            normalizer="mean_abs" if fused else None,
            **self._target(x0, at),
        )
        if self.normalizer_floor is None:
            return gap.gradient, gap.gap_sq, mean_abs_lengths(factor, gap)
        distance = self._distance(at, gap)
        if self.normalizer == "batch":
            mean = distance.mean() if batch.normalizer is None else batch.normalizer
            distance = mean.expand_as(distance)
        divisor = distance.clamp(min=self.normalizer_floor)
        lengths = factor.abs() / divisor * gap.gap_sq.sqrt()
        return gap.gradient / per_sample(divisor, gap.gradient), gap.gap_sq, lengths

    def _distance(self, at: Noised, gap: ops.ScoreGap) -> torch.Tensor:
        """mean|x0 - X_guided|, [B]."""
        assert gap.residual_abs is not None  # the target was given
        return at.k.abs() * gap.residual_abs

    def _logits(self, batch: Batch, x0: torch.Tensor, stream: int) -> torch.Tensor:
        """Return logits of latents at a noise level of their own: generated and real ones share the times."""
        assert self.discriminator is not None
        at = self._noised(batch, x0, times=self.gan_times, streams=(SECOND_TIMESTEP, stream))
        logits = check_per_sample("the discriminator", self.discriminator(at.x_t, at.t, batch.conditioning), x0)
        if x0.requires_grad:
            check_differentiable("the discriminator", logits, "x_t")
        return widen(logits)
