"""Checked prompts in the cache of `datasets`: written when their files are first read, mapped into memory, by index."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.training.durable import write_whole
from diffpp_fast.training.prompts.readers import ROWS, read

#: Counts up when readers make other prompts of the same files.
VERSION = 1
#: Inside the folder that `HF_DATASETS_CACHE` names.
FOLDER = "diffpp_fast"
SCHEMA = pa.schema({"prompt": pa.large_string()})

logger = logging.getLogger(__name__)


class Rows:
    """The prompts of files, in turn. The files are read where the cache does not hold them as they are now.

    Processes that start together wait for the one that reads. Where the cache can't be written, what was read lies in a
    temporary folder that goes with the process.

    Args:
        files: in order.
        format, column: as `read` takes them.

    Attributes:
        counts: of prompts in each file.
        digest: SHA-256 of all prompts, one per line.

    Raises ConfigurationError for files that can't be read, and for the first prompt that is malformed.
    """

    def __init__(self, files: Sequence[Path], format: str, column: str | None) -> None:
        self._files = files
        self._format, self._column = format, column
        self._states = [_state_of(file) for file in files]
        facts = [VERSION, format, column, [os.path.abspath(file) for file in files], self._states]
        name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32] + ".arrow"
        folder = Path(datasets.config.HF_DATASETS_CACHE) / FOLDER
        try:
            if not self._load(folder / name):
                folder.mkdir(parents=True, exist_ok=True)
                with FileLock(folder / f"{name}.lock"):
                    if not self._load(folder / name):
                        self._store(folder / name)
        except (OSError, NotImplementedError) as error:
            logger.warning(
                "prompts: the cache %s can't be written (%s): the prompts are read at every start. The environment "
                "variable HF_DATASETS_CACHE names another",
                folder,
                getattr(error, "strerror", None) or error,
            )
            try:
                self._temporary = TemporaryDirectory(prefix="diffpp_fast-prompts-")
                self._store(Path(self._temporary.name) / name)
            except OSError as again:
                raise ConfigurationError(
                    f"prompts: there is no place for what was read, neither in {folder} nor in a temporary folder "
                    f"({getattr(again, 'strerror', None) or again}): name one with HF_DATASETS_CACHE"
                ) from None

    def __getitem__(self, indices: Sequence[int]) -> list[str]:
        """Return the prompts of B indices, B > 0. Consecutive ones are given as a range."""
        prompts: list[str] = self._rows[indices].column(0).to_pylist()
        return prompts

    def refuse_change(self, number: int) -> None:
        """Raise ConfigurationError where a file, by its number, holds other prompts than it did. It may be touched."""
        file = self._files[number]
        state = _state_of(file)
        if state == self._states[number]:
            return
        first = sum(self.counts[:number])
        before = self._rows.select(range(first, first + self.counts[number])).iter(ROWS)
        try:
            same = _digest_of(_blocks(self._read(file))) == _digest_of(
                rows.column(0).combine_chunks() for rows in before
            )
        except ConfigurationError:
            same = False
        if not same:
            raise ConfigurationError(f"prompts: {file} has changed since it was opened: start the run again")
        self._states[number] = state

    def _read(self, file: Path) -> Iterator[str]:
        return read(file, self._format, self._column)

    def _load(self, path: Path) -> bool:
        """Use what the cache holds, where that is what was written."""
        try:
            facts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            # Read, not mapped: what is mapped and looked at once would count as the process's memory.
            with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as batches:
                same = _digest_of(_validated(batch.column(0)) for batch in batches) == facts["digest"]
            if same:
                self._use(path, facts["counts"], facts["digest"])
                return True
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
            pass
        logger.warning("prompts: %s is damaged: the prompts are read anew", path)
        return False

    def _store(self, path: Path) -> None:
        """Read the files, write their prompts into the cache and use them."""
        partial, counts = path.with_suffix(".partial"), []
        try:
            with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as stream:

                def written() -> Iterator[pa.LargeStringArray]:
                    for each in self._files:
                        counts.append(0)
                        for block in _blocks(self._read(each)):
                            stream.write_batch(pa.record_batch([block], schema=SCHEMA))
                            counts[-1] += len(block)
                            yield block

                digest = _digest_of(written())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        write_whole(path.with_suffix(".json"), json.dumps({"digest": digest, "counts": counts}))
        self._use(path, counts, digest)

    def _use(self, path: Path, counts: list[int], digest: str) -> None:
        self._rows = datasets.Dataset.from_file(str(path)).with_format("arrow")
        if len(self._rows) != sum(counts):
            raise ValueError(f"{path} has {len(self._rows)} rows, not {sum(counts)}")
        self.counts, self.digest = counts, digest


def _state_of(path: Path) -> list[int]:
    """Return sizes and times of a file, or of those in a dataset's folder: writing to one changes them."""
    try:
        facts = [file.stat() for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    except OSError as error:
        raise ConfigurationError(f"prompts: can't read {path}: {error.strerror}") from None
    # The last, unlike the others, can't be set by a program that copies files.
    return [number for each in facts for number in (each.st_size, each.st_mtime_ns, each.st_ctime_ns)]


def _blocks(prompts: Iterator[str]) -> Iterator[pa.LargeStringArray]:
    while block := list(islice(prompts, ROWS)):
        yield pa.array(block, pa.large_string())


def _validated(block: pa.LargeStringArray) -> pa.LargeStringArray:
    block.validate(full=True)
    return block


def _digest_of(blocks: Iterable[pa.LargeStringArray]) -> str:
    """Return SHA-256 of prompts, one per line. No block is empty."""
    digest, between = hashlib.sha256(), b""
    newline = pa.scalar("\n", pa.large_string())
    for block in blocks:
        lines = pc.binary_join(pa.LargeListArray.from_arrays(pa.array([0, len(block)]), block), newline)
        digest.update(between)
        digest.update(lines[0].as_buffer())
        between = b"\n"
    return digest.hexdigest()
