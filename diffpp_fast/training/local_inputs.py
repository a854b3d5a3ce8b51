"""Looks at the inputs of a run that no hub has, before the hub is asked for the others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.training.config import Prompts
from diffpp_fast.training.images import KEY as IMAGES
from diffpp_fast.training.prompts import open_prompts
from diffpp_fast.training.prompts.embeddings import need_manifest
from diffpp_fast.training.prompts.source import find_files
from diffpp_fast.user_paths import refuse_no_folder


def check_prompts(data: Mapping[str, Any]) -> None:
    """Raise ConfigurationError for prompts that can't be read; see `check_local_inputs`."""
    if _text(data, "prompts.path") is not None:
        open_prompts(Prompts.model_validate(data["prompts"]))


def check_local_inputs(data: Mapping[str, Any]) -> None:
    """Raise ConfigurationError, naming the key, for unreadable prompts, and for images and rewards that are not there.

    Args:
        data: nested mappings of a configuration, with absolute paths, whose keys and types are right.
    """
    if (output := _text(data, "output")) is not None:
        refuse_no_folder("output", Path(output))
    check_prompts(data)
    if (embeddings := _text(data, "prompts.embeddings")) is not None:
        need_manifest(Path(embeddings))
    if (images := _text(data, "method.regularizers.images.path")) is not None:
        find_files(images, IMAGES)
    for name in ("optimised", "held_out"):
        key = f"rewards.{name}.factory"
        source = (_text(data, key) or "").rpartition(":")[0]
        if source.endswith(".py") and not Path(source).is_file():
            raise ConfigurationError(f"{key}: no such file: {source}")


def _text(data: Mapping[str, Any], key: str) -> str | None:
    """Return the text at a dotted key; None where there is none."""
    value: Any = data
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value if isinstance(value, str) else None
