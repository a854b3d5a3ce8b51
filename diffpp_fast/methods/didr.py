"""DIDR, Diff-Instruct with diffused reward (arXiv 2605.24001), the successor of Diff-Instruct++.

RLHF's optimum p(x0) ~ p_ref(x0) exp(r(x0) / beta) is diffused like any distribution. Its score at noise level t is that
of the reference plus

    s_r(x_t) = grad_{x_t} log E_{p_ref(x0 | x_t)}[exp(r(x0) / beta)],

so that the gradient of the integral of KL to it is

    dL/dx0 = alpha w(t) (score_fake - score_guided - s_r)  =  h(t) d - alpha w(t) s_r.

s_r is replaced by grad_{x_t} r(X(x_t)) / beta, where X are a few deterministic denoising steps of the reference; one
step gives the posterior mean. That is exact for a Gaussian reference and a linear reward. The derivation, the proxy's
bias for other rewards, and what of the paper could not be verified, are in docs/method.md.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass

import torch

from diffpp_fast import ops
from diffpp_fast.methods.base import Batch, Reward, RewardOutput, SampleGradient, is_finite
from diffpp_fast.methods.guidance import Guided, guide
from diffpp_fast.methods.integral_kl import IntegralKL
from diffpp_fast.methods.method import Noised
from diffpp_fast.methods.reward_term import RewardTerm
from diffpp_fast.methods.through_networks import without_parameters
from diffpp_fast.plain import per_sample
from diffpp_fast.prediction import MEAN_ABS_FLOOR, implied, score_scale


@dataclass(eq=False, repr=False)
class DIDR(IntegralKL):
    """Diff-Instruct towards RLHF's optimum: the reward acts at every noise level, as a score.

    The optimum does not depend on `weighting`; that of Diff-Instruct++ does.

    Beyond the arguments of `IntegralKL`:

    Args:
        reward: (x0, conditioning) -> [B] or a `RewardOutput`. It judges X(x_t), not the generator's sample, and is
            differentiated by x_t through the reference.
        reward_scale: a factor of the reward; with 0.0 it is evaluated and logged only.
        reward_clip: the most that a sample's reward term may be, in norms of its score gradient, as in `RewardTerm`.
        beta: the weight of the KL in max E[r] - beta KL(p || p_ref), above 0; the smaller, the stronger the reward.
        denoising_steps: K of X(x_t), calls of the reference per sample and pass, at times evenly spaced from t down.
            Guidance acts in each.

    Raises ValueError for a reward, beta or denoising_steps out of range.
    """

    takes_reward = True
    differentiates = ("reference",)

    reward: Reward | None = None
    reward_scale: float | None = 1.0
    _: KW_ONLY
    reward_clip: float | None = None
    beta: float = 1.0
    denoising_steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reward is None:
            raise ValueError("DIDR needs a reward: without one it is DiffInstruct")
        if not 0.0 < self.beta < math.inf:
            raise ValueError(f"beta must be above 0 and finite, got {self.beta}")
        if self.denoising_steps < 1:
            raise ValueError(f"denoising_steps must be at least 1, got {self.denoising_steps}")
        self.reward_term = RewardTerm(self.reward, self.reward_scale, self.reward_clip)
        self._refuse_large_gap_scale("the reward of DIDR", self.times)
        self._refuse_beyond_use("the reward term of DIDR", self._reward_scale, self.times)

    def _sample_gradient(self, batch: Batch, x0: torch.Tensor) -> SampleGradient:
        """h d - alpha w(t) s_r."""
        with torch.no_grad():
            at = self._noised(batch, x0)
        outputs: list[Guided] = []

        def denoise(x_t: torch.Tensor) -> torch.Tensor:
            at_x_t = at._replace(x_t=x_t)
            outputs.append(self._ask_reference(batch, at_x_t))
            return self._denoise(batch, at_x_t, outputs[0])

        with without_parameters([self.reference]):
            evaluated = self.reward_term.evaluate(batch, at.x_t, denoise)
        guided = outputs[0].detach()
        if evaluated is None or evaluated.gradient is None:
            _, found = self._score_gradient(batch, x0, at, guided)
            return self.reward_term.subtract(found, evaluated)
        return self._rewarded_gradient(batch, x0, at, guided, evaluated.rewards, evaluated.gradient)

    @torch.no_grad()
    def _rewarded_gradient(
        self,
        batch: Batch,
        x0: torch.Tensor,
        at: Noised,
        guided: Guided,
        rewards: RewardOutput,
        slope: torch.Tensor,
    ) -> SampleGradient:
        """Both terms in one pass over memory, with what there is to log from its sums: `slope` is dr/dx_t."""
        fake = self._ask_fake(batch, at)
        normalised = {"normalizer": "mean_abs", **self._target(x0, at)} if self.weighting == "mean_abs" else {}
        factor = self._scale(at.t, at.alpha, at.sigma, at.k)
        toward = self.reward_term.strength * self._reward_scale(at.t, at.alpha, at.sigma, at.k)
        gap = ops.score_gap(
            fake,
            guided.cond,
            guided.uncond,
            guidance_scale=guided.scale,
            scale=factor,
            reward_score=slope,
            # A sample whose reward is not finite has no reward term.
            reward_scale=toward.where(is_finite(rewards.values), math.nan),
            reward_clip=self.reward_term.clip,
            **normalised,
        )
        if gap.residual_abs is not None:
            divisor = gap.residual_abs.clamp(min=MEAN_ABS_FLOOR)
            factor, toward = factor / divisor, toward / divisor
        given_lengths, lengths = factor.abs() * gap.gap_sq.sqrt(), toward.abs() * gap.reward_sq.sqrt()
        defined = is_finite(lengths + rewards.values)
        # The sums of a sample that is left out are not finite.
        lengths = lengths.where(defined, 0.0)
        product = (factor * toward * gap.gap_dot_reward).where(defined, 0.0)
        share = None if self.reward_term.clip is None else gap.reward_share.where(defined, 1.0)
        about_gap = {
            "score_gap": (gap.gap_sq / slope[0].numel()).sqrt().mean(),
            "score_gradient_norm": given_lengths.mean(),
        }
        about_reward = self.reward_term.metrics(rewards, defined, lengths, product, given_lengths, share)
        return SampleGradient(gap.gradient, {**about_gap, **about_reward}, rewards)

    def _reward_scale(self, t: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Return alpha w(t) / beta = h(t) sigma^2 / (alpha k beta), but for the normaliser by which h is divided."""
        size = score_scale(self.schedule.prediction_type, alpha, sigma)
        return self._scale(t, alpha, sigma, k) * k.sign() / (size * self.beta)

    def _denoise(self, batch: Batch, at: Noised, guided: Guided) -> torch.Tensor:
        """X(x_t): the reference's own sample after `denoising_steps` steps of DDIM, the first with outputs at hand."""
        kind, x0 = self.schedule.prediction_type, at.x_t
        for left in range(self.denoising_steps, 0, -1):
            output = guided.cond if guided.uncond is None else guide(guided.cond, guided.uncond, guided.scale)
            alpha, sigma = (per_sample(each, at.x_t) for each in (at.alpha, at.sigma))
            x0, eps = implied(kind, output, at.x_t, alpha, sigma)
            if left > 1:
                # t (left - 1) / left of what is left: from the first t, evenly down.
                t = at.t * (left - 1) // left
                alpha, sigma, k = self.schedule.lookup(t)
                x_t = per_sample(alpha, x0) * x0 + per_sample(sigma, x0) * eps
                at = at._replace(x_t=x_t, t=t, alpha=alpha, sigma=sigma, k=k)
                guided = self._ask_reference(batch, at)
        return x0
