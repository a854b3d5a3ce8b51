"""The reference's own samples: against a Gaussian's closed form and against diffusers' DDIM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from diffpp_fast.methods import Batch
from diffpp_fast.methods.base import LATENT
from diffpp_fast.schedule import NoiseSchedule
from diffpp_fast.training.baseline import (
    Baseline,
    measure_baseline,
    read_baseline,
    sample_reference,
    write_baseline,
)

MEAN, STD = 0.7, 0.4
SHAPE = (4, 8, 8)


def diffusion(prediction_type: str) -> NoiseSchedule:
    """Stable Diffusion's noise levels."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    products = (1 - betas).cumprod(0)
    return NoiseSchedule(products.sqrt(), (1 - products).sqrt(), prediction_type)


def flow() -> NoiseSchedule:
    sigmas = torch.arange(1000, dtype=torch.float64) / 1000
    return NoiseSchedule(1 - sigmas, sigmas, "flow_prediction")


def gaussian(schedule: NoiseSchedule, mean: float = MEAN):  # type: ignore[no-untyped-def]
    """The exact network of data N(mean, STD^2): predictions made of E[x0 | x_t]."""

    def predict(x: torch.Tensor, t: torch.Tensor, conditioning: Any) -> torch.Tensor:
        alpha, sigma = (level.view(-1, 1, 1, 1) for level in schedule.coefficients(t))
        x0 = mean + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * mean)
        noise = (x - alpha * x0) / sigma
        return {
            "epsilon": noise,
            "v_prediction": alpha * noise - sigma * x0,
            "flow_prediction": noise - x0,
            "sample": x0,
        }[schedule.prediction_type]

    return predict


def batch(count: int = 64, first: int = 0, null: Any = None) -> Batch:
    return Batch(torch.arange(first, first + count), None, seed=3, shape=SHAPE, null_conditioning=null)


SCHEDULES = [diffusion("epsilon"), diffusion("v_prediction"), diffusion("sample"), flow()]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.prediction_type)
def test_a_gaussian_s_mean_and_spread_come_back(schedule: NoiseSchedule) -> None:
    # 64 samples of 256 elements: standard errors of 0.8 % and 0.6 % of the spread. The rest is the sampler's: it begins
    # at a mean of 0 instead of alpha_T times the data's, and its steps make the spread too small; twice as many halve
    # that.
    for steps, of_mean, of_std in ((20, 0.06, 0.18), (40, 0.06, 0.11), (320, 0.06, 0.025)):
        baseline = Baseline.of(sample_reference(gaussian(schedule), schedule, batch(), steps=steps))
        assert baseline.x0_mean == pytest.approx(MEAN, abs=of_mean * STD), steps
        assert baseline.x0_std == pytest.approx(STD, rel=of_std), steps


def test_all_prediction_types_of_one_model_draw_the_same_samples() -> None:
    drawn = [sample_reference(gaussian(s), s, batch(4), steps=7) for s in SCHEDULES if s is not SCHEDULES[-1]]
    for other in drawn[1:]:
        torch.testing.assert_close(other, drawn[0], rtol=0, atol=2e-5)


def test_flow_is_eulers_method() -> None:
    schedule, steps = flow(), 8
    network = gaussian(schedule)
    x = batch(4).noise(LATENT).normal(SHAPE)
    levels = [0.999 - 0.125 * step for step in range(steps)]
    for level, following in zip(levels, [*levels[1:], 0.0], strict=True):
        x = x + (following - level) * network(x, torch.full((4,), round(1000 * level)), None)
    torch.testing.assert_close(sample_reference(network, schedule, batch(4), steps=steps), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_tiny_unet_is_sampled_as_by_diffusers_ddim(prediction_type: str) -> None:
    from diffusers import DDIMScheduler

    from diffpp_fast.networks import Denoiser

    network = tiny.unet().eval()
    states = torch.randn(2, 3, tiny.TEXT_WIDTH, generator=torch.Generator().manual_seed(0))
    cond, null = {"encoder_hidden_states": states}, {"encoder_hidden_states": torch.zeros_like(states)}
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        prediction_type=prediction_type,
        timestep_spacing="trailing",
    )
    mine = Batch(torch.arange(2), cond, seed=3, shape=SHAPE, null_conditioning=null)
    scheduler.set_timesteps(5)
    x = mine.noise(LATENT).normal(SHAPE)
    with torch.no_grad():
        for t in scheduler.timesteps:
            with_text, without = (network(x, t, **arguments).sample for arguments in (cond, null))
            x = scheduler.step(without + 3.0 * (with_text - without), t, x).prev_sample
    drawn = sample_reference(
        Denoiser(network), NoiseSchedule.from_diffusers(scheduler), mine, steps=5, guidance_scale=3.0
    )
    torch.testing.assert_close(drawn, x, rtol=1e-4, atol=1e-4)


def test_guidance_goes_beyond_the_prompt() -> None:
    schedule = diffusion("epsilon")

    def reference(x: torch.Tensor, t: torch.Tensor, conditioning: float) -> torch.Tensor:
        return gaussian(schedule, conditioning)(x, t, None)

    for scale, mean in ((1.0, 0.5), (2.0, 0.8)):
        asked = Batch(torch.arange(64), 0.5, seed=3, shape=SHAPE, null_conditioning=0.2)
        drawn = measure_baseline(reference, schedule, [asked], steps=100, guidance_scale=scale)
        assert drawn.x0_mean == pytest.approx(mean, abs=0.03)


def test_batches_and_precision_do_not_matter() -> None:
    schedule = diffusion("epsilon")
    network = gaussian(schedule)
    whole = measure_baseline(network, schedule, [batch(8)], steps=5)
    parts = measure_baseline(network, schedule, [batch(3), batch(5, first=3)], steps=5)
    assert parts.x0_mean == pytest.approx(whole.x0_mean, rel=1e-5)
    assert parts.x0_std == pytest.approx(whole.x0_std, rel=1e-5)
    half = sample_reference(lambda *inputs: network(*inputs).bfloat16(), schedule, batch(8), steps=5)
    assert half.dtype == torch.float32
    assert Baseline.of(half).x0_std == pytest.approx(whole.x0_std, rel=0.02)


def test_more_steps_than_times_and_a_start_from_pure_noise_are_cut() -> None:
    alphas = torch.tensor([0.9, 0.6, 0.0])
    schedule = NoiseSchedule(alphas, (1 - alphas**2).sqrt(), "epsilon")
    asked: list[int] = []

    def network(x: torch.Tensor, t: torch.Tensor, conditioning: Any) -> torch.Tensor:
        asked.append(int(t[0]))
        return torch.zeros_like(x)

    assert sample_reference(network, schedule, batch(2), steps=10).isfinite().all()
    assert asked == [1, 0]


def test_it_is_kept_for_the_same_run_only(tmp_path: Path) -> None:
    path, facts = tmp_path / "baseline.json", {"steps": 20, "latent_shape": (4, 8, 8), "reference": "somewhere"}
    assert read_baseline(path, facts) is None
    write_baseline(path, Baseline(0.1, 0.9), facts)
    assert read_baseline(path, facts) == Baseline(0.1, 0.9)
    assert Baseline(0.1, 0.9).scalars() == {"reference/x0_mean": 0.1, "reference/x0_std": 0.9}
    assert read_baseline(path, {**facts, "steps": 10}) is None
    for damaged in ("{", "[]", json.dumps({"facts": json.loads(json.dumps(facts))})):
        path.write_text(damaged)
        assert read_baseline(path, facts) is None
