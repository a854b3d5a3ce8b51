"""Rescaled guidance, in the gradients and in the reference's own samples, and what guidance leads away from."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from method_cases import SCHEDULES, Convolution, assert_near, batch_of, gradient_by_x0, level_of
from torch import nn

from diffpp_fast.methods import METHODS, Batch
from diffpp_fast.methods.guidance import guide
from diffpp_fast.training.baseline import sample_reference

T_RANGE = (100, 900)
RESCALE, SCALE = 0.7, 4.0


def rescale(output: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
    """`rescale_noise_cfg` of diffusers' pipelines, written out: importing one takes ten times as long as this file."""
    axes = [1, 2, 3]
    spread = cond.std(dim=axes, keepdim=True) / output.std(dim=axes, keepdim=True)
    return RESCALE * output * spread + (1 - RESCALE) * output


def rescaled(reference: nn.Module, level: Any, batch: Batch) -> torch.Tensor:
    cond = reference(level.x_t, level.t, batch.conditioning)
    return rescale(level.guided(reference, batch, SCALE), cond)


def test_it_is_diffusers_rescaling() -> None:
    cond, uncond = torch.randn(2, 4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    whole = uncond + SCALE * (cond - uncond)
    torch.testing.assert_close(guide(cond, uncond, SCALE, RESCALE), rescale(whole, cond))
    assert torch.equal(guide(cond, uncond, SCALE), whole)
    low = guide(cond.bfloat16(), uncond.bfloat16(), SCALE, RESCALE)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, guide(cond.bfloat16().float(), uncond.bfloat16().float(), SCALE, RESCALE))
    assert guide(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), SCALE, RESCALE).isfinite().all()


@pytest.mark.parametrize("name", ["diff_instruct", "dmd2", "sid", "sim"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "flow_prediction"])
def test_the_gradient_by_x0_is_that_of_the_rescaled_guided_output(name: str, prediction_type: str) -> None:
    """Also through the two standard deviations, where the method differentiates the networks."""
    schedule, batch = SCHEDULES[prediction_type], batch_of()
    fake, reference = Convolution(1), Convolution(2)
    options: dict[str, Any] = {"t_range": T_RANGE, "guidance_scale": SCALE, "guidance_rescale": RESCALE}
    found, gradient = gradient_by_x0(lambda g: METHODS[name](g, fake, reference, schedule, **options), batch)
    x0 = found.requires_grad_()
    at = level_of(x0, batch, schedule, T_RANGE)
    outputs = fake(at.x_t, at.t, batch.conditioning), rescaled(reference, at, batch)
    of_fake, of_guided = (at.x0_of(prediction_type, output) for output in outputs)
    gap, axes = of_guided - of_fake, (1, 2, 3)
    distance = (x0 - of_guided).abs().mean(axes, keepdim=True).detach()
    if name == "diff_instruct":
        expected = -gap.detach() / len(batch)
    elif name == "dmd2":
        expected = (-gap / distance).detach() / len(batch)
    elif name == "sid":
        losses = (gap * ((of_guided - x0) - gap) / distance).sum(axes)
        (expected,) = torch.autograd.grad(losses.mean(), x0)
    else:
        y = -at.a * gap / at.s**2
        of_sample = (at.a * of_fake - at.x_t) / at.s**2 + at.eps / at.s
        losses = -(at.s**2 / at.a * y / (y.square().sum(axes, keepdim=True) + 1).sqrt() * of_sample).sum(axes)
        (expected,) = torch.autograd.grad(losses.mean(), x0)
    assert_near(gradient, expected)


@pytest.mark.parametrize(("name", "options"), [("decoupled_dmd", {}), ("diff_instruct_star", {"guidance": "outside"})])
def test_methods_that_form_no_guided_output_refuse_to_rescale_it(name: str, options: dict[str, Any]) -> None:
    networks = Convolution(0), Convolution(1), Convolution(2)
    with pytest.raises(ValueError, match=r"guidance_rescale changes the guided output, which .* leave it 0"):
        METHODS[name](*networks, SCHEDULES["epsilon"], guidance_rescale=0.5, **options)


def test_the_references_own_samples_are_rescaled_too() -> None:
    """As by diffusers' DDIM under its pipelines' rescaling."""
    from diffusers import DDIMScheduler

    from diffpp_fast import NoiseSchedule

    weights = Convolution(2)

    def network(x: torch.Tensor, t: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        return weights(0.1 * x, conditioning)  # far from where tanh is constant

    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing", prediction_type="v_prediction")
    batch = batch_of()
    scheduler.set_timesteps(4)
    x = batch.noise(0).normal(batch.shape)
    with torch.no_grad():
        for t in scheduler.timesteps:
            cond, uncond = (network(x, t, prompt) for prompt in (batch.conditioning, batch.null_conditioning))
            output = rescale(uncond + SCALE * (cond - uncond), cond)
            x = scheduler.step(output, t, x).prev_sample
    drawn = sample_reference(
        network,
        NoiseSchedule.from_diffusers(scheduler),
        batch,
        steps=4,
        guidance_scale=SCALE,
        guidance_rescale=RESCALE,
    )
    torch.testing.assert_close(drawn, x, rtol=1e-4, atol=1e-4)


def test_a_negative_prompt_stands_in_for_the_empty_one() -> None:
    """With zeros for the empty prompt, too, as in diffusers' pipelines."""
    from diffpp_fast.networks import DualTextEncoder, TextEncoder

    for zero_empty in (False, True):
        one = TextEncoder(tiny.clip(), tiny.clip_tokenizer(), 8, False, zero_empty=zero_empty, negative_prompt="frog")
        two = DualTextEncoder(
            (tiny.clip(), tiny.clip_tokenizer()),
            (tiny.clip(seed=1, projection=True), tiny.clip_tokenizer()),
            8,
            time_ids=torch.arange(6),
            zero_empty=zero_empty,
            negative_prompt="frog",
        )
        for encoder in (one, two):
            null, expected = encoder.null().tensors, encoder(["frog"]).tensors
            assert torch.equal(null["encoder_hidden_states"], expected["encoder_hidden_states"])
            assert not torch.equal(null["encoder_hidden_states"], encoder([""]).tensors["encoder_hidden_states"])
