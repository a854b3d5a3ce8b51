"""Generators of a few steps: their calls, whose x0 a loss sees, where the gradient goes, and where training leads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from method_cases import SCHEDULES, SHAPE, Convolution, batch_of
from test_methods_shared import METHODS, made
from torch import nn

from diffpp_fast import Noise, NoiseSchedule
from diffpp_fast.methods import Batch, DiffInstructPP, base
from diffpp_fast.methods.base import LATENT
from diffpp_fast.networks import FewStepGenerator, OneStepGenerator
from diffpp_fast.networks.few_step import MOST_STEPS, RENOISE, STEP, GradientStep
from diffpp_fast.noise import USER_STREAMS

TIMES = (900, 600, 200)


class Denoising(Convolution):
    """A network of the generator that notes the times it was asked at, and whether a graph was kept."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.calls: list[tuple[list[int], bool]] = []

    def forward(self, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        self.calls.append((rest[0].tolist(), torch.is_grad_enabled()))
        return super().forward(x, *rest) * (1 + rest[0].view(-1, 1, 1, 1).to(x.dtype) / 1000)


def few(prediction_type: str = "epsilon", seed: int = 7, **changes: Any) -> FewStepGenerator:
    options = {"timesteps": TIMES, "input_scale": 1.0, **changes}
    return FewStepGenerator(Denoising(seed), SCHEDULES[prediction_type], **options)


def network_of(generator: FewStepGenerator) -> Denoising:
    assert isinstance(generator.network, Denoising)
    return generator.network


def by_hand(generator: FewStepGenerator, batch: Batch, steps: list[int]) -> torch.Tensor:
    """Each sample's x0 of its step in float64, by the formulas, with gradient through that one call."""
    schedule, network, results = generator.schedule, network_of(generator), []
    for place, last in enumerate(steps):
        samples = batch.samples[place : place + 1]
        x = Noise(batch.seed, samples, LATENT).normal(SHAPE).double()
        for number, timestep in enumerate(generator.timesteps[: last + 1]):
            a, s = (float(table[timestep].float()) for table in (schedule.alphas, schedule.sigmas))
            output = network(x, torch.tensor([timestep]), batch.conditioning[place : place + 1])
            x0, eps = {
                "epsilon": ((x - s * output) / a, output),
                "v_prediction": (a * x - s * output, s * x + a * output),
                "flow_prediction": (x - s * output, x + (1 - s) * output),
                "sample": (output, (x - a * output) / s),
            }[schedule.prediction_type]
            if number == last:
                results.append(x0)
                break
            if generator.renoise == "fresh":
                eps = Noise(batch.seed, samples, RENOISE + number).normal(SHAPE).double()
            following = generator.timesteps[number + 1]
            x = (schedule.alphas[following].float() * x0 + schedule.sigmas[following].float() * eps).detach()
    return torch.cat(results)


@pytest.mark.parametrize("gradient_step", ["last", "random"])
@pytest.mark.parametrize("renoise", ["fresh", "ddim"])
@pytest.mark.parametrize("prediction_type", list(SCHEDULES))
def test_sample_and_gradient_are_those_of_the_formulas(prediction_type: str, renoise: str, gradient_step: str) -> None:
    generator = few(prediction_type, timesteps=(900, 300), renoise=renoise, gradient_step=gradient_step)
    batch, network = batch_of(8), network_of(generator)
    z = batch.noise(LATENT).normal(SHAPE).double()
    x0 = generator(z, batch.conditioning, noise=batch.noise, for_loss=True)
    steps = [1] * 8 if gradient_step == "last" else batch.noise(STEP).integers(0, 2).tolist()
    assert len(set(steps)) == (1 if gradient_step == "last" else 2)
    expected = by_hand(generator, batch, steps)
    torch.testing.assert_close(x0, expected, rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(x0.square().sum(), [network.weight])
    torch.testing.assert_close(
        gradient, torch.autograd.grad(expected.square().sum(), [network.weight])[0], rtol=1e-4, atol=1e-4
    )


def test_a_picture_is_of_the_last_step_and_a_loss_of_the_drawn_one() -> None:
    generator, batch = few(), batch_of(64)
    z = batch.noise(LATENT).normal(SHAPE)
    picture = generator(z, batch.conditioning, noise=batch.noise)
    seen = generator(z, batch.conditioning, noise=batch.noise, for_loss=True)
    last = batch.noise(STEP).integers(0, 3) == 2
    assert torch.equal(seen[last], picture[last])
    assert 10 < int(last.sum()) < 35 and ((seen - picture).flatten(1).norm(dim=1) > 0.1)[~last].all()
    calls = network_of(generator).calls
    assert [grad for _, grad in calls] == [False, False, True] * 2
    assert [times[0] for times, _ in calls[:3]] == list(TIMES) and set(calls[-1][0]) == set(TIMES)


def test_one_step_of_it_is_the_one_step_generator_to_the_bit() -> None:
    z, conditioning = torch.randn(3, *SHAPE), torch.zeros(3, 1, 1, 1)
    for prediction_type, schedule in SCHEDULES.items():
        several = few(prediction_type, timesteps=[500], input_scale="sigma")
        one = OneStepGenerator(several.network, schedule, timestep=500)
        assert torch.equal(several(z, conditioning), one(z, conditioning))
        assert torch.equal(several(z, conditioning, for_loss=True), one(z, conditioning))


def test_a_sample_does_not_depend_on_its_batch() -> None:
    """So a run is the same on any number of processes and with any micro-batch."""
    whole = batch_of(6)
    for method in (made("dmd2", few(), Convolution(1), Convolution(2)), made("sid", few(), *map(Convolution, (1, 2)))):
        parts = [
            Batch(whole.samples[part], whole.conditioning[part], whole.seed, SHAPE, whole.null_conditioning[part])
            for part in (slice(0, 2), slice(2, 6))
        ]
        network = method.generator.network
        gradients = []
        for batches in ([whole], parts):
            network.weight.grad = None
            for batch in batches:
                (method.generator_loss(batch).loss * (len(batch) / 6)).backward()
            gradients.append(network.weight.grad)
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)
        drawn = [method.generator_loss(batch).x0 for batch in ([whole, *parts])]
        torch.testing.assert_close(drawn[0], torch.cat(drawn[1:]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_hands_over_addresses_and_reaches_one_network(name: str) -> None:
    """The teaching assistant learns on samples of the law that the generator's loss sees: of drawn steps."""
    generator, fake, reference = few(), Convolution(1), Convolution(2)
    weight = network_of(generator).weight
    method, batch = made(name, generator, fake, reference), batch_of()
    output = method.generator_loss(batch)
    output.loss.backward()
    assert weight.grad is not None and weight.grad.norm() > 0
    assert fake.weight.grad is None and reference.weight.grad is None
    weight.grad = None
    expected = by_hand(generator, batch, batch.noise(STEP).integers(0, 3).tolist())
    torch.testing.assert_close(output.x0.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(method._fake_samples(batch), output.x0)
    method.fake_loss(batch).loss.backward()
    assert fake.weight.grad is not None and fake.weight.grad.norm() > 0
    assert weight.grad is None and reference.weight.grad is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timesteps": []}, "timesteps must be 1 to 8 times, got 0 of them"),
        ({"timesteps": range(900, 0, -100)}, "timesteps must be 1 to 8 times, got 9 of them"),
        ({"timesteps": [200, 600]}, r"timesteps must fall from each call to the next, got \[200, 600\]"),
        ({"timesteps": [600, 600]}, "timesteps must fall"),
        ({"timesteps": [1000, 500]}, r"timestep must lie in \[0, 1000\), got 1000"),
        ({"timesteps": [500, -1]}, r"timestep must lie in \[0, 1000\), got -1"),
        ({"input_scale": 0.0}, r"input_scale 0\.0 feeds the network 0 z at timestep 900"),
        ({"renoise": "ode"}, "renoise must be one of fresh, ddim, got 'ode'"),
        ({"gradient_step": "first"}, "gradient_step must be one of last, random, got 'first'"),
    ],
)
def test_what_makes_no_steps_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        few(**changes)


def test_times_that_give_no_x0_are_refused_and_missing_addresses_named() -> None:
    alphas = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    schedule = NoiseSchedule(alphas, (1 - alphas**2).sqrt(), "epsilon")
    with pytest.raises(ValueError, match=r"timestep 2, where alpha is 0 and sigma 1: x0 .* the error of an epsilon"):
        FewStepGenerator(nn.Identity(), schedule, timesteps=[2, 1])
    with pytest.raises(ValueError, match="timestep 0, where alpha is 1 and sigma 0: x0 would be the input"):
        FewStepGenerator(nn.Identity(), schedule, timesteps=[1, 0])
    with pytest.raises(ValueError, match="FewStepGenerator draws noise after its steps"):
        few()(torch.zeros(2, *SHAPE), torch.zeros(2, 1, 1, 1))
    few(renoise="ddim")(torch.zeros(2, *SHAPE), torch.zeros(2, 1, 1, 1))


def test_its_streams_are_its_own() -> None:
    streams = [STEP, *(RENOISE + number for number in range(MOST_STEPS - 1))]
    assert len(set(streams)) == MOST_STEPS and not [each for each in streams if each in USER_STREAMS or each < 10]
    assert max(streams) < 2**32
    others = {value for name, value in vars(base).items() if name.isupper() and isinstance(value, int)}
    assert not others & set(streams)


class Linear(nn.Module):
    """x0 = a x + b with numbers of its own for each time: a network that predicts x0."""

    def __init__(self, times: tuple[int, ...], dimension: int) -> None:
        super().__init__()
        self.times = times
        self.a = nn.Parameter(torch.full((len(times),), 0.3))
        self.b = nn.Parameter(torch.zeros(len(times), dimension))

    def forward(self, x: torch.Tensor, t: torch.Tensor, _: Any) -> torch.Tensor:
        call = sum(number * (t == time) for number, time in enumerate(self.times))
        return self.a[call].view(-1, 1) * x + self.b[call]


class Gaussian(nn.Module):
    """Exact epsilon of data N(mean, spread^2 I)."""

    def __init__(self, schedule: NoiseSchedule, mean: torch.Tensor, spread: float) -> None:
        super().__init__()
        self.schedule = schedule
        self.mean = nn.Parameter(mean.clone())
        self.spread = nn.Parameter(torch.tensor(spread))

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, _: Any) -> torch.Tensor:
        alpha, sigma = (each.view(-1, 1) for each in self.schedule.coefficients(t))
        return sigma * (x_t - alpha * self.mean) / ((alpha * self.spread).square() + sigma.square())


def trained(
    gradient_step: GradientStep, mean: torch.Tensor, spread: float, slope: torch.Tensor, count: int = 1024
) -> Any:
    """A generator of two linear calls that Diff-Instruct++ has trained from 0, and a batch that no update has seen."""
    schedule, times, size = SCHEDULES["epsilon"], (800, 400), len(mean)
    network = Linear(times, size)
    generator = FewStepGenerator(network, SCHEDULES["sample"], timesteps=times, gradient_step=gradient_step)
    fake = Gaussian(schedule, torch.zeros(size), 1.0)
    method = DiffInstructPP(
        generator,
        fake,
        Gaussian(schedule, mean, spread),
        schedule,
        reward=lambda x0, _: x0 @ slope,
        reward_scale=0.5,
        t_range=(0, 600),
    )
    rounds, rate = 260, 0.03
    parts = {"fake": fake, "generator": network}
    optimizers = {name: torch.optim.Adam(part.parameters(), betas=(0.0, 0.99)) for name, part in parts.items()}
    first = 0
    for step in range(rounds):
        for role in ("fake", "fake", "generator"):
            optimizers[role].param_groups[0]["lr"] = rate * min(1.0, 2 * (rounds - step) / rounds) ** 1.5
            batch = Batch(torch.arange(first, first + count), None, seed=1, shape=(size,))
            first += count
            optimizers[role].zero_grad()
            (method.fake_loss if role == "fake" else method.generator_loss)(batch).loss.backward()
            optimizers[role].step()
    return generator, Batch(torch.arange(first, first + 2**16), None, seed=1, shape=(size,))


@pytest.mark.parametrize("gradient_step", ["last", pytest.param("random", marks=pytest.mark.slow)])
def test_two_calls_reach_the_optimum_of_a_gaussian(gradient_step: GradientStep) -> None:
    """The law that the losses see goes to N(m + reward_scale slope / c, S^2), c = E[sigma^2 / (alpha^2 S^2 + sigma^2)].

    With "random" that is the mixture of the steps' laws.
    """
    mean, spread, slope = torch.tensor([1.0, -0.5]), 0.6, torch.tensor([0.5, 1.0])
    generator, batch = trained(gradient_step, mean, spread, slope)
    alphas, sigmas = (table[:600].square() for table in (SCHEDULES["epsilon"].alphas, SCHEDULES["epsilon"].sigmas))
    optimum = mean + 0.5 * slope / float((sigmas / (alphas * spread**2 + sigmas)).mean())
    with torch.no_grad():
        x0 = generator(batch.noise(LATENT).normal(batch.shape), noise=batch.noise, for_loss=True)
    assert (x0.mean(0) - optimum).norm() < 0.01 * optimum.norm()
    assert float(x0.std(0).square().mean().sqrt()) == pytest.approx(spread, rel=0.01)
