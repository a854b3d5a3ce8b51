"""The parts of a whole pipeline, found in its folder or on the hub, and copied file by file."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from diffpp_fast.networks.loading import local_folder, read_config
from diffpp_fast.networks.weight_files import DIFFUSERS, TRANSFORMERS, open_weights, patterns

#: Configurations, tokenizers and vocabularies.
SMALL_FILES = ("*.json", "*.txt", "*.model")


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
