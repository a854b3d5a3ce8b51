"""The discriminator on a UNet's middle block, alone and as DMD2 trains it."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import nn

from diffpp_fast import NoiseSchedule
from diffpp_fast.methods import DMD2, Batch
from diffpp_fast.networks import Denoiser, MiddleBlockDiscriminator, OneStepGenerator


def unet(seed: int) -> Denoiser:
    return Denoiser(tiny.unet(seed, mid_block_type="UNetMidBlock2DCrossAttn")).eval()


def inputs(count: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, text = (torch.randn(count, *shape, generator=generator) for shape in (tiny.LATENT, (8, tiny.TEXT_WIDTH)))
    return x, torch.arange(count) * 100, text


def test_logits_come_from_the_middle_block_and_nothing_behind_it_runs() -> None:
    fake = unet(0)
    network: Any = fake.network
    discriminator, seen = MiddleBlockDiscriminator(fake, 16, width=8), []
    with torch.no_grad():
        handle = network.mid_block.register_forward_hook(lambda module, given, output: seen.append(output))
        fake(*inputs())
        handle.remove()
    network.up_blocks[0].register_forward_pre_hook(lambda *_: pytest.fail("the decoder half was computed"))
    logits = discriminator(*inputs())
    torch.testing.assert_close(logits, discriminator.head(seen[0]).squeeze(1))
    assert logits.shape == (3,) and len(network.mid_block._forward_hooks) == 0
    logits.sum().backward()
    assert network.conv_in.weight.grad is not None and network.conv_out.weight.grad is None


def test_its_parameters_are_the_heads_and_drawn_from_no_global_generator() -> None:
    before = torch.get_rng_state()
    one, other = (MiddleBlockDiscriminator(unet(0), 16, width=8, seed=5) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert {name.split(".")[0] for name, _ in one.named_parameters()} == {"head"}
    for mine, its in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, its)


def test_networks_without_a_middle_block_are_refused() -> None:
    with pytest.raises(ValueError, match="Denoiser has no mid_block"):
        MiddleBlockDiscriminator(Denoiser(tiny.pixart()), 16)


def test_dmd2_trains_generator_ta_and_head() -> None:
    """Each in its own turn; the discriminator learns to tell the real latents from the generator's."""
    generator, fake, reference = (unet(seed) for seed in range(3))
    discriminator = MiddleBlockDiscriminator(fake, 16, width=8)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    cumulative = (1 - betas).cumprod(0)
    schedule = NoiseSchedule(cumulative.sqrt(), (1 - cumulative).sqrt())
    method = DMD2(
        OneStepGenerator(generator, schedule),
        fake,
        reference,
        schedule,
        discriminator=discriminator,
        fake_gan_weight=1.0,
        gan_t_range=(0, 200),
    )
    ta: list[nn.Parameter] = [*fake.parameters(), *discriminator.parameters()]
    optimizer = torch.optim.Adam(ta, lr=3e-3)
    x, _, text = inputs(4)
    batch = Batch(torch.arange(4), text, shape=tiny.LATENT, real=x.cumsum(2))
    losses = []
    for _ in range(6):
        output = method.fake_loss(batch)
        optimizer.zero_grad()
        output.loss.backward()
        assert all(weight.grad is None for weight in (*generator.parameters(), *reference.parameters()))
        assert all(weight.grad is not None and weight.grad.norm() > 0 for weight in discriminator.parameters())
        optimizer.step()
        losses.append(float(output.metrics["gan_loss"]))
    assert losses[-1] < losses[0]
    optimizer.zero_grad()
    output = method.generator_loss(batch)
    output.loss.backward()
    assert output.metrics["gan_gradient_norm"] > 0
    assert all(weight.grad is None for weight in ta) and all(weight.requires_grad for weight in ta)
    assert any(weight.grad is not None and weight.grad.norm() > 0 for weight in generator.parameters())
