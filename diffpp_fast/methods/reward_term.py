"""A reward's share of the gradient on the samples, for the methods that take one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from diffpp_fast.methods.base import (
    Batch,
    Reward,
    RewardOutput,
    SampleGradient,
    finite_statistics,
    input_gradient,
    is_finite,
    norms,
    per_sample,
)
from diffpp_fast.methods.outputs import check_per_sample
from diffpp_fast.precision import widen

#: A product of two lengths below it counts as this: one of the vectors is 0, and so is the cosine.
SMALLEST = 1e-30


class Evaluated(NamedTuple):
    """The rewards of a batch, and their gradient [B, ...]; None where it is not wanted, since the scale is 0."""

    rewards: RewardOutput
    gradient: torch.Tensor | None


class RewardTerm:
    """Subtracts scale dR/dx0 from a gradient on the samples.

    The reward's graph is differentiated and freed in here, so that only one vector of x0's size of it meets the
    generator's own backward pass.

    A sample whose reward, or whose reward's gradient, is not finite gets no reward term; its other gradient stays, and
    nothing changes for the others. The share of such samples is logged as `reward_undefined`.

    Args:
        reward: (x0, conditioning) -> [B] or a `RewardOutput`, or None. Differentiated by x0 only.
        scale: alpha_rew; a reward needs one. With 0.0 it is still evaluated and logged, without gradient.
        clip: the most that the norm of a sample's reward term may be, in norms of the gradient that it is subtracted
            from: a longer one is shortened, in its direction. None: as long as it is. By sample, so that it depends on
            no other of the batch. The norms that are logged are those before.
    """

    def __init__(self, reward: Reward | None, scale: float | None, clip: float | None = None) -> None:
        if reward is None and scale:
            raise ValueError(f"reward_scale is {scale}, but no reward was given")
        if reward is not None and scale is None:
            raise ValueError("a reward needs its reward_scale; with 0.0 it is evaluated and logged only")
        if scale is not None and not math.isfinite(scale):
            raise ValueError(f"reward_scale must be finite, got {scale}")
        if clip is not None and not clip > 0.0:
            raise ValueError(f"reward_clip must be above 0, or None, got {clip}")
        self.reward = reward
        self.scale = 0.0 if scale is None else scale
        self.clip = clip
        #: What the scale is multiplied by now: a number, or a scalar tensor that its owner writes to in place.
        self.factor: float | torch.Tensor = 1.0
        #: (reward [B], x) -> d sum of rewards / dx; a trainer that times the pass wraps it.
        self.differentiate = input_gradient
        #: Whether mean and spread of a batch's rewards are logged; a trainer that does so by updates takes it back.
        self.describes = True

    @property
    def strength(self) -> float | torch.Tensor:
        """The scale times the factor that a schedule gives it."""
        return self.scale * self.factor

    def evaluate(
        self, batch: Batch, x: torch.Tensor, sample_of: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> Evaluated | None:
        """Return the rewards of a batch and their gradient; None without a reward.

        Args:
            batch: for the conditioning.
            x: [B, ...], the tensor that the gradient is by.
            sample_of: x -> the samples that the reward judges, differentiable; None: x itself.
        """
        if self.reward is None:
            return None
        optimised = self.scale != 0.0
        with torch.set_grad_enabled(optimised):
            x = x.detach().requires_grad_(optimised)
            samples = x if sample_of is None else sample_of(x)
            output = self.reward(samples, batch.conditioning)
            output = output if isinstance(output, RewardOutput) else RewardOutput(output)
            reward = check_per_sample("the reward", output.values, x)
        # A reward may use its tensor again.
        told = output._replace(values=reward.detach().to(torch.float32, copy=True))
        if not optimised:
            return Evaluated(told, None)
        if not reward.requires_grad:
            raise ValueError("the reward has no gradient by x0: it must be differentiable, or reward_scale 0")
        return Evaluated(told, self.differentiate(reward, x))

    def subtract(self, given: SampleGradient, evaluated: Evaluated | None) -> SampleGradient:
        """Return a gradient [B, ...] less the reward's term, with the rewards and what there is to log of them."""
        if evaluated is None:
            return given
        gradient, metrics = given.gradient, dict(given.metrics)
        rewards, slope = evaluated
        if slope is None:
            return SampleGradient(gradient, metrics | self._statistics(rewards), rewards)
        term = self.strength * widen(slope)
        lengths, given_lengths = norms(term), norms(gradient) if given.lengths is None else given.lengths
        # A length is finite where all of its elements are.
        defined = is_finite(lengths + rewards.values)
        term, lengths = term.where(per_sample(defined, term), 0.0), lengths.where(defined, 0.0)
        product = torch.linalg.vecdot(widen(gradient).flatten(1), term.flatten(1))
        # A sample without a reward gradient has nothing to shorten.
        share = None if self.clip is None else (self.clip * given_lengths / lengths).where(lengths != 0.0, 1.0)
        metrics |= self.metrics(rewards, defined, lengths, product, given_lengths, share)
        if share is not None:
            term = term * per_sample(share.clamp(max=1.0), term)
        return SampleGradient(gradient - term, metrics, rewards)

    def metrics(
        self,
        rewards: RewardOutput,
        defined: torch.Tensor,
        lengths: torch.Tensor,
        product: torch.Tensor,
        given_lengths: torch.Tensor,
        share: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        """Return what there is to log of a term that is subtracted from a gradient.

        Args:
            rewards: of the samples.
            defined: [B], whether the sample has a reward term.
            lengths: [B], the term's norm before it is shortened, 0 where there is none.
            product: [B], gradient times term.
            given_lengths: [B], the norm of the gradient.
            share: [B], below 1 where the term is shortened; None without a clip.
        """
        by_sample = {
            "reward_undefined": torch.where(defined, 0.0, 1.0),
            "reward_gradient_norm": lengths,
            "gradient_cosine": -product / (given_lengths * lengths).clamp(min=SMALLEST),
        }
        if share is not None:
            by_sample["reward_clipped"] = torch.where(share < 1.0, 1.0, 0.0)
        means = torch.stack(list(by_sample.values())).mean(1)
        return {**self._statistics(rewards), **dict(zip(by_sample, means.unbind(), strict=True))}

    def _statistics(self, rewards: RewardOutput) -> dict[str, torch.Tensor]:
        if not self.describes:
            return {}
        mean, std = finite_statistics(rewards.values)
        return {"reward": mean, "reward_std": std}
