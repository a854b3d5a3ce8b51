"""SiD: its gradient through both networks, against its definition in implied x0; where it leads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from method_cases import SCHEDULES, Convolution, assert_near, batch_of, gradient_by_x0, level_of, train_gaussian

from diffpp_fast.methods import SiD

T_RANGE = (100, 900)


@pytest.mark.parametrize("fake_scale", [1.0, 2.5])
@pytest.mark.parametrize("sid_alpha", [1.0, 1.2])
@pytest.mark.parametrize("prediction_type", list(SCHEDULES))
def test_gradient_by_x0_is_that_of_the_definition(prediction_type: str, sid_alpha: float, fake_scale: float) -> None:
    schedule, batch, scale = SCHEDULES[prediction_type], batch_of(), 2.5
    fake, reference = Convolution(1), Convolution(2)
    options: dict[str, Any] = {"guidance_scale": scale, "fake_guidance_scale": fake_scale, "sid_alpha": sid_alpha}
    found, gradient = gradient_by_x0(lambda g: SiD(g, fake, reference, schedule, t_range=T_RANGE, **options), batch)
    x0 = found.requires_grad_()
    at = level_of(x0, batch, schedule, T_RANGE)
    outputs = at.guided(fake, batch, fake_scale), at.guided(reference, batch, scale)
    of_fake, of_guided = (at.x0_of(prediction_type, output) for output in outputs)
    normaliser = (x0 - of_guided).abs().mean((1, 2, 3), keepdim=True).detach()
    gap = of_guided - of_fake
    losses = (gap * ((of_guided - x0) - sid_alpha * gap) / normaliser).sum((1, 2, 3))
    (expected,) = torch.autograd.grad(losses.mean(), x0)
    assert_near(gradient, expected)


def test_the_guided_output_of_the_ta_is_what_denoises() -> None:
    schedule, batch, scale = SCHEDULES["epsilon"], batch_of(), 2.5
    generator, fake = Convolution(0), Convolution(1)
    method = SiD(generator, fake, Convolution(2), schedule, fake_guidance_scale=scale)
    loss = method.fake_loss(batch).loss
    loss.backward()
    found, fake.weight.grad = fake.weight.grad, None
    with torch.no_grad():
        x0 = generator(batch.noise(0).normal(batch.shape), batch.conditioning).double()
    at = level_of(x0, batch, schedule, (0, 1000))
    expected = (at.guided(fake, batch, scale) - at.eps).square().mean()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(found, fake.weight.grad, rtol=1e-4, atol=1e-6)


def test_gaussians_reach_the_guided_mean() -> None:
    """Generator N(theta, I), reference N(m, I): d = sigma alpha (theta - m_guided) once the TA knows theta, and
    dL/dtheta = |k| sigma alpha d / mean|r|, whatever sid_alpha is; so theta* = m_guided."""
    schedule, cond_mean, guidance = SCHEDULES["epsilon"], torch.tensor([1.0, -2.0, 0.5]), 3.0

    def build(generator: Any, fake: Any, reference: Any) -> SiD:
        return SiD(generator, fake, reference, schedule, guidance_scale=guidance, sid_alpha=1.2)

    theta = train_gaussian(build, schedule, cond_mean, rates=(2.5, 2.0), rounds=40, count=512)
    optimum = guidance * cond_mean
    assert (theta - optimum).norm() < 0.01 * optimum.norm()


def test_a_guided_ta_needs_null_conditioning() -> None:
    method = SiD(Convolution(0), Convolution(1), Convolution(2), SCHEDULES["epsilon"], fake_guidance_scale=2.0)
    batch = batch_of()
    object.__setattr__(batch, "null_conditioning", None)
    for loss in (method.fake_loss, method.generator_loss):
        with pytest.raises(ValueError, match=r"fake_guidance_scale 2\.0 needs Batch\.null_conditioning"):
            loss(batch)
