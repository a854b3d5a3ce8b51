"""SIM and Diff-Instruct*: their gradients through both networks, against their definition in scores; their optima."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from method_cases import (
    SCHEDULES,
    Convolution,
    T,
    assert_near,
    batch_of,
    gradient_by_x0,
    level_of,
    quadratic_reward,
    train_gaussian,
)

from diffpp_fast.methods import SIM, DiffInstructPP, DiffInstructStar

T_RANGE = (100, 900)


def weight_of(t: torch.Tensor) -> torch.Tensor:
    return 1.0 + t.float() / T


@pytest.mark.parametrize("guidance", ["inside", "outside"])
@pytest.mark.parametrize("weighting", ["x0", "score", "function"])
@pytest.mark.parametrize("prediction_type", list(SCHEDULES))
def test_gradient_by_x0_is_that_of_the_definition(prediction_type: str, weighting: str, guidance: str) -> None:
    schedule, batch, scale, reward_scale, huber_c = SCHEDULES[prediction_type], batch_of(), 2.5, 0.3, 2.0
    fake, reference = Convolution(1), Convolution(2)
    options: dict[str, Any] = {"reward": quadratic_reward, "reward_scale": reward_scale, "t_range": T_RANGE}
    options |= {"weighting": weight_of if weighting == "function" else weighting, "huber_c": huber_c}
    options |= {"guidance_scale": scale, "guidance": guidance}
    found, gradient = gradient_by_x0(lambda g: DiffInstructStar(g, fake, reference, schedule, **options), batch)
    x0 = found.requires_grad_()
    at = level_of(x0, batch, schedule, T_RANGE)

    def score(output: torch.Tensor) -> torch.Tensor:
        return (at.a * at.x0_of(prediction_type, output) - at.x_t) / at.s**2

    scales = {"inside": (scale, 0.0), "outside": (1.0, scale - 1.0)}[guidance]
    of_fake, of_reference = score(at.guided(fake, batch, 1.0)), score(at.guided(reference, batch, scales[0]))
    y = of_fake - of_reference
    w = {"x0": at.s**2 / at.a, "score": torch.ones_like(at.s), "function": weight_of(at.t).view(-1, 1, 1, 1)}[weighting]
    w = w.double()
    direction = y / (y.square().sum((1, 2, 3), keepdim=True) + huber_c**2).sqrt()
    losses = -(w * direction * (of_fake - -at.eps / at.s)).sum((1, 2, 3))
    (expected,) = torch.autograd.grad(losses.mean(), x0, retain_graph=True)
    with torch.no_grad():
        towards = score(reference(at.x_t, at.t, batch.conditioning)) - score(
            reference(at.x_t, at.t, batch.null_conditioning)
        )
        expected = expected - (scales[1] * at.a * w * towards + reward_scale * -2 * (x0 - 0.5)) / len(batch)
    assert_near(gradient, expected)


def test_without_reward_diff_instruct_star_is_sim() -> None:
    networks = Convolution(1), Convolution(2)
    one, other = (
        gradient_by_x0(
            lambda generator, of=of: of(generator, *networks, SCHEDULES["v_prediction"], guidance_scale=3.0),  # type: ignore[misc]
            batch_of(),
        )[1]
        for of in (SIM, DiffInstructStar)
    )
    assert torch.equal(one, other)


def test_guidance_outside_is_the_reward_of_the_theorem_and_no_guidance_inside() -> None:
    """It adds to the unguided gradient what Diff-Instruct++ gets from guidance, with the same w(t)."""
    networks, schedule = (Convolution(1), Convolution(2)), SCHEDULES["epsilon"]

    def gradient(of: type, **options: Any) -> torch.Tensor:
        return gradient_by_x0(lambda generator: of(generator, *networks, schedule, **options), batch_of())[1]

    star = {"weighting": "score", "huber_c": 2.0}
    plain = gradient(DiffInstructStar, **star)
    inside, outside = (
        gradient(DiffInstructStar, **star, guidance=guidance, guidance_scale=3.0) for guidance in ("inside", "outside")
    )
    kl, guided_kl = (gradient(DiffInstructPP, weighting="score", guidance_scale=scale) for scale in (1.0, 3.0))
    assert_near(outside - plain, guided_kl - kl)
    assert (inside - outside).norm() > 0.1 * outside.norm()


def solve(right: torch.Tensor, weights: torch.Tensor, alpha: torch.Tensor, huber_c: float) -> torch.Tensor:
    """delta with E_t[w alpha^2 delta / sqrt(alpha^2 |delta|^2 + c^2)] = right, by bisection over its length."""
    low, high = 0.0, 1e3
    for _ in range(100):
        length = (low + high) / 2
        left = (weights * alpha**2 * length / (alpha**2 * length**2 + huber_c**2).sqrt()).mean()
        low, high = (length, high) if left < right.norm() else (low, length)
    return low * right / right.norm()


@pytest.mark.parametrize(("weighting", "guidance"), [("x0", "inside"), ("score", "outside")])
def test_gaussians_reach_the_analytic_optimum(weighting: str, guidance: str) -> None:
    """Generator N(theta, I), reference N(m, I), reward <v, x0>. With the TA at theta, y = alpha (theta - m), and

        E[w alpha^2 (theta - m) / sqrt(alpha^2 |theta - m|^2 + c^2)] = reward_scale v + (g - 1) E[w alpha^2] (m_c - m_u)

    at the optimum, with the last term where guidance, of scale g, is outside. Inside, m is the guided mean, else m_c.
    """
    schedule, huber_c, reward_scale, scale = SCHEDULES["epsilon"], 2.0, 0.02, 1.5
    cond_mean, v = torch.tensor([0.5, -1.0, 0.25]), torch.tensor([0.5, 1.0, -1.0])

    def build(generator: Any, fake: Any, reference: Any) -> DiffInstructStar:
        options: dict[str, Any] = {"guidance_scale": scale, "guidance": guidance, "weighting": weighting}
        return DiffInstructStar(
            generator, fake, reference, schedule, lambda x0, c: x0 @ v, reward_scale, huber_c=huber_c, **options
        )

    alpha, sigma = schedule.alphas, schedule.sigmas
    w = sigma**2 / alpha if weighting == "x0" else torch.ones_like(sigma)
    right = reward_scale * v.double()
    if guidance == "outside":
        right = right + (scale - 1) * (w * alpha**2).mean() * cond_mean.double()
    optimum = (scale if guidance == "inside" else 1.0) * cond_mean.double() + solve(right, w, alpha, huber_c)
    theta = train_gaussian(build, schedule, cond_mean, rates=(1.5, 1.5), rounds=60, count=512)
    assert (theta - optimum).norm() < 0.02 * optimum.norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weighting": "unit"}, "weighting must be one of x0, score or a function of t"),
        ({"huber_c": 0.0}, "huber_c must be above 0"),
        ({"guidance": "both"}, "guidance must be one of inside, outside"),
        ({"reward_scale": 1.0}, r"reward_scale is 1\.0, but no reward"),
    ],
)
def test_wrong_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffInstructStar(Convolution(0), Convolution(1), Convolution(2), SCHEDULES["epsilon"], **options)
