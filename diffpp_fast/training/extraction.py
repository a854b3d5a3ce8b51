"""A LoRA from two whole networks: the part of a generator's change that low ranks hold, and what is lost of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffpp_fast.errors import CheckpointError, ConfigurationError
from diffpp_fast.networks.loading import exists, is_file, open_denoiser, read_config, split_hub_id
from diffpp_fast.networks.lora_formats import LoraFormat, LowRank, is_carried
from diffpp_fast.networks.low_rank import approximate, rank_of
from diffpp_fast.tensor_files import first_not_finite, shapes_of
from diffpp_fast.training.build.agreement import naming
from diffpp_fast.training.exported import Exported
from diffpp_fast.user_paths import public_name, real_path, user_path


class LayerShare(NamedTuple):
    """A layer's part of the whole change, and the share of its own change that its update keeps."""

    rank: int
    of_change: float
    kept: float


@dataclass(frozen=True)
class Extraction:
    """An extracted LoRA, with what is lost: shares of the change's squared norm, over all tensors of the network.

    Attributes:
        layers: the updates, by the layers' names.
        rank: that was asked for.
        base: what was subtracted, in words.
        from_begun: whether that is what the generator began as.
        base_id: the hub's repository of another base; None: it is of this machine.
        shares: of each layer that has an update.
        kept: of the whole change.
        not_carried: of tensors that have changed and that no update carries, by name.
        unchanged: how many linear layers and convolutions have no change.
    """

    layers: Mapping[str, LowRank] = field(repr=False)
    rank: int
    base: str
    from_begun: bool
    base_id: str | None
    shares: Mapping[str, LayerShare]
    kept: float
    not_carried: Mapping[str, float]
    unchanged: int

    @property
    def whole(self) -> list[str]:
        """The layers that are no larger than the rank: their change is kept but for rounding."""
        return [
            layer
            for layer, update in self.layers.items()
            if rank_of((*update.up.shape[:1], *update.down.shape[1:])) <= self.rank
        ]

    def sentences(self) -> list[str]:
        """Say what is kept and what is lost."""
        worst, share = min(self.shares.items(), key=lambda item: item[1].kept)
        said = [
            f"rank {self.rank} on {len(self.layers)} layers keeps {self.kept:.2%} of the change from {self.base} "
            f"(squared norm); least of {worst}: {share.kept:.2%}"
        ]
        if self.whole:
            said.append(f"{len(self.whole)} layers are no larger than that rank, and whole: {_some(self.whole)}")
        if self.not_carried:
            said.append(
                f"not carried: {len(self.not_carried)} tensors with {sum(self.not_carried.values()):.2%} of the "
                f"change: {_some(sorted(self.not_carried, key=lambda name: -self.not_carried[name]))}"
            )
        return said

    def facts(self) -> dict[str, Any]:
        """Return all of it but the updates, as JSON has it."""
        return {
            "rank": self.rank,
            "base": self.base,
            "kept": self.kept,
            "unchanged_layers": self.unchanged,
            "not_carried": dict(self.not_carried),
            "layers": {layer: share._asdict() for layer, share in self.shares.items()},
        }


class Extractor:
    """Extracts a LoRA from a generator and the network that it is the change of.

    Args:
        exported: the generator.
        rank: of the updates.
        base: a network or a pipeline, as a folder, hub id or file; None: what the generator began as.
        kind: the format, which may not carry all layers.

    Raises ConfigurationError, before a tensor is read, for a rank above all layers', a generator that is adapters on
    that base already, and a base that can't be read or is another network.
    """

    def __init__(self, exported: Exported, rank: int, base: str | None, kind: LoraFormat) -> None:
        if base is None and exported.lora is not None:
            raise ConfigurationError(
                "--extract-lora: the run trained adapters, which --format writes as they are: leave it out, or name "
                "another network to subtract with --base"
            )
        self._exported, self._rank, self._kind = exported, rank, kind
        self._base = exported.begun if base is None else _open_base(base, exported)
        # Of a folder here the name alone: what is exported leaves this machine.
        here = None if base is None else real_path(user_path(base))
        local = here is not None and exists(here)
        self._base_name = "what the generator began as" if base is None else base
        if here is not None and local:
            self._base_name = public_name(here) or "a folder of the author's"
        self._base_id = None if base is None or local or base.startswith("package:") else split_hub_id(base)[0]
        self._from_begun = base is None
        target = exported.target
        self._layers = [layer for layer in exported.linear if is_carried(kind, layer, target)]
        largest = max(self._layers, key=lambda layer: rank_of(exported.shapes[f"{layer}.weight"]))
        most = rank_of(exported.shapes[f"{largest}.weight"])
        if rank > most:
            raise ConfigurationError(
                f"--extract-lora {rank}: no layer has a rank above {most} ({largest}): use a rank below that"
            )

    def __len__(self) -> int:
        return len(self._layers)

    def run(self, dtype: torch.dtype | None = None, progress: Callable[[], None] | None = None) -> Extraction:
        """Extract; one layer is in memory at a time.

        Args:
            dtype: of the updates; what is lost by it counts.
            progress: told of every layer.

        Raises CheckpointError where no layer that the format carries has changed, for weights that are not finite or
        not floating-point, and for updates that the precision can't hold.
        """
        layers: dict[str, LowRank] = {}
        energies: dict[str, tuple[float, float]] = {}
        unchanged = 0
        for layer in self._layers:
            change = self._change(f"{layer}.weight")
            if change.any():
                layers[layer], *energy = approximate(change, self._rank, dtype)
                energies[layer] = (energy[0], energy[1])
                if not math.isfinite(energy[1]):
                    raise CheckpointError(
                        f"--extract-lora: {layer} has changed by up to {change.abs().max():.3g}, which its update does "
                        f"not hold in {str(dtype or torch.float32).removeprefix('torch.')}: use --dtype bfloat16"
                    )
            else:
                unchanged += 1
            if progress is not None:
                progress()
        others = {name: energy for name, energy in self._others() if energy > 0.0}
        if not layers:
            raise CheckpointError(
                f"--extract-lora: no layer that a LoRA carries differs from {self._base_name}"
                + (f", but {_some(list(others))}" if others else ": they are the same network")
            )
        total = sum(energy for energy, _ in energies.values()) + sum(others.values())
        lost = sum(lost for _, lost in energies.values()) + sum(others.values())
        return Extraction(
            layers,
            self._rank,
            self._base_name,
            self._from_begun,
            self._base_id,
            {
                layer: LayerShare(layers[layer].rank, energy / total, 1.0 - lost / energy)
                for layer, (energy, lost) in energies.items()
            },
            1.0 - lost / total,
            {name: energy / total for name, energy in others.items()},
            unchanged,
        )

    def _change(self, name: str) -> Tensor:
        weight, base = self._exported.weight(name), self._base[name]
        if base.is_floating_point() != self._exported.is_floating_point(name):
            raise CheckpointError(
                f"--extract-lora: {name} of {self._base_name} is {str(base.dtype).removeprefix('torch.')}: quantised "
                "weights? Name the network that they were made from with --base"
            )
        base = base.double()
        if first_not_finite({name: base}) is not None:
            raise CheckpointError(
                f"--extract-lora: {name} of {self._base_name} holds values that are NaN or infinite: is it damaged? "
                "Name another with --base"
            )
        return weight.double() - base

    def _others(self) -> Iterator[tuple[str, float]]:
        """The squared norms of the changes of all tensors that no update carries, by name."""
        carried = {f"{layer}.weight" for layer in self._layers}
        for name in self._exported.shapes:
            if name not in carried:
                yield name, self._change(name).square().sum().item()


def _open_base(base: str, exported: Exported) -> Mapping[str, Tensor]:
    """Return the tensors of a network, or of a pipeline's; raise ConfigurationError unless they are of this one."""
    with naming("--base", base):
        path = base if is_file(base) else _network_in(base, exported.part)
        tensors = open_denoiser(path, exported.configuration if is_file(base) else path)
    other, own = shapes_of(tensors), exported.shapes
    wrong = sorted(name for name in other.keys() | own.keys() if other.get(name) != own.get(name))
    if wrong:
        shapes = [f"{list(each[wrong[0]])}" if wrong[0] in each else "none" for each in (other, own)]
        raise ConfigurationError(
            f"--base {base}: it is another network than the generator, {len(wrong)} tensors differ in name or shape, "
            f"e.g. {wrong[0]}: {shapes[0]} and {shapes[1]}: name the one that the generator is a change of"
        )
    return tensors


def _network_in(path: str, part: str) -> str:
    try:
        read_config(path, "model_index.json")
    except FileNotFoundError:
        return path
    return f"{path}/{part}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
