"""The configuration that a checkpoint was saved with, and a hint where the folders in it have moved since."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.networks.loading import exists
from diffpp_fast.training.config import Config
from diffpp_fast.training.loading import load_config

#: Keys of `models` and its sections that are paths.
PATHS = ("base", "path", "tokenizer")


def load_saved_config(checkpoint: Path, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration of a checkpoint; with another `models.base`, the parts that lay in the old one follow.

    Raises ConfigurationError like `load_config`, and names the folders that are no longer there.
    """
    file = checkpoint / "config.yaml"
    with naming_moves(checkpoint):
        return load_config(file, [*_followers(file, overrides), *overrides])


@contextmanager
def naming_moves(checkpoint: Path) -> Iterator[None]:
    """Add to an error which folders of a checkpoint's configuration are not there, and how to say where they are."""
    try:
        yield
    except ConfigurationError as error:
        file = checkpoint / "config.yaml"
        gone = [
            f"{key}={path}" for key, path in _paths(file).items() if path.startswith("/") and not exists(Path(path))
        ]
        if not gone:
            raise
        raise ConfigurationError(
            f"{error}. {file} was saved when these were there: {', '.join(gone)}. If they have moved, say where to: "
            f"--override {gone[0].partition('=')[0]}=FOLDER"
        ) from error


def _followers(file: Path, overrides: Sequence[str]) -> list[str]:
    bases = [override.partition("=")[2] for override in overrides if override.startswith("models.base=")]
    paths = _paths(file)
    old = paths.pop("models.base", None)
    if not bases or old is None:
        return []
    new = str(Path(bases[-1]).expanduser().absolute()) if exists(Path(bases[-1]).expanduser()) else bases[-1]
    return [f"{key}={new}{path.removeprefix(old)}" for key, path in paths.items() if path.startswith(f"{old}/")]


def _paths(file: Path) -> dict[str, str]:
    """The paths in the section `models`, by key."""
    try:
        models: Any = yaml.safe_load(file.read_text(encoding="utf-8"))["models"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return {}
    sections = {"models": models} | {f"models.{name}": part for name, part in models.items() if isinstance(part, dict)}
    inside = {f"{name}.initial_lora": section.get("initial_lora") for name, section in sections.items()}
    sections |= {name: part for name, part in inside.items() if isinstance(part, dict)}
    return {
        f"{name}.{key}": section[key]
        for name, section in sections.items()
        for key in PATHS
        if isinstance(section.get(key), str)
    }
