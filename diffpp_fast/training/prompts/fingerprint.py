"""What tells embeddings of one text encoder from those of another."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.networks.loading import resolve, split_hub_id
from diffpp_fast.training.config import TextEncoderSection

#: Of an encoder's or a tokenizer's folder, what decides about its embeddings.
FILES = ("*.safetensors", "*.json", "*.txt", "*.model")
#: Keys of a text encoder's section that name such folders.
FOLDERS = ("path", "tokenizer")

#: Size, time of the last change in ns and SHA-256 of files, by path.
Seen = dict[str, tuple[int, int, str]]


def encoder_facts(encoder: TextEncoderSection, seen: Mapping[str, Any], reading: Seen) -> dict[str, Any]:
    """All settings of a text encoder; folders stand in it as the SHA-256 of their files, by name.

    A text encoder may have tens of gigabytes: a file that has kept its path, size and time is not read again.

    Args:
        encoder: its section of the configuration.
        seen: what is known of files, from an earlier call.
        reading: filled with what is known of the files now.

    Raises FileNotFoundError for a folder that isn't there.
    """
    return {
        key: _files(value, seen, reading) if key in FOLDERS and value is not None else value for key, value in encoder
    }


def refuse_other_cache(folder: Path, manifest: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Raises ConfigurationError where a cache in `folder` was not made from these facts."""
    if changes := _differences(manifest["encoder"], facts["encoder"]):
        raise ConfigurationError(
            f"prompts.embeddings: {folder} was made from other inputs: {', '.join(changes)}. "
            "Write these embeddings into another folder with `diffpp-fast embed`."
        )
    if manifest["prompts"] != facts["prompts"]:
        before, after = manifest["prompts"]["count"], facts["prompts"]["count"]
        raise ConfigurationError(
            f"prompts.embeddings: {folder} was made of other prompts ({before} there, {after} here): their text or "
            "their order differs. Write these embeddings into another folder with `diffpp-fast embed`."
        )


def _differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "models.") -> list[str]:
    """Dotted keys whose values are not the same."""
    found = []
    for key in sorted({*before, *after}):
        one, other = before.get(key), after.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += _differences(one, other, f"{prefix}{key}.")
        elif one != other:
            found.append(f"{prefix}{key}")
    return found


def _files(path: str, seen: Mapping[str, Any], reading: Seen) -> dict[str, str]:
    folder = Path(resolve(path))
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        repository, inside = split_hub_id(path)
        patterns = [f"{inside}/{pattern}" if inside else pattern for pattern in FILES]
        folder = Path(snapshot_download(repository, allow_patterns=patterns)) / inside
    files = sorted({file for pattern in FILES for file in folder.glob(pattern)})
    return {file.name: _digest(file.resolve(), seen, reading) for file in files}


def _digest(file: Path, seen: Mapping[str, Any], reading: Seen) -> str:
    facts = file.stat()
    state = [facts.st_size, facts.st_mtime_ns]
    known = seen.get(str(file))
    if known is not None and list(known[:2]) == state:
        digest = known[2]
    else:
        with file.open("rb") as opened:
            digest = _sha256(opened)
    reading[str(file)] = (facts.st_size, facts.st_mtime_ns, digest)
    return str(digest)


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 24):
        digest.update(chunk)
    return digest.hexdigest()
