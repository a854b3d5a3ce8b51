"""Files of records: an index of byte offsets, eight bytes a record, and the records read by it."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.training.prompts.source import Digest, PromptFile

#: UTF-16's and UTF-32's begin so, too.
BYTE_ORDER_MARKS_16 = (b"\xff\xfe", b"\xfe\xff")
#: Bytes that are read at a time, to be indexed.
CHUNK = 1 << 22
#: Bytes of one prompt, and of the line or member that holds it; more is not text that somebody wrote.
LONGEST = 1 << 20


class StableFile:
    """A file that is opened for every reading, and whose prompts have to stay as they were at first.

    Args:
        path: of the file.
        index: reads the file, adds its prompts to a digest and returns where they lie.
        digest: of all prompts before this file's; has them, too, afterwards.
    """

    def __init__(self, path: Path, index: Callable[[BinaryIO, Digest], np.ndarray], digest: Digest) -> None:
        self.path = path
        self._index = index
        self._state: tuple[int, int] | None = None
        self._before = digest.copy()
        with self.open() as file:
            self._state = _state(file)
            #: Where the prompts lie.
            self.places = index(file, digest)
        self._digest = digest.hexdigest()

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Raises ConfigurationError where the file can't be read or its prompts have changed."""
        try:
            with open(self.path, "rb") as file:
                if self._state not in (None, _state(file)):
                    self._refuse_change(file)
                    self._state = _state(file)
                    file.seek(0)
                yield file
        except OSError as error:
            raise ConfigurationError(f"prompts: can't read {self.path}: {error.strerror}") from None

    def _refuse_change(self, file: BinaryIO) -> None:
        """Reads a file again that has been written to, or only touched."""
        digest = self._before.copy()
        try:
            same = np.array_equal(self._index(file, digest), self.places) and digest.hexdigest() == self._digest
        except ConfigurationError:
            same = False
        if not same:
            raise ConfigurationError(f"prompts: {self.path} has changed since it was opened: start the run again")


class RecordFile(PromptFile):
    """A file in which every prompt is a record of its own.

    A subclass says where the records begin and what the prompt in a record is.
    """

    def __init__(self, path: Path, digest: Digest) -> None:
        self.path = path
        self._file = StableFile(path, self._index, digest)
        #: int64 [N + 1]: where the N records begin, and where the last one ends.
        self._starts = self._file.places
        if len(self) == 0:
            raise ConfigurationError(f"prompts: {path} holds no prompt")

    @abstractmethod
    def _index(self, file: BinaryIO, digest: Digest) -> np.ndarray:
        """Reads and checks the whole file, adds its prompts to the digest and returns `_starts`.

        Raises ConfigurationError that names the line of what is malformed.
        """

    @abstractmethod
    def _parse(self, record: bytes) -> str:
        """The prompt of a record. Blank lines at its end don't count."""

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, indices: Sequence[int]) -> list[str]:
        with self._file.open() as file:
            if isinstance(indices, range):
                return [self._parse(record) for record in self._consecutive(file, indices)]
            descriptor = file.fileno()
            bounds = [(int(self._starts[index]), int(self._starts[index + 1])) for index in indices]
            return [self._parse(os.pread(descriptor, end - start, start)) for start, end in bounds]

    def _consecutive(self, file: BinaryIO, indices: range) -> Iterator[bytes]:
        bounds = self._starts[indices.start : indices.stop + 1]
        file.seek(int(bounds[0]))
        data = file.read(int(bounds[-1] - bounds[0]))
        for start, end in pairwise((bounds - bounds[0]).tolist()):
            yield data[start:end]


def line_blocks(path: Path, file: BinaryIO) -> Iterator[list[bytes]]:
    """Yield the lines of a file with their ends, many at a time: line feeds, carriage returns or the two together.

    Raises ConfigurationError for a line longer than any prompt.
    """
    rest, number = b"", 0
    while data := file.read(CHUNK):
        # The last one may go on in the next chunk, if only by a line feed.
        *lines, rest = (rest + data).splitlines(keepends=True)
        number += len(lines)
        if len(rest) > LONGEST or (lines and max(map(len, lines)) > LONGEST):
            place = next((place for place, line in enumerate(lines) if len(line) > LONGEST), len(lines))
            raise ConfigurationError(
                f"prompts: {path}, line {number - len(lines) + place + 1}: longer than {LONGEST >> 20} MiB: is it text?"
            )
        yield lines
    if rest:
        yield [rest]


def refuse_encoding(path: Path, line: int, text: bytes, error: UnicodeDecodeError) -> ConfigurationError:
    """The error for a line, given as bytes, that is not UTF-8."""
    if line == 1 and text.startswith(BYTE_ORDER_MARKS_16):
        return ConfigurationError(f"prompts: {path} is UTF-16 or UTF-32: save it as UTF-8")
    column = len(text[: error.start].decode()) + 1
    return ConfigurationError(
        f"prompts: {path}, line {line}, column {column}: not UTF-8 ({error.reason}, byte 0x{text[error.start]:02x})"
    )


def _state(file: BinaryIO) -> tuple[int, int]:
    """Size and time of the last change."""
    facts = os.fstat(file.fileno())
    return facts.st_size, facts.st_mtime_ns
