"""Generators of a few steps: their calls, whose x0 a loss sees, where the gradient goes, and where training leads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from method_cases import SCHEDULES, SHAPE, Convolution, batch_of
from test_methods_shared import METHODS, made
from torch import nn

from diffpp_fast import Noise, NoiseSchedule
from diffpp_fast.methods import Batch, DiffInstructPP, base
from diffpp_fast.methods.base import LATENT, TIMESTEP
from diffpp_fast.methods.regularizers import KLToStart, StepImageDenoising
from diffpp_fast.methods.times import LogNormal, StepTimes, TimeIntervals
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


def drawn_steps(generator: FewStepGenerator, batch: Batch) -> list[int]:
    """The steps whose x0 a loss is of, from the addresses in the docs."""
    count = len(generator.timesteps)
    if generator.gradient_step == "last":
        return [count - 1] * len(batch)
    if generator.gradient_step == "random":
        return batch.noise(STEP).integers(0, count).tolist()
    first = batch.samples[:1] if batch.first is None else torch.tensor([batch.first])
    return Noise(batch.seed, first, STEP).integers(0, count).tolist() * len(batch)


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


@pytest.mark.parametrize("gradient_step", ["last", "random", "random_exit"])
@pytest.mark.parametrize("renoise", ["fresh", "ddim"])
@pytest.mark.parametrize("prediction_type", list(SCHEDULES))
def test_sample_and_gradient_are_those_of_the_formulas(prediction_type: str, renoise: str, gradient_step: str) -> None:
    generator = few(prediction_type, timesteps=(900, 300), renoise=renoise, gradient_step=gradient_step)
    batch, network = batch_of(8), network_of(generator)
    z = batch.noise(LATENT).normal(SHAPE).double()
    x0 = generator(z, batch.conditioning, noise=batch.noise, update=batch.update_noise, for_loss=True)
    steps = drawn_steps(generator, batch)
    assert len(set(steps)) == (2 if gradient_step == "random" else 1)
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


def test_calls_end_at_the_step_that_is_drawn_for_an_update() -> None:
    """The same one in all of its parts, in whichever process; a picture is made of all calls."""
    generator, seen = few(gradient_step="random_exit"), []
    calls = network_of(generator).calls
    for update in range(0, 320, 4):
        parts = [replace(batch_of(2, first), first=update) for first in (update, update + 2)]
        for batch in parts:
            generator(
                batch.noise(LATENT).normal(SHAPE),
                batch.conditioning,
                noise=batch.noise,
                update=batch.update_noise,
                for_loss=True,
            )
        (step,) = {*drawn_steps(generator, parts[0]), *drawn_steps(generator, parts[1])}
        assert calls == [([time] * 2, time == TIMES[step]) for time in TIMES[: step + 1]] * 2
        assert generator.steps(parts[1].noise, parts[1].update_noise).tolist() == [step] * 2
        seen.append(len(calls) / 2)
        calls.clear()
    assert set(seen) == {1, 2, 3} and sum(seen) / len(seen) == pytest.approx(2, abs=0.3)
    generator(torch.zeros(2, *SHAPE), torch.zeros(2, 1, 1, 1), noise=batch_of(2).noise)
    assert len(calls) == 3
    with pytest.raises(ValueError, match=r"hand it update, stream -> Noise, such as Batch\.update_noise"):
        generator(torch.zeros(2, *SHAPE), torch.zeros(2, 1, 1, 1), noise=batch_of(2).noise, for_loss=True)


def test_one_step_of_it_is_the_one_step_generator_to_the_bit() -> None:
    z, conditioning = torch.randn(3, *SHAPE), torch.zeros(3, 1, 1, 1)
    for prediction_type, schedule in SCHEDULES.items():
        several = few(prediction_type, timesteps=[500], input_scale="sigma")
        one = OneStepGenerator(several.network, schedule, timestep=500)
        assert torch.equal(several(z, conditioning), one(z, conditioning))
        assert torch.equal(several(z, conditioning, for_loss=True), one(z, conditioning))


def test_a_sample_does_not_depend_on_its_batch() -> None:
    """So a run is the same on any number of processes and with any micro-batch."""
    whole = replace(batch_of(6), first=100)
    for name, gradient_step in (("dmd2", "random"), ("sid", "random"), ("decoupled_dmd", "random_exit")):
        networks = few(gradient_step=gradient_step), Convolution(1), Convolution(2)
        method = made(name, *networks, time_intervals="separate", t_range=(0, 850))
        parts = [
            Batch(
                whole.samples[part],
                whole.conditioning[part],
                whole.seed,
                SHAPE,
                whole.null_conditioning[part],
                first=100,
            )
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
        ({"gradient_step": "first"}, "gradient_step must be one of last, random, random_exit, got 'first'"),
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


def test_times_lie_in_the_interval_of_each_step() -> None:
    """Uniform ones are those of the interval's own range, to the bit; others are its cut of the distribution."""
    schedule, noise = SCHEDULES["epsilon"], Noise(5, torch.arange(6000), TIMESTEP)
    steps = torch.arange(6000) % 3

    def drawn(nested: bool = False, t_range: Any = None, distribution: Any = None) -> list[torch.Tensor]:
        times = StepTimes("t_range", schedule, t_range, distribution, TIMES, range(3), nested=nested)
        t = times.draw(noise, steps)
        assert set(t.tolist()) <= set(times.possible().tolist())
        return [t[steps == step] for step in range(3)]

    intervals = {
        (False, None): [(600, 900), (200, 600), (0, 200)],
        (True, None): [(600, 1000), (200, 1000), (0, 1000)],
        (False, (20, 700)): [(600, 700), (200, 600), (20, 200)],
    }
    for (nested, t_range), expected in intervals.items():
        for step, (low, high) in enumerate(expected):
            own = Noise(5, torch.arange(6000)[steps == step], TIMESTEP).integers(low, high)
            assert torch.equal(drawn(nested, t_range)[step], own)
    log_normal = LogNormal(-1.2, 1.2)
    below = log_normal.cumulative(schedule)
    for (low, high), t in zip(intervals[False, None], drawn(distribution=log_normal), strict=True):
        assert low <= int(t.min()) and int(t.max()) < high
        half = int((below[low : high + 1] < (below[low] + below[high]) / 2).sum()) + low
        assert float((t < half).double().mean()) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("name", METHODS)
def test_every_loss_of_every_method_follows_the_steps(name: str) -> None:
    """TA, reference, guidance: what is asked of a sample is at times of its step."""
    asked: list[torch.Tensor] = []

    class Asked(Convolution):
        def forward(self, x: torch.Tensor, *rest: Any) -> torch.Tensor:
            asked.append(rest[0])
            return super().forward(x, *rest)

    method = made(name, few(), Asked(1), Asked(2), time_intervals="separate", batched_passes=False)
    batch = batch_of(16)
    low, high = (torch.tensor(bounds)[batch.noise(STEP).integers(0, 3)] for bounds in ([600, 200, 0], [900, 600, 200]))
    output = method.generator_loss(batch)
    method.fake_loss(batch)
    # DIDR's later denoising steps go down from the time that was drawn.
    first = [t for number, t in enumerate(asked) if name != "didr" or number not in (2, 3)]
    assert len(first) >= 3 and all(((t >= low) & (t < high)).all() for t in first)
    shared = replace(batch, samples=batch.samples + 50, x0=output.x0)
    asked.clear()
    method.fake_loss(replace(shared, steps=output.steps))
    assert all(((t >= low) & (t < high)).all() for t in asked)
    with pytest.raises(ValueError, match=r"needs Batch\.steps beside Batch\.x0"):
        method.fake_loss(shared)


@pytest.mark.parametrize(
    ("call", "options", "message"),
    [
        ({"timesteps": [500]}, {"time_intervals": "nested"}, "time_intervals 'nested' are those of .* single call"),
        ({}, {"time_intervals": "own"}, "time_intervals must be one of whole, separate, nested, got 'own'"),
        (
            {},
            {"time_intervals": "separate", "t_range": (300, 1000)},
            r"t_range \[300, 1000\) holds no time of \[0, 200\), in which those of the call at 200 lie",
        ),
        (
            {"timesteps": [900, 500], "gradient_step": "last"},
            {"time_intervals": "separate", "fake_t_range": (500, 1000)},
            r"fake_t_range \[500, 1000\) holds no time of \[0, 500\)",
        ),
    ],
)
def test_intervals_without_times_are_refused(call: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made("dmd2", few(**call), Convolution(1), Convolution(2), **options)


def test_images_are_denoised_at_the_times_of_the_calls_that_learn() -> None:
    generator, batch = few(), batch_of(8)
    latents = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(7))
    images = base.ImageData(latents, torch.full((8, 1, 1, 1), -0.25))
    term = StepImageDenoising(0.7, SCHEDULES["epsilon"])
    found = term(replace(batch, images=images), latents, lambda _: latents, generator)
    network = network_of(generator)
    times = torch.tensor(TIMES)[drawn_steps(generator, batch)]
    assert network.calls == [(times.tolist(), True)] and len(set(times.tolist())) == 3
    alpha, sigma = (each.view(-1, 1, 1, 1) for each in SCHEDULES["epsilon"].coefficients(times))
    x_t = alpha * latents + sigma * batch.noise(base.IMAGE_DIFFUSION).normal(SHAPE)
    denoised = (x_t - sigma * network(x_t, times, images.conditioning)) / alpha
    expected = 0.35 * (denoised - latents).square().sum() / 8
    assert found.loss is not None
    torch.testing.assert_close(found.loss, expected, rtol=1e-5, atol=0)
    gradients = [torch.autograd.grad(loss, [network.weight])[0] for loss in (found.loss, expected)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


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
    """Exact epsilon of data N(mean, spread^2 I), or of other data from each of some falling times on."""

    def __init__(self, schedule: NoiseSchedule, mean: torch.Tensor, spread: float, times: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.schedule = schedule
        self.times = times
        self.mean = nn.Parameter(mean.expand(len(times) + 1, -1).clone())
        self.spread = nn.Parameter(torch.full((len(times) + 1,), spread))

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, _: Any) -> torch.Tensor:
        alpha, sigma = (each.view(-1, 1) for each in self.schedule.coefficients(t))
        data = sum(((t < time).long() for time in self.times), torch.zeros_like(t))
        variance = (alpha * self.spread[data].view(-1, 1)).square() + sigma.square()
        return sigma * (x_t - alpha * self.mean[data]) / variance


def pull_of(low: int, high: int, spread: float) -> float:
    """c = E[sigma^2 / (alpha^2 S^2 + sigma^2)] over the times: X_fake - X_reference of Gaussians with that spread whose
    means are 1 apart."""
    alphas, sigmas = (table[low:high].square() for table in (SCHEDULES["epsilon"].alphas, SCHEDULES["epsilon"].sigmas))
    return float((sigmas / (alphas * spread**2 + sigmas)).mean())


@pytest.mark.parametrize(("gradient_step", "kept"), [("last", 0.5), ("random", 0.5), ("random_exit", 0.0)])
def test_the_gradient_is_zero_at_the_optimum_of_each_steps_interval(gradient_step: GradientStep, kept: float) -> None:
    """Samples of step k are N(m_k, S^2), and c_k (m_k - m) - reward_scale slope + kept (m_k - start_k) is 0.

    So the pull of the reference is that of the step's own times, and the KL to the start that of the step's samples. A
    TA of means f_k gives c_k (f_k - m) in place of the first term, whatever the samples are.
    """
    schedule, times, mean, spread = SCHEDULES["epsilon"], (800, 400), torch.tensor([1.0, -0.5]), 0.6
    slope, starts, sample = torch.tensor([0.5, 1.0]), torch.tensor([[0.2, 0.0], [-0.4, 0.3]]), SCHEDULES["sample"]
    pulls = [pull_of(400, 800, spread), pull_of(0, 400, spread)]
    means = torch.stack(
        [(c * mean + 0.5 * slope + kept * start) / (c + kept) for c, start in zip(pulls, starts, strict=True)]
    )

    def generator_of(means: torch.Tensor) -> FewStepGenerator:
        network = Linear(times, 2)
        made = FewStepGenerator(network, sample, timesteps=times, gradient_step=gradient_step)
        alpha, sigma = (float(each) for each in sample.coefficients(torch.tensor([400])))
        with torch.no_grad():
            network.a.copy_(
                torch.tensor([spread / made.input_scale, spread / (alpha**2 * spread**2 + sigma**2) ** 0.5])
            )
            network.b.copy_(torch.stack([means[0], means[1] - network.a[1] * alpha * means[0]]))
        return made

    def gradients(told: torch.Tensor) -> torch.Tensor:
        generator, fake = generator_of(means), Gaussian(schedule, mean, spread, (400,))
        with torch.no_grad():
            fake.mean.copy_(told)
        method = DiffInstructPP(
            generator,
            fake,
            Gaussian(schedule, mean, spread),
            schedule,
            reward=lambda x0, _: x0 @ slope,
            reward_scale=0.5,
            t_range=(0, 800),
            time_intervals="separate",
            regularizers=[KLToStart(generator_of(starts), kept)] if kept else None,
        )
        # Of two updates the first is of the first step, the other of the last.
        drawn = [Noise(1, torch.tensor([first * 2**15]), STEP).integers(0, 2).item() for first in range(20)]
        for first in (drawn.index(0), drawn.index(1)):
            numbers = torch.arange(first * 2**15, (first + 1) * 2**15)
            (method.generator_loss(Batch(numbers, None, seed=1, shape=(2,))).loss / 2).backward()
        network: Any = generator.network
        return torch.cat([network.a.grad[:, None], network.b.grad], 1)

    assert gradients(means).abs().max() < 0.01
    told = torch.tensor([3.0, 2.0])
    shares = [0.0, 1.0] if gradient_step == "last" else [0.5, 0.5]
    by_b = torch.stack([shares[step] * pulls[step] * (told - means[step]) for step in range(2)])
    alpha = float(sample.coefficients(torch.tensor([400]))[0])
    by_a = torch.stack([torch.zeros(()), alpha * by_b[1] @ means[0]])
    expected = torch.cat([by_a[:, None], by_b], 1)
    torch.testing.assert_close(gradients(told.expand(2, -1)), expected, rtol=0.02, atol=0.01)


def trained(
    gradient_step: GradientStep,
    mean: torch.Tensor,
    spread: float,
    slope: torch.Tensor,
    count: int = 1024,
    time_intervals: TimeIntervals = "whole",
) -> Any:
    """A generator of two linear calls that Diff-Instruct++ has trained from 0, and a batch that no update has seen."""
    schedule, times, size = SCHEDULES["epsilon"], (800, 400), len(mean)
    network = Linear(times, size)
    generator = FewStepGenerator(network, SCHEDULES["sample"], timesteps=times, gradient_step=gradient_step)
    fake = Gaussian(schedule, torch.zeros(size), 1.0, () if time_intervals == "whole" else (400,))
    method = DiffInstructPP(
        generator,
        fake,
        Gaussian(schedule, mean, spread),
        schedule,
        reward=lambda x0, _: x0 @ slope,
        reward_scale=0.5,
        t_range=(0, 600),
        time_intervals=time_intervals,
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
    optimum = mean + 0.5 * slope / pull_of(0, 600, spread)
    with torch.no_grad():
        x0 = generator(batch.noise(LATENT).normal(batch.shape), noise=batch.noise, for_loss=True)
    assert (x0.mean(0) - optimum).norm() < 0.01 * optimum.norm()
    assert float(x0.std(0).square().mean().sqrt()) == pytest.approx(spread, rel=0.01)
    of_last = x0[generator.steps(batch.noise) == 1].mean(0)
    assert ((of_last - optimum).norm() < 0.1 * optimum.norm()) == (gradient_step == "last")


@pytest.mark.slow
@pytest.mark.parametrize("gradient_step", ["random", "random_exit"])
def test_training_in_intervals_leads_each_step_to_its_own_optimum(gradient_step: GradientStep) -> None:
    mean, spread, slope = torch.tensor([1.0, -0.5]), 0.6, torch.tensor([0.5, 1.0])
    generator, batch = trained(gradient_step, mean, spread, slope, time_intervals="separate")
    generator.gradient_step = "random"
    with torch.no_grad():
        x0 = generator(batch.noise(LATENT).normal(batch.shape), noise=batch.noise, for_loss=True)
    steps = batch.noise(STEP).integers(0, 2)
    for step, interval in enumerate([(400, 600), (0, 400)]):
        optimum = mean + 0.5 * slope / pull_of(*interval, spread)
        of_step = x0[steps == step]
        # An update of one step leaves the other where it is, which takes twice as many.
        tolerance = 0.01 if gradient_step == "random" else 0.02
        assert (of_step.mean(0) - optimum).norm() < tolerance * optimum.norm()
        assert float(of_step.std(0).square().mean().sqrt()) == pytest.approx(spread, rel=tolerance)
