"""Diff-Instruct (arXiv 2305.18455) and Diff-Instruct++ (arXiv 2410.18881).

Both move a one-step generator by a known gradient on its samples, with networks under no_grad:

    dL/dx0 = h(t) d - reward_scale dr/dx0,    d = uncond + guidance_scale (cond - uncond) - fake

and both keep a "teaching assistant" (the fake score) on the generator's current samples by denoising score matching.
The derivation, and what of the paper could not be verified, is in docs/method.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch

from diffpp_fast import ops
from diffpp_fast.methods.base import Batch, Denoiser, Generator, Reward, SampleGradient, TimeFunction, check_choice
from diffpp_fast.methods.method import FakeWeighting, Method, Options
from diffpp_fast.methods.reward_term import RewardTerm
from diffpp_fast.schedule import NoiseSchedule

if TYPE_CHECKING:
    from typing_extensions import Unpack

Weighting = Literal["x0", "score", "unit", "mean_abs"]


@dataclass(eq=False, repr=False, kw_only=True)
class DiffInstruct(Method):
    """Distils a reference diffusion model into a one-step generator by the integral of KL over noise levels.

    Guidance is an implicit reward here: w equals adding the reward log p_ref(x_t | c) / p_ref(x_t) with scale w - 1.

    Args, beyond those of `Method`:
        weighting: h(t) of the gradient. "x0": h = k, so that dL/dx0 = X_fake - X_guided; "score": w(t) = 1 before
            the difference of scores; "unit": h = sign k; "mean_abs": sign k / mean|r| (DMD's normaliser); or a
            function w(t) for the difference of scores.
    """

    weighting: Weighting | TimeFunction = "x0"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("weighting", self.weighting, get_args(Weighting))
        self._check_weighting("weighting", self.weighting, self._scale, self.times)
        if self.weighting == "x0":
            self._refuse_large_gap_scale("weighting 'x0'", self.times)

    @torch.no_grad()
    def _sample_gradient(self, batch: Batch, x0: torch.Tensor) -> SampleGradient:
        """h d."""
        at = self._noised(batch, x0)
        fake = self._ask_fake(batch, at)
        cond, uncond, scale = self._ask_reference(batch, at)
        # Only the normaliser needs the target; without it nothing regenerates the noise.
        normalised = {"normalizer": "mean_abs", **self._target(x0, at)} if self.weighting == "mean_abs" else {}
        factor = self._scale(at.t, at.alpha, at.sigma)
        gap = ops.score_gap(fake, cond, uncond, guidance_scale=scale, scale=factor, **normalised)
        return SampleGradient(gap.gradient, self._gap_metrics(gap.gap_sq, gap.gradient))

    def _scale(self, t: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        k = self.schedule.gap_scale(t)
        if self.weighting == "x0":
            return k
        if self.weighting in ("unit", "mean_abs"):
            return k.sign()
        # score_fake - score_guided = alpha k d / sigma^2, and x_t = alpha x0 + ... gives the second alpha.
        weight = self.weighting(t) if callable(self.weighting) else 1.0
        return alpha.square() * k / sigma.square() * weight


class DiffInstructPP(DiffInstruct):
    """Diff-Instruct with a reward: aligns the generator with human preference while the KL keeps it near the reference.

    Args, beyond those of `DiffInstruct`: reward, reward_scale and reward_clip, those of `RewardTerm`. Without a reward
    this is Diff-Instruct.
    """

    takes_reward = True

    def __init__(
        self,
        generator: Generator,
        fake: Denoiser,
        reference: Denoiser,
        schedule: NoiseSchedule,
        reward: Reward | None = None,
        reward_scale: float | None = None,
        guidance_scale: float = 1.0,
        weighting: Weighting | TimeFunction = "x0",
        t_range: tuple[int, int] | None = None,
        fake_rounds: int = 1,
        fake_weighting: FakeWeighting | TimeFunction = "prediction",
        reward_clip: float | None = None,
        **options: Unpack[Options],
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
            **options,
        )
        self.reward_term = RewardTerm(reward, reward_scale, reward_clip)

    def _sample_gradient(self, batch: Batch, x0: torch.Tensor) -> SampleGradient:
        """h d - reward_scale dr/dx0."""
        return self.reward_term.subtract(super()._sample_gradient(batch, x0), batch, x0)
