"""The denoisers of a run: the frozen reference and the two roles that are trained, wholly or by LoRA adapters."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.methods.base import FAKE_ADAPTER, GENERATOR_ADAPTER
from diffpp_fast.networks import Denoiser, fuse, load_denoiser, set_attention
from diffpp_fast.networks.loading import is_file, open_denoiser, read_config, refuse_stored, resolve
from diffpp_fast.networks.lora import Adapters
from diffpp_fast.networks.text import refuse_stored_text
from diffpp_fast.networks.weight_files import holds_weights
from diffpp_fast.training.build.checks import naming
from diffpp_fast.training.build.compiled import refuse_known_faults
from diffpp_fast.training.build.precision import autocast_to, compute_dtype
from diffpp_fast.training.config import Config, Lora, Models, TextEncoder, Weights
from diffpp_fast.training.distributed import World
from diffpp_fast.training.engines import place_reference
from diffpp_fast.training.inputs import digest_of, public

logger = logging.getLogger(__name__)

#: The addressed randomness that initialises a role's adapters.
STREAMS = {"generator": GENERATOR_ADAPTER, "fake": FAKE_ADAPTER}


@dataclass(frozen=True)
class Stored:
    """Where a role's weights are stored; equal for roles that share them.

    Attributes:
        path: a folder, a hub id or a file.
        variant, state_dict: which weights of a folder, or of a file.
        key: of the configuration that says so.
    """

    path: str
    variant: str | None
    state_dict: str | None
    key: str = field(compare=False)


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


def stored_weights(models: Models, role: str) -> Stored:
    """Return where the weights of "generator", "fake" or "reference" are: with no path of its own, the reference's."""
    section = getattr(models, role)
    if section.path is None:
        role, section = "reference", models.reference
    state_dict = None if role == "reference" else section.state_dict
    return Stored(section.path, section.variant, state_dict, f"models.{role}")


def configuration_of(models: Models, stored: Stored) -> str:
    """Return where the `config.json` of stored weights is; a file has none of its own, but the reference's."""
    return models.reference.path if is_file(stored.path) else stored.path


def refuse_weights(config: Config, *, download: bool = True) -> None:
    """Look at the headers of all files of weights, of which none is loaded.

    Args:
        config: of the run.
        download: False leaves out what is on the hub, and folders that hold configurations alone.

    Raises ConfigurationError, naming the key, for weights that are missing, damaged, or those of another network.
    """
    models = config.models

    def look(key: str, section: Stored | Weights, refuse: Callable[[str, str | None], None]) -> None:
        with naming(key, section.path):
            if not is_file(section.path) and (download or holds_weights(Path(resolve(section.path)))):
                refuse(section.path, section.variant)

    for role in ("generator", "fake", "reference"):
        stored = stored_weights(models, role)
        look(stored.key, stored, refuse_stored)
        if is_file(stored.path) and (download or stored.path.startswith(("/", "package:"))):
            with naming(stored.key, stored.path):
                open_denoiser(stored.path, models.reference.path, state_dict=stored.state_dict)
    if models.decoder is not None:
        look("models.decoder", models.decoder, refuse_stored)
    if config.prompts.embeddings is None:
        for name, section in models:
            if isinstance(section, TextEncoder):
                look(f"models.{name}", section, refuse_stored_text)


class Networks:
    """Loads the denoisers of a run; frozen weights once, however many roles compute with them.

    Args:
        config: its `models` and what is applied to networks in `training`. They fit together: `refuse_misfits`.
        device: where they go.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config = config
        self.device = device
        #: Digests of the frozen weights that were loaded.
        self.inputs: dict[str, str | None] = {}
        self._backbones: dict[Stored, tuple[Denoiser, Adapters]] = {}

    def reference(self) -> nn.Module:
        """(x_t, t, conditioning) -> prediction: the frozen diffusion model."""
        denoiser, adapters = self._backbone(stored_weights(self.config.models, "reference"))
        return Denoiser(denoiser.network, dtype=autocast_to(self._frozen_dtype), adapters=adapters)

    def place_reference(self, world: World) -> None:
        """Spreads the reference over the processes as `distributed.reference` says (collective).

        Raises ConfigurationError where a role that is trained computes with its weights.
        """
        settings = self.config.distributed
        if settings.reference == "replica":
            return
        denoiser, adapters = self._backbone(stored_weights(self.config.models, "reference"))
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
        stored = stored_weights(self.config.models, role)
        if section.lora is not None:
            return self._adapted(role, stored, section.lora)
        denoiser = self._load(stored, torch.float32)
        denoiser.network.requires_grad_(True)
        dtype = compute_dtype("auto", self.config)
        parameters = dict(denoiser.network.named_parameters())
        return Trained(role, denoiser.network, parameters, Denoiser(denoiser.network, dtype=autocast_to(dtype)))

    def _adapted(self, role: str, stored: Stored, lora: Lora) -> Trained:
        denoiser, adapters = self._backbone(stored)
        with naming(f"models.{role}.lora"):
            parameters = adapters.add(
                role,
                rank=lora.rank,
                alpha=lora.alpha or lora.rank,
                targets=lora.targets,
                seed=self.config.seed,
                stream=STREAMS[role],
            )
        network, dtype = denoiser.network, autocast_to(self._frozen_dtype)
        denoise = Denoiser(network, dtype=dtype, adapters=adapters, adapter=role)
        return Trained(role, denoiser.network, parameters, denoise, adapters)

    @property
    def _frozen_dtype(self) -> torch.dtype:
        # Autocast would cast frozen float32 weights anew in every call: what nothing updates is stored as it is used.
        return compute_dtype(self.config.models.reference.dtype, self.config)

    def _backbone(self, stored: Stored) -> tuple[Denoiser, Adapters]:
        """Frozen weights; those that are there already are shared."""
        if stored not in self._backbones:
            denoiser = self._load(stored, self._frozen_dtype)
            facts = public(read_config(configuration_of(self.config.models, stored)))
            shared = stored == stored_weights(self.config.models, "reference")
            name = "reference" if shared else stored.key.removeprefix("models.")
            self.inputs[name] = digest_of(facts, denoiser.network.state_dict())
            self._backbones[stored] = denoiser, Adapters(denoiser.network)
        return self._backbones[stored]

    def _load(self, stored: Stored, dtype: torch.dtype) -> Denoiser:
        """A denoiser in eval mode, so that no dropout draws from a global generator."""
        training = self.config.training
        with naming(stored.key, stored.path):
            denoiser = load_denoiser(
                stored.path,
                dtype=dtype,
                configuration=self.config.models.reference.path,
                variant=stored.variant,
                state_dict=stored.state_dict,
            )
        network: Any = denoiser.eval().to(self.device).network
        if training.fuse:
            fuse(network)
        if training.attention is not None:
            with naming("training.attention"):
                set_attention(network, training.attention)
        if training.activation_checkpointing:
            with naming("training.activation_checkpointing", stored.path):
                network.enable_gradient_checkpointing()
        if training.compile:
            refuse_known_faults(network, fused=training.fuse, device=self.device)
            logger.info("%s: torch.compile compiles it in the first steps, which takes minutes", stored.key)
            network.compile()
        return denoiser
