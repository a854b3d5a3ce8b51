"""DMD2 and decoupled DMD: the published gradient with every normaliser, the discriminator's losses, where they lead."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from method_cases import SCHEDULES, SHAPE, Convolution, assert_near, batch_of, gradient_by_x0, level_of, train_gaussian
from torch import nn

from diffpp_fast.methods import DMD2, Batch, DecoupledDMD, DiffInstruct

T_RANGE = (100, 900)
#: Streams of the time and of the noise.
FIRST, SECOND, REAL = (2, 1), (6, 7), (6, 8)


def flat_mean(x: torch.Tensor) -> torch.Tensor:
    return x.abs().mean((1, 2, 3), keepdim=True)


@pytest.mark.parametrize(
    ("normalizer", "floor"), [("sample", None), ("sample", 1e-9), ("sample", 1.3), ("batch", None), ("batch", 1e3)]
)
@pytest.mark.parametrize("prediction_type", list(SCHEDULES))
def test_gradient_by_x0_is_the_published_one(prediction_type: str, normalizer: str, floor: float | None) -> None:
    schedule, batch, scale = SCHEDULES[prediction_type], batch_of(), 2.5
    fake, reference = Convolution(1), Convolution(2)
    options: dict[str, Any] = {"guidance_scale": scale, "t_range": T_RANGE}
    options |= {"normalizer": normalizer, "normalizer_floor": floor}
    x0, gradient = gradient_by_x0(lambda g: DMD2(g, fake, reference, schedule, **options), batch)
    at = level_of(x0, batch, schedule, T_RANGE)
    with torch.no_grad():
        outputs = at.guided(fake, batch, 1.0), at.guided(reference, batch, scale)
    of_fake, of_guided = (at.x0_of(prediction_type, output) for output in outputs)
    distance = flat_mean(x0 - of_guided)
    if normalizer == "batch":
        distance = distance.mean(0, keepdim=True)
    expected = (of_fake - of_guided) / distance.clamp(min=floor or 0.0)
    assert_near(gradient, expected / len(batch))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dmd", {}),
        ("dmd", {"normalizer_floor": 1.3}),
        ("dmd", {"normalizer": "batch"}),
        ("decoupled", {"guidance_scale": 1.0}),
    ],
)
def test_the_norm_that_is_logged_is_the_gradients(name: str, options: dict[str, Any]) -> None:
    """It comes from sums that the operator takes; at t = 0 of a flow the gradient is 0, whatever they are."""
    networks = [Convolution(seed) for seed in range(3)]
    made: Any = DMD2 if name == "dmd" else DecoupledDMD
    for t_range in (T_RANGE, (0, 1)):
        method = made(*networks, SCHEDULES["flow_prediction"], **{"guidance_scale": 2.5, "t_range": t_range, **options})
        batch = batch_of()
        metrics = method.generator_loss(batch).metrics
        found = method._sample_gradient(batch, method._sample(batch).detach()).gradient
        assert_near(metrics["score_gradient_norm"], found.flatten(1).norm(dim=1).mean())


def test_without_discriminator_it_is_diff_instruct_with_that_normaliser() -> None:
    networks, schedule = (Convolution(1), Convolution(2)), SCHEDULES["v_prediction"]
    one = gradient_by_x0(lambda generator: DMD2(generator, *networks, schedule), batch_of())[1]
    other = gradient_by_x0(
        lambda generator: DiffInstruct(generator, *networks, schedule, weighting="mean_abs"), batch_of()
    )[1]
    assert torch.equal(one, other)
    assert DMD2(Convolution(0), *networks, schedule).fake_rounds == 5


class Critic(nn.Module):
    """Logits of features that a layer of the TA makes."""

    def __init__(self, fake: Convolution) -> None:
        super().__init__()
        self.fake = fake
        self.head = nn.Parameter(torch.linspace(-1, 1, math.prod(SHAPE)))

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        return self.fake(x_t, t, conditioning).flatten(1) @ self.head.to(x_t.dtype)


def with_real(batch: Batch) -> Batch:
    real = torch.randn(len(batch), *SHAPE, generator=torch.Generator().manual_seed(9))
    return replace(batch, real=real)


def test_the_discriminator_pulls_samples_towards_higher_logits() -> None:
    schedule, batch, weight = SCHEDULES["epsilon"], batch_of(), 3.0
    fake, reference = Convolution(1), Convolution(2)
    critic = Critic(fake)

    def gradient(**options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return gradient_by_x0(
            lambda generator: DMD2(generator, fake, reference, schedule, t_range=T_RANGE, **options), batch
        )

    x0, plain = gradient()
    _, pulled = gradient(discriminator=critic, gan_weight=weight, gan_t_range=(0, 500))
    at = level_of(x0.requires_grad_(), batch, schedule, (0, 500), SECOND)
    logits = critic(at.x_t, at.t, batch.conditioning)
    (expected,) = torch.autograd.grad(weight * F.softplus(-logits).mean(), x0)
    assert_near(pulled - plain, expected)
    assert fake.weight.grad is None and critic.head.grad is None


def test_discriminator_and_ta_learn_together() -> None:
    schedule, batch, weight = SCHEDULES["epsilon"], with_real(batch_of()), 0.5
    generator, fake = Convolution(0), Convolution(1)
    critic = Critic(fake)
    method = DMD2(
        generator,
        fake,
        Convolution(2),
        schedule,
        t_range=T_RANGE,
        discriminator=critic,
        fake_gan_weight=weight,
        gan_t_range=(0, 500),
    )
    output = method.fake_loss(batch)
    output.loss.backward()
    found = fake.weight.grad, critic.head.grad
    fake.weight.grad = critic.head.grad = None
    with torch.no_grad():
        x0 = generator(batch.noise(0).normal(SHAPE), batch.conditioning).double()
    at = level_of(x0, batch, schedule, T_RANGE, FIRST)
    denoising = (fake(at.x_t, at.t, batch.conditioning) - at.eps).square().mean()
    assert batch.real is not None
    generated, real = (
        critic(at.x_t, at.t, batch.conditioning)
        for at in (
            level_of(x0, batch, schedule, (0, 500), SECOND),
            level_of(batch.real.double(), batch, schedule, (0, 500), REAL),
        )
    )
    expected = denoising + weight * (F.softplus(generated) + F.softplus(-real)).mean()
    expected.backward()
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-5, atol=0)
    for one, other in zip(found, (fake.weight.grad, critic.head.grad), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert generator.weight.grad is None
    assert {"denoising_loss", "gan_loss", "logit", "real_logit"} < output.metrics.keys()


@pytest.mark.parametrize("real", [None, torch.zeros(3, *SHAPE)])
def test_a_discriminator_needs_real_latents(real: torch.Tensor | None) -> None:
    fake = Convolution(1)
    method = DMD2(Convolution(0), fake, Convolution(2), SCHEDULES["epsilon"], discriminator=Critic(fake))
    with pytest.raises(ValueError, match=r"needs Batch\.real, \(4, 2, 3, 3\) real latents"):
        method.fake_loss(replace(batch_of(), real=real))


def test_a_discriminator_gives_one_logit_per_sample() -> None:
    networks = Convolution(0), Convolution(1), Convolution(2)
    method = DMD2(*networks, SCHEDULES["epsilon"], discriminator=lambda x_t, t, c: x_t.flatten(1))
    with pytest.raises(
        ValueError, match=r"the discriminator must give one number per sample, .* \(4,\), got shape \(4, 18\)"
    ):
        method.generator_loss(batch_of())


@pytest.mark.parametrize("prediction_type", list(SCHEDULES))
def test_guidance_has_a_noise_level_of_its_own(prediction_type: str) -> None:
    """w - 1 times cond - uncond at the second level, cond - fake at the first, each over its mean|x0 - X_cond|."""
    schedule, batch, scale = SCHEDULES[prediction_type], batch_of(), 3.5
    fake, reference = Convolution(1), Convolution(2)
    options: dict[str, Any] = {"guidance_scale": scale, "t_range": (100, 500), "guidance_t_range": (500, 900)}
    x0, gradient = gradient_by_x0(lambda g: DecoupledDMD(g, fake, reference, schedule, **options), batch)

    @torch.no_grad()
    def implied(network: nn.Module, at: Any, conditioning: Any) -> torch.Tensor:
        return at.x0_of(prediction_type, network(at.x_t, at.t, conditioning))

    first = level_of(x0, batch, schedule, (100, 500), FIRST)
    second = level_of(x0, batch, schedule, (500, 900), SECOND)
    cond = implied(reference, first, batch.conditioning)
    expected = (implied(fake, first, batch.conditioning) - cond) / flat_mean(x0 - cond)
    cond = implied(reference, second, batch.conditioning)
    uncond = implied(reference, second, batch.null_conditioning)
    expected = expected + (scale - 1.0) * (uncond - cond) / flat_mean(x0 - cond)
    assert_near(gradient, expected / len(batch))


def test_without_guidance_decoupled_dmd_is_dmd2() -> None:
    networks = Convolution(1), Convolution(2)
    one, other = (
        gradient_by_x0(
            lambda generator, of=of: of(generator, *networks, SCHEDULES["epsilon"]),  # type: ignore[misc]
            batch_of(),
        )[1]
        for of in (DMD2, DecoupledDMD)
    )
    assert torch.equal(one, other)


def test_gaussians_reach_the_guided_mean() -> None:
    """Generator N(theta, I), reference N(m, I): the gradient is a positive factor times theta - m_guided."""
    schedule, cond_mean, guidance = SCHEDULES["epsilon"], torch.tensor([1.0, -2.0, 0.5]), 3.0

    def build(generator: Any, fake: Any, reference: Any) -> DMD2:
        return DMD2(generator, fake, reference, schedule, guidance_scale=guidance)

    theta = train_gaussian(build, schedule, cond_mean, rates=(2.5, 3.0), rounds=40, count=512)
    optimum = guidance * cond_mean
    assert (theta - optimum).norm() < 0.01 * optimum.norm()


@pytest.mark.parametrize(
    ("of", "options", "message"),
    [
        (DMD2, {"normalizer": "mean"}, "normalizer must be one of sample, batch"),
        (DMD2, {"normalizer_floor": 0.0}, "normalizer_floor must be above 0"),
        (DMD2, {"gan_t_range": (5, 5)}, r"gan_t_range must lie within \[0, 1000\)"),
        (DecoupledDMD, {"guidance_t_range": (0, 1001)}, r"guidance_t_range must lie within \[0, 1000\)"),
    ],
)
def test_wrong_options_are_refused_by_name(of: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        of(Convolution(0), Convolution(1), Convolution(2), SCHEDULES["epsilon"], **options)
