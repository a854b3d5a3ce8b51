"""Embeddings of prompts on the disk, in place of a text encoder: a manifest, and safetensors files of rows.

    manifest.json                        which encoder's embeddings of which prompts these are
    null.safetensors                     the empty prompt's, one row
    extra.safetensors                    those of the grid's prompts, where the configuration lists them
    shard-00000-of-00012.safetensors     those of the prompts, in their order

A row has a key made of the prompt's text, by which it is found, all tensors of its conditioning, and a checksum of them
that is compared whenever the row is read. Files of earlier versions have no checksums.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.networks import Conditioning
from diffpp_fast.training.durable import allow, move, open_tensors, sync
from diffpp_fast.training.prompts.encoder import concatenate

logger = logging.getLogger(__name__)

MANIFEST, NULL, EXTRA = "manifest.json", "null.safetensors", "extra.safetensors"
#: Tensors of keys and checksums in every file; those of a conditioning have their path as a name, after the prefix.
KEYS, SUMS, PREFIX = "keys", "checksums", "conditioning/"
#: The entry of a file's metadata: which cache it belongs to, and the dtypes that its tensors had.
ABOUT = "embeddings"
#: Tensors that one of these holds without loss are stored in it: encoders of half precision give float32, too.
NARROW = (torch.bfloat16, torch.float16)


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
            with EmbeddingRows(path) as rows:
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
            with EmbeddingRows(self._files[number]) as rows:
                for place in np.flatnonzero(numbers == number).tolist():
                    parts[place] = rows.read(found[place] - first, self.device)
        return Conditioning(tuple(prompts), concatenate(parts))

    def null(self) -> Conditioning:
        """Return the conditioning that guidance leads away from, for one prompt."""
        with EmbeddingRows(self.folder / NULL) as rows:
            return Conditioning(("",), rows.read(0, self.device))

    def holds(self, prompt: str) -> bool:
        return self._look_up(keys_of([prompt])[0]) is not None

    def _find(self, key: np.ndarray, prompt: str) -> int:
        row = self._look_up(key)
        if row is None:
            raise ConfigurationError(f"prompts.embeddings: {self.folder} holds no embedding of {prompt!r}")
        return row

    def _look_up(self, key: np.ndarray) -> int | None:
        """Return the row among those of all files; None where there is none."""
        place = int(np.searchsorted(self._keys[:, 0], key[0]))
        while place < len(self._keys) and self._keys[place, 0] == key[0]:
            if self._keys[place, 1] == key[1]:
                return int(self._rows[place])
            place += 1
        return None


def shard_name(number: int, count: int) -> str:
    return f"shard-{number:05d}-of-{count:05d}.safetensors"


def keys_of(prompts: Sequence[str]) -> np.ndarray:
    """128 bits of a hash of every prompt, int64 [B, 2]: no two of any number of prompts will ever share them."""
    digests = b"".join(hashlib.blake2b(prompt.encode(), digest_size=16).digest() for prompt in prompts)
    return np.frombuffer(digests, dtype=np.int64).reshape(-1, 2)


def identity(manifest: Mapping[str, Any]) -> str:
    """A hash of what the embeddings in a cache depend on. Every file in it carries it."""
    facts = {name: manifest[name] for name in ("encoder", "prompts")}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a cache, None where there is none. Raises ConfigurationError for one that is damaged."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        missing = {"encoder", "prompts", "seen", "rows", "shards"} - manifest.keys()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigurationError(f"prompts.embeddings: can't read {folder / MANIFEST}: {error.strerror}") from None
    except (ValueError, AttributeError) as error:
        raise ConfigurationError(f"prompts.embeddings: {folder / MANIFEST} is damaged: {error}") from None
    if missing:
        raise ConfigurationError(f"prompts.embeddings: {folder / MANIFEST} is damaged: it has no {min(missing)}")
    return manifest


def need_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a cache. Raises ConfigurationError like `read_manifest`, and where there is none."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise ConfigurationError(f"prompts.embeddings: no embeddings in {folder}: write them with `diffpp-fast embed`")
    return manifest


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    text = json.dumps(manifest, indent=2) + "\n"
    _publish(folder / MANIFEST, lambda path: path.write_text(text, encoding="utf-8"))


def write_rows(path: Path, conditioning: Conditioning, identity: str) -> None:
    """B prompts' conditioning, in one rename, when every byte is on the disk."""
    keys, stored, dtypes = keys_of(conditioning.prompts), {}, {}
    for name, tensor in _flat(conditioning.tensors):
        stored[name] = _narrowed(tensor.cpu()).contiguous()
        dtypes[name] = str(tensor.dtype).removeprefix("torch.")
    sums = [
        _checksum(keys[row], dtypes, {name: tensor[row : row + 1] for name, tensor in stored.items()})
        for row in range(len(keys))
    ]
    tensors = {PREFIX + name: tensor for name, tensor in stored.items()}
    tensors |= {KEYS: torch.from_numpy(keys.copy()), SUMS: torch.tensor(sums, dtype=torch.int64)}
    # In one entry, for several would come in any order: the same embeddings are the same file.
    about = json.dumps({"identity": identity, "dtypes": dtypes})
    _publish(path, lambda partial: save_file(tensors, partial, {ABOUT: about}))


def stored_bytes(conditioning: Conditioning) -> int:
    """Return the bytes that these prompts take on the disk."""
    return sum(_narrowed(tensor).nbytes for _, tensor in _flat(conditioning.tensors))


class EmbeddingRows:
    """A file of embeddings, opened for a moment: `with EmbeddingRows(path) as rows`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> EmbeddingRows:
        try:
            self._file = open_tensors(self.path).__enter__()
            about = json.loads((self._file.metadata() or {})[ABOUT])
            self.identity: str = about["identity"]
            self._dtypes: dict[str, str] = about["dtypes"]
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ConfigurationError(f"prompts.embeddings: {self.path} is damaged: {error}") from None
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.__exit__(*exception)

    @property
    def is_checked(self) -> bool:
        """Whether there are checksums."""
        return SUMS in self._file.keys()  # noqa: SIM118 (no mapping)

    def keys(self) -> np.ndarray:
        """int64 [N, 2]"""
        return self._slice(KEYS, slice(None)).numpy()

    def checksums(self) -> np.ndarray:
        """int64 [N]"""
        return self._slice(SUMS, slice(None)).numpy()

    def read(self, row: int, device: torch.device) -> dict[str, Any]:
        """Return the tensors of one prompt's conditioning, [1, ...] each, as the encoder gave them.

        Raises ConfigurationError where they are not what was written.
        """
        place = slice(row, row + 1)
        stored = {name: self._slice(PREFIX + name, place) for name in self._dtypes}
        if self.is_checked and int(self._slice(SUMS, place)) != _checksum(
            self._slice(KEYS, place).numpy(), self._dtypes, stored
        ):
            raise ConfigurationError(
                f"prompts.embeddings: row {row} of {self.path} is damaged: its checksum has changed. Remove that file, "
                "and `diffpp-fast embed` writes it again"
            )
        tensors: dict[str, Any] = {}
        for name, dtype in self._dtypes.items():
            *sections, last = name.split("/")
            inner = tensors
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[last] = stored[name].to(device).to(getattr(torch, dtype))
        return tensors

    def _slice(self, name: str, rows: slice) -> torch.Tensor:
        try:
            # A copy: a slice maps the file and dies with it.
            rows_of_it: torch.Tensor = self._file.get_slice(name)[rows].clone()
        except SafetensorError as error:
            raise ConfigurationError(f"prompts.embeddings: {self.path} is damaged: {error}") from None
        return rows_of_it


def _checksum(key: np.ndarray, dtypes: Mapping[str, str], stored: Mapping[str, torch.Tensor]) -> int:
    """CRC-32 of a row: of its key, and of the names, dtypes, shapes and bytes of its tensors."""
    total = zlib.crc32(key.tobytes())
    for name, tensor in sorted(stored.items()):
        total = zlib.crc32(f"{name} {dtypes[name]} {tensor.dtype} {list(tensor.shape)}".encode(), total)
        total = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, total)
    return total


def _flat(tensors: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in tensors.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def _narrowed(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype == torch.float32:
        for dtype in NARROW:
            narrow = tensor.to(dtype)
            if torch.equal(narrow.float(), tensor):
                return narrow
    return tensor


def _publish(path: Path, write: Any) -> None:
    """Writes a file beside its place, brings it to the disk and renames it."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        # safetensors makes files that their owner alone can read; the folder's mode follows the umask.
        allow(partial, path.parent.stat().st_mode & 0o666)
        sync(partial)
        move(partial, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise ConfigurationError(f"can't write {path}: {error}. Shards that are complete stay.") from None
