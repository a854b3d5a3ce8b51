"""Files of an export: a trained generator tensor by tensor, and the other parts of a pipeline."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffpp_fast.errors import CheckpointError
from diffpp_fast.networks.loading import build_network, local_folder, open_denoiser, read_config
from diffpp_fast.networks.lora import layers_of, merged_weight
from diffpp_fast.networks.lora_formats import LoraTarget, LowRank
from diffpp_fast.networks.low_rank import joined
from diffpp_fast.networks.weight_files import DIFFUSERS, TRANSFORMERS, open_weights, patterns
from diffpp_fast.tensor_files import Planned, first_not_finite, write_tensors
from diffpp_fast.training.build import Trained
from diffpp_fast.training.build.agreement import naming
from diffpp_fast.training.build.networks import compute_dtype, configuration_of, stored_weights, with_lora
from diffpp_fast.training.checkpoint import SavedGenerator, open_role
from diffpp_fast.training.config import Config
from diffpp_fast.training.initial_lora import open_role_lora
from diffpp_fast.training.inputs import digest_of, public


class Cast(Mapping[str, Tensor]):
    """Tensors of another mapping in one precision; each is cast when it is asked for."""

    def __init__(self, source: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self._source = source
        self._dtype = dtype

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._source[name]
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._source)

    def __len__(self) -> int:
        return len(self._source)


class Exported:
    """A generator as it will be written: the network that it makes, and where each of its tensors comes from.

    Args:
        config: of the run.
        generator: in a checkpoint, or as it is in memory.

    Raises:
        ConfigurationError: the network that the generator began as can't be read.
        CheckpointError: what was trained is not of this network.
    """

    def __init__(self, config: Config, generator: SavedGenerator | Trained) -> None:
        self.lora = config.models.generator.lora
        self._trained: Mapping[str, Tensor]
        if isinstance(generator, SavedGenerator):
            self._trained = open_role(*generator)
        else:
            self._trained = {name: weight.detach() for name, weight in generator.parameters.items()}
        self._stored = stored_weights(config.models, "generator")
        self._config = config
        self._configuration = configuration_of(config.models, self._stored)
        with naming(self._stored.key, self._stored.path), torch.device("meta"):
            network: Any = build_network(read_config(self._configuration), self._configuration)
        self._network = network
        tensors = network.state_dict()
        self._shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self._whole_numbers = {name for name, tensor in tensors.items() if not tensor.is_floating_point()}
        self._layers = layers_of(self._trained, "generator")
        self._refuse_others(str(generator) if isinstance(generator, SavedGenerator) else "the generator")

    @property
    def target(self) -> LoraTarget:
        """The network as a LoRA is written for it."""
        return LoraTarget.of(self._network)

    @property
    def part(self) -> str:
        """The name that pipelines have for the network."""
        return self.target.part

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shapes of its tensors by name."""
        return self._shapes

    def is_floating_point(self, name: str) -> bool:
        """Return whether a tensor is not of whole numbers."""
        return name not in self._whole_numbers

    @property
    def linear(self) -> list[str]:
        """The names of its linear layers and convolutions, which adapters can be on; not of those in groups (Sana's),
        for which no product B A is the update."""
        kinds = torch.nn.Linear | torch.nn.Conv2d
        return [
            name
            for name, layer in self._network.named_modules()
            if isinstance(layer, kinds) and getattr(layer, "groups", 1) == 1
        ]

    @property
    def adapted(self) -> list[str]:
        """The names of the layers that have adapters, trained ones or those of a LoRA that was merged before."""
        return list(dict.fromkeys([*(name.removesuffix(".weight") for name in self._layers), *self._merged]))

    @cached_property
    def _merged(self) -> Mapping[str, LowRank]:
        """The updates of the LoRA that is merged in what the generator began as, with its scale in alpha."""
        opened = None if self._stored.lora is None else open_role_lora(self._config.models, "generator")
        layers = {} if opened is None else opened.file.layers
        scale = 1.0 if opened is None else opened.section.scale
        return {layer: update._replace(alpha=scale * update.alpha) for layer, update in layers.items()}

    @property
    def configuration(self) -> str:
        """The folder or hub id of its `config.json`."""
        return self._configuration

    def write_network(self, folder: Path, dtype: torch.dtype | None) -> None:
        """Write a network of diffusers, without adapters, fused blocks and other changes.

        Args:
            folder: is made.
            dtype: of its floating-point tensors; None: float32, in which every stored precision is exact.
        """
        planned = {}
        for name, tensor in self._network.state_dict().items():
            kind = (dtype or torch.float32) if tensor.is_floating_point() else tensor.dtype
            planned[name] = Planned(kind, self._shapes[name], partial(self.weight, name, kind))
        folder.mkdir(parents=True, exist_ok=True)
        # Without the path that the network was loaded from, which is this machine's.
        self._network.register_to_config(_name_or_path="")
        self._network.save_config(folder)
        write_tensors(folder / f"{DIFFUSERS}.safetensors", planned)

    def inputs(self) -> dict[str, str | None]:
        """Return the digest of the weights below the adapters, as a run notes it: in the precision of its frozen
        weights."""
        shared = self._stored == stored_weights(self._config.models, "reference")
        name = "reference" if shared else "generator"
        dtype = compute_dtype(self._config.models.reference.dtype, self._config)
        facts = public(read_config(self._configuration))
        return {name: digest_of(facts, Cast(self.begun, dtype))}

    def adapters(self) -> dict[str, LowRank]:
        """Return the trained adapters by the layers' names, as they are in memory or in the checkpoint.

        A LoRA that was merged before is added to them: they are updates of the weights in the files.
        """
        assert self.lora is not None
        alpha = self.lora.alpha or self.lora.rank
        parts = {
            name.removesuffix(".weight"): [_cast(part, self._trained[part].cpu(), None) for part in both]
            for name, both in self._layers.items()
        }
        trained = {layer: LowRank(down, up, alpha) for layer, (down, up) in parts.items()}
        both = {layer: joined(update, trained[layer]) for layer, update in self._merged.items() if layer in trained}
        return {**self._merged, **trained, **both}

    @cached_property
    def begun(self) -> Mapping[str, Tensor]:
        """The weights that the generator began as; each is read when it is asked for."""
        stored = self._stored
        with naming(stored.key, stored.path):
            tensors = open_denoiser(stored.path, self._configuration, stored.variant, stored.state_dict)
        return with_lora(self._config.models, stored, tensors)

    def weight(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a tensor of the network that is exported, adapters merged; floating-point ones in a precision."""
        if name in self._layers:
            assert self.lora is not None
            down, up = (self._trained[part] for part in self._layers[name])
            scale = (self.lora.alpha or self.lora.rank) / self.lora.rank
            return _cast(name, merged_weight(self.begun[name], down.cpu(), up.cpu(), scale), dtype)
        return _cast(name, self._trained[name] if name in self._trained else self.begun[name], dtype)

    def _refuse_others(self, source: str) -> None:
        """Raises CheckpointError for trained weights of another network, or of other adapters."""
        if self.lora is None:
            other = self._trained.keys() ^ dict(self._network.named_parameters()).keys()
        else:
            adapters = {part for parts in self._layers.values() for part in parts}
            other = (self._trained.keys() ^ adapters) | (self._layers.keys() - self._shapes.keys())
        if other or not self._trained:
            raise CheckpointError(
                f"{source}: the weights are not those of this generator, {len(other)} names differ, e.g. "
                f"{min(other, default='all')}: is models.generator.lora what it was?"
            )


def refuse_overflow(layers: Mapping[str, LowRank], dtype: torch.dtype | None, factors: Mapping[str, float]) -> None:
    """Raise CheckpointError for updates that a precision can't hold, or that are not finite in their own.

    Args:
        layers, dtype: of the file.
        factors: of B, by layer.
    """
    for layer, update in layers.items():
        _cast(layer, update.down, dtype)
        _cast(layer, update.up.float() * factors[layer], dtype or update.up.dtype)


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor in another precision; raises CheckpointError for values that are not finite, before or by that."""
    dtype = dtype or tensor.dtype
    cast = tensor.to(dtype)
    if first_not_finite({name: cast}) is None:
        return cast
    if first_not_finite({name: tensor}) is None:
        largest, kind = tensor.abs().max().item(), str(dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{name} holds values up to {largest:.3g}, and {kind} ends at {torch.finfo(dtype).max:.3g}: use bfloat16"
        )
    raise CheckpointError(
        f"{name} holds values that are NaN or infinite: the generator has diverged. Lower optimizers.generator.lr, or "
        "export an earlier checkpoint"
    )


#: Configurations, tokenizers and vocabularies.
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")


def pipeline_files(base: str, variant: str | None, leave_out: Collection[str]) -> dict[str, Path]:
    """Return the files of a pipeline's parts, by the name that each has in a copy, where no variant is named.

    Args:
        base: a folder or hub id with `model_index.json`.
        variant: of the weights, where a part has it.
        leave_out: names of parts.

    Raises FileNotFoundError and ValueError for parts whose weights are not there, or damaged.
    """
    index = read_config(base, "model_index.json")
    # A component that a pipeline does without is [null, null].
    parts = {name: value[0] for name, value in index.items() if isinstance(value, list) and value[0] is not None}
    wanted = {part: library for part, library in parts.items() if part not in leave_out}
    weights = {name for stem in (DIFFUSERS, TRANSFORMERS) for each in {variant, None} for name in patterns(stem, each)}
    folder = local_folder(base, [f"{part}/{name}" for part in wanted for name in (*SMALL_FILES, *weights)])
    files: dict[str, Path] = {}
    for part, library in wanted.items():
        if not (folder / part).is_dir():
            raise FileNotFoundError(f"{folder} has no folder {part}, which its model_index.json names")
        small = [path for pattern in SMALL_FILES for path in (folder / part).glob(pattern)]
        files |= {f"{part}/{path.name}": path for path in small if ".safetensors.index" not in path.name}
        if (folder / part / "config.json").is_file():
            files |= {f"{part}/{name}": path for name, path in _weights(folder / part, library, variant).items()}
    return files


def copy_parts(files: Mapping[str, Path], target: Path) -> None:
    """Copy files into a folder, under their names there."""
    for name, path in files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / name)


def _weights(part: Path, library: str, variant: str | None) -> dict[str, Path]:
    stem = TRANSFORMERS if library == "transformers" else DIFFUSERS
    plain, plain_index, _ = patterns(stem, None)
    single, index, _ = patterns(stem, variant)
    if not (part / single).is_file() and not (part / index).is_file():
        variant, single, index = None, plain, plain_index
    tensors = open_weights(part, stem, variant, f"{library}.AutoModel")
    if (part / single).is_file():
        return {plain: part / single}
    return {plain_index: part / index} | {place.path.name: place.path for place in tensors.places.values()}
