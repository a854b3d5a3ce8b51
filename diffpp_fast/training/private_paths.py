"""Takes out of an export's files the paths of the machine that made it, which tell names of people and folders."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from diffpp_fast.tensor_files import drop_metadata
from diffpp_fast.training.checkpoint import write_json

#: Files of settings; others (vocabularies, tokenizers, indices of weights) name no places.
CONFIGURATIONS = ("*config.json", "model_index.json")
#: An absolute path of at least two names, or one from a home folder, alone or within a text; an address is none.
PATH = re.compile(
    r"(?<![\w:/.~-])(?:/|[A-Za-z]:[\\/]+)[\w.@ -]+[\\/]+[\w.@-]"  # from a root
    r"|(?<![\w/])~[\w.-]*/[\w.@-]|file:/"
)
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def remove_private_paths(folder: Path) -> None:
    """Take entries that hold paths out of the settings and of the weights' metadata in an export's files.

    Files without any keep every byte. What reads the files does not miss them: they say where something once lay.
    """
    for pattern in CONFIGURATIONS:
        for file in folder.rglob(pattern):
            try:
                settings = json.loads(file.read_text(encoding="utf-8"))
            except (ValueError, RecursionError):
                continue  # damaged as it is in the base
            public = _without_paths(settings)
            if public != settings:
                write_json(file, public)
    for file in folder.rglob("*.safetensors"):
        drop_metadata(file, lambda text: PATH.search(text) is not None)


def _without_paths(settings: Any) -> Any:
    if not isinstance(settings, dict):
        return settings
    return {name: _without_paths(value) for name, value in settings.items() if not _is_private(name, value)}


def _is_private(name: str, value: Any) -> bool:
    """Return whether a value is a path, by what it is or, where it may be one, by its name."""
    if not isinstance(value, str) or "\n" in value:
        return False
    named = name.endswith("name_or_path") and value != "" and HUB_ID.fullmatch(value) is None
    return named or PATH.match(value) is not None
