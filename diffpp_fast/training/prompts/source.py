"""Prompts on disk: random access by index, a length and a digest, over one file or many."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

#: Prompts that are read together where all of them are read in turn.
BLOCK = 1 << 16
#: What goes from both ends of a prompt: white space, and the byte order marks that files put together have in them.
AROUND = "".join(chr(code) for code in range(0x3001) if chr(code).isspace()) + "\ufeff"


class Digest:
    """SHA-256 of prompts, one per line: of their text and order, not of the files that hold them."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._first = True

    def add(self, prompts: Iterable[str]) -> None:
        """The next prompts."""
        text = "\n".join(prompts)
        if text:
            self._hash.update(text.encode() if self._first else f"\n{text}".encode())
            self._first = False

    def copy(self) -> Digest:
        """Return one that goes on from here on its own."""
        other = Digest()
        other._hash, other._first = self._hash.copy(), self._first
        return other

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


class PromptFile(ABC):
    """The prompts of one file, or of one dataset. Its constructor checks all of them and adds them to a `Digest`."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, indices: Sequence[int]) -> list[str]:
        """The prompts of B indices, each in [0, len(self)). Consecutive ones come as a range, to be read at once."""


class PromptSource:
    """The prompts of a run, in an order that does not change. They are read when they are asked for.

    A prompt is what a line of a text file can hold: one line, without white space around it, never empty. So the same
    prompts are the same source, whatever the format and however they are spread over files.

    Args:
        name: where they come from, for messages.
        files: none of them empty.
        digest: of all their prompts.
    """

    def __init__(self, name: str, files: Sequence[PromptFile], digest: Digest) -> None:
        self.name = name
        self._files = files
        self._digest = digest.hexdigest()
        self._ends = np.cumsum([len(file) for file in files])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, indices: Sequence[int]) -> list[str]:
        """The prompts of B indices, each in [0, len(self)).

        Raises ConfigurationError where a file is no longer as it was.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"{self.name} has {len(self)} prompts, asked for {wanted.min()} to {wanted.max()}")
        numbers = np.searchsorted(self._ends, wanted, side="right")
        prompts = [""] * len(wanted)
        for number in np.unique(numbers).tolist():
            file = self._files[number]
            places = np.flatnonzero(numbers == number)
            inside = wanted[places] - (self._ends[number] - len(file))
            for place, prompt in zip(places.tolist(), file[_as_range(inside)], strict=True):
                prompts[place] = prompt
        return prompts

    def __iter__(self) -> Iterator[str]:
        """All prompts in turn."""
        for first in range(0, len(self), BLOCK):
            yield from self[range(first, min(first + BLOCK, len(self)))]

    def digest(self) -> str:
        """SHA-256 of the prompts' text and order: files may move, or change their format, without changing it."""
        return self._digest


def one_line(text: str) -> str:
    """Return a prompt out of what a file holds: white space and byte order marks around it go, line breaks in it become
    spaces.

    Line breaks are line feeds, carriage returns and the two together; Unicode's other separators are part of a prompt.
    Raises ValueError, whose message goes on where the place was named, for a NUL character.
    """
    text = text.strip(AROUND)
    if "\0" in text:
        raise ValueError(": it holds a NUL character: the file is UTF-16, or no text")
    if "\n" in text or "\r" in text:
        text = text.replace("\r\n", " ").replace("\n", " ").replace("\r", " ")
    return text


def _as_range(indices: np.ndarray) -> Sequence[int]:
    first, count = int(indices[0]), len(indices)
    if int(indices[-1]) == first + count - 1 and (np.diff(indices) == 1).all():
        return range(first, first + count)
    return indices.tolist()
