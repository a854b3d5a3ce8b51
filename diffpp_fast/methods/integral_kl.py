"""The gradient of the integral of KL over noise levels, that of Diff-Instruct and what is built on it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from diffpp_fast import ops
from diffpp_fast.methods.base import Batch, SampleGradient, TimeFunction, check_choice
from diffpp_fast.methods.guidance import Guided
from diffpp_fast.methods.method import Method, Noised
from diffpp_fast.prediction import MEAN_ABS_FLOOR

Weighting = Literal["x0", "score", "unit", "mean_abs"]


@dataclass(eq=False, repr=False, kw_only=True)
class IntegralKL(Method):
    """A method whose gradient has the term h(t) d, with d = guided - fake.

    Beyond the arguments of `Method`:

    Args:
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
    def _score_gradient(
        self, batch: Batch, x0: torch.Tensor, at: Noised, guided: Guided, fake: torch.Tensor | None = None
    ) -> tuple[ops.ScoreGap, SampleGradient]:
        """h d with the reference's outputs at hand, or the TA's too, and what the operator says besides."""
        fake = self._ask_fake(batch, at) if fake is None else fake
        # Only the normaliser needs the target; without it nothing regenerates the noise.
        normalised = {"normalizer": "mean_abs", **self._target(x0, at)} if self.weighting == "mean_abs" else {}
        factor = self._scale(at.t, at.alpha, at.sigma, at.k)
        gap = ops.score_gap(fake, guided.cond, guided.uncond, guidance_scale=guided.scale, scale=factor, **normalised)
        distance, length = gap.gap_sq.sqrt(), factor.abs()
        if self.weighting == "mean_abs" and gap.residual_abs is not None:
            length = length / gap.residual_abs.clamp(min=MEAN_ABS_FLOOR)
        lengths = length * distance
        metrics = {
            "score_gap": distance.mean() / math.sqrt(gap.gradient[0].numel()),
            "score_gradient_norm": lengths.mean(),
        }
        return gap, SampleGradient(gap.gradient, metrics, lengths=lengths)

    def _scale(self, t: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        if self.weighting == "x0":
            return k
        if self.weighting in ("unit", "mean_abs"):
            return k.sign()
        # score_fake - score_guided = alpha k d / sigma^2, and x_t = alpha x0 + ... gives the second alpha.
        weight = self.weighting(t) if callable(self.weighting) else 1.0
        return alpha.square() * k / sigma.square() * weight
