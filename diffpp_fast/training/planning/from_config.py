"""From a run's configuration to the setup of a plan: configurations of networks are read, no weights."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from diffpp_fast.networks.inputs import is_pixart
from diffpp_fast.networks.loading import build_network, is_file, local_folder, read_config
from diffpp_fast.networks.text import check_tokenizer
from diffpp_fast.rewards.text import need_ftfy
from diffpp_fast.training.build.agreement import refuse_misfits, text_length
from diffpp_fast.training.build.checks import naming
from diffpp_fast.training.build.precision import compute_dtype
from diffpp_fast.training.build.schedule import load_checked_schedule
from diffpp_fast.training.config import Config, TextEncoderSection
from diffpp_fast.training.planning.models import Models, Recipe
from diffpp_fast.training.planning.rewards import TOWERS, Towers
from diffpp_fast.training.planning.setup import Lora, Setup, Trained, Zero


def setup_of(config: Config, gpus: int = 1) -> Setup:
    """The setup of a run on so many GPUs.

    Raises ConfigurationError for a folder without configuration, for networks that don't fit together or can't be
    planned, and for settings that the noise schedule does not serve.
    """
    refuse_misfits(config)
    training, models = config.training, config.models
    return Setup(
        models=_models(config),
        generator=_trained(config, "generator", gpus, ema=config.ema is not None),
        fake=_trained(config, "fake", gpus, ema=False),
        gpus=gpus,
        global_batch=training.global_batch,
        micro_batch=training.micro_batch,
        precision=config.precision,
        reference=config.distributed.reference,
        reference_dtype=compute_dtype(models.reference.dtype, config),
        decoder_dtype=compute_dtype("auto" if models.decoder is None else models.decoder.dtype, config),
        activation_checkpointing=training.activation_checkpointing,
        fuse=training.fuse,
        decoder_checkpoint=models.decoder is not None and models.decoder.checkpoint,
        text_resident=config.prompts.embeddings is None,
        rewards=_towers(config.rewards.optimised),
        held_out=_towers(config.rewards.held_out),
        method=config.method.name,
        guided=config.method.guidance_scale != 1.0,
        fake_guided=getattr(config.method, "fake_guidance_scale", 1.0) != 1.0,
        guidance_outside=getattr(config.method, "guidance", "inside") == "outside",
        fake_rounds=config.method.fake_rounds,
    )


def _models(config: Config) -> Models:
    models = config.models
    reference = models.reference.path
    generator, fake = models.generator.path or reference, models.fake.path or reference
    schedule = load_checked_schedule(config)
    text = {"models.text_encoder": models.text_encoder, "models.text_encoder_2": models.text_encoder_2}
    encoders = {key: _text_encoder(key, section) for key, section in text.items() if section is not None}
    facts = _facts("models.reference", reference)
    first, masked = models.text_encoder, models.text_encoder.mask_padding
    return Models(
        name=models.base or reference,
        reference=_network("models.reference", reference),
        # A single file has the reference's architecture.
        generator=_network("models.generator", reference if is_file(generator) else generator),
        fake=_network("models.fake", reference if is_file(fake) else fake),
        decoder=None if models.decoder is None else _network("models.decoder", models.decoder.path),
        text_encoders=tuple((recipe, width) for recipe, width, _ in encoders.values()),
        schedule=lambda: schedule,
        latent_shape=models.latent_shape,
        tokens=text_length(first, is_pixart(facts)),
        masked=not encoders["models.text_encoder"][2].startswith("clip") if masked is None else masked,
        timestep=models.generator.timestep,
        backbones=(generator, fake, reference),
    )


def _network(key: str, path: str) -> Recipe:
    """Return the recipe of a network or an autoencoder in diffusers' format."""
    return partial(build_network, _facts(key, path), path)


def _facts(key: str, path: str) -> Mapping[str, Any]:
    with naming(key, path):
        return read_config(path)


def _text_encoder(key: str, section: TextEncoderSection) -> tuple[Recipe, int, str]:
    """A text encoder in transformers' format, the bytes of an element of its weights, and what kind it is."""
    from transformers import AutoConfig, AutoModelForTextEncoding, CLIPTextModelWithProjection

    with naming(f"{key}.tokenizer", section.tokenizer or section.path):
        check_tokenizer(section.tokenizer or section.path)
    with naming(key, section.path):
        facts = AutoConfig.from_pretrained(local_folder(section.path, ["config.json"]), trust_remote_code=False)

    def make() -> nn.Module:
        network: nn.Module = (
            CLIPTextModelWithProjection(facts)
            if key == "models.text_encoder_2"
            else AutoModelForTextEncoding.from_config(facts)
        )
        return network

    return make, 4 if section.dtype in ("auto", "float32") else 2, facts.model_type


def _trained(config: Config, role: str, gpus: int, *, ema: bool) -> Trained:
    lora, zero = getattr(config.models, role).lora, getattr(config.distributed, role)
    spread = config.distributed.engine == "deepspeed" or config.distributed.needs_deepspeed or gpus > 1
    return Trained(
        optimizer=getattr(config.optimizers, role).name,
        ema=ema,
        lora=None if lora is None else Lora(lora.rank, tuple(lora.targets)),
        zero=None
        if not spread
        else Zero(zero.stage, zero.offload_optimizer, zero.offload_parameters, zero.overlap, zero.reduce_bucket_size),
    )


def _towers(reward: Any) -> Towers | None:
    """What a reward computes with, if it is one of the package's; others are told of and left out."""
    if reward is None:
        return None
    source, _, name = reward.factory.rpartition(":")
    arguments: Mapping[str, Any] = reward.arguments
    if source not in ("diffpp_fast.rewards", "diffpp_fast.rewards.factories"):
        return Towers(unknown=(reward.factory,))
    entries = [(name, arguments)]
    if name == "load":
        entries = [(arguments.get("name", ""), arguments)]
    if entries[0][0] == "mixture":
        mixed = arguments.get("rewards") or {}
        entries = [(entry.get("reward", key), entry.get("arguments") or {}) for key, entry in mixed.items()]
    for kind, _ in entries:
        if kind in ("clip", "hpsv2", "hpsv2.1"):
            need_ftfy(kind)
    dtypes = {given.get("dtype", "float32") for _, given in entries}
    return Towers(
        names=tuple(kind for kind, _ in entries if kind in TOWERS),
        # Of several dtypes the widest: a mixture may have some in each.
        dtype=torch.float32 if "float32" in dtypes else torch.bfloat16,
        checkpoint=all(given.get("checkpoint", False) for _, given in entries),
        unknown=tuple(kind for kind, _ in entries if kind not in TOWERS),
    )
