"""Embeddings of prompts on the disk, in place of a text encoder: a manifest, and safetensors files of rows.

    manifest.json                        which encoder's embeddings of which prompts these are
    null.safetensors                     the empty prompt's, one row
    extra.safetensors                    those of the grid's prompts, where the configuration lists them
    shard-00000-of-00012.safetensors     those of the prompts, in their order

A row has a key made of the prompt's text, by which it is found, all tensors of its conditioning, and a checksum of them
that is compared whenever the row is read. Files of earlier versions have no checksums. Where padding is zeros, a row is
stored without it, behind the row before.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.networks import Conditioning
from diffpp_fast.training.durable import allow, move, open_tensors, sync
from diffpp_fast.training.prompts.encoder import concatenate
from diffpp_fast.training.prompts.source import PromptSource

logger = logging.getLogger(__name__)

MANIFEST, NULL, EXTRA = "manifest.json", "null.safetensors", "extra.safetensors"
#: Tensors of keys and checksums in every file; those of a conditioning have their path as a name, after the prefix.
KEYS, SUMS, PREFIX = "keys", "checksums", "conditioning/"
#: Tokens of each row, of tensors without their padding.
LENGTHS = "lengths/"
#: Padding is left out where it is more than this share of a tensor.
PADDED = 0.1
#: The entry of a file's metadata: which cache it belongs to, and the dtypes that its tensors had.
ABOUT = "embeddings"
#: The end of a file's name while it is written.
PARTIAL = ".partial"
#: For a file that can't be used.
REMEDY = "Remove it, and `diffpp-fast embed` writes it again"
#: Tensors that one of these holds without loss are stored in it: encoders of half precision give float32, too.
NARROW = (torch.bfloat16, torch.float16)


class RowEnds(NamedTuple):
    """How many rows a shard has, and the keys of its first and its last one, int64 [2, 2]."""

    rows: int
    keys: np.ndarray


class EmbeddingCache:
    """Prompts -> their conditioning as the encoder gave it, read from the disk when it is asked for.

    In memory are 32 bytes per prompt, by which its row is found.

    Args:
        folder: of a complete cache.
        manifest: its.
        device: where the conditioning goes.
        prompts: of which it was made, to compare shards with; None: they are not compared.

    Attributes:
        digest: of all that it holds, made of the checksums; None where an earlier version wrote files without.

    Raises ConfigurationError for a cache that isn't complete, and for a file that is damaged or has no place in it.
    """

    def __init__(
        self, folder: Path, manifest: dict[str, Any], device: torch.device, prompts: PromptSource | None = None
    ) -> None:
        self.folder = folder
        self.device = device
        count = manifest["shards"]
        shards = [folder / shard_name(number, count) for number in range(count)]
        missing = [path.name for path in shards if not path.is_file()]
        if missing or not (folder / NULL).is_file():
            said = f"{len(missing)} of {count} shards are missing in {folder}, {missing[0]} first" if missing else ""
            raise ConfigurationError(
                f"prompts.embeddings: {said or f'{folder / NULL} is missing'}: "
                "run `diffpp-fast embed` again, which goes on where it stopped"
            )
        self._files = [*shards, *([folder / EXTRA] if (folder / EXTRA).is_file() else [])]
        keys, digest, unchecked = [], hashlib.sha256(), []
        ends = None if prompts is None else ends_of(manifest, prompts)
        form: dict[str, Any] = {}
        for number, path in enumerate([*self._files, folder / NULL]):
            with EmbeddingRows(path) as rows:
                if rows.identity != identity(manifest):
                    raise ConfigurationError(
                        f"prompts.embeddings: {path} belongs to another cache: it was made by another encoder or of "
                        f"other prompts. {REMEDY}"
                    )
                keys.append(rows.keys())
                if number < count:
                    form = form or rows.form()
                    if ends is not None:
                        rows.refuse_other_rows(keys[-1], ends[number], form)
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
        raise ConfigurationError(f"prompts.embeddings: {folder / MANIFEST} is damaged: {error}. {REMEDY}") from None
    if missing:
        raise ConfigurationError(
            f"prompts.embeddings: {folder / MANIFEST} is damaged: it has no {min(missing)}. {REMEDY}"
        )
    return manifest


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    text = json.dumps(manifest, indent=2) + "\n"
    _publish(folder / MANIFEST, lambda path: path.write_text(text, encoding="utf-8"))


def remove_partial_files(folder: Path, rank: int) -> None:
    """Remove what a killed process of this rank has begun to write."""
    for path in folder.glob(f".*.{rank}{PARTIAL}"):
        path.unlink(missing_ok=True)


def write_rows(path: Path, conditioning: Conditioning, identity: str, rank: int = 0) -> None:
    """B prompts' conditioning, in one rename, when every byte is on the disk."""
    keys, tensors, dtypes = keys_of(conditioning.prompts), {}, {}
    rows: list[dict[str, torch.Tensor]] = [{} for _ in keys]
    padded: dict[str, int] = {}
    for name, tensor in _flat(conditioning.tensors):
        stored = _narrowed(tensor.cpu()).contiguous()
        dtypes[name] = str(tensor.dtype).removeprefix("torch.")
        lengths = _lengths(stored)
        for row, place in zip(rows, range(len(stored)), strict=True):
            row[name] = stored[place : place + 1] if lengths is None else stored[place : place + 1, : lengths[place]]
        if lengths is None:
            tensors[PREFIX + name] = stored
        else:
            padded[name] = stored.shape[1]
            tensors[PREFIX + name] = torch.cat([row[name][0] for row in rows])
            tensors[LENGTHS + name] = torch.tensor(lengths, dtype=torch.int64)
    sums = [_checksum(key, dtypes, row) for key, row in zip(keys, rows, strict=True)]
    tensors |= {KEYS: torch.from_numpy(keys.copy()), SUMS: torch.tensor(sums, dtype=torch.int64)}
    # In one entry, for several would come in any order: the same embeddings are the same file.
    about = json.dumps({"identity": identity, "dtypes": dtypes} | ({"padded": padded} if padded else {}))
    _publish(path, lambda partial: save_file(tensors, partial, {ABOUT: about}), rank)


def stored_bytes(conditioning: Conditioning) -> tuple[int, int]:
    """Return the bytes that one prompt takes: with padding, and on the disk."""
    stored = [_narrowed(tensor) for _, tensor in _flat(conditioning.tensors)]
    kept = [tensor if (lengths := _lengths(tensor)) is None else tensor[:, : lengths[0]] for tensor in stored]
    return sum(tensor.nbytes for tensor in stored), sum(tensor.nbytes for tensor in kept)


def ends_of(manifest: Mapping[str, Any], prompts: PromptSource, shards: Iterable[int] | None = None) -> list[RowEnds]:
    """Return how many rows each shard has, and the keys of the first and the last; of all of them, or of `shards`."""
    starts = [number * manifest["rows"] for number in (range(manifest["shards"]) if shards is None else shards)]
    lasts = [min(start + manifest["rows"], len(prompts)) - 1 for start in starts]
    keys = keys_of(prompts[[place for pair in zip(starts, lasts, strict=True) for place in pair]])
    return [
        RowEnds(last - start + 1, keys[2 * number : 2 * number + 2])
        for number, (start, last) in enumerate(zip(starts, lasts, strict=True))
    ]


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
            #: Tokens of a row with its padding, by the names of tensors that are stored without.
            self._padded: dict[str, int] = about.get("padded", {})
            self._ends: dict[str, list[int]] = {}
            names = {*(PREFIX + name for name in self._dtypes), *(LENGTHS + name for name in self._padded)}
            strange = {KEYS, SUMS, *names} ^ {*self._file.keys()}
            if strange - {SUMS}:
                raise ValueError(f"it has or lacks {min(strange)}")
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise ConfigurationError(f"prompts.embeddings: {self.path} is damaged: {error}. {REMEDY}") from None
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

    def form(self) -> dict[str, Any]:
        """Return dtype and shape of a row's tensors, as the encoder gave them."""
        shapes = {name: self._file.get_slice(PREFIX + name).get_shape() for name in self._dtypes}
        tokens = {name: [self._padded[name]] if name in self._padded else [] for name in shapes}
        return {name: (self._dtypes[name], [*tokens[name], *shape[1:]]) for name, shape in shapes.items()}

    def refuse_other_rows(self, keys: np.ndarray, ends: RowEnds, form: Mapping[str, Any] | None = None) -> None:
        """Raise ConfigurationError where these are not the prompts, or tensors, that the file should hold.

        Args:
            keys: of all rows, int64 [N, 2].
            ends: of the file that should lie here.
            form: of the rows of other files; None: any.
        """
        if len(keys) != ends.rows:
            said = f"has {len(keys)} rows in place of {ends.rows}"
        elif not np.array_equal(keys[[0, -1]], ends.keys):
            said = "holds other prompts than its name says"
        elif form is not None and (mine := self.form()) != form:
            said = f"has rows of {mine}, others of {form}"
        else:
            return
        raise ConfigurationError(f"prompts.embeddings: {self.path} {said}. {REMEDY}")

    def check(self) -> None:
        """Read all rows; raise ConfigurationError where one is not what was written."""
        for row in range(len(self.keys())):
            self.read(row, torch.device("cpu"))

    def read(self, row: int, device: torch.device) -> dict[str, Any]:
        """Return the tensors of one prompt's conditioning, [1, ...] each, as the encoder gave them.

        Raises ConfigurationError where they are not what was written.
        """
        place = slice(row, row + 1)
        stored = {
            name: self._tokens(name, row) if name in self._padded else self._slice(PREFIX + name, place)
            for name in self._dtypes
        }
        if self.is_checked and int(self._slice(SUMS, place)) != _checksum(
            self._slice(KEYS, place).numpy(), self._dtypes, stored
        ):
            raise ConfigurationError(
                f"prompts.embeddings: row {row} of {self.path} is damaged: its checksum has changed. {REMEDY}"
            )
        tensors: dict[str, Any] = {}
        for name, dtype in self._dtypes.items():
            *sections, last = name.split("/")
            inner = tensors
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[last] = self._with_padding(name, stored[name]).to(device).to(getattr(torch, dtype))
        return tensors

    def _tokens(self, name: str, row: int) -> torch.Tensor:
        """A row of a tensor that is stored without padding."""
        if name not in self._ends:
            self._ends[name] = [0, *self._slice(LENGTHS + name, slice(None)).cumsum(0).tolist()]
        start, end = self._ends[name][row : row + 2]
        return self._slice(PREFIX + name, slice(start, end))[None]

    def _with_padding(self, name: str, row: torch.Tensor) -> torch.Tensor:
        if name not in self._padded:
            return row
        whole = row.new_zeros(1, self._padded[name], *row.shape[2:])
        whole[:, : row.shape[1]] = row
        return whole

    def _slice(self, name: str, rows: slice) -> torch.Tensor:
        try:
            # A copy: a slice maps the file and dies with it.
            rows_of_it: torch.Tensor = self._file.get_slice(name)[rows].clone()
        except SafetensorError as error:
            raise ConfigurationError(f"prompts.embeddings: {self.path} is damaged: {error}. {REMEDY}") from None
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


def _lengths(tensor: torch.Tensor) -> list[int] | None:
    """Tokens up to the last one that is not all zeros, of each row [L, ...]; None where there is little behind them."""
    if tensor.dim() < 3 or not tensor.is_floating_point() or not tensor.numel():
        return None
    # As integers, for -0 is no padding.
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    lengths = []
    for row in tensor:
        used = row.contiguous().flatten(1).view(bits).any(1).nonzero()
        lengths.append(int(used[-1]) + 1 if len(used) else 0)
    return lengths if sum(lengths) < (1 - PADDED) * tensor.shape[0] * tensor.shape[1] else None


def _narrowed(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype == torch.float32:
        for dtype in NARROW:
            narrow = tensor.to(dtype)
            if torch.equal(narrow.float(), tensor):
                return narrow
    return tensor


def _publish(path: Path, write: Any, rank: int = 0) -> None:
    """Writes a file beside its place, by a name that no process of another rank has, and renames it on the disk."""
    partial = path.with_name(f".{path.name}.{rank}{PARTIAL}")
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
        raise ConfigurationError(
            f"can't write {path}: {error}. Shards that are complete stay: clear that away and start again"
        ) from None
