"""Writing embeddings of prompts to the disk, by one or several processes, from where an earlier attempt stopped."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.networks import Conditioning
from diffpp_fast.networks.loading import resolve, split_hub_id
from diffpp_fast.training.config import TextEncoderSection
from diffpp_fast.training.prompts.embeddings import (
    EXTRA,
    NULL,
    EmbeddingRows,
    RowEnds,
    ends_of,
    identity,
    read_manifest,
    remove_partial_files,
    shard_name,
    stored_bytes,
    write_manifest,
    write_rows,
)
from diffpp_fast.training.prompts.encoder import BATCH, concatenate
from diffpp_fast.training.prompts.source import PromptSource

#: Bytes that a shard is meant to have, and the most rows in it. An interrupted process loses one shard.
SHARD_BYTES, SHARD_ROWS = 256 * 2**20, 1 << 14
#: Files in an encoder's or a tokenizer's folder on which its embeddings depend.
FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
#: Keys of a text encoder's section that name such folders.
FOLDERS = ("path", "tokenizer")

#: Runs calls and returns what they return.
RunAll = Callable[[Sequence[Callable[[], Conditioning]]], list[Conditioning]]


def one_by_one(calls: Sequence[Callable[[], Conditioning]]) -> list[Conditioning]:
    """Return what calls return."""
    return [call() for call in calls]


#: Size, time of the last change in ns and SHA-256 of files, by path.
Seen = dict[str, tuple[int, int, str]]


class EmbeddingWriter:
    """One process's part of writing an embedding cache.

    Shards are split among processes by their number, so that these need nothing of each other but the folder.

    Args:
        folder: a new one, or one in which embeddings of the same prompts by the same encoder have been begun.
        facts: from `embedding_facts`.
        prompts: all of them.
        encode: B prompts -> their conditioning.
        null: the conditioning that guidance leads away from, of one prompt.
        batch: prompts that are encoded together. The last bits of an embedding depend on its neighbours. None: as the
            folder was begun; a new one as a run that encodes its prompts itself does it, as long as it keeps them.
        rank, size: of this process, and how many there are.
        check: read all rows of the shards that are there, and write those anew that are damaged.
        run_all: calls the encoder for all batches of a shard: one by one, or `networks.streaming.in_step`.

    Raises ConfigurationError for a folder with other embeddings, and where the disk is too small.
    """

    def __init__(
        self,
        folder: Path,
        facts: dict[str, Any],
        prompts: PromptSource,
        encode: Callable[[Sequence[str]], Conditioning],
        null: Conditioning,
        *,
        batch: int | None = None,
        rank: int = 0,
        size: int = 1,
        check: bool = False,
        run_all: RunAll = one_by_one,
    ) -> None:
        self.run_all = run_all
        self.folder = folder
        self.prompts = prompts
        self.encode = encode
        self.null = null
        self.rank = rank
        self.check = check
        in_memory, self._prompt_bytes = stored_bytes(encode(prompts[[0]]))
        manifest = read_manifest(folder)
        begun = manifest is not None
        self.batch = batch or (manifest or {}).get("batch", BATCH)
        batch = self.batch
        if manifest is None:
            rows = max(1, min(SHARD_BYTES // in_memory, SHARD_ROWS))
            # Whole batches, so that prompts have the neighbours that they have in a run.
            rows -= rows % batch if rows > batch else 0
            manifest = {**facts, "rows": rows, "shards": -(-len(prompts) // rows), "batch": batch}
        else:
            refuse_other_cache(folder, manifest, facts)
            manifest = manifest | {"seen": facts["seen"]}
        self.manifest = manifest
        self.identity = identity(manifest)
        self.shards = range(rank, manifest["shards"], size)
        if not begun:
            self._refuse_foreign_files()
        there = [number for number in self.shards if self._path(number).is_file()]
        ends = ends_of(manifest, prompts, there)
        #: What is wrong with files that are there, by the shard's number.
        self.damaged = {
            number: said for number, end in zip(there, ends, strict=True) if (said := self._fault_of(number, end))
        }
        self.missing = sorted({*self.shards} - {*there} | self.damaged.keys())

    def write(self, extra: Sequence[str] = ()) -> Iterator[int]:
        """Writes what is missing; yields how many prompts each new shard holds.

        Args:
            extra: prompts besides those of the source. The first process writes what is not a shard.
        """
        if self.missing:
            self._refuse_small_disk()
        remove_partial_files(self.folder, self.rank)
        if self.rank == 0:
            # Other processes know all that stands in it: it is the same facts and the same sizes.
            write_manifest(self.folder, self.manifest)
            write_rows(self.folder / NULL, self.null, self.identity)
            if extra:
                write_rows(self.folder / EXTRA, self._encode(extra), self.identity)
        for number in self.missing:
            prompts = self.prompts[self._rows(number)]
            write_rows(self._path(number), self._encode(prompts), self.identity, self.rank)
            yield len(prompts)

    def left(self) -> int:
        """Return how many shards are not there, of all processes."""
        return sum(not self._path(number).is_file() for number in range(self.manifest["shards"]))

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        batches = [prompts[start : start + self.batch] for start in range(0, len(prompts), self.batch)]
        parts = self.run_all([partial(self._encode_batch, batch) for batch in batches])
        return Conditioning(tuple(prompts), concatenate([part.tensors for part in parts]))

    def _encode_batch(self, prompts: Sequence[str]) -> Conditioning:
        return self.encode(prompts).to("cpu")

    def _rows(self, number: int) -> range:
        rows = self.manifest["rows"]
        return range(number * rows, min((number + 1) * rows, len(self.prompts)))

    def _path(self, number: int) -> Path:
        return self.folder / shard_name(number, self.manifest["shards"])

    def _fault_of(self, number: int, ends: RowEnds) -> str | None:
        """Return what keeps a shard's file from being one of this cache; None: nothing."""
        try:
            with EmbeddingRows(self._path(number)) as rows:
                if rows.identity != self.identity:
                    return f"{rows.path} belongs to other embeddings"
                rows.refuse_other_rows(rows.keys(), ends)
                if self.check:
                    rows.check()
        except ConfigurationError as error:
            return str(error)
        return None

    def _refuse_foreign_files(self) -> None:
        """Raises ConfigurationError where there is no manifest, but a file that this cache would replace."""
        for path in (self.folder / NULL, self.folder / EXTRA, *map(self._path, self.shards)):
            if path.exists() and self._identity_of(path) != self.identity:
                raise ConfigurationError(
                    f"{self.folder} holds {path.name}, which belongs to no embeddings of these prompts: choose another "
                    "folder with --out"
                )

    def _identity_of(self, path: Path) -> str | None:
        try:
            with EmbeddingRows(path) as rows:
                return rows.identity
        except ConfigurationError:
            return None

    def _refuse_small_disk(self) -> None:
        existing = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free
        needed = sum(len(self._rows(number)) for number in self.missing) * self._prompt_bytes
        if needed > free:
            raise ConfigurationError(
                f"the embeddings that are missing in {self.folder} take {needed / 2**30:.1f} GiB, "
                f"{free / 2**30:.1f} GiB are free: choose another folder with --out"
            )


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
