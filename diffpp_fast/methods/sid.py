"""SiD, score identity distillation (arXiv 2404.04057), and SiD-LSG, its long and short guidance (arXiv 2406.01561).

The generator's loss per sample, in terms of the x0 that the networks imply,

    |.| sum (X_guided - X_fake) [(X_guided - x0) - sid_alpha (X_guided - X_fake)] / mean|x0 - X_guided|,

with no gradient through the denominator. Everything else is differentiated: the explicit x0, and both networks at x_t.
Checked against the published code of SiD-LSG; docs/method.md says where this differs from it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from diffpp_fast import ops
from diffpp_fast.methods.base import Batch, SampleGradient
from diffpp_fast.methods.method import Method, Noised
from diffpp_fast.methods.passes import Pass
from diffpp_fast.methods.through_networks import gradient_through


@dataclass(eq=False, repr=False, kw_only=True)
class SiD(Method):
    """Distils by matching scores through an identity that holds under the generator's own distribution.

    Beyond the arguments of `Method`:

    Args:
        sid_alpha: alpha of `ops.sid_loss`; 1 in SiD-LSG's scripts.
        fake_guidance_scale: w of classifier-free guidance of the TA, in its own loss and in the generator's: the guided
            output is what denoises the samples. SiD-LSG calls the scales kappa, and its scripts set all of them to 2:
            pass it here and as `guidance_scale`. 1, the default, is a TA that is never guided. Anything else needs
            `Batch.null_conditioning` and costs one more call of the TA in both losses; SiD-LSG then drops 10 % of the
            prompts, `prompt_dropout=0.1`.
    """

    differentiates = ("fake", "reference")

    fake_guidance_scale: float = 1.0
    sid_alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("fake_guidance_scale", self.fake_guidance_scale), ("sid_alpha", self.sid_alpha)):
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")
        self._refuse_large_gap_scale("SiD's loss", self.times)

    def _sample_gradient(self, batch: Batch, x0: torch.Tensor) -> SampleGradient:
        """The gradient of `ops.sid_loss` through both networks and the target."""
        gaps: list[torch.Tensor] = []

        def losses_of(x0: torch.Tensor) -> torch.Tensor:
            at = self._noised(batch, x0)
            fake, (cond, uncond, scale) = self._ask(batch, at)
            gaps.append(ops.score_gap(fake, cond, uncond, guidance_scale=scale).gap_sq)
            return ops.sid_loss(
                fake, cond, uncond, **self._target(x0, at), guidance_scale=scale, sid_alpha=self.sid_alpha
            )

        losses, gradient = gradient_through((self.fake, self.reference), losses_of, x0, self.differentiate)
        return SampleGradient(gradient, {"divergence_loss": losses.mean(), **self._gap_metrics(gaps[0], gradient)})

    def _fake_passes(self, batch: Batch, at: Noised) -> list[Pass]:
        passes = super()._fake_passes(batch, at)
        if self.fake_guidance_scale != 1.0:
            null = self._null(batch, "fake_guidance_scale", self.fake_guidance_scale)
            passes.append(self._pass_of("fake", at, null))
        return passes

    def _guided_fake(self, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        if len(outputs) == 1:
            return outputs[0]
        cond, uncond = outputs
        return torch.lerp(uncond, cond, self.fake_guidance_scale)
