"""Which diffusion times are drawn, how often, and whose prompts are left out: all by address."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from method_cases import SCHEDULES, SHAPE, Convolution, T, batch_of, level_of, train_gaussian
from torch import nn

from diffpp_fast import Noise
from diffpp_fast.methods import Batch, DiffInstruct, DiffInstructPP, SiD
from diffpp_fast.methods.dropout import drop_prompts
from diffpp_fast.methods.times import DISTRIBUTIONS, LogitNormal, LogNormal, Shifted, Times, Uniform
from diffpp_fast.networks import Conditioning

COUNT = 200_000
NOISE = Noise(5, torch.arange(COUNT), stream=2)
SCHEDULE = SCHEDULES["epsilon"]
LEVELS = (SCHEDULE.sigmas / SCHEDULE.alphas).log()


def simulated(distribution: Any) -> torch.Tensor:
    """Times as the definitions draw them, one by one, with torch's generator."""
    generator = torch.Generator().manual_seed(1)
    if isinstance(distribution, Shifted):
        u = torch.rand(8 * COUNT, generator=generator, dtype=torch.float64)
        return (T * distribution.shift * u / (1 + (distribution.shift - 1) * u)).long()
    normal = distribution.mean + distribution.std * torch.randn(8 * COUNT, generator=generator, dtype=torch.float64)
    if isinstance(distribution, LogitNormal):
        return (T * normal.sigmoid()).long()
    middles = (LEVELS[1:] + LEVELS[:-1]) / 2  # the nearest level
    inside = (normal > 2 * LEVELS[0] - middles[0]) & (normal < 2 * LEVELS[-1] - middles[-1])
    return torch.bucketize(normal[inside], middles)


@pytest.mark.parametrize("t_range", [(0, T), (100, 700)])
@pytest.mark.parametrize(
    "distribution",
    [LogNormal(-1.2, 1.2), LogNormal(0.5, 0.3), LogitNormal(0.0, 1.0), LogitNormal(-0.7, 0.5), Shifted(3.0)],
)
def test_times_are_distributed_as_defined(distribution: Any, t_range: tuple[int, int]) -> None:
    drawn = Times("t_range", SCHEDULE, t_range, distribution).draw(NOISE)
    expected = simulated(distribution)
    expected = expected[(expected >= t_range[0]) & (expected < t_range[1])]
    assert drawn.dtype == torch.int64 and drawn.min() >= t_range[0] and drawn.max() < t_range[1]
    one, other = (torch.bincount(t, minlength=T).double().cumsum(0) / len(t) for t in (drawn, expected))
    # Kolmogorov and Smirnov's distance of two samples: 1.95 sqrt(1/n + 1/m) is passed once in a thousand times.
    assert (one - other).abs().max() < 1.95 * (1 / COUNT + 1 / len(expected)) ** 0.5


@pytest.mark.parametrize("distribution", [None, Uniform(), Shifted(1.0)])
def test_uniform_times_are_the_noises_own_integers(distribution: Any) -> None:
    for t_range in ((0, T), (20, 980)):
        assert torch.equal(Times("t_range", SCHEDULE, t_range, distribution).draw(NOISE), NOISE.integers(*t_range))


def test_a_samples_time_does_not_depend_on_the_others() -> None:
    times = Times("t_range", SCHEDULE, (20, 980), LogNormal(-1.2, 1.2))
    part = Noise(5, NOISE.samples[777:801], stream=2)
    assert torch.equal(times.draw(part), times.draw(NOISE)[777:801])
    assert not torch.equal(times.draw(Noise(5, part.samples, stream=6)), times.draw(part))


def test_times_without_mass_are_never_drawn() -> None:
    flow = SCHEDULES["flow_prediction"]
    whole = type(flow)(torch.cat([torch.ones(1), flow.alphas, torch.zeros(1)]),
                       torch.cat([torch.zeros(1), flow.sigmas, torch.ones(1)]), "flow_prediction")  # fmt: skip
    times = Times("t_range", whole, None, LogNormal(0.0, 4.0))
    assert times.possible().tolist() == list(range(1, T + 1))
    drawn = times.draw(NOISE)
    assert drawn.min() == 1 and drawn.max() == T


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogNormal(float("nan"), 1.0), "a finite mean and a std above 0"),
        (lambda: LogitNormal(0.0, 0.0), "a finite mean and a std above 0"),
        (lambda: Shifted(0.0), "shift of a distribution of times must be above 0"),
        (
            lambda: Times("t_range", SCHEDULE, (0, 50), LogNormal(2.0, 0.1)),
            r"only 0\.0e\+00 of its mass on t_range \[0, 50\)",
        ),
        (lambda: Times("t_range", SCHEDULE, (0.02, 0.98)), "t_range must be two whole numbers"),
        (lambda: Times("t_range", SCHEDULE, (7, 7)), r"t_range must lie within \[0, 1000\) and be non-empty"),
    ],
)
def test_distributions_that_make_no_sense_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_configurations_know_every_distribution() -> None:
    from diffpp_fast.training.config import NormalTimes, ShiftedTimes, UniformTimes

    known = {
        name: {key for key in section.model_fields if key != "name"}
        for section in (UniformTimes, NormalTimes, ShiftedTimes)
        for name in get_args(section.model_fields["name"].annotation)
    }
    assert known == {name: set(getattr(kind, "__dataclass_fields__", ())) for name, kind in DISTRIBUTIONS.items()}


def test_the_ta_has_times_of_its_own() -> None:
    """And the generator's loss keeps those of t_range."""
    asked: dict[str, torch.Tensor] = {}

    def fake(x_t: torch.Tensor, t: torch.Tensor, conditioning: Any) -> torch.Tensor:
        asked["fake"] = t
        return Convolution(1)(x_t, conditioning)

    batch = batch_of(64)
    noise = batch.noise(2)
    plain = {"t_range": (100, 300), "time_distribution": Shifted(3.0)}
    for options, of_fake in (
        ({}, (100, 300, Shifted(3.0))),
        ({"fake_t_range": (0, 1000)}, (0, 1000, Shifted(3.0))),
        ({"fake_time_distribution": Uniform()}, (100, 300, None)),
        ({"fake_t_range": (0, 900), "fake_time_distribution": LogitNormal(0.0, 1.0)}, (0, 900, LogitNormal(0.0, 1.0))),
    ):
        method = DiffInstruct(Convolution(0), fake, Convolution(2), SCHEDULE, **plain, **options)
        method.fake_loss(batch)
        expected = Times("fake_t_range", SCHEDULE, of_fake[:2], of_fake[2])
        assert torch.equal(asked["fake"], expected.draw(noise))
        method.generator_loss(batch)
        assert torch.equal(asked["fake"], Times("t_range", SCHEDULE, (100, 300), Shifted(3.0)).draw(noise))


@pytest.mark.parametrize("reward_scale", [0.0, 0.7])
def test_gaussians_reach_the_optimum_of_the_distribution(reward_scale: float) -> None:
    """theta* = m_guided + reward_scale v / c with c = E[h sigma alpha] over the times that are drawn; without a reward
    no distribution changes it. The TA, which is exact at any of its times, learns at others."""
    cond_mean, v, guidance = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.5, 1.0, -1.0]), 1.5
    distribution, t_range = LogNormal(-1.2, 1.2), (50, 900)
    times: dict[str, Any] = {"t_range": t_range, "time_distribution": distribution}
    times |= {"fake_t_range": (0, 1000), "fake_time_distribution": Uniform()}

    def build(generator: Any, fake: Any, reference: Any) -> DiffInstructPP:
        return DiffInstructPP(
            generator, fake, reference, SCHEDULE, lambda x0, c: x0 @ v, reward_scale, guidance, **times
        )

    theta = train_gaussian(build, SCHEDULE, cond_mean, rates=(2.5, 3.0), rounds=100)
    below = distribution.cumulative(SCHEDULE)[t_range[0] : t_range[1] + 1]
    probabilities = below.diff() / (below[-1] - below[0])
    curvature = (probabilities * SCHEDULE.sigmas[slice(*t_range)] ** 2).sum().float()
    # Uniform times would put it elsewhere by far.
    assert curvature < 0.6 * SCHEDULE.sigmas[slice(*t_range)].square().mean()
    optimum = guidance * cond_mean + reward_scale * v / curvature
    assert (theta - optimum).norm() < 0.02 * optimum.norm()


def test_prompts_are_left_out_by_address() -> None:
    """The generator's samples and the TA's loss see the null conditioning where stream 9 says so."""
    batch, share = batch_of(256), 0.25
    generator, fake = Convolution(0), Convolution(1)
    method = SiD(generator, fake, Convolution(2), SCHEDULE, fake_guidance_scale=2.0, prompt_dropout=share)
    loss = method.fake_loss(batch).loss

    dropped = Noise(batch.seed, batch.samples, stream=9).uniform() < share
    assert 0.15 < dropped.float().mean() < 0.35
    seen = torch.where(dropped.view(-1, 1, 1, 1), batch.null_conditioning, batch.conditioning)
    with torch.no_grad():
        x0 = generator(batch.noise(0).normal(SHAPE), seen).double()
        at = level_of(x0, batch, SCHEDULE, (0, T))
        cond, uncond = (fake(at.x_t, at.t, prompt) for prompt in (seen, batch.null_conditioning))
        expected = (uncond + 2.0 * (cond - uncond) - at.eps).square().mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)

    plain = SiD(generator, fake, Convolution(2), SCHEDULE, fake_guidance_scale=2.0)
    assert torch.equal(method.generator_loss(batch).loss, plain.generator_loss(batch).loss)
    with pytest.raises(ValueError, match=r"prompt_dropout 0\.25 needs Batch\.null_conditioning"):
        method.fake_loss(replace(batch, null_conditioning=None))


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_dropped_prompts_identify_the_guided_tas_branches(share: float) -> None:
    """Samples are N(m, I) with the prompt and N(0, I) without; the TA's branches have means a and b, guided by 2.

    The loss alone fits 2 a - b = m and leaves them, from zero, at a = 2 m / 5 and b = -m / 5, the shortest way. The
    dropped prompts fit b = 0.
    """
    m = torch.tensor([1.0, -2.0, 0.5])
    a, b = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))

    def fake(x_t: torch.Tensor, t: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        alpha, sigma = (c.view(-1, 1) for c in SCHEDULE.coefficients(t))
        return sigma * (x_t - alpha * torch.where(conditioning == 0.0, b, a))

    method = SiD(lambda z, c: z + c, fake, fake, SCHEDULE, fake_guidance_scale=2.0, prompt_dropout=share)
    optimizer, count, steps = torch.optim.SGD([a, b]), 512, 200
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1.5 * (1 - step / steps)
        samples = torch.arange(step * count, (step + 1) * count)
        batch = Batch(samples, m.expand(count, 3), shape=(3,), null_conditioning=torch.zeros(count, 3))
        optimizer.zero_grad()
        method.fake_loss(batch).loss.backward()
        optimizer.step()
    torch.testing.assert_close(2 * a - b, m, rtol=0, atol=0.05)
    torch.testing.assert_close(b, torch.zeros(3) if share else -m / 5, rtol=0, atol=0.05)


def test_every_kind_of_conditioning_can_be_left_out() -> None:
    dropped = torch.tensor([True, False, True])
    text, null = torch.ones(3, 2, 4), torch.zeros(1, 2, 4).expand(3, 2, 4)
    expected = torch.tensor([0.0, 1.0, 0.0]).view(3, 1, 1).expand(3, 2, 4)
    assert torch.equal(drop_prompts(text, null, dropped), expected)
    assert drop_prompts(["a", "b", "c"], [""] * 3, dropped) == ["", "b", ""]
    nested = drop_prompts({"states": text, "added": {"more": text}}, {"states": null, "added": {"more": null}}, dropped)
    assert torch.equal(nested["states"], expected) and torch.equal(nested["added"]["more"], expected)
    whole = drop_prompts(
        Conditioning(("a", "b", "c"), {"states": text}), Conditioning(("",) * 3, {"states": null}), dropped
    )
    assert whole.prompts == ("a", "b", "c") and torch.equal(whole.tensors["states"], expected)


@pytest.mark.parametrize(
    ("conditioning", "null", "message"),
    [
        (torch.ones(3, 2), torch.ones(3, 4), r"of shape \(3, 2\) and null_conditioning of shape \(3, 4\)"),
        (torch.ones(3, 2), [""] * 3, "conditioning is Tensor, null_conditioning is list"),
        ({"a": torch.ones(3)}, {"b": torch.ones(3)}, "only one of conditioning and null_conditioning has a, b"),
        ("abc", "abc", "can't leave prompts out of str"),
        (["a"], [""], "can't leave prompts out of list"),
    ],
)
def test_conditioning_that_can_not_be_left_out_is_named(conditioning: Any, null: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        drop_prompts(conditioning, null, torch.tensor([True, False, True]))
