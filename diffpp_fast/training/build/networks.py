"""The denoisers of a run: the frozen reference and the two roles that are trained, wholly or by LoRA adapters."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.methods.base import FAKE_ADAPTER, GENERATOR_ADAPTER
from diffpp_fast.networks import Denoiser, fuse, load_denoiser, set_attention
from diffpp_fast.networks.loading import is_file, read_config
from diffpp_fast.networks.lora import Adapted, Adapters
from diffpp_fast.training.build.checks import agree, naming
from diffpp_fast.training.build.compiled import refuse_known_faults
from diffpp_fast.training.build.precision import compute_dtype, precise
from diffpp_fast.training.build.text import TextFacts
from diffpp_fast.training.config import Config, Lora
from diffpp_fast.training.distributed import World
from diffpp_fast.training.engines import place_reference
from diffpp_fast.training.inputs import digest_of, public

logger = logging.getLogger(__name__)

#: The addressed randomness that initialises a role's adapters.
STREAMS = {"generator": GENERATOR_ADAPTER, "fake": FAKE_ADAPTER}


@dataclass(frozen=True)
class Trained:
    """A role that is trained.

    Attributes:
        role: "generator" or "fake".
        network: from diffusers. With LoRA it may be the reference's, and other roles' adapters on it, too.
        parameters: what is trained, float32, by the names in `network.state_dict()`: all of the network's, or those of
            the role's adapters. Nothing else of the network requires gradient, but for other roles' adapters.
        denoise: (x_t, t, conditioning) -> prediction: the network as this role, in the run's precision.
        adapters: of the network; None where all of it is trained.
    """

    role: str
    network: nn.Module
    parameters: Mapping[str, nn.Parameter]
    denoise: nn.Module
    adapters: Adapters | None = None

    def active(self) -> AbstractContextManager[None]:
        """Inside, the network computes as this role. To be held around the backward pass, too: under activation
        checkpointing it calls the network's blocks again."""
        return nullcontext() if self.adapters is None else self.adapters.active(self.role)


class Networks:
    """Loads the denoisers of a run; frozen weights once, however many roles compute with them.

    Args:
        config: its `models` and what is applied to networks in `training`.
        text: what the networks are conditioned on; None: not compared.
        device: where they go.
    """

    def __init__(self, config: Config, text: TextFacts | None, device: torch.device) -> None:
        self.config = config
        self.text = text
        self.device = device
        #: Digests of the frozen weights that were loaded.
        self.inputs: dict[str, str | None] = {}
        self._backbones: dict[str, tuple[Denoiser, Adapters]] = {}

    def reference(self) -> nn.Module:
        """(x_t, t, conditioning) -> prediction: the frozen diffusion model."""
        path = self.config.models.reference.path
        denoiser, adapters = self._backbone("reference", path)
        return Adapted(precise(denoiser, self._frozen_dtype, self.device), adapters, None)

    def place_reference(self, world: World) -> None:
        """Spreads the reference over the processes as `distributed.reference` says (collective).

        Raises ConfigurationError where a role that is trained computes with its weights.
        """
        settings, path = self.config.distributed, self.config.models.reference.path
        if settings.reference == "replica":
            return
        denoiser, adapters = self._backbone("reference", path)
        if adapters.names:
            raise ConfigurationError(
                f"distributed.reference is {settings.reference}, but the reference's weights serve "
                f"{' and '.join(adapters.names)} too, by LoRA: use distributed.reference=replica"
            )
        place_reference(denoiser.network, settings, world)

    def trained(self, role: str) -> Trained:
        """The generator or the fake score, which start as the reference where no path is given.

        Raises ConfigurationError for what can't be loaded or does not fit, and for adapters that find no layer.
        """
        section: Any = getattr(self.config.models, role)
        path = section.path or self.config.models.reference.path
        if section.lora is not None:
            return self._adapted(role, path, section.lora)
        denoiser = self._load(role, path, torch.float32)
        denoiser.network.requires_grad_(True)
        dtype = compute_dtype("auto", self.config)
        parameters = dict(denoiser.network.named_parameters())
        return Trained(role, denoiser.network, parameters, precise(denoiser, dtype, self.device))

    def _adapted(self, role: str, path: str, lora: Lora) -> Trained:
        denoiser, adapters = self._backbone(role, path)
        with naming(f"models.{role}.lora"):
            parameters = adapters.add(
                role,
                rank=lora.rank,
                alpha=lora.alpha or lora.rank,
                targets=lora.targets,
                seed=self.config.seed,
                stream=STREAMS[role],
            )
        denoise = Adapted(precise(denoiser, self._frozen_dtype, self.device), adapters, role)
        return Trained(role, denoiser.network, parameters, denoise, adapters)

    @property
    def _frozen_dtype(self) -> torch.dtype:
        # Autocast would cast frozen float32 weights anew in every call: what nothing updates is stored as it is used.
        return compute_dtype(self.config.models.reference.dtype, self.config)

    def _backbone(self, role: str, path: str) -> tuple[Denoiser, Adapters]:
        """Frozen weights; those that are there already are shared."""
        if path not in self._backbones:
            denoiser = self._load(role, path, self._frozen_dtype)
            reference = self.config.models.reference.path
            facts = public(read_config(reference if is_file(path) else path))
            self.inputs["reference" if path == reference else role] = digest_of(facts, denoiser.network.state_dict())
            self._backbones[path] = denoiser, Adapters(denoiser.network)
        return self._backbones[path]

    def _load(self, role: str, path: str, dtype: torch.dtype) -> Denoiser:
        """A denoiser in eval mode, so that no dropout draws from a global generator; its shapes are checked."""
        key, training = f"models.{role}", self.config.training
        configuration = self.config.models.reference.path if is_file(path) else None
        if role == "reference" and configuration is not None:
            raise ConfigurationError(f"models.reference.path must be a folder or a hub id, got the file {path}")
        with naming(key, path):
            denoiser = load_denoiser(path, dtype=dtype, configuration=configuration).eval().to(self.device)
        network: Any = denoiser.network
        self._check(key, network.config)
        if training.fuse:
            fuse(network)
        if training.attention is not None:
            with naming("training.attention"):
                set_attention(network, training.attention)
        if training.activation_checkpointing:
            with naming("training.activation_checkpointing", path):
                network.enable_gradient_checkpointing()
        if training.compile:
            refuse_known_faults(network, fused=training.fuse, device=self.device)
            logger.info("%s: torch.compile compiles it in the first steps, which takes minutes", key)
            network.compile()
        return denoiser

    def _check(self, key: str, facts: Any) -> None:
        channels = self.config.models.latent_shape[0]
        agree(key, "input channels", facts.in_channels, "models.latent_shape", channels)
        if facts.out_channels != 2 * channels:  # else it predicts a variance too, which is cut off
            agree(key, "output channels", facts.out_channels, "models.latent_shape", channels)
        if self.text is None:
            return
        width = getattr(facts, "caption_channels", None) or getattr(facts, "cross_attention_dim", None)
        if isinstance(width, int):
            agree(key, "channels of text", width, "models.text_encoder", self.text.width)
        if getattr(facts, "addition_embed_type", None) == "text_time":
            expected = 6 * facts.addition_time_embed_dim + (self.text.pooled_width or 0)
            given = facts.projection_class_embeddings_input_dim
            agree(key, "channels of pooled text and sizes", given, "what models.text_encoder_2 gives", expected)
