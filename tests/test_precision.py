"""Numbers that are subtracted are not rounded before: predictions, gaps, samples and rewards in float32 at least."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from diffpp_fast import Noise, NoiseSchedule
from diffpp_fast.methods import Batch, DiffInstruct, DiffInstructPP
from diffpp_fast.methods.base import inject_gradient
from diffpp_fast.networks import Denoiser, OneStepGenerator, fuse
from diffpp_fast.networks.lora import Adapters

#: The most that rounding to bfloat16 changes a number by, as a share of it: 8 bits, the first of them not stored.
ROUNDING = 2.0**-8
NETWORKS = {"unet": (tiny.unet, "conv_out"), "pixart": (tiny.pixart, "proj_out")}


def stable_diffusion(prediction_type: str = "epsilon") -> NoiseSchedule:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    products = (1 - betas).cumprod(0)
    return NoiseSchedule(products.sqrt(), (1 - products).sqrt(), prediction_type)


def network_of(kind: str) -> Any:
    network = NETWORKS[kind][0](seed=1).eval().requires_grad_(False)
    if kind == "pixart":  # begins as zero
        nn.init.normal_(network.proj_out.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    return network


def inputs_of(kind: str, count: int = 32) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    numbers = torch.arange(count)
    states = Noise(1, numbers, stream=1).normal((5, tiny.TEXT_WIDTH))
    conditioning: dict[str, Any] = {"encoder_hidden_states": states}
    if kind == "pixart":
        conditioning["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return Noise(1, numbers, stream=0).normal(tiny.LATENT), torch.full((count,), 625), conditioning


@pytest.mark.parametrize("how", ["autocast", "stored"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_bfloat16_networks_last_layer_neither_sums_nor_returns_bfloat16(kind: str, how: str) -> None:
    """x0 comes nearer to the float64 network's than by a rounded prediction; the layer itself errs as float32 does."""
    network, (z, t, conditioning) = network_of(kind), inputs_of(kind)
    exact = OneStepGenerator(Denoiser(copy.deepcopy(network).double()), stable_diffusion())
    wide = {"encoder_hidden_states": conditioning["encoder_hidden_states"].double()}
    expected = exact(z.double(), conditioning | wide)
    assert expected.dtype == torch.float64

    low = Denoiser(network if how == "autocast" else network.bfloat16())
    fuse(network)
    seen: dict[str, Any] = {}
    layer = network.get_submodule(NETWORKS[kind][1])
    layer.register_forward_hook(lambda module, args, output: seen.update(input=args[0], output=output))
    conditioning["encoder_hidden_states"] = conditioning["encoder_hidden_states"].bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        prediction = low(z, t, conditioning)
        x0 = OneStepGenerator(low, stable_diffusion())(z, conditioning)
    assert prediction.dtype == x0.dtype == torch.float32

    double = nn.Module.double(copy.deepcopy(layer.bfloat16()))
    by_hand = double(seen["input"].double())
    assert float((seen["output"] - by_hand).norm() / by_hand.norm()) < 1e-6
    rounded = OneStepGenerator(lambda *args: prediction.bfloat16(), stable_diffusion())(z)
    errors = [float((of - expected).square().sum()) for of in (x0, rounded)]
    assert errors[0] < errors[1]


class Gaussian(nn.Module):
    """The exact prediction for N(mean, 1) data at noise levels with alpha^2 + sigma^2 = 1, from a last layer.

    eps = sigma (x_t - alpha mean): the layer's weight is sigma, and its bias -sigma alpha mean.
    """

    def __init__(self, schedule: NoiseSchedule, time: int) -> None:
        super().__init__()
        self.alpha, self.sigma = float(schedule.alphas[time]), float(schedule.sigmas[time])
        self.conv_out = nn.Conv2d(4, 4, 1)
        self.conv_out.weight.data = self.sigma * torch.eye(4)[:, :, None, None]

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, mean: float, return_dict: bool) -> tuple[torch.Tensor]:
        self.conv_out.bias.data.fill_(-self.sigma * self.alpha * mean)
        return (self.conv_out(x),)


def test_the_gap_of_bfloat16_networks_at_high_noise_is_not_rounding() -> None:
    """Against sigma alpha (mean - guided mean), at Stable Diffusion's t = 800 with w = 4.5.

    The predictions differ by their biases alone, so that with float32 sums the gap errs by the rounding of these: at
    most ROUNDING (|w b_cond| + |(w - 1) b_uncond| + |b_fake|). Rounded predictions err by ROUNDING of eps, which is of
    order 1, times sqrt(w^2 + (w - 1)^2 + 1) = 5.8, with a gap of order .1.
    """
    schedule, time, w = stable_diffusion(), 800, 4.5
    means = {"fake": 0.3, "cond": 0.45, "uncond": 0.1}
    toy = Denoiser(Gaussian(schedule, time).eval())
    alpha, sigma = float(schedule.alphas[time]), float(schedule.sigmas[time])
    biases = {name: sigma * alpha * mean for name, mean in means.items()}
    gap = biases["fake"] - (biases["uncond"] + w * (biases["cond"] - biases["uncond"]))

    def error(rounded: bool) -> float:
        def ask(x: torch.Tensor, t: torch.Tensor, name: str) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                prediction = toy(x, t, {"mean": means[name]})
            return prediction.bfloat16() if rounded else prediction

        method = DiffInstruct(
            lambda z, c: x0.requires_grad_(),
            lambda x, t, c: ask(x, t, "fake"),
            lambda x, t, c: ask(x, t, c),
            schedule,
            guidance_scale=w,
            weighting="unit",
            t_range=(time, time + 1),
        )
        x0 = Noise(0, torch.arange(64), stream=7).normal((4, 4, 4)) + means["fake"]
        method.generator_loss(Batch(torch.arange(64), "cond", 0, (4, 4, 4), "uncond")).loss.backward()
        assert x0.grad is not None
        off = 64 * x0.grad.double() - gap
        return float(off.square().mean().sqrt()) / abs(gap)

    bound = ROUNDING * (w * biases["cond"] + (w - 1) * biases["uncond"] + biases["fake"]) / abs(gap)
    assert error(rounded=False) < bound < error(rounded=True)


@pytest.mark.parametrize("kind", NETWORKS)
def test_adapters_of_the_last_layer_and_its_gradients_stay_what_they_were(kind: str) -> None:
    network, (z, t, conditioning) = network_of(kind), inputs_of(kind, 2)
    names = list(network.state_dict())
    denoise, layer = Denoiser(network), NETWORKS[kind][1]
    assert list(network.state_dict()) == names
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = denoise(z, t, conditioning)
    adapters = Adapters(network)
    weights = adapters.add("generator", rank=2, alpha=2.0, targets=[layer], seed=0, stream=4)
    with torch.autocast("cpu", dtype=torch.bfloat16), adapters.active("generator"):
        adapted = denoise(z, t, conditioning)
        assert adapted.dtype == torch.float32 and torch.equal(adapted, plain)  # B is 0
        adapted.square().sum().backward()
    assert weights[f"{layer}.lora_B.generator.weight"].grad.norm() > 0
    assert Denoiser(network).network is network  # a widened layer inside an adapter is found, too
    network.requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        denoise(z, t, conditioning).square().sum().backward()
    assert all(weight.grad.dtype == weight.dtype for weight in network.parameters() if weight.grad is not None)


def test_a_low_precision_generator_of_ones_own_meets_a_float32_gradient() -> None:
    """Its output, and the gradient on it, are rounded where they enter its graph, and nowhere else."""
    table = nn.Parameter(torch.zeros(2, 4, 8, 8, dtype=torch.bfloat16))
    at: list[torch.Tensor] = []

    def low(x: torch.Tensor, t: torch.Tensor, c: Any) -> torch.Tensor:
        at.append(x)
        return torch.full_like(x, 1.0 if c is None else 1.01, dtype=torch.bfloat16)

    method = DiffInstruct(
        lambda z, c: table + z.bfloat16(), low, low, stable_diffusion(), weighting="x0", t_range=(500, 501)
    )
    output = method.generator_loss(Batch(torch.arange(2), None, 0, tiny.LATENT))
    output.loss.backward()
    assert {x.dtype for x in at} == {torch.float32} == {output.loss.dtype}
    assert table.grad is not None and table.grad.dtype == torch.bfloat16


def test_an_injected_bfloat16_gradient_is_scaled_in_float32() -> None:
    x0 = torch.zeros(3, 2, requires_grad=True)
    gradient = torch.tensor([[1.0, 3.0], [5.0, 7.0], [9.0, 11.0]], dtype=torch.bfloat16)
    loss = inject_gradient(x0, gradient)
    loss.backward()
    assert loss.dtype == torch.float32 and float(loss.detach()) == pytest.approx(286 / 6, rel=1e-6)
    torch.testing.assert_close(x0.grad, gradient.float() / 3, rtol=1e-6, atol=0.0)


def test_rewards_of_a_float64_run_are_float64() -> None:
    """A reward whose gradient float32 can't hold: 1 + 2^-40 in one element."""
    slope = torch.ones(4, 2, 2, dtype=torch.float64)
    slope[0, 0, 0] += 2.0**-40
    x0 = torch.zeros(2, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    same = lambda x, t, c: x.double()  # noqa: E731
    method = DiffInstructPP(
        lambda z, c: x0,
        same,
        same,
        stable_diffusion(),
        reward=lambda x, c: (slope * x).sum((1, 2, 3)),
        reward_scale=2.0,
    )
    output = method.generator_loss(Batch(torch.arange(2), None, 0, (4, 2, 2)))
    output.loss.backward()
    assert torch.equal(x0.grad, -slope.expand(2, -1, -1, -1))
    assert output.metrics["reward_gradient_norm"].dtype == torch.float64
