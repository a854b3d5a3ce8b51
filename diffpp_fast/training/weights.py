"""A role's weights in a checkpoint, by parameter name, whether one process wrote them or several."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import torch

from diffpp_fast.errors import CheckpointError
from diffpp_fast.tensor_files import StoredTensors
from diffpp_fast.training.build import Trained


class Weights(NamedTuple):
    """A generator in a checkpoint: the folder, and which of its weights, `generator` or `generator_ema`."""

    folder: Path
    name: str

    def __str__(self) -> str:
        return str(self.folder / self.name)


def find_role(folder: Path, name: str) -> list[Path]:
    """The files `NAME.safetensors` or `NAME-00001-of-00004.safetensors` and so on; [] where there are none.

    Raises CheckpointError where some of the parts are missing.
    """
    whole = folder / f"{name}.safetensors"
    if whole.is_file():
        return [whole]
    parts = sorted(folder.glob(f"{name}-*-of-*.safetensors"))
    counts = {re.fullmatch(r".*-\d+-of-(\d+)\.safetensors", part.name)[1] for part in parts}  # type: ignore[index]
    if parts and (len(counts) > 1 or len(parts) != int(next(iter(counts)))):
        raise CheckpointError(
            f"{folder}: parts of {name} are missing, there are only {', '.join(part.name for part in parts)}"
        )
    return parts


def open_role(folder: Path, name: str) -> StoredTensors:
    """Return the tensors of `generator`, `generator_ema` or `fake`, each of which is read when it is asked for.

    Raises CheckpointError where there are none, or not all.
    """
    files = find_role(folder, name)
    if not files and not folder.is_dir():
        raise CheckpointError(f"{folder} is gone: a run that goes on removes its oldest checkpoints. Start again")
    if not files:
        raise CheckpointError(f"{folder} holds no weights of {name}")
    try:
        return StoredTensors(files)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def read_role(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Return the tensors of `generator`, `generator_ema` or `fake`, on the CPU; raises like `open_role`."""
    return dict(open_role(folder, name))


@torch.no_grad()
def load_role(trained: Trained, tensors: dict[str, torch.Tensor], source: Path) -> None:
    """Copies a role's trained weights into its network.

    Raises CheckpointError where names or shapes are not those of the network.
    """
    unknown = sorted(tensors.keys() ^ trained.parameters.keys())
    if unknown:
        raise CheckpointError(
            f"{source}: the weights are not those of this {trained.role}, {len(unknown)} names differ, "
            f"e.g. {unknown[0]}: is models.{trained.role}.lora what it was?"
        )
    for name, parameter in trained.parameters.items():
        if tensors[name].shape != parameter.shape:
            raise CheckpointError(
                f"{source}: {name} has shape {list(tensors[name].shape)}, the {trained.role}'s {list(parameter.shape)}"
            )
        parameter.copy_(tensors[name])
