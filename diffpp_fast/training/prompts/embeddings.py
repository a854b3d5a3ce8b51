"""Embeddings of prompts from the disk, in place of a text encoder."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.networks import Conditioning
from diffpp_fast.training.prompts.embedding_files import (
    EXTRA,
    NULL,
    Rows,
    identity,
    keys_of,
    shard_name,
)
from diffpp_fast.training.prompts.encoder import concatenate

logger = logging.getLogger(__name__)


class EmbeddingCache:
    """Prompts -> their conditioning as the encoder gave it, read from the disk when it is asked for.

    In memory are 32 bytes per prompt, by which its row is found.

    Args:
        folder: of a complete cache.
        manifest: its.
        device: where the conditioning goes.

    Attributes:
        digest: of all that it holds, made of the checksums; None where an earlier version wrote files without.

    Raises ConfigurationError for a cache that isn't complete.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], device: torch.device) -> None:
        self.folder = folder
        self.device = device
        count = manifest["shards"]
        shards = [folder / shard_name(number, count) for number in range(count)]
        missing = [path for path in shards if not path.is_file()]
        if missing or not (folder / NULL).is_file():
            raise ConfigurationError(
                f"prompts.embeddings: {len(missing)} of {count} shards are missing in {folder}: "
                "run `diffpp-fast embed` again, which goes on where it stopped"
            )
        self._files = [*shards, *([folder / EXTRA] if (folder / EXTRA).is_file() else [])]
        keys, digest, unchecked = [], hashlib.sha256(), []
        for path in [*self._files, folder / NULL]:
            with Rows(path) as rows:
                if rows.identity != identity(manifest):
                    raise ConfigurationError(f"prompts.embeddings: {path} belongs to another cache: remove it")
                keys.append(rows.keys())
                digest.update(keys[-1].tobytes())
                if rows.is_checked:
                    digest.update(rows.checksums().tobytes())
                else:
                    unchecked.append(path.name)
        del keys[-1]  # of the empty prompt, which is read by itself
        self.digest = None if unchecked else digest.hexdigest()
        if unchecked:
            logger.warning(
                "prompts.embeddings: %d files in %s, such as %s, are of an earlier version, without checksums: "
                "nobody would notice if one were damaged. `diffpp-fast embed` into another folder writes them with",
                len(unchecked),
                folder,
                unchecked[0],
            )
        self._ends = np.cumsum([len(part) for part in keys])
        every = np.concatenate(keys)
        self._rows = np.argsort(every[:, 0], kind="stable")
        self._keys = every[self._rows]

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """B prompts -> their conditioning, on the device. Raises ConfigurationError for a prompt that isn't held."""
        found = [self._find(key, prompt) for key, prompt in zip(keys_of(prompts), prompts, strict=True)]
        numbers = np.searchsorted(self._ends, found, side="right")
        parts: list[dict[str, Any]] = [{}] * len(found)
        for number in np.unique(numbers).tolist():
            first = 0 if number == 0 else int(self._ends[number - 1])
            with Rows(self._files[number]) as rows:
                for place in np.flatnonzero(numbers == number).tolist():
                    parts[place] = rows.read(found[place] - first, self.device)
        return Conditioning(tuple(prompts), concatenate(parts))

    def null(self) -> Conditioning:
        """What guidance leads away from, for one prompt."""
        with Rows(self.folder / NULL) as rows:
            return Conditioning(("",), rows.read(0, self.device))

    def holds(self, prompt: str) -> bool:
        return self._look_up(keys_of([prompt])[0]) is not None

    def _find(self, key: np.ndarray, prompt: str) -> int:
        row = self._look_up(key)
        if row is None:
            raise ConfigurationError(f"prompts.embeddings: {self.folder} holds no embedding of {prompt!r}")
        return row

    def _look_up(self, key: np.ndarray) -> int | None:
        """The row among those of all files."""
        place = int(np.searchsorted(self._keys[:, 0], key[0]))
        while place < len(self._keys) and self._keys[place, 0] == key[0]:
            if self._keys[place, 1] == key[1]:
                return int(self._rows[place])
            place += 1
        return None
