"""Small cases for every method: schedules of all prediction types, networks, a formula's inputs, trained Gaussians."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from diffpp_fast import Noise, NoiseSchedule
from diffpp_fast.methods import Batch, Method

T = 1000
SHAPE = (2, 3, 3)


def variance_preserving(prediction_type: str = "epsilon") -> NoiseSchedule:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, T, dtype=torch.float64).square()
    cumulative = (1 - betas).cumprod(0)
    return NoiseSchedule(cumulative.sqrt(), (1 - cumulative).sqrt(), prediction_type=prediction_type)


def rectified_flow() -> NoiseSchedule:
    sigmas = (torch.arange(T, dtype=torch.float64) + 1) / (T + 1)
    return NoiseSchedule(1 - sigmas, sigmas, prediction_type="flow_prediction")


SCHEDULES = {
    "epsilon": variance_preserving(),
    "v_prediction": variance_preserving("v_prediction"),
    "flow_prediction": rectified_flow(),
    "sample": variance_preserving("sample"),
}


class Convolution(nn.Module):
    """A network of any role: (x, t, conditioning) or (z, conditioning) -> the shape of x."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(SHAPE[0], SHAPE[0], 3, 3, generator=generator) / 3)

    def forward(self, x: torch.Tensor, *rest: object) -> torch.Tensor:
        *_, conditioning = rest
        return (nn.functional.conv2d(x, self.weight.to(x.dtype), padding=1) + conditioning).tanh()


def batch_of(count: int = 4, first: int = 100) -> Batch:
    return Batch(
        torch.arange(first, first + count),
        torch.full((count, 1, 1, 1), 0.5),
        seed=3,
        shape=SHAPE,
        null_conditioning=torch.zeros(count, 1, 1, 1),
    )


def quadratic_reward(x0: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
    return -(x0 - conditioning).square().flatten(1).sum(1)


class Level(NamedTuple):
    """A noise level in float64: x0 at it, t, a and s [B, 1, 1, 1], eps."""

    x_t: torch.Tensor
    t: torch.Tensor
    a: torch.Tensor
    s: torch.Tensor
    eps: torch.Tensor

    def x0_of(self, prediction_type: str, output: torch.Tensor) -> torch.Tensor:
        """The x0 that a prediction implies, each from its own definition."""
        if prediction_type == "epsilon":
            return (self.x_t - self.s * output) / self.a
        if prediction_type == "v_prediction":
            return self.a * self.x_t - self.s * output
        if prediction_type == "flow_prediction":
            return self.x_t - self.s * output
        return output

    def guided(self, network: nn.Module, batch: Batch, scale: float) -> torch.Tensor:
        """A network's guided output."""
        cond, uncond = (network(self.x_t, self.t, given) for given in (batch.conditioning, batch.null_conditioning))
        return uncond + scale * (cond - uncond)


def level_of(
    x0: torch.Tensor,
    batch: Batch,
    schedule: NoiseSchedule,
    t_range: tuple[int, int],
    streams: tuple[int, int] = (2, 1),
) -> Level:
    """x0 at the times and with the noise of these streams; differentiable in x0."""
    t = Noise(batch.seed, batch.samples, stream=streams[0]).integers(*t_range)
    eps = Noise(batch.seed, batch.samples, stream=streams[1]).normal(SHAPE).double()
    a, s = (table.float().double()[t].view(-1, 1, 1, 1) for table in (schedule.alphas, schedule.sigmas))
    return Level(a * x0 + s * eps, t, a, s, eps)


def gradient_by_x0(
    build: Callable[[Callable[..., torch.Tensor]], Method], batch: Batch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fixed samples in float64, and what a method's generator loss gives as its gradient by them."""
    x0 = nn.Parameter(torch.randn(len(batch), *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    build(lambda z, conditioning: x0 + 0 * z).generator_loss(batch).loss.backward()
    assert x0.grad is not None
    return x0.detach(), x0.grad


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Schedules give float32: equal up to their rounding, in units of the largest element."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


class GaussianScore(nn.Module):
    """Exact epsilon of data N(mean, I) under a variance-preserving schedule; the conditioning shifts the mean."""

    def __init__(self, schedule: NoiseSchedule, mean: torch.Tensor) -> None:
        super().__init__()
        self.schedule = schedule
        self.mean = nn.Parameter(mean.clone())

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        alpha, sigma = (c.view(-1, 1) for c in self.schedule.coefficients(t))
        return sigma * (x_t - alpha * (self.mean + shift))


def train_gaussian(
    build: Callable[[Callable[..., torch.Tensor], Callable[..., torch.Tensor], GaussianScore], Method],
    schedule: NoiseSchedule,
    cond_mean: torch.Tensor,
    *,
    rates: tuple[float, float] = (2.5, 1.0),
    rounds: int = 160,
    count: int = 1024,
) -> torch.Tensor:
    """Return the mean theta of a generator theta + z that a method trains from 0, three rounds of the TA per step.

    Args:
        build: (generator, fake, reference) -> the method. The reference is N(cond_mean, I), and N(0, I) without prompt;
            the TA is exact at any time once it knows theta.
        schedule: of both scores, variance-preserving.
        cond_mean: the conditioning; the null conditioning is 0.
        rates: learning rates of the TA and of the generator, whose own falls to 0 over the second half.
        rounds, count: steps, and samples of each update.
    """
    zero = torch.zeros(len(cond_mean))
    theta, fake = nn.Parameter(zero.clone()), GaussianScore(schedule, zero)
    method = build(lambda z, c: theta + z, lambda x_t, t, c: fake(x_t, t, zero), GaussianScore(schedule, zero))
    conditioning, null = cond_mean.expand(count, -1), torch.zeros(count, len(cond_mean))
    optimizers = {"fake": torch.optim.SGD(fake.parameters(), lr=rates[0]), "generator": torch.optim.SGD([theta])}
    first = 0
    for step in range(rounds):
        optimizers["generator"].param_groups[0]["lr"] = rates[1] * min(1.0, 2 * (rounds - step) / rounds)
        for role in ("fake", "fake", "fake", "generator"):
            samples = torch.arange(first, first + count)
            first += count
            batch = Batch(samples, conditioning, seed=1, shape=(len(cond_mean),), null_conditioning=null)
            loss = (method.fake_loss if role == "fake" else method.generator_loss)(batch).loss
            optimizers[role].zero_grad()
            loss.backward()
            optimizers[role].step()
    return theta.detach()
