"""What a run computes with: the sampler, and around it the method with its rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffpp_fast.methods import Method
from diffpp_fast.networks import Conditioning, OneStepGenerator, load_decoder
from diffpp_fast.schedule import NoiseSchedule
from diffpp_fast.training.build.checks import agree, naming
from diffpp_fast.training.build.networks import Networks, Trained
from diffpp_fast.training.build.precision import compute_dtype, precise
from diffpp_fast.training.build.schedule import load_checked_schedule, load_run_schedule, make_generator, make_method
from diffpp_fast.training.build.text import Text, open_text
from diffpp_fast.training.config import Config, Reward
from diffpp_fast.training.distributed import World
from diffpp_fast.training.phases import Phases
from diffpp_fast.training.prompts import EmbeddingCache, PromptSource
from diffpp_fast.training.rewards import LatentReward, load_scorer


@dataclass(frozen=True)
class Sampler:
    """What turns prompts and latents into pictures.

    Attributes:
        encode: prompts -> their conditioning.
        trained: the generator's network, with those of its weights that are saved and loaded.
        generator: (z, conditioning) -> x0, one call of it.
        decoder: latents -> images [B, 3, H, W] about [-1, 1].
    """

    schedule: NoiseSchedule
    encode: Callable[[Sequence[str]], Conditioning]
    trained: Trained
    generator: OneStepGenerator
    decoder: Callable[[torch.Tensor], torch.Tensor] | None


@dataclass(frozen=True)
class Run:
    """All that a training run computes with.

    Attributes:
        sampler: the generator with what surrounds it.
        fake: the teaching assistant.
        reference: (x_t, t, conditioning) -> prediction, the frozen model.
        null: the empty prompt's conditioning, of one sample; None where the method is not guided.
        reward, held_out: the rewards of the configuration, on latents.
    """

    sampler: Sampler
    fake: Trained
    reference: nn.Module
    method: Method
    null: Conditioning | None
    reward: LatentReward | None
    held_out: LatentReward | None

    def trained(self, role: str) -> Trained:
        """The generator or the fake score."""
        return self.fake if role == "fake" else self.sampler.trained


def build_sampler(config: Config, device: torch.device) -> Sampler:
    """Loads the generator, the text encoders and the decoder.

    Raises ConfigurationError for what can't be loaded and for networks whose shapes don't agree.
    """
    text = open_text(config.models, device)
    return _build_sampler(config, device, load_run_schedule(config), text, Networks(config, text.facts, device))


def build_run(
    config: Config,
    world: World,
    phases: Phases,
    embeddings: EmbeddingCache | None = None,
    prompts: PromptSource | None = None,
) -> Run:
    """Loads everything that a training run needs (collective, for the reference may be spread).

    Args:
        config: of the run.
        world: the processes.
        phases: where the method's calls of networks and reward are timed.
        embeddings: take the place of text encoders, which are then not loaded.
        prompts: of the run, whose encodings are kept where they are few.

    Raises like `build_sampler`.
    """
    device = world.device
    schedule = load_checked_schedule(config)
    text = open_text(config.models, device, embeddings, prompts)
    networks = Networks(config, text.facts, device)
    sampler = _build_sampler(config, device, schedule, text, networks)
    reference, fake = networks.reference(), networks.trained("fake")
    networks.place_reference(world)
    decoder = None if sampler.decoder is None else phases.wrap(sampler.decoder, "decode")
    reward = _load_reward("rewards.optimised", config.rewards.optimised, decoder, device)
    held_out = _load_reward("rewards.held_out", config.rewards.held_out, decoder, device)
    method = make_method(
        config,
        phases.wrap(sampler.generator, "generator"),
        phases.wrap(fake.denoise, "fake"),
        phases.wrap(reference, "reference"),
        sampler.schedule,
        reward if reward is None else phases.wrap(reward, "reward"),
    )
    method.differentiate = phases.wrap(method.differentiate, "networks_backward")
    term = getattr(method, "reward", None)
    if term is not None:
        term.differentiate = phases.wrap(term.differentiate, "reward_backward")
    null = text.null() if config.method.guided else None
    return Run(sampler, fake, reference, method, null, reward, held_out)


def build_trained(config: Config, role: str, device: torch.device) -> Trained:
    """Loads the network of one role and nothing else; raises like `build_sampler`."""
    return Networks(config, None, device).trained(role)


def _build_sampler(
    config: Config, device: torch.device, schedule: NoiseSchedule, text: Text, networks: Networks
) -> Sampler:
    trained = networks.trained("generator")
    generator = make_generator(config, trained.denoise, schedule)
    return Sampler(
        schedule=schedule,
        encode=text.encode,
        trained=trained,
        generator=generator,
        decoder=_load_decoder(config, device),
    )


def _load_decoder(config: Config, device: torch.device) -> nn.Module | None:
    section = config.models.decoder
    if section is None:
        return None
    dtype = compute_dtype(section.dtype, config)
    with naming("models.decoder", section.path):
        decoder = load_decoder(section.path, dtype=dtype, checkpoint=section.checkpoint)
    vae: Any = decoder.vae
    channels = config.models.latent_shape[0]
    agree("models.decoder", "latent channels", vae.config.latent_channels, "models.latent_shape", channels)
    return precise(decoder.to(device), dtype, device)


def _load_reward(
    key: str, reward: Reward | None, decoder: Callable[[torch.Tensor], torch.Tensor] | None, device: torch.device
) -> LatentReward | None:
    if reward is None:
        return None
    assert decoder is not None  # the schema sees to it
    return LatentReward(f"{key} ({reward.factory})", load_scorer(key, reward, device), decoder)
