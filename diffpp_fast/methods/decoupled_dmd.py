"""Decoupled DMD (arXiv 2511.22677): distribution matching and guidance, each at a noise level of its own.

DMD's gap is d = (cond - fake) + (w - 1)(cond - uncond): matching of distributions, and what the paper calls CFG
augmentation. Here the first is taken at one noise level and the second at another, drawn independently. The split was
read in the paper; its normalisers were not, so here each term has DMD's, of the unguided reference at its own level.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffpp_fast import ops
from diffpp_fast.methods.base import SECOND_DIFFUSION, SECOND_TIMESTEP, Batch, SampleGradient
from diffpp_fast.methods.method import Method, Noised, mean_abs_lengths
from diffpp_fast.methods.passes import predict


@dataclass(eq=False, repr=False, kw_only=True)
class DecoupledDMD(Method):
    """DMD whose guidance looks at other noise levels than its matching of distributions.

    Beyond the arguments of `Method`:

    Args:
        t_range: of the matching term, and of the TA's loss where it has none of its own.
        guidance_t_range: of the guidance term; None is `t_range`. The paper takes levels noisier than the generator's
            input, which for a one-step generator are all.
    """

    fake_rounds: int = 5
    guidance_t_range: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guidance_rescale != 0.0:
            raise ValueError("guidance_rescale changes the guided output, which decoupled DMD never forms: leave it 0")
        self.guidance_times = self.times
        if self.guidance_t_range is not None:
            self.guidance_times = self._times("guidance_t_range", self.guidance_t_range, self.time_distribution)
            self._refuse_pure_noise(self.guidance_times)
        self.guidance_t_range = self.guidance_times.range

    @torch.no_grad()
    def _sample_gradient(self, batch: Batch, x0: torch.Tensor) -> SampleGradient:
        """sign k (cond - fake) / mean|r| at one level, plus sign k (w - 1)(cond - uncond) / mean|r| at another.

        r = cond - target, each time at the term's own level.
        """
        at = self._noised(batch, x0)
        passes = [*self._fake_passes(batch, at), self._pass_of("reference", at, batch.conditioning)]
        fake, cond = predict(passes, self.batched_passes)
        matching, lengths = self._normalised(x0, at, cond, fake, 1.0)
        metrics = self._gap_metrics(matching.gap_sq, matching.gradient, lengths)
        if self.guidance_scale == 1.0:
            return SampleGradient(matching.gradient, metrics)
        null = self._null(batch, "guidance_scale", self.guidance_scale)
        at = self._noised(batch, x0, times=self.guidance_times, streams=(SECOND_TIMESTEP, SECOND_DIFFUSION))
        passes = [self._pass_of("reference", at, given) for given in (batch.conditioning, null)]
        cond, uncond = predict(passes, self.batched_passes)
        guidance, lengths = self._normalised(x0, at, cond, uncond, self.guidance_scale - 1.0)
        metrics["guidance_gradient_norm"] = lengths.mean()
        return SampleGradient(matching.gradient + guidance.gradient, metrics)

    def _normalised(
        self, x0: torch.Tensor, at: Noised, cond: torch.Tensor, other: torch.Tensor, factor: float
    ) -> tuple[ops.ScoreGap, torch.Tensor]:
        """factor sign k (cond - other) / mean|cond - target|, and its norms [B]."""
        scale = factor * at.k.sign()
        gap = ops.score_gap(other, cond, scale=scale, normalizer="mean_abs", **self._target(x0, at))
        return gap, mean_abs_lengths(scale, gap)
