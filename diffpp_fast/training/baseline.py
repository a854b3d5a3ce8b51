"""Mean and spread that latents should have: those of samples that the frozen reference draws itself, in a few steps."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from diffpp_fast.methods.base import LATENT, Batch, Denoiser
from diffpp_fast.methods.guidance import guide
from diffpp_fast.prediction import implied
from diffpp_fast.schedule import NoiseSchedule
from diffpp_fast.training.config import Config


@dataclass(frozen=True)
class Baseline:
    """Mean and standard deviation over all elements of the reference's own samples; NaN where there is none.

    Attributes:
        undefined: samples that were left out, for they are not finite.
    """

    x0_mean: float
    x0_std: float
    undefined: int = 0

    @classmethod
    def of(cls, latents: torch.Tensor) -> Baseline:
        finite = latents.flatten(1).isfinite().all(1)
        values = latents[finite].double()
        return cls(float(values.mean()), float(values.std(correction=0)), int((~finite).sum()))

    def scalars(self) -> dict[str, float]:
        """Return them as they are logged, next to the generator's."""
        return {"reference/x0_mean": self.x0_mean, "reference/x0_std": self.x0_std}


def measure_baseline(
    reference: Denoiser, schedule: NoiseSchedule, batches: Iterable[Batch], **options: Any
) -> Baseline:
    """Draws the batches' samples from the reference; options as in `sample_reference`."""
    return Baseline.of(torch.cat([sample_reference(reference, schedule, batch, **options) for batch in batches]))


@torch.no_grad()
def sample_reference(
    reference: Denoiser,
    schedule: NoiseSchedule,
    batch: Batch,
    *,
    steps: int,
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
) -> torch.Tensor:
    """Samples of a diffusion model by a deterministic sampler: DDIM with eta = 0.

    Every step reads x0 and the noise off the prediction and mixes them anew for the next, lower level. For flow
    prediction that is Euler's method: (1 - s')(x - s v) + s'(x + (1 - s) v) = x + (s' - s) v.

    Args:
        reference: (x_t [B, *shape], t [B] int64, conditioning) -> the raw prediction.
        schedule: noise levels and the prediction type.
        batch: whose addressed latents are where the sampler begins.
        steps: calls of the reference (twice as many with guidance), at times evenly spaced from the last one down.
        guidance_scale: w, as in the methods; anything but 1 needs `batch.null_conditioning`.
        guidance_rescale: as in the methods.

    Returns float32 [B, *shape].
    """
    x = batch.noise(LATENT).normal(batch.shape)
    times = _times(schedule, steps)
    for time, following in zip(times, [*times[1:], None], strict=True):
        t = torch.full((len(batch),), time, dtype=torch.int64, device=x.device)
        prediction = reference(x, t, batch.conditioning).float()
        if guidance_scale != 1.0:
            uncond = reference(x, t, batch.null_conditioning).float()
            prediction = guide(prediction, uncond, guidance_scale, guidance_rescale)
        alpha, sigma = float(schedule.alphas[time]), float(schedule.sigmas[time])
        x0, noise = implied(schedule.prediction_type, prediction, x, alpha, sigma)
        if following is None:
            x = x0
        else:
            x = float(schedule.alphas[following]) * x0 + float(schedule.sigmas[following]) * noise
    return x


def baseline_facts(config: Config, steps: int, prompts: Sequence[str]) -> dict[str, Any]:
    """Return all that a run's baseline depends on; it is not measured again while they stay."""
    method, models = config.method, config.models
    facts: dict[str, Any] = {
        "reference": models.reference.path,
        "guidance_scale": method.guidance_scale,
        "steps": steps,
        "seed": config.seed,
        "prompts": list(prompts),
    }
    if method.guidance_rescale != 0.0:
        facts["guidance_rescale"] = method.guidance_rescale
    if models.negative_prompt is not None:
        facts["negative_prompt"] = models.negative_prompt
    return facts


def read_baseline(path: Path, facts: Mapping[str, Any]) -> Baseline | None:
    """Return what an earlier part of the run has measured, if that was of the same `facts`."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        same = saved["facts"] == json.loads(json.dumps(dict(facts)))
        return Baseline(float(saved["x0_mean"]), float(saved["x0_std"])) if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_baseline(path: Path, baseline: Baseline, facts: Mapping[str, Any]) -> None:
    """Keeps it for `read_baseline`. `facts`: all that it depends on, as JSON has it."""
    path.write_text(json.dumps({**asdict(baseline), "facts": dict(facts)}, indent=2) + "\n", encoding="utf-8")


def _times(schedule: NoiseSchedule, steps: int) -> list[int]:
    """Evenly spaced, the last one first; 0 is not among them unless every time is."""
    # Where alpha is 0, nothing of x0 is in an epsilon prediction: begin below.
    usable = len(schedule)
    if schedule.prediction_type == "epsilon":
        usable = int(schedule.alphas.nonzero().max()) + 1
    steps = min(steps, usable)
    return [round(usable - index * usable / steps) - 1 for index in range(steps)]
