"""From a configuration to a run's networks, rewards and method; what doesn't fit together is refused here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.methods import DiffInstruct, DiffInstructPP
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
from diffpp_fast.schedule import NoiseSchedule
from diffpp_fast.training.config import Config, Reward
from diffpp_fast.training.prompts import PromptEncoder
from diffpp_fast.training.rewards import LatentReward, load_scorer


class Autocast(nn.Module):
    """A network under bfloat16 autocast; its weights keep their precision."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.network = network
        self.device_type = device.type

    def forward(self, *inputs: Any) -> torch.Tensor:
        with torch.autocast(self.device_type, dtype=torch.bfloat16):
            return self.network(*inputs)


@dataclass(frozen=True)
class Sampler:
    """What turns prompts and latents into pictures.

    Attributes:
        text_width: channels of the text encoder's output.
        network: the generator's diffusers network, whose weights are saved and loaded.
        generator: (z, conditioning) -> x0, one call of it.
        decoder: latents -> images [B, 3, H, W] about [-1, 1].
    """

    schedule: NoiseSchedule
    encode: PromptEncoder
    text_width: int
    network: nn.Module
    generator: OneStepGenerator
    decoder: Callable[[torch.Tensor], torch.Tensor] | None


@dataclass(frozen=True)
class Run:
    """All that a training run computes with.

    Attributes:
        sampler: the generator with what surrounds it.
        fake_network: the teaching assistant's diffusers network.
        null: the empty prompt's conditioning, of one sample; None where the method is not guided.
        reward, held_out: the rewards of the configuration, on latents.
    """

    sampler: Sampler
    fake_network: nn.Module
    method: DiffInstruct
    null: Conditioning | None
    reward: LatentReward | None
    held_out: LatentReward | None


def build_sampler(config: Config, device: torch.device) -> Sampler:
    """Loads the generator, the text encoder and the decoder.

    Raises ConfigurationError for what can't be loaded and for networks whose shapes don't agree.
    """
    models = config.models
    with _naming("models.scheduler", models.scheduler.path):
        schedule = load_schedule(models.scheduler.path)
    with _naming("models.text_encoder", models.text_encoder.path):
        text = TextEncoder.from_pretrained(
            resolve(models.text_encoder.path), models.text_encoder.max_length, models.text_encoder.mask_padding
        )
    text_model: Any = text.model
    text_width = text_model.config.hidden_size
    denoiser = _load_denoiser(config, "generator", models.generator.path, text_width)
    with _naming("models.generator", models.generator.path):
        generator = OneStepGenerator(
            _precise(denoiser, config, device),
            schedule,
            timestep=models.generator.timestep,
            input_scale=models.generator.input_scale,
        )
    decoder = _load_decoder(config)
    return Sampler(
        schedule=schedule,
        encode=PromptEncoder(text.to(device)),
        text_width=text_width,
        network=denoiser.network,
        generator=generator.to(device),
        decoder=None if decoder is None else _precise(decoder, config, device).to(device),
    )


def build_run(config: Config, device: torch.device) -> Run:
    """Loads everything that a training run needs; raises like `build_sampler`."""
    models, settings = config.models, config.method
    sampler = build_sampler(config, device)
    reference = _load_denoiser(config, "reference", models.reference.path, sampler.text_width, _frozen_dtype(config))
    fake = _load_denoiser(config, "fake", (models.fake or models.reference).path, sampler.text_width)
    reward = _load_reward("rewards.optimised", config.rewards.optimised, sampler, device)
    held_out = _load_reward("rewards.held_out", config.rewards.held_out, sampler, device)
    arguments: dict[str, Any] = settings.model_dump(exclude={"name"})
    if settings.name == "diff_instruct_pp":
        assert config.rewards.optimised is not None  # the schema sees to it
        optimised = config.rewards.optimised
        arguments.update(reward=reward, reward_scale=optimised.scale, reward_clip=optimised.clip)
    with _naming("method"):
        method = (DiffInstructPP if settings.name == "diff_instruct_pp" else DiffInstruct)(
            sampler.generator,
            _precise(fake, config, device).to(device),
            _precise(reference.requires_grad_(False), config, device).to(device),
            sampler.schedule,
            **arguments,
        )
    null = sampler.encode([""]) if settings.guidance_scale != 1.0 else None
    return Run(sampler, fake.network, method, null, reward, held_out)


def _load_denoiser(
    config: Config, role: str, path: str, text_width: int, dtype: torch.dtype = torch.float32
) -> Denoiser:
    """A denoiser in eval mode, so that no dropout draws from a global generator; its shapes are checked."""
    with _naming(f"models.{role}", path):
        denoiser = load_denoiser(path, dtype=dtype).eval()
    network: Any = denoiser.network
    facts, channels = network.config, config.models.latent_shape[0]
    _agree(f"models.{role}", "input channels", facts.in_channels, "models.latent_shape", channels)
    if facts.out_channels != 2 * channels:  # else it predicts a variance too, which is cut off
        _agree(f"models.{role}", "output channels", facts.out_channels, "models.latent_shape", channels)
    width = getattr(facts, "caption_channels", None) or getattr(facts, "cross_attention_dim", None)
    if isinstance(width, int):
        _agree(f"models.{role}", "channels of text", width, "models.text_encoder", text_width)
    return denoiser


def _load_decoder(config: Config) -> FrozenDecoder | None:
    if config.models.decoder is None:
        return None
    path = config.models.decoder.path
    with _naming("models.decoder", path):
        decoder = load_decoder(path, dtype=_frozen_dtype(config), checkpoint=config.models.decoder.checkpoint)
    vae: Any = decoder.vae
    channels = config.models.latent_shape[0]
    _agree("models.decoder", "latent channels", vae.config.latent_channels, "models.latent_shape", channels)
    return decoder


def _load_reward(key: str, reward: Reward | None, sampler: Sampler, device: torch.device) -> LatentReward | None:
    if reward is None:
        return None
    assert sampler.decoder is not None  # the schema sees to it
    return LatentReward(f"{key} ({reward.factory})", load_scorer(key, reward, device), sampler.decoder)


def _precise(network: nn.Module, config: Config, device: torch.device) -> nn.Module:
    return Autocast(network, device) if config.precision == "bfloat16" else network


def _frozen_dtype(config: Config) -> torch.dtype:
    # Autocast would cast frozen float32 weights anew in every call: what nothing updates is stored as it is used.
    return torch.bfloat16 if config.precision == "bfloat16" else torch.float32


def _agree(role: str, what: str, number: int, other: str, expected: int) -> None:
    if number != expected:
        raise ConfigurationError(f"{role} has {number} {what}, {other} has {expected}")


@contextmanager
def _naming(key: str, path: str | None = None) -> Iterator[None]:
    """Names the configuration's key in the errors of whatever it is handed to."""
    try:
        yield
    except (ValueError, OSError) as error:
        where = f"{key} ({path})" if path and path not in str(error) else key
        hint = "; it was taken for a hub id, for there is no such folder" if _is_hub_id(path) else ""
        raise ConfigurationError(f"{where}: {error}{hint}") from error


def _is_hub_id(path: str | None) -> bool:
    # Folders are absolute in a loaded configuration.
    return path is not None and not path.startswith(("/", "package:"))
