"""Diff-Instruct (arXiv 2305.18455) and Diff-Instruct++ (arXiv 2410.18881).

Both move a one-step generator by a known gradient on its samples, with networks under no_grad:

    dL/dx0 = h(t) d - reward_scale dr/dx0,    d = uncond + guidance_scale (cond - uncond) - fake

and both keep a "teaching assistant" (the fake score) on the generator's current samples by denoising score matching.
The derivation, and what of the paper could not be verified, is in docs/method.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from diffpp_fast.methods.base import Batch, Denoiser, Generator, Reward, SampleGradient, TimeFunction
from diffpp_fast.methods.integral_kl import IntegralKL, Weighting
from diffpp_fast.methods.method import FakeWeighting, Options
from diffpp_fast.methods.reward_term import RewardTerm
from diffpp_fast.schedule import NoiseSchedule

if TYPE_CHECKING:
    from typing_extensions import Unpack


class DiffInstruct(IntegralKL):
    """Distils a reference diffusion model into a one-step generator by the integral of KL over noise levels.

    Guidance is an implicit reward here: w equals adding the reward log p_ref(x_t | c) / p_ref(x_t) with scale w - 1.

    Its arguments are those of `IntegralKL`.
    """

    @torch.no_grad()
    def _sample_gradient(self, batch: Batch, x0: torch.Tensor) -> SampleGradient:
        """h d."""
        at = self._noised(batch, x0)
        fake, guided = self._ask(batch, at)
        return self._score_gradient(batch, x0, at, guided, fake)[1]


class DiffInstructPP(DiffInstruct):
    """Diff-Instruct with a reward: aligns the generator with human preference while the KL keeps it near the reference.

    Beyond the arguments of `IntegralKL` it takes reward, reward_scale and reward_clip, those of `RewardTerm`. Without a
    reward this is Diff-Instruct.
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
        found = super()._sample_gradient(batch, x0)
        return self.reward_term.subtract(found, self.reward_term.evaluate(batch, x0))
