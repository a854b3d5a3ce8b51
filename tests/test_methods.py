"""Diff-Instruct and Diff-Instruct++: the gradient element by element, who gets it, and where it leads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from method_cases import (
    SCHEDULES,
    SHAPE,
    Convolution,
    T,
    batch_of,
    gradient_by_x0,
    level_of,
    quadratic_reward,
    train_gaussian,
)
from prediction_targets import TARGETS
from torch import nn

from diffpp_fast import Noise, NoiseSchedule
from diffpp_fast.methods import Batch, DiffInstruct, DiffInstructPP


@pytest.mark.parametrize("weighting", ["x0", "score", "unit", "mean_abs", "function"])
@pytest.mark.parametrize("prediction_type", list(SCHEDULES))
def test_gradient_by_x0_is_the_papers(prediction_type: str, weighting: str) -> None:
    """Against scores and x0 written out in float64: h d - reward_scale dr/dx0, over B."""
    schedule, batch, guidance, reward_scale = SCHEDULES[prediction_type], batch_of(), 2.5, 0.3
    table = nn.Parameter(torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(1)))
    fake, reference = Convolution(1), Convolution(2)

    def weight_of(t: torch.Tensor) -> torch.Tensor:
        return 1.0 + t.float() / T

    method = DiffInstructPP(
        lambda z, c: table + 0 * z,
        fake,
        reference,
        schedule,
        reward=quadratic_reward,
        reward_scale=reward_scale,
        guidance_scale=guidance,
        weighting=weight_of if weighting == "function" else weighting,
        t_range=(100, 900),
    )
    method.generator_loss(batch).loss.backward()

    x0 = table.detach().double()
    at = level_of(x0, batch, schedule, (100, 900))
    x_t, t, a, s, eps = at
    with torch.no_grad():
        o_fake = fake(x_t, t, batch.conditioning)
        cond, uncond = reference(x_t, t, batch.conditioning), reference(x_t, t, batch.null_conditioning)
    guided = uncond + guidance * (cond - uncond)
    x_fake, x_guided = (at.x0_of(prediction_type, o) for o in (o_fake, guided))
    score_fake, score_guided = ((a * x - x_t) / s**2 for x in (x_fake, x_guided))
    if weighting == "x0":
        expected = x_fake - x_guided
    elif weighting in ("score", "function"):
        w = weight_of(t).view(-1, 1, 1, 1) if weighting == "function" else 1.0
        expected = a * w * (score_fake - score_guided)
    else:
        expected = (guided - o_fake) * (-1 if prediction_type == "sample" else 1)
        if weighting == "mean_abs":
            target = TARGETS[prediction_type](x0, eps, a, s)
            expected = expected / (guided - target).abs().mean((1, 2, 3), keepdim=True)
    expected = (expected - reward_scale * -2 * (x0 - 0.5)) / len(batch)
    assert table.grad is not None
    torch.testing.assert_close(table.grad.double(), expected, rtol=2e-4, atol=2e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("weighting", ["x0", "score", "unit", "mean_abs"])
def test_the_logged_length_is_the_gradients(weighting: Any) -> None:
    networks = Convolution(1), Convolution(2)
    batch = batch_of()
    lengths = []

    def build(generator: Any) -> DiffInstruct:
        method = DiffInstruct(generator, *networks, SCHEDULES["epsilon"], guidance_scale=3.0, weighting=weighting)
        loss_of = method.generator_loss

        def noting(batch: Batch) -> Any:
            output = loss_of(batch)
            lengths.append(output.metrics["score_gradient_norm"])
            return output

        method.generator_loss = noting  # type: ignore[method-assign]
        return method

    _, gradient = gradient_by_x0(build, batch)
    expected = (len(batch) * gradient).flatten(1).norm(dim=1).mean()
    assert float(lengths[0]) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("method_class", [DiffInstruct, DiffInstructPP])
def test_each_loss_reaches_one_network_only(method_class: type) -> None:
    generator, fake, reference, reward_network = (Convolution(seed) for seed in range(4))
    options: dict = {"guidance_scale": 3.0}
    if method_class is DiffInstructPP:
        options |= {"reward": lambda x0, c: reward_network(x0, c).flatten(1).sum(1), "reward_scale": 1.0}
    method = method_class(generator, fake, reference, SCHEDULES["epsilon"], **options)

    method.fake_loss(batch_of()).loss.backward()
    assert fake.weight.grad is not None and fake.weight.grad.norm() > 0
    assert all(network.weight.grad is None for network in (generator, reference, reward_network))

    fake.weight.grad = None
    method.generator_loss(batch_of()).loss.backward()
    assert generator.weight.grad is not None and generator.weight.grad.norm() > 0
    assert all(network.weight.grad is None for network in (fake, reference, reward_network))


@pytest.mark.parametrize("clip", [0.5, 1e6])
def test_the_reward_term_is_shortened_by_sample_to_a_share_of_the_score_term(clip: float) -> None:
    batch, scale = batch_of(), 0.3

    def gradient(
        reward_scale: float, reward_clip: float | None, part: slice = slice(None)
    ) -> tuple[torch.Tensor, dict]:
        table = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(1))
        # Of very different lengths, and one of none.
        table = table * torch.tensor([0.01, 1.0, 100.0, 1.0]).reshape(4, 1, 1, 1)
        table[3] = 0.5
        x0 = table[part].requires_grad_()
        of_part = Batch(batch.samples[part], batch.conditioning[part], batch.seed, SHAPE)
        method = DiffInstructPP(
            lambda z, conditioning: x0,
            Convolution(1),
            Convolution(2),
            SCHEDULES["epsilon"],
            reward=quadratic_reward,
            reward_scale=reward_scale,
            reward_clip=reward_clip,
        )
        output = method.generator_loss(of_part)
        (grad,) = torch.autograd.grad(output.loss, x0)
        return grad.double() * len(x0), dict(output.metrics)

    (score, _), (whole, plain), (clipped, metrics) = (
        gradient(0.0, None),
        gradient(scale, None),
        gradient(scale, clip),
    )
    norms = score.flatten(1).norm(dim=1)
    term, kept = whole - score, clipped - score
    lengths = term.flatten(1).norm(dim=1)
    limit = (clip * norms / lengths).clamp(max=1.0).nan_to_num(1.0).reshape(4, 1, 1, 1)
    torch.testing.assert_close(kept, term * limit, rtol=1e-4, atol=1e-5)
    assert metrics["reward_clipped"] == (limit < 1).float().mean() and "reward_clipped" not in plain
    for name in ("reward_gradient_norm", "score_gradient_norm", "gradient_cosine"):
        assert metrics[name] == plain[name]
    alone, _ = gradient(scale, clip, slice(1, 2))
    torch.testing.assert_close(alone, clipped[1:2], rtol=1e-5, atol=1e-6)


def test_reward_scale_is_the_only_thing_the_reward_changes() -> None:
    """With scale 0 the reward is logged and the gradient is Diff-Instruct's, bit for bit."""
    gradients = []
    for build in (
        lambda g: DiffInstruct(g, Convolution(1), Convolution(2), SCHEDULES["v_prediction"]),
        lambda g: DiffInstructPP(g, Convolution(1), Convolution(2), SCHEDULES["v_prediction"], quadratic_reward, 0.0),
    ):
        generator = Convolution(0)
        output = build(generator).generator_loss(batch_of())
        output.loss.backward()
        gradients.append(generator.weight.grad)
    assert torch.equal(*gradients)
    assert "reward" in output.metrics and "reward_gradient_norm" not in output.metrics


@pytest.mark.parametrize("weighting", ["prediction", "x0", "score", "function"])
def test_fake_loss_is_weighted_denoising(weighting: str) -> None:
    schedule, batch, generator, fake = SCHEDULES["v_prediction"], batch_of(), Convolution(0), Convolution(1)
    method = DiffInstruct(
        generator,
        fake,
        Convolution(2),
        schedule,
        fake_weighting=(lambda t: 1.0 + t.float()) if weighting == "function" else weighting,
    )
    loss = method.fake_loss(batch).loss

    t = Noise(3, batch.samples, stream=2).integers(0, T)
    a, s = (table[t].double().view(-1, 1, 1, 1) for table in (schedule.alphas, schedule.sigmas))
    eps = Noise(3, batch.samples, stream=1).normal(SHAPE).double()
    with torch.no_grad():
        x0 = generator(Noise(3, batch.samples, stream=0).normal(SHAPE), batch.conditioning).double()
        x_t = a * x0 + s * eps
        o = fake(x_t, t, batch.conditioning)
    x_fake = a * x_t - s * o
    score, truth = (a * x_fake - x_t) / s**2, -eps / s
    errors = {
        "prediction": (o - (a * eps - s * x0)).square(),
        "x0": (x_fake - x0).square(),
        "score": (score - truth).square(),
        "function": (1 + t.view(-1, 1, 1, 1)) * (o - (a * eps - s * x0)).square(),
    }
    torch.testing.assert_close(loss.double(), errors[weighting].mean(), rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize(("weighting", "guidance"), [("x0", 1.0), ("score", 1.0), ("unit", 1.0), ("x0", 3.0)])
def test_gaussian_reaches_the_analytic_optimum(weighting: str, guidance: float) -> None:
    """Generator N(theta, I), reference N(m, I), reward <v, x0>.

    The KL's gradient is c (theta - m_guided) with c = E_t[h sigma alpha], m_guided = m_uncond + w (m_cond - m_uncond);
    so theta* = m_guided + reward_scale v / c. The TA is trained along, as in the real algorithm.
    """
    schedule = SCHEDULES["epsilon"]
    cond_mean, v, reward_scale = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.5, 1.0, -1.0]), 0.7

    def build(generator: Any, fake: Any, reference: Any) -> DiffInstructPP:
        return DiffInstructPP(
            generator, fake, reference, schedule, lambda x0, c: x0 @ v, reward_scale, guidance, weighting
        )

    theta = train_gaussian(build, schedule, cond_mean)
    alpha, sigma = schedule.alphas.double(), schedule.sigmas.double()
    curvature = {"x0": sigma**2, "score": alpha**2, "unit": sigma * alpha}[weighting].mean().float()
    optimum = guidance * cond_mean + reward_scale * v / curvature
    assert (theta - optimum).norm() < 0.01 * optimum.norm()


def test_the_same_addresses_give_the_same_step() -> None:
    method = DiffInstruct(Convolution(0), Convolution(1), Convolution(2), SCHEDULES["epsilon"])
    assert torch.equal(method.generator_loss(batch_of()).loss, method.generator_loss(batch_of()).loss)
    assert not torch.equal(method.generator_loss(batch_of()).loss, method.generator_loss(batch_of(first=104)).loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weighting": "sid"}, "weighting must be one of x0, score, unit, mean_abs"),
        ({"fake_weighting": "snr"}, "fake_weighting must be one of"),
        ({"t_range": (500, 500)}, r"t_range must lie within \[0, 1000\)"),
        ({"t_range": (0, 1001)}, "t_range"),
        ({"fake_rounds": 0}, "fake_rounds must be at least 1"),
        ({"reward_scale": 1.0}, "reward_scale is 1.0, but no reward"),
        ({"reward": quadratic_reward}, r"a reward needs its reward_scale; with 0\.0 it is evaluated and logged only"),
        ({"reward": quadratic_reward, "reward_scale": float("nan")}, "reward_scale must be finite"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be finite"),
        ({"guidance_rescale": 1.5}, r"guidance_rescale must lie in \[0, 1\]"),
        ({"prompt_dropout": 1.0}, r"prompt_dropout must lie in \[0, 1\)"),
        ({"weighting": lambda t: 1.0}, r"weighting must turn t \[B\] into floating-point weights \[B\], got float"),
        ({"weighting": lambda t: t}, r"weighting must turn .*, got torch.int64 \[1000\]"),
        (
            {"fake_weighting": lambda t: t.float() - 3.0},
            r"fake_weighting is negative at t = 0, 1, 2: .* e\.g\. \[3, 1000\]",
        ),
        (
            {"weighting": lambda t: 1.0 / t.float()},
            r"weighting is not finite at t = 0: leave .* t_range, e\.g\. \[1, 1000\]",
        ),
    ],
)
def test_wrong_options_are_refused_by_name(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffInstructPP(Convolution(0), Convolution(1), Convolution(2), SCHEDULES["epsilon"], **options)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda x0, c: x0.mean(), r"a tensor of shape \(4,\), got shape \(\): keep the samples apart"),
        (lambda x0, c: x0.mean((1, 2, 3), keepdim=True), r"shape \(4,\), got shape \(4, 1, 1, 1\): flatten it"),
        (lambda x0, c: x0.mean((1, 2, 3))[:3], r"got shape \(3,\)$"),
        (lambda x0, c: x0.mean((1, 2, 3)).tolist(), "got list of 4"),
        (lambda x0, c: x0.mean((1, 2, 3)).detach().numpy(), "got a NumPy array, through which nothing can be diff"),
        (lambda x0, c: None, "got NoneType: did it return nothing"),
        (lambda x0, c: x0.mean((1, 2, 3)).round().int(), "of a floating-point dtype, got torch.int32"),
        (lambda x0, c: x0.mean((1, 2, 3)).to("meta"), "the reward gave a tensor on meta, its inputs are on cpu"),
        (lambda x0, c: x0.mean((1, 2, 3)).detach(), "no gradient by x0"),
        (lambda x0, c: x0.detach().mean((1, 2, 3)) + nn.Parameter(torch.ones(4)), "does not reach the samples"),
    ],
)
def test_wrong_rewards_are_refused(reward: object, message: str) -> None:
    networks = Convolution(0), Convolution(1), Convolution(2)
    method = DiffInstructPP(*networks, SCHEDULES["epsilon"], reward=reward, reward_scale=1.0)
    with pytest.raises((TypeError, ValueError), match=message):
        method.generator_loss(batch_of())


@pytest.mark.parametrize("options", [{"weighting": "score"}, {"fake_weighting": "score"}])
def test_a_weighting_that_is_infinite_somewhere_asks_for_a_time_range(options: dict) -> None:
    sigmas = torch.arange(10, dtype=torch.float64) / 10
    schedule = NoiseSchedule(1 - sigmas, sigmas, "flow_prediction")
    with pytest.raises(ValueError, match=r"weighting 'score' is not finite at t = 0: .* e\.g\. \[1, 10\]"):
        DiffInstruct(Convolution(0), Convolution(1), Convolution(2), schedule, **options)
    DiffInstruct(Convolution(0), Convolution(1), Convolution(2), schedule, t_range=(1, 10), **options)


def test_guidance_without_null_conditioning_is_refused() -> None:
    method = DiffInstruct(Convolution(0), Convolution(1), Convolution(2), SCHEDULES["epsilon"], guidance_scale=2.0)
    batch = Batch(torch.arange(2), torch.zeros(2, 1, 1, 1), shape=SHAPE)
    with pytest.raises(ValueError, match="null_conditioning"):
        method.generator_loss(batch)


def test_samples_of_the_generators_step_are_learnt_on_with_times_and_noise_of_their_own() -> None:
    calls: list[int] = []

    def generator(z: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        calls.append(len(z))
        return network(z, conditioning)

    network, fake = Convolution(0), Convolution(1)
    method = DiffInstruct(generator, fake, Convolution(2), SCHEDULES["epsilon"], share_samples=True)
    made = method.generator_loss(batch_of()).x0
    assert made is not None and not made.requires_grad and calls == [4]
    # The same latents and prompts looked at from other addresses: as if the numbers' latents had given these samples.
    later = batch_of(first=104)
    shared = method.fake_loss(replace(later, x0=made))
    assert calls == [4]
    method.generator = lambda z, conditioning: made
    assert torch.equal(shared.loss, method.fake_loss(later).loss)
    assert not torch.equal(shared.loss, method.fake_loss(batch_of()).loss)
    shared.loss.backward()
    assert fake.weight.grad is not None and network.weight.grad is None
    assert method.fake_loss(later).x0 is None


def test_shared_samples_are_checked() -> None:
    networks = Convolution(0), Convolution(1), Convolution(2), SCHEDULES["epsilon"]
    with pytest.raises(ValueError, match=r"Batch\.x0 must have shape \(4, 2, 3, 3\), got \(3, 2, 3, 3\)"):
        DiffInstruct(*networks).fake_loss(replace(batch_of(), x0=torch.zeros(3, 2, 3, 3)))
    with pytest.raises(ValueError, match="share_samples takes were made with it"):
        DiffInstruct(*networks, share_samples=True, prompt_dropout=0.1)
