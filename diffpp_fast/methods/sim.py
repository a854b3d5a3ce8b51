"""SIM, score implicit matching (arXiv 2410.16794), and Diff-Instruct* (arXiv 2410.20898), which is SIM with a reward.

The distance of the two scores' distributions is E w(t) sqrt(|y|^2 + c^2) with y = s_fake - s_guided. Its gradient, with
the distribution of x_t held fixed, is that of the loss per sample

    -w(t) <y / sqrt(|y|^2 + c^2), s_fake(x_t) - score of (x_t given x0)>,

differentiated through both networks and x_t. Derived and checked numerically (docs/method.md); of the papers' settings
neither w(t) nor c could be verified.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Literal, get_args

import torch

from diffpp_fast import ops
from diffpp_fast.methods.base import Batch, Reward, SampleGradient, TimeFunction, check_choice
from diffpp_fast.methods.method import Method, Noised
from diffpp_fast.methods.passes import predict
from diffpp_fast.methods.reward_term import RewardTerm
from diffpp_fast.methods.through_networks import gradient_through
from diffpp_fast.prediction import score_scale

ScoreWeighting = Literal["x0", "score"]
Guidance = Literal["inside", "outside"]


@dataclass(eq=False, repr=False, kw_only=True)
class SIM(Method):
    """Distils by the pseudo-Huber distance between the scores of generator and reference.

    Beyond the arguments of `Method`:

    Args:
        weighting: w(t). "score": 1; "x0": sigma^2 / alpha, so that for large gaps the loss is in units of x0; or a
            function of t.
        huber_c: c, in units of the whole sample's score: where the distance turns from squared into plain.
    """

    differentiates = ("fake", "reference")

    weighting: ScoreWeighting | TimeFunction = "x0"
    huber_c: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("weighting", self.weighting, get_args(ScoreWeighting))
        if not 0.0 < self.huber_c < math.inf:
            raise ValueError(f"huber_c must be above 0 and finite, got {self.huber_c}")
        self._check_weighting("weighting", self.weighting, self._weight, self.times)
        self._refuse_beyond_use(f"the loss of {type(self).__name__}", self._slope, self.times)

    def _sample_gradient(self, batch: Batch, x0: torch.Tensor) -> SampleGradient:
        """The gradient of w(t) `ops.sim_loss` through both networks and the target."""
        return self._divergence(batch, x0)[0]

    def _divergence(self, batch: Batch, x0: torch.Tensor) -> tuple[SampleGradient, torch.Tensor]:
        """Return the gradient, and the reference's output with the prompt."""
        outputs: dict[str, torch.Tensor] = {}

        def losses_of(x0: torch.Tensor) -> torch.Tensor:
            at = self._noised(batch, x0)
            fake, (cond, uncond, scale) = self._ask(batch, at)
            gap = ops.score_gap(fake, cond, uncond, guidance_scale=scale)
            outputs.update(gap_sq=gap.gap_sq, cond=cond.detach())
            losses = ops.sim_loss(
                fake, cond, uncond, **self._target(x0, at), guidance_scale=scale, huber_c=self.huber_c
            )
            return self._weight(at.t, at.alpha, at.sigma, at.k) * losses

        losses, gradient = gradient_through((self.fake, self.reference), losses_of, x0, self.differentiate)
        metrics = {"divergence_loss": losses.mean(), **self._gap_metrics(outputs["gap_sq"], gradient)}
        return SampleGradient(gradient, metrics), outputs["cond"]

    def _weight(self, t: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """w(t)."""
        if callable(self.weighting):
            return self.weighting(t)
        return sigma.square() / alpha if self.weighting == "x0" else torch.ones_like(sigma)

    def _slope(self, t: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Return what the loss of a large gap grows by with the gap of outputs: a score's share of it, times w(t)."""
        return score_scale(self.schedule.prediction_type, alpha, sigma) * self._weight(t, alpha, sigma, k)


@dataclass(eq=False, repr=False)
class DiffInstructStar(SIM):
    """SIM with a reward: human preference, while a distance of scores keeps the generator near the reference.

    Guidance inside the divergence pulls towards the guided reference. Outside, the divergence is to the unguided one,
    and guidance is the reward whose gradient is alpha w(t) (s_cond - s_uncond), with scale guidance_scale - 1. For the
    KL of Diff-Instruct++ these are one thing; here they are two, since this divergence's gradient is not linear in the
    reference's score.

    Beyond the arguments of `SIM`, and reward, reward_scale and reward_clip, which are those of `RewardTerm`:

    Args:
        guidance: "inside" or "outside".
    """

    takes_reward = True

    reward: Reward | None = None
    reward_scale: float | None = None
    _: KW_ONLY
    guidance: Guidance = "inside"
    reward_clip: float | None = None

    def __post_init__(self) -> None:
        self.outside_guidance_scale = 1.0
        if self.guidance == "outside":
            self.guidance_scale, self.outside_guidance_scale = 1.0, self.guidance_scale
        super().__post_init__()
        if self.guidance not in get_args(Guidance):
            raise ValueError(f"guidance must be one of {', '.join(get_args(Guidance))}, got {self.guidance!r}")
        if self.guidance == "outside" and self.guidance_rescale != 0.0:
            raise ValueError(
                "guidance_rescale changes the guided output, which guidance='outside' does not form: leave it 0"
            )
        self.reward_term = RewardTerm(self.reward, self.reward_scale, self.reward_clip)

    def _sample_gradient(self, batch: Batch, x0: torch.Tensor) -> SampleGradient:
        """SIM's gradient, less those of the two rewards."""
        found, cond = self._divergence(batch, x0)
        if self.outside_guidance_scale != 1.0:
            guidance = self._guidance_gradient(batch, self._noised(batch, x0), cond)
            found = found._replace(gradient=found.gradient - guidance)
        return self.reward_term.subtract(found, self.reward_term.evaluate(batch, x0))

    @torch.no_grad()
    def _guidance_gradient(self, batch: Batch, at: Noised, cond: torch.Tensor) -> torch.Tensor:
        """(guidance_scale - 1) alpha w(t) (s_cond - s_uncond), from outputs: their gap times -alpha k / sigma^2."""
        null = self._null(batch, "guidance_scale", self.outside_guidance_scale)
        weight = at.alpha.square() * at.k / at.sigma.square() * self._weight(at.t, at.alpha, at.sigma, at.k)
        (uncond,) = predict([self._pass_of("reference", at, null)], self.batched_passes)
        # d = cond - uncond in the place of guided - fake.
        return ops.score_gap(uncond, cond, scale=(1.0 - self.outside_guidance_scale) * weight).gradient
