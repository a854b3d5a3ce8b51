"""The parts that a run computes with: the sampler, and around it the method with its rewards."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffpp_fast.methods import METHODS, Method
from diffpp_fast.methods.regularizers import ImageDenoising, KLToStart, Regularizer, StepImageDenoising
from diffpp_fast.methods.through_networks import without_parameters
from diffpp_fast.methods.times import DISTRIBUTIONS
from diffpp_fast.networks import (
    Conditioning,
    FewStepGenerator,
    ImageEncoder,
    OneStepGenerator,
    load_decoder,
    load_schedule,
)
from diffpp_fast.networks.loading import read_config
from diffpp_fast.schedule import NoiseSchedule
from diffpp_fast.training.build.agreement import TextFacts, idle_sentences, naming, refuse_denoisers, refuse_misfits
from diffpp_fast.training.build.networks import (
    Networks,
    Trained,
    check_gradients,
    compute_dtype,
    refuse_quantization,
    refuse_weights,
)
from diffpp_fast.training.build.text import Text, embeddings_by, encode_ahead, open_text, picture_size
from diffpp_fast.training.config import Config, Decoder, RewardSection
from diffpp_fast.training.distributed import World
from diffpp_fast.training.images import ImageBatches, digest_of_images, open_images
from diffpp_fast.training.inputs import digest_of, public
from diffpp_fast.training.phases import Phases
from diffpp_fast.training.prompts import EmbeddingCache, PromptSource
from diffpp_fast.training.rewards import LatentReward, digest_of_reward, load_scorer


def load_run_schedule(config: Config) -> NoiseSchedule:
    """Load a run's noise schedule. Raises ConfigurationError for one that can't be read or is none."""
    path = config.models.scheduler.path
    with naming("models.scheduler", path):
        return load_schedule(path)


def load_checked_schedule(config: Config) -> NoiseSchedule:
    """Load a run's noise schedule, and build generator and method on it without networks, so that no weight is read.

    Raises ConfigurationError as `load_run_schedule`, and for settings that the schedule does not serve: times at which
    alpha or sigma is 0, say.
    """
    schedule = load_run_schedule(config)
    generator = make_generator(config, nn.Identity(), schedule)
    make_method(config, generator, nn.Identity(), nn.Identity(), schedule, nn.Identity())
    return schedule


def make_generator(config: Config, network: nn.Module, schedule: NoiseSchedule) -> OneStepGenerator | FewStepGenerator:
    """Make a run's generator of its network. Raises ConfigurationError as `load_checked_schedule`."""
    settings = config.models.generator
    with naming("models.generator"):
        if len(settings.times) == 1:
            return OneStepGenerator(network, schedule, **settings.call())
        return FewStepGenerator(network, schedule, **settings.call(), gradient_step=settings.gradient_step)


def batches_passes(config: Config) -> bool | None:
    """Return `Method.batched_passes` of a run: where the configuration leaves it open, by what calls cost.

    A spread reference sends its weights in every call. What is compiled has few launches, and a code for each size.
    """
    if config.training.batched_passes is not None:
        return config.training.batched_passes
    if config.distributed.reference != "replica":
        return True
    return False if config.training.compile else None


def make_regularizers(
    config: Config, schedule: NoiseSchedule, start: Callable[..., Any] | None
) -> list[Regularizer] | None:
    """Make a run's regularisers; `start` is the generator as it was, where one of them asks for it."""
    sections = config.method.regularizers
    if sections is None:
        return None
    made: list[Regularizer] = []
    if sections.start is not None and start is not None:
        made.append(KLToStart(start, sections.start.weight))
    if sections.images is not None:
        made.append(_image_denoising(sections.images.weight, make_generator(config, nn.Identity(), schedule)))
    return made


def _image_denoising(weight: float, call: OneStepGenerator | FewStepGenerator) -> ImageDenoising:
    if isinstance(call, FewStepGenerator):
        return StepImageDenoising(weight, call.schedule)
    return ImageDenoising(weight, alpha=call.alpha, sigma=call.sigma, input_scale=call.input_scale)


def make_method(
    config: Config,
    generator: Callable[..., Any],
    fake: Callable[..., Any],
    reference: Callable[..., Any],
    schedule: NoiseSchedule,
    reward: Callable[..., Any] | None,
    start: Callable[..., Any] | None = None,
) -> Method:
    """Make a run's method of its networks, its reward and the generator as it was at the start.

    Raises ConfigurationError as `load_checked_schedule`.
    """
    settings = config.method
    arguments: dict[str, Any] = settings.model_dump(exclude={"name", "regularizers"}, exclude_none=True)
    arguments["regularizers"] = make_regularizers(config, schedule, start)
    for key in ("time_distribution", "fake_time_distribution"):
        if key in arguments:
            arguments[key] = DISTRIBUTIONS[arguments[key].pop("name")](**arguments[key])
    arguments["batched_passes"] = batches_passes(config)
    optimised = config.rewards.optimised
    if METHODS[settings.name].takes_reward:
        assert optimised is not None  # the schema sees to it
        arguments.update(reward=reward, reward_scale=optimised.scale, reward_clip=optimised.clip)
    with naming("method"):
        return METHODS[settings.name](generator, fake, reference, schedule, **arguments)


logger = logging.getLogger(__name__)

#: Weights of an autoencoder that no decoding asks for.
ENCODING = ("vae.encoder.", "vae.quant_conv.")


#: B prompts -> their conditioning, on the device.
Encode = Callable[[Sequence[str]], Conditioning]


@dataclass(frozen=True)
class Sampler:
    """The parts that turn prompts and latents into pictures.

    Attributes:
        encode: prompts -> their conditioning.
        trained: the generator's network, with those of its weights that are saved and loaded.
        generator: (z, conditioning) -> x0, one call of it, or a few.
        decoder: latents -> images [B, 3, H, W] about [-1, 1].
        inputs: digests of what it was loaded from, by the names of `training.inputs`.
    """

    schedule: NoiseSchedule
    encode: Encode
    trained: Trained
    generator: OneStepGenerator | FewStepGenerator
    decoder: Callable[[torch.Tensor], torch.Tensor] | None
    inputs: Mapping[str, str | None]


@dataclass(frozen=True)
class Run:
    """The parts that a training run computes with.

    Attributes:
        sampler: the generator with what surrounds it.
        fake: the teaching assistant.
        reference: (x_t, t, conditioning) -> prediction, the frozen model.
        null: the empty prompt's conditioning, of one sample; None where the method is not guided.
        reward, held_out: the rewards of the configuration, on latents.
        images: that samples of the generator's update come with, where the configuration has some.
        inputs: digests of all that the run goes on to stand on.
    """

    sampler: Sampler
    fake: Trained
    reference: nn.Module
    method: Method
    null: Conditioning | None
    reward: LatentReward | None
    held_out: LatentReward | None
    inputs: Mapping[str, str | None]
    images: ImageBatches | None = None

    def trained(self, role: str) -> Trained:
        """The generator or the fake score."""
        return self.fake if role == "fake" else self.sampler.trained

    def weight_bytes(self) -> int:
        """Return the bytes of the denoisers' weights; what roles share counts once."""
        networks = self.sampler.trained.network, self.fake.network, self.reference
        weights = {id(weight): weight for network in networks for weight in network.parameters()}
        return sum(weight.nbytes for weight in weights.values())


def build_sampler(
    config: Config,
    device: torch.device,
    *,
    ahead: Sequence[str] | None = None,
    embeddings: Path | None = None,
) -> Sampler:
    """Load the generator, the text encoders and the decoder.

    Args:
        config: that names them.
        device: where they compute.
        ahead: all prompts that will be asked for, which are encoded now by streamed encoders; None: any prompts.
        embeddings: a folder that takes the place of text encoders.

    Raises ConfigurationError for what can't be loaded and for networks whose shapes don't agree.
    """
    refuse_misfits(config)
    refuse_weights(config)
    encode: Encode
    inputs: Mapping[str, str | None] = {}
    if ahead is not None:
        encode = encode_ahead(config.models, ahead, device)
    elif embeddings is not None:
        encode = embeddings_by(config, embeddings, device)
    else:
        text = open_text(config.models, device)
        encode, inputs = text.encode, text.inputs
    return _build_sampler(config, device, load_run_schedule(config), encode, inputs, Networks(config, device))


def build_run(
    config: Config,
    world: World,
    phases: Phases,
    embeddings: EmbeddingCache | None = None,
    prompts: PromptSource | None = None,
) -> Run:
    """Load everything that a training run needs (collective, for the reference may be spread).

    Args:
        config: of the run.
        world: the processes.
        phases: where the method's calls of networks and reward are timed.
        embeddings: take the place of text encoders, which are then not loaded.
        prompts: of the run, whose encodings are kept where they are few.

    Raises like `build_sampler`.
    """
    device = world.device
    refuse_misfits(config, None if embeddings is None else TextFacts.of(embeddings.null()))
    schedule = load_checked_schedule(config)
    refuse_quantization(config)
    for sentence in idle_sentences(config) if world.is_main else ():
        logger.warning("%s", sentence)
    refuse_weights(config)
    pictures = open_images(config.method.images, picture_size(config.models))
    text = open_text(config.models, device, embeddings, prompts)
    networks = Networks(config, device)
    sampler = _build_sampler(config, device, schedule, text.encode, text.inputs, networks)
    reference, fake = networks.reference(), networks.trained("fake")
    start = None
    if config.method.pulled_to_start:
        start = make_generator(config, networks.start(), schedule)
    if "reference" in METHODS[config.method.name].differentiates:
        networks.freeze_reference()
    networks.keep_reference_text()
    if config.training.compile:
        _check_compiled(config, world, text, sampler.trained, fake, reference)
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
        start if start is None else phases.wrap(start, "start"),
    )
    method.differentiate = phases.wrap(method.differentiate, "networks_backward")
    term = getattr(method, "reward_term", None)
    if term is not None:
        term.differentiate = phases.wrap(term.differentiate, "reward_backward")
        term.describes = False  # the trainer logs the rewards of whole updates
    null = text.null() if config.method.guided else None
    inputs = {**sampler.inputs, **networks.inputs}
    images = None
    if pictures is not None:
        encoder = ImageEncoder(sampler.decoder)
        inputs["images"] = digest_of_images(pictures, encoder)
        # All of it, for every process has to have the phase, also where it has kept the latents of all its images.
        images = phases.wrap(ImageBatches(pictures, config.seed, encoder, device), "images")
    if reward is not None and config.rewards.optimised is not None:
        inputs["reward"] = digest_of_reward(config.rewards.optimised, reward.scorer)
    return Run(sampler, fake, reference, method, null, reward, held_out, inputs, images)


def build_trained(config: Config, role: str, device: torch.device) -> Trained:
    """Load the network of one role and nothing else; raises like `build_sampler`."""
    refuse_denoisers(config)
    return Networks(config, device).trained(role)


def _build_sampler(
    config: Config,
    device: torch.device,
    schedule: NoiseSchedule,
    encode: Encode,
    inputs_of_text: Mapping[str, str | None],
    networks: Networks,
) -> Sampler:
    trained = networks.trained("generator")
    generator = make_generator(config, trained.denoise, schedule)
    models = config.models
    tables = {"alphas": schedule.alphas, "sigmas": schedule.sigmas}
    inputs = {**inputs_of_text, **networks.inputs, "scheduler": digest_of(schedule.prediction_type, tables)}
    decoder = None
    if models.decoder is not None:
        decoder = _load_decoder(config, models.decoder, device)
        # Digests in checkpoints go by these names, as earlier versions had them.
        prefix = "" if compute_dtype(models.decoder.dtype, config) == torch.float32 else "network."
        decoding = {
            prefix + name: tensor
            for name, tensor in decoder.state_dict().items()
            if not any(part in name for part in ENCODING)
        }
        inputs["decoder"] = digest_of(public(read_config(models.decoder.path)), decoding)
    return Sampler(
        schedule=schedule,
        encode=encode,
        trained=trained,
        generator=generator,
        decoder=decoder,
        inputs=inputs,
    )


def _check_compiled(
    config: Config, world: World, text: Text, generator: Trained, fake: Trained, reference: nn.Module
) -> None:
    """Compare the gradients that the run takes through compiled networks with those of eager mode."""
    null, samples = text.null(), config.training.micro_batch or config.training.global_batch // world.size
    conditioning = null.expand(samples)
    dtype, shape = compute_dtype("auto", config), config.models.latent_shape
    for part in (generator, fake):
        with part.active():
            check_gradients(part.role, part.denoise, part.parameters, conditioning, shape, dtype, world.device)
    denoisers = {"fake": fake.denoise, "reference": reference}
    for role in METHODS[config.method.name].differentiates:
        passes = 2 if batches_passes(config) and (role == "reference" or config.method.name == "sid") else 1
        with without_parameters([denoisers[role]]):
            check_gradients(role, denoisers[role], {}, null.expand(passes * samples), shape, dtype, world.device)


def _load_decoder(config: Config, section: Decoder, device: torch.device) -> nn.Module:
    dtype = compute_dtype(section.dtype, config)
    with naming("models.decoder", section.path):
        decoder = load_decoder(
            section.path, dtype=dtype, checkpoint=section.checkpoint, rows=section.rows, variant=section.variant
        )
    return decoder.to(device)


def _load_reward(
    key: str, reward: RewardSection | None, decoder: Callable[[torch.Tensor], torch.Tensor] | None, device: torch.device
) -> LatentReward | None:
    if reward is None:
        return None
    assert decoder is not None  # the schema sees to it
    return LatentReward(f"{key} ({reward.factory})", load_scorer(key, reward, device), decoder)
