"""The denoisers of a run, trained wholly or by LoRA adapters, their precision, and what torch.compile makes of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.methods.base import DIFFUSION, FAKE_ADAPTER, GENERATOR_ADAPTER, LATENT
from diffpp_fast.networks import Denoiser, freeze, fuse, load_denoiser, set_attention
from diffpp_fast.networks.kept_text import keep_text
from diffpp_fast.networks.loading import is_file, open_denoiser, read_config, refuse_stored, resolve
from diffpp_fast.networks.lora import Adapters
from diffpp_fast.networks.lora_files import Merged
from diffpp_fast.networks.quantization import quantize, refuse_kind
from diffpp_fast.networks.text import refuse_stored_text
from diffpp_fast.networks.weight_files import holds_weights
from diffpp_fast.noise import Noise
from diffpp_fast.training.build.agreement import naming
from diffpp_fast.training.build.compiling import Mode, compile_network, repeated_blocks
from diffpp_fast.training.config import Config, Dtype, InitialLora, Lora, Models, TextEncoderSection, WeightsSection
from diffpp_fast.training.distributed import World
from diffpp_fast.training.engines import place_reference
from diffpp_fast.training.initial_lora import Opened, open_role_lora
from diffpp_fast.training.inputs import digest_of, public


def compute_dtype(wanted: Dtype, config: Config) -> torch.dtype:
    """Return the dtype of a configuration's key; "auto" is the run's precision."""
    dtype: torch.dtype = getattr(torch, config.precision if wanted == "auto" else wanted)
    return dtype


def autocast_to(dtype: torch.dtype) -> torch.dtype | None:
    """The dtype of the autocast under which a network computes in `dtype`; None: it needs none."""
    return None if dtype == torch.float32 else dtype


#: What rounding may change in a gradient, as a share of its norm, by the dtype that is computed in. Wrong gradients
#: have been off by half of it and more.
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 1e-1}
#: Gradients shorter than this share of the longest are rounding errors themselves, as that of a bias before a norm.
NEGLIGIBLE = 1e-3


def refuse_known_faults(network: Any, *, fused: bool, device: torch.device) -> None:
    """Raise ConfigurationError where torch.compile is known to give wrong gradients.

    Inductor's code for the CPU in torch 2.13: the gradient of diffusers' UNets by everything before their upsampling is
    wrong, and loss and output are right. With fused blocks it is not.
    """
    upsamples = any(type(part).__name__ == "Upsample2D" for part in network.modules())
    if device.type == "cpu" and torch.__version__.startswith("2.13.") and upsamples and not fused:
        raise ConfigurationError(
            f"training.compile: on a CPU torch {torch.__version__} compiles a {type(network).__name__} without fused "
            "blocks to one with wrong gradients: use training.fuse=true, or training.compile=false"
        )


def check_gradients(
    role: str,
    denoise: Callable[..., torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    conditioning: Any,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Compare a compiled network's gradients with those of the same network in eager mode, once.

    It runs both forward and backward on one batch; what is compiled for it serves the run. Two gradients of the weights
    are in memory meanwhile.

    Args:
        role: of the network, for the message.
        denoise: (x_t, t, conditioning) -> prediction, of a network that was compiled by `nn.Module.compile`.
        weights: what is differentiated, by name; empty: the samples are.
        conditioning: of B samples.
        shape: of a sample.
        dtype: that the network computes in.
        device: of the network.

    Raises ConfigurationError where they differ by more than rounding.
    """
    numbers = torch.arange(len(conditioning), device=device)
    x, direction = (Noise(0, numbers, stream=stream).normal(shape) for stream in (LATENT, DIFFUSION))
    t = torch.full((len(conditioning),), 500, dtype=torch.int64, device=device)

    def gradients() -> dict[str, torch.Tensor]:
        leaves = dict(weights) or {"the samples": x.detach().requires_grad_()}
        with torch.enable_grad():
            product = (denoise(leaves.get("the samples", x), t, conditioning) * direction).sum()
        found = torch.autograd.grad(product, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(leaves, found, strict=True))

    with torch.compiler.set_stance("force_eager"):
        exact = gradients()
    compiled = gradients()
    floor = NEGLIGIBLE * max(float(gradient.norm()) for gradient in exact.values())
    off = {}
    for name, gradient in exact.items():
        error = float((compiled[name] - gradient).norm()) / max(float(gradient.norm()), floor)
        if not error <= TOLERANCE[dtype]:
            off[name] = error
    if off:
        worst = max(off, key=lambda name: off[name])
        raise ConfigurationError(
            f"training.compile: as torch {torch.__version__} compiles the {role}, its gradients are wrong: {len(off)} "
            f"of {len(exact)} tensors differ from eager's, {worst} by {off[worst]:.0%}. Use training.compile=false"
        )


logger = logging.getLogger(__name__)

#: The addressed randomness that initialises a role's adapters.
STREAMS = {"generator": GENERATOR_ADAPTER, "fake": FAKE_ADAPTER}
#: The adapter of the generator as it was, where it began with one.
START = "start"


@dataclass(frozen=True)
class Stored:
    """Where a role's weights are stored; equal for roles that share them.

    Attributes:
        path: a folder, a hub id or a file.
        variant, state_dict: which weights of a folder, or of a file.
        key: of the configuration that says so.
        lora: that is merged into them.
    """

    path: str
    variant: str | None
    state_dict: str | None
    key: str = field(compare=False)
    lora: InitialLora | None = None


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
        """Inside, the network computes as this role. It belongs around the backward pass, too: under activation
        checkpointing it calls the network's blocks again."""
        return nullcontext() if self.adapters is None else self.adapters.active(self.role)


def stored_weights(models: Models, role: str) -> Stored:
    """Return where the weights of "generator", "fake" or "reference" are: with no path of its own, the reference's."""
    section = getattr(models, role)
    lora = None if role == "reference" else section.initial_lora
    if lora is not None and lora.keep:
        lora = None
    key = f"models.{role}"
    if section.path is None:
        role, section = "reference", models.reference
        key = "models.reference" if lora is None else key
    state_dict = None if role == "reference" else section.state_dict
    return Stored(section.path, section.variant, state_dict, key, lora)


def start_is_copied(models: Models) -> bool:
    """Return whether the generator's initial weights are in memory only where they are loaded for themselves."""
    if models.generator.lora is not None:
        return False
    shared = stored_weights(models, "generator") == stored_weights(models, "reference")
    return not shared or models.reference.quantization is not None


def configuration_of(models: Models, stored: Stored) -> str:
    """Return where the `config.json` of stored weights is; a file has none of its own, but the reference's."""
    return models.reference.path if is_file(stored.path) else stored.path


def with_lora(models: Models, stored: Stored, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Return stored tensors with the LoRA in them that is merged into a role's weights; raises like
    `open_role_lora`."""
    opened = None if stored.lora is None else open_role_lora(models, stored.key.removeprefix("models."))
    return tensors if opened is None else Merged(tensors, opened.file.layers, opened.section.scale)


def refuse_quantization(config: Config) -> None:
    """Raise ConfigurationError where the package that quantises the reference is missing."""
    kind = config.models.reference.quantization
    if kind is not None:
        with naming("models.reference.quantization"):
            refuse_kind(kind)


def refuse_weights(config: Config, *, download: bool = True) -> None:
    """Look at the headers of all files of weights, of which none is loaded.

    Args:
        config: of the run.
        download: False leaves out what is on the hub, and folders that hold configurations alone.

    Raises ConfigurationError, naming the key, for weights that are missing, damaged, or those of another network.
    """
    models = config.models

    def look(key: str, section: Stored | WeightsSection, refuse: Callable[[str, str | None], None]) -> None:
        with naming(key, section.path):
            if not is_file(section.path) and (download or holds_weights(Path(resolve(section.path)))):
                refuse(section.path, section.variant)

    for role in ("generator", "fake", "reference"):
        stored = stored_weights(models, role)
        look(stored.key, stored, refuse_stored)
        if is_file(stored.path) and (download or stored.path.startswith(("/", "package:"))):
            with naming(stored.key, stored.path):
                open_denoiser(stored.path, models.reference.path, state_dict=stored.state_dict)
        initial = getattr(models, role).initial_lora if role != "reference" else None
        if initial is not None and (download or initial.path.startswith(("/", "package:"))):
            open_role_lora(models, role)
    if models.decoder is not None:
        look("models.decoder", models.decoder, refuse_stored)
    if config.prompts.embeddings is None:
        for name, section in models:
            if isinstance(section, TextEncoderSection):
                look(f"models.{name}", section, refuse_stored_text)


def _recompute(block: Any, *inputs: Any) -> Any:
    """Call a block that is computed again in the backward pass. In eval mode none draws: no generator is put back,
    which a captured graph could not do."""
    return checkpoint(block.__call__, *inputs, use_reentrant=False, preserve_rng_state=False)


@torch.no_grad()
def _begin_with(parameters: Mapping[str, nn.Parameter], role: str, initial: Opened) -> None:
    """Copy A and B of a LoRA file into an adapter of its rank and layers."""
    for layer, update in initial.file.uniform()[2].items():
        parameters[f"{layer}.lora_A.{role}.weight"].copy_(update.down)
        parameters[f"{layer}.lora_B.{role}.weight"].copy_(update.up)


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
        guidance = self.config.models.reference.guidance_embedding
        return Denoiser(denoiser.network, dtype=autocast_to(self._frozen_dtype), adapters=adapters, guidance=guidance)

    def freeze_reference(self) -> None:
        """Make the reference keep nothing for its weights when it is differentiated by its input.

        It belongs after all roles are loaded: weights that adapters train on are left, and so they are with
        `training.fuse=false`.
        """
        denoiser, adapters = self._backbone(stored_weights(self.config.models, "reference"))
        if adapters.names:
            serves = " and ".join(adapters.names)
            logger.info("reference: not frozen for its gradient, for its weights serve %s too, by LoRA", serves)
        elif self.config.training.fuse:
            freeze(denoiser.network)
        else:
            logger.info("reference: not frozen for its gradient, for training.fuse=false leaves its blocks as they are")

    def keep_reference_text(self) -> None:
        """Let the reference project the empty prompt once, after all roles are loaded; not for weights in motion."""
        denoiser, adapters = self._backbone(stored_weights(self.config.models, "reference"))
        if not adapters.names and self.config.distributed.reference == "replica" and not self.config.training.compile:
            keep_text(denoiser.network)

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
        initial = open_role_lora(self.config.models, role)
        if initial is not None:
            self.inputs[f"{role}_lora"] = initial.digest
            logger.info("%s: begins with %s", role, initial.describe())
        if section.lora is not None:
            return self._adapted(role, stored, section.lora, initial)
        denoiser = self._ready(stored, self._load(stored, torch.float32))
        denoiser.network.requires_grad_(True)
        dtype = compute_dtype("auto", self.config)
        parameters = dict(denoiser.network.named_parameters())
        denoise = Denoiser(denoiser.network, dtype=autocast_to(dtype), guidance=section.guidance_embedding)
        return Trained(role, denoiser.network, parameters, denoise)

    def start(self) -> nn.Module:
        """(x_t, t, conditioning) -> prediction of the generator as it was at the start, in the frozen weights' dtype.

        Under adapters these are the weights without them, and the reference's own where they are equal; else a copy.
        Where the generator goes on from a LoRA file's adapter, there is a second one, which stays as the file is.
        """
        models = self.config.models
        stored, dtype = stored_weights(models, "generator"), autocast_to(self._frozen_dtype)
        guidance = models.generator.guidance_embedding
        if start_is_copied(models):
            with naming(stored.key, stored.path):
                denoiser = self._ready(stored, self._load(stored, self._frozen_dtype))
            denoiser.network.requires_grad_(False)
            return Denoiser(denoiser.network, dtype=dtype, guidance=guidance)
        denoiser, adapters = self._backbone(stored)
        initial, lora = open_role_lora(models, "generator"), models.generator.lora
        if initial is None or lora is None or not initial.section.keep:
            return Denoiser(denoiser.network, dtype=dtype, adapters=adapters, guidance=guidance)
        kept = self._add(adapters, START, lora, GENERATOR_ADAPTER)
        _begin_with(kept, START, initial)
        for weight in kept.values():
            weight.requires_grad_(False)
        return Denoiser(denoiser.network, dtype=dtype, adapters=adapters, adapter=START, guidance=guidance)

    def _add(self, adapters: Adapters, name: str, lora: Lora, stream: int) -> dict[str, nn.Parameter]:
        return adapters.add(
            name,
            rank=lora.rank,
            alpha=lora.alpha or lora.rank,
            targets=lora.targets,
            seed=self.config.seed,
            stream=stream,
        )

    def _adapted(self, role: str, stored: Stored, lora: Lora, initial: Opened | None) -> Trained:
        denoiser, adapters = self._backbone(stored)
        with naming(f"models.{role}.lora"):
            parameters = self._add(adapters, role, lora, STREAMS[role])
        if initial is not None and initial.section.keep:
            _begin_with(parameters, role, initial)
        network, dtype = denoiser.network, autocast_to(self._frozen_dtype)
        guidance = getattr(self.config.models, role).guidance_embedding
        denoise = Denoiser(network, dtype=dtype, adapters=adapters, adapter=role, guidance=guidance)
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
            # Of the weights as they are stored: what is made of them here depends on the device.
            self.inputs[name] = digest_of(facts, denoiser.network.state_dict())
            kind = self.config.models.reference.quantization
            if shared and kind is not None:
                with naming("models.reference.quantization"):
                    self._quantize(denoiser.network, kind)
            self._backbones[stored] = self._ready(stored, denoiser), Adapters(denoiser.network)
        return self._backbones[stored]

    def _quantize(self, network: nn.Module, kind: str) -> None:
        """Raises ValueError where it would change nothing."""
        if quantize(network, kind, self.device) == 0:
            raise ValueError(
                f"{kind} finds no layer in this {type(network).__name__} whose weights it could store: remove it"
            )

    def _load(self, stored: Stored, dtype: torch.dtype) -> Denoiser:
        """A denoiser on the CPU."""
        models = self.config.models
        with naming(stored.key, stored.path):
            denoiser = load_denoiser(
                stored.path,
                dtype=dtype,
                configuration=models.reference.path,
                variant=stored.variant,
                state_dict=stored.state_dict,
            )
            if stored.lora is None:
                return denoiser
            # Merged in float32, whatever the dtype: an update may be smaller than the dtype's steps.
            weights = open_denoiser(stored.path, configuration_of(models, stored), stored.variant, stored.state_dict)
        merged, network = with_lora(models, stored, weights), denoiser.network.state_dict()
        assert isinstance(merged, Merged)
        for name in merged.changed:
            network[name].copy_(merged[name])
        return denoiser

    def _ready(self, stored: Stored, denoiser: Denoiser) -> Denoiser:
        """The denoiser on its device, in eval mode, so that no dropout draws from a global generator."""
        training = self.config.training
        network: Any = denoiser.eval().to(self.device).network
        if training.fuse:
            fuse(network)
        if training.attention is not None:
            with naming("training.attention"):
                set_attention(network, training.attention)
        if training.activation_checkpointing:
            with naming("training.activation_checkpointing", stored.path):
                network.enable_gradient_checkpointing(_recompute)
        if training.compile:
            mode: Mode = "regional" if training.compile is True else training.compile
            if mode == "whole" or not repeated_blocks(network):
                refuse_known_faults(network, fused=training.fuse, device=self.device)
            count = compile_network(network, mode)
            logger.info("%s: torch.compile compiles %d modules of it in the first steps", stored.key, count)
        return denoiser
