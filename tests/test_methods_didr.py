"""DIDR: its gradient against the formula in float64, its closed form on Gaussians, and the bias of its reward score."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from method_cases import (
    SCHEDULES,
    SHAPE,
    Convolution,
    GaussianScore,
    batch_of,
    gradient_by_x0,
    level_of,
    quadratic_reward,
    train_gaussian,
)
from torch import nn

from diffpp_fast import Noise, NoiseSchedule
from diffpp_fast.methods import DIDR, Batch, DiffInstruct

RANGE = (20, 980)


def gradient(build: Any) -> torch.Tensor:
    """The gradient on each sample, in the method's units: of the loss times the batch."""
    batch = batch_of()
    _, found = gradient_by_x0(build, batch)
    return found * len(batch)


def by_formula(
    x0: torch.Tensor, weighting: str, prediction_type: str, *, beta: float, steps: int, scale: float
) -> torch.Tensor:
    """h d - alpha w s_r in float64, each part from its own definition."""
    schedule, batch, fake, reference = SCHEDULES[prediction_type], batch_of(), Convolution(1), Convolution(2)
    level = level_of(x0.double(), batch, schedule, RANGE)
    x_t = level.x_t.detach().requires_grad_()
    level = level._replace(x_t=x_t)
    guided = first = level.guided(reference, batch, scale)
    at = level
    for left in range(steps, 0, -1):
        sample = at.x0_of(prediction_type, guided)
        if left == 1:
            break
        eps = (at.x_t - at.a * sample) / at.s
        t = at.t * (left - 1) // left
        a, s = (table.float().double()[t].view(-1, 1, 1, 1) for table in (schedule.alphas, schedule.sigmas))
        at = at._replace(x_t=a * sample + s * eps, t=t, a=a, s=s)
        guided = at.guided(reference, batch, scale)
    (slope,) = torch.autograd.grad(quadratic_reward(sample, batch.conditioning).sum(), x_t)
    with torch.no_grad():
        a, s = level.a, level.s
        x_fake, x_guided = (
            level.x0_of(prediction_type, output) for output in (fake(level.x_t, level.t, batch.conditioning), first)
        )
        score_gap = a * (x_fake - x_guided) / s**2
        weight = a * {"x0": s**2 / a**2, "score": torch.ones_like(s)}[weighting]
        return weight * (score_gap - slope / beta)


@pytest.mark.parametrize("prediction_type", SCHEDULES)
@pytest.mark.parametrize(("weighting", "steps"), [("x0", 1), ("score", 1), ("score", 3)])
def test_the_gradient_is_that_of_the_formula(prediction_type: str, weighting: str, steps: int) -> None:
    options: dict[str, Any] = {"weighting": weighting, "guidance_scale": 3.0, "t_range": RANGE, "beta": 0.7}
    networks = Convolution(1), Convolution(2)
    batch = batch_of()
    x0, found = gradient_by_x0(
        lambda generator: DIDR(
            generator, *networks, SCHEDULES[prediction_type], quadratic_reward, denoising_steps=steps, **options
        ),
        batch,
    )
    expected = by_formula(x0, weighting, prediction_type, beta=0.7, steps=steps, scale=3.0)
    torch.testing.assert_close(
        found.double() * len(batch), expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max())
    )


def test_a_small_beta_leaves_diff_instruct_behind_and_a_large_one_is_it() -> None:
    networks = Convolution(1), Convolution(2)

    def of(method: Any, **options: Any) -> torch.Tensor:
        return gradient(lambda generator: method(generator, *networks, SCHEDULES["epsilon"], t_range=RANGE, **options))

    plain = of(DiffInstruct)
    torch.testing.assert_close(of(DIDR, reward=quadratic_reward, beta=1e12), plain)
    assert torch.equal(of(DIDR, reward=quadratic_reward, reward_scale=0.0), plain)
    twice = [of(DIDR, reward=quadratic_reward, **options) for options in ({"beta": 0.5}, {"reward_scale": 2.0})]
    torch.testing.assert_close(*twice)
    assert (twice[0] - plain).norm() > 0.1 * plain.norm()


@pytest.mark.parametrize("weighting", ["x0", "score", "mean_abs"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_gaussians_reach_the_same_optimum_whatever_the_weighting(weighting: str, guidance: float) -> None:
    """Generator N(theta, I), reference N(m, I), reward <u, x0>: theta* = m_guided + u / beta."""
    schedule, beta = SCHEDULES["epsilon"], 0.5
    cond_mean, u = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.5, 1.0, -1.0])
    theta = train_gaussian(
        lambda generator, fake, reference: DIDR(
            generator,
            fake,
            reference,
            schedule,
            reward=lambda x0, c: x0 @ u,
            guidance_scale=guidance,
            weighting=weighting,  # type: ignore[arg-type]
            beta=beta,
        ),
        schedule,
        cond_mean,
    )
    optimum = guidance * cond_mean + u / beta
    assert (theta - optimum).norm() < 0.01 * optimum.norm()


def test_a_spread_reference_moves_by_its_variance() -> None:
    """Reference N(m, S^2): at theta = m + S^2 u / beta every sample's gradient vanishes, at every noise level."""
    schedule, beta = SCHEDULES["epsilon"], 0.5
    mean, spread, u = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.5, 1.0, 2.0]), torch.tensor([0.5, 1.0, -1.0])

    def score_of(center: torch.Tensor) -> Any:
        def epsilon(x_t: torch.Tensor, t: torch.Tensor, conditioning: object) -> torch.Tensor:
            alpha, sigma = (each.view(-1, 1) for each in schedule.coefficients(t))
            return sigma * (x_t - alpha * center) / (alpha.square() * spread.square() + sigma.square())

        return epsilon

    optimum = nn.Parameter(mean + spread.square() * u / beta)
    batch = Batch(torch.arange(64), torch.zeros(3), shape=(3,))
    for weighting in ("x0", "score", "mean_abs"):
        method = DIDR(
            lambda z, c: optimum + spread * z,
            score_of(optimum.detach()),
            score_of(mean),
            schedule,
            reward=lambda x0, c: x0 @ u,
            weighting=weighting,
            beta=beta,
            t_range=RANGE,
        )
        output = method.generator_loss(batch)
        assert output.metrics["score_gradient_norm"] > 0.01
        assert output.loss < 1e-6 * output.metrics["score_gradient_norm"].square()


def test_the_proxy_of_a_quadratic_reward_is_too_strong_by_a_factor_that_is_known() -> None:
    """For r = -c x0^2 / 2 and a posterior N(mu, V) the exact score is -(c / beta) mu mu' / (1 + c V / beta); the proxy
    lacks the divisor. The exact one is a quadrature here."""
    schedule, beta, c = SCHEDULES["epsilon"], 0.5, 0.8
    batch = Batch(torch.arange(16), torch.zeros(1), shape=(1,))
    theta = nn.Parameter(torch.tensor([0.3]))
    reference = GaussianScore(schedule, torch.tensor([0.3]))
    method = DIDR(
        lambda z, conditioning: theta + z,
        reference,
        reference,
        schedule,
        reward=lambda x0, conditioning: -0.5 * c * x0.square().sum(1),
        weighting="score",
        beta=beta,
        t_range=RANGE,
    )
    samples = nn.Parameter(Noise(0, batch.samples, stream=0).normal((1,)) + 0.3)
    method.generator = lambda z, conditioning: samples
    method.generator_loss(batch).loss.backward()
    assert samples.grad is not None and reference.mean.grad is None
    # The fake score is the reference's: what is left is -alpha s_r.
    t = Noise(0, batch.samples, stream=2).integers(*RANGE)
    alpha, sigma = (each.double().view(-1, 1) for each in schedule.coefficients(t))
    x_t = alpha * samples.detach().double() + sigma * Noise(0, batch.samples, stream=1).normal((1,)).double()
    proxy = -samples.grad.double() * len(batch) / alpha

    def log_expectation(x: torch.Tensor) -> torch.Tensor:
        grid = torch.linspace(-12, 12, 4001, dtype=torch.float64)
        density = -0.5 * (grid - 0.3).square() - 0.5 * (x - alpha * grid).square() / sigma.square()
        return (density - 0.5 * c / beta * grid.square()).logsumexp(1) - density.logsumexp(1)

    x = x_t.clone().requires_grad_()
    (exact,) = torch.autograd.grad(log_expectation(x).sum(), x)
    variance = sigma.square()  # of the posterior, where the reference's is 1
    torch.testing.assert_close(proxy, exact * (1.0 + c * variance / beta), rtol=1e-4, atol=1e-5)
    assert (proxy.abs() > exact.abs()).all()


def test_the_reward_judges_the_references_sample_and_is_logged() -> None:
    seen: list[torch.Tensor] = []

    def reward(x: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        seen.append(x.detach())
        return quadratic_reward(x, conditioning)

    batch, schedule, reference = batch_of(), SCHEDULES["epsilon"], Convolution(2)
    method = DIDR(Convolution(0), Convolution(1), reference, schedule, reward, t_range=RANGE)
    output = method.generator_loss(batch)
    assert output.rewards is not None and output.rewards.values.shape == (len(batch),)
    with torch.no_grad():
        x0 = method.generator(Noise(3, batch.samples, stream=0).normal(SHAPE), batch.conditioning)
        level = level_of(x0.double(), batch, schedule, RANGE)
        expected = level.x0_of("epsilon", reference(level.x_t, level.t, batch.conditioning))
    torch.testing.assert_close(seen[0].double(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(output.rewards.values, quadratic_reward(seen[0], batch.conditioning))


def test_a_sample_without_reward_gradient_keeps_its_score_gradient() -> None:
    def broken(x: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        values = quadratic_reward(x, conditioning)
        return torch.cat([values[:1] * math.nan, values[1:]])

    networks = Convolution(1), Convolution(2)

    def of(method: Any, **options: Any) -> torch.Tensor:
        return gradient(lambda generator: method(generator, *networks, SCHEDULES["epsilon"], t_range=RANGE, **options))

    found, plain = of(DIDR, reward=broken), of(DiffInstruct)
    torch.testing.assert_close(found[0], plain[0])
    assert (found[1] - plain[1]).norm() > 0.1 * plain[1].norm()


def test_a_clip_shortens_the_reward_term() -> None:
    networks = Convolution(1), Convolution(2)

    def of(method: Any, **options: Any) -> torch.Tensor:
        return gradient(lambda generator: method(generator, *networks, SCHEDULES["epsilon"], t_range=RANGE, **options))

    plain, clipped = of(DiffInstruct), of(DIDR, reward=quadratic_reward, beta=1e-6, reward_clip=0.5)
    ratio = (clipped - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.5), rtol=1e-3, atol=1e-3)


def test_what_makes_no_sense_is_refused_by_name() -> None:
    networks = Convolution(0), Convolution(1), Convolution(2), SCHEDULES["epsilon"]
    refused: list[tuple[dict[str, Any], str]] = [
        ({"reward": None}, "DIDR needs a reward"),
        ({"beta": 0.0}, "beta must be above 0 and finite, got 0"),
        ({"beta": math.inf}, "beta must be above 0"),
        ({"denoising_steps": 0}, "denoising_steps must be at least 1, got 0"),
    ]
    for options, message in refused:
        with pytest.raises(ValueError, match=message):
            DIDR(*networks, **{"reward": quadratic_reward, **options})
    ends = NoiseSchedule(torch.tensor([1.0, 0.6, 0.0]), torch.tensor([0.0, 0.8, 1.0]), "v_prediction")
    with pytest.raises(ValueError, match=r"the reward term of DIDR is not finite at t = 2"):
        DIDR(*networks[:3], ends, quadratic_reward)
    without = replace(batch_of(), null_conditioning=None)
    with pytest.raises(ValueError, match=r"guidance_scale 2\.0 needs Batch\.null_conditioning"):
        DIDR(*networks, quadratic_reward, guidance_scale=2.0).generator_loss(without)
