"""Adapters around diffusers' and transformers' networks: what goes in, what comes out, who gets gradient."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from diffpp_fast import NoiseSchedule
from diffpp_fast.networks import (
    Conditioning,
    Denoiser,
    FrozenDecoder,
    OneStepGenerator,
    TextEncoder,
    load_decoder,
    load_denoiser,
    load_schedule,
)
from diffpp_fast.networks.loading import resolve

SIGMA = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
SCHEDULES = {
    "epsilon": NoiseSchedule((1 - SIGMA**2).sqrt(), SIGMA, "epsilon"),
    "v_prediction": NoiseSchedule((1 - SIGMA**2).sqrt(), SIGMA, "v_prediction"),
    "flow_prediction": NoiseSchedule(1 - SIGMA, SIGMA, "flow_prediction"),
    "sample": NoiseSchedule((1 - SIGMA**2).sqrt(), SIGMA, "sample"),
}


def conditioning(count: int = 2) -> Conditioning:
    states = torch.randn(count, 5, tiny.TEXT_WIDTH)
    return Conditioning(tuple(f"prompt {i}" for i in range(count)), {"encoder_hidden_states": states})


@pytest.mark.parametrize("prediction_type", list(SCHEDULES))
def test_one_step_generator_reads_x0_out_of_an_exact_prediction(prediction_type: str) -> None:
    """A network that knows x0 and eps of its input: the generator must give back that x0."""
    schedule, timestep = SCHEDULES[prediction_type], 30
    alpha, sigma = float(schedule.alphas[timestep]), float(schedule.sigmas[timestep])
    x0, eps = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    x_t = alpha * x0 + sigma * eps
    exact = {
        "epsilon": eps,
        "v_prediction": alpha * eps - sigma * x0,
        "flow_prediction": eps - x0,
        "sample": x0,
    }[prediction_type]

    def network(x: torch.Tensor, t: torch.Tensor, c: object) -> torch.Tensor:
        torch.testing.assert_close(x, x_t)
        assert t.tolist() == [timestep, timestep] and t.dtype == torch.int64 and c == "prompt"
        return exact

    generator = OneStepGenerator(network, schedule, timestep=timestep, input_scale=0.5)
    torch.testing.assert_close(generator(x_t / 0.5, "prompt"), x0, rtol=1e-4, atol=1e-5)


def test_one_step_generator_scales_its_input_by_sigma_by_default() -> None:
    schedule = SCHEDULES["sample"]
    generator = OneStepGenerator(lambda x, t, c: x, schedule, timestep=10)
    z = torch.randn(3, 4, 2, 2)
    torch.testing.assert_close(generator(z), schedule.sigmas[10].float() * z)


def test_one_step_generator_refuses_a_timestep_off_the_schedule() -> None:
    with pytest.raises(ValueError, match=r"timestep must lie in \[0, 50\), got 50"):
        OneStepGenerator(nn.Identity(), SCHEDULES["epsilon"], timestep=50)


@pytest.mark.parametrize(
    ("prediction_type", "timestep", "input_scale", "message"),
    [
        ("epsilon", 2, "sigma", r"timestep 2, where alpha is 0 and sigma 1: x0 .* the error of an epsilon prediction"),
        ("epsilon", 1, "sigma", r"alpha is 0\.0001 .* magnified over 1000-fold: choose an earlier timestep"),
        ("epsilon", 0, 1.0, r"sigma 0: x0 would be the input, whatever the network says: choose a later timestep"),
        ("v_prediction", 0, "sigma", "whatever the network says"),
        (
            "sample",
            0,
            "sigma",
            r"input_scale 'sigma' feeds the network 0 z at .*: it must be finite and not 0",
        ),
        ("sample", 1, 0.0, r"input_scale 0\.0 feeds the network 0 z"),
        ("sample", 1, float("nan"), "input_scale nan feeds the network nan z"),
    ],
)
def test_one_step_generator_refuses_what_gives_no_sample(
    prediction_type: str, timestep: int, input_scale: Any, message: str
) -> None:
    alphas = torch.tensor([1.0, 1e-4, 0.0], dtype=torch.float64)
    schedule = NoiseSchedule(alphas, (1 - alphas**2).sqrt(), prediction_type)
    with pytest.raises(ValueError, match=message):
        OneStepGenerator(nn.Identity(), schedule, timestep=timestep, input_scale=input_scale)


def test_one_step_generator_takes_pure_noise_where_the_prediction_still_says_x0() -> None:
    alphas = torch.tensor([1.0, 0.0])
    for prediction_type in ("v_prediction", "sample", "flow_prediction"):
        OneStepGenerator(nn.Identity(), NoiseSchedule(alphas, 1 - alphas, prediction_type), timestep=1)


def test_denoiser_is_the_networks_own_call() -> None:
    network, c = tiny.unet().eval(), conditioning()
    x, t = torch.randn(2, *tiny.LATENT), torch.tensor([3, 900])
    expected = network(x, t, encoder_hidden_states=c.tensors["encoder_hidden_states"]).sample
    assert torch.equal(Denoiser(network)(x, t, c), expected)
    assert torch.equal(Denoiser(network)(x, t, c.tensors["encoder_hidden_states"]), expected)


def test_denoiser_cuts_a_predicted_variance_off() -> None:
    network = tiny.unet(out_channels=8).eval()
    x, t, c = torch.randn(2, *tiny.LATENT), torch.tensor([3, 900]), conditioning()
    expected = network(x, t, encoder_hidden_states=c.tensors["encoder_hidden_states"]).sample[:, :4]
    assert torch.equal(Denoiser(network)(x, t, c), expected)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_frozen_decoder_gives_diffusers_image_and_gradient_to_the_latents_only(checkpoint: bool) -> None:
    vae = tiny.vae(scaling_factor=0.5, shift_factor=0.1)
    latents = torch.randn(2, *tiny.LATENT, requires_grad=True)
    expected = vae.eval().decode(latents / 0.5 + 0.1).sample
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), latents)

    decoder = FrozenDecoder(vae, checkpoint=checkpoint)
    images = decoder(latents)
    torch.testing.assert_close(images, expected)
    images.square().sum().backward()
    torch.testing.assert_close(latents.grad, expected_gradient)
    assert all(weight.grad is None and not weight.requires_grad for weight in decoder.parameters())


def test_frozen_decoder_refuses_what_cannot_decode() -> None:
    with pytest.raises(TypeError, match="diffusers autoencoder"):
        FrozenDecoder(nn.Identity())


def test_conditioning_slices_and_expands_every_tensor() -> None:
    states = torch.randn(3, 5, 16)
    whole = Conditioning(
        ("a", "b", "c"), {"encoder_hidden_states": states, "added_cond_kwargs": {"time_ids": torch.arange(3)}}
    )
    part = whole[1:]
    assert part.prompts == ("b", "c") and torch.equal(part.tensors["encoder_hidden_states"], states[1:])
    assert part.tensors["added_cond_kwargs"]["time_ids"].tolist() == [1, 2]
    repeated = whole[:1].expand(4)
    assert len(repeated) == 4 and repeated.tensors["encoder_hidden_states"].shape == (4, 5, 16)
    assert repeated.tensors["encoder_hidden_states"].data_ptr() == states.data_ptr()
    with pytest.raises(ValueError, match="only one prompt"):
        whole.expand(2)


def test_text_encoder_masks_padding_and_says_what_it_cuts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny.write_text_encoder(tmp_path / "text")
    encoder = TextEncoder.from_pretrained(tmp_path / "text", max_length=6)
    encoded = encoder(["a red apple", "a frog"])
    assert encoded.tensors["encoder_hidden_states"].shape == (2, 6, tiny.TEXT_WIDTH)
    assert encoded.tensors["encoder_attention_mask"].sum(1).tolist() == [5, 4]
    assert not encoded.tensors["encoder_hidden_states"].requires_grad and not caplog.records
    with caplog.at_level(logging.WARNING):
        encoder(["a red apple a red apple", "a frog"])
    assert "1 of 2 prompts cut to 6 tokens, e.g. 'a red apple a red apple'" in caplog.text


def test_text_encoder_without_mask_and_of_an_encoder_decoder_model(tmp_path: Path) -> None:
    """T5 as PixArt uses it: the folder holds a whole T5, of which only the encoder is built."""
    from transformers import AutoTokenizer, T5Config, T5EncoderModel, T5Model

    tiny.write_text_encoder(tmp_path / "bert")
    facts = T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5Model(facts).save_pretrained(tmp_path / "t5")
    AutoTokenizer.from_pretrained(tmp_path / "bert").save_pretrained(tmp_path / "t5")
    encoder = TextEncoder.from_pretrained(tmp_path / "t5", max_length=8, mask_padding=False)
    assert isinstance(encoder.model, T5EncoderModel)
    encoded = encoder(["a red apple"])
    assert set(encoded.tensors) == {"encoder_hidden_states"}
    assert encoded.tensors["encoder_hidden_states"].shape == (1, 8, 16)


def test_networks_load_from_folders_as_they_were_saved(tmp_path: Path) -> None:
    tiny.write(tmp_path)
    weights = tmp_path / "weights"
    x, t, c = torch.randn(2, *tiny.LATENT), torch.tensor([3, 900]), conditioning()
    denoiser = load_denoiser(str(weights / "reference")).eval()
    assert torch.equal(denoiser(x, t, c), Denoiser(tiny.unet(seed=0).eval())(x, t, c))
    assert torch.equal(load_decoder(str(weights / "vae"))(x), FrozenDecoder(tiny.vae())(x))
    schedule = load_schedule(str(weights / "scheduler"))
    assert schedule.prediction_type == "epsilon" and len(schedule) == 1000


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/nowhere/at/all", "no such folder: /nowhere/at/all"),
        ("package:no_such_package_anywhere/model", "package no_such_package_anywhere is not installed"),
        ("package:torch/no_such_folder", "no such folder"),
    ],
)
def test_what_is_not_there_is_named(path: str, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=message):
        load_denoiser(path)


def test_hub_ids_and_package_folders_are_told_from_paths() -> None:
    assert resolve("stable-diffusion-v1-5/stable-diffusion-v1-5") == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert Path(resolve("package:torch/nn")).joinpath("modules").is_dir()


def test_a_folder_without_a_config_or_with_an_unknown_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        load_denoiser(str(tmp_path))
    (tmp_path / "config.json").write_text('{"_class_name": "NoSuchNetwork"}')
    with pytest.raises(ValueError, match="diffusers has no class 'NoSuchNetwork'"):
        load_denoiser(str(tmp_path))
