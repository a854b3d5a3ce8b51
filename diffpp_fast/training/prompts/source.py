"""The prompts of a run: which files they are in, access by index, a length and a digest."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffpp_fast import install
from diffpp_fast.errors import ConfigurationError
from diffpp_fast.training.config import Prompts

if TYPE_CHECKING:
    from diffpp_fast.training.prompts.cache import Rows

#: Prompts that are read together where all of them are read in turn.
BLOCK = 1 << 16
#: Characters that go from both ends of a prompt: white space, and the byte order marks that files put together have.
AROUND = "".join(chr(code) for code in range(0x3001) if chr(code).isspace()) + "\ufeff"
#: Files in a folder that `save_to_disk` has written: of one split, and of several.
DATASET, SPLITS = "state.json", "dataset_dict.json"
SUFFIXES = {
    "text": (".txt",),
    "jsonl": (".jsonl", ".ndjson"),
    "csv": (".csv", ".tsv"),
    "parquet": (".parquet",),
    "dataset": (".arrow",),
    "webdataset": (".tar",),
}
#: Files that braces may stand for; more is a slip of the finger.
MOST_FILES = 100_000


class PromptSource:
    """The prompts of a run, in an order that does not change. They are read when they are asked for.

    A prompt is what a line of a text file can hold: one line, without white space around it, never empty. So the same
    prompts are the same source, whatever the format and however they are spread over files.

    Args:
        name: where they come from, for messages.
        rows: the prompts of its files, read and checked.
    """

    def __init__(self, name: str, rows: Rows) -> None:
        self.name = name
        self._rows = rows
        self._ends = np.cumsum(rows.counts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, indices: Sequence[int]) -> list[str]:
        """Return the prompts of B indices, each in [0, len(self)).

        Raises ConfigurationError where a file that held them holds other prompts now.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        if len(wanted) == 0:
            return []
        if not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"{self.name} has {len(self)} prompts, asked for {wanted.min()} to {wanted.max()}")
        for number in np.unique(np.searchsorted(self._ends, wanted, side="right")).tolist():
            self._rows.refuse_change(number)
        return self._rows[indices if isinstance(indices, range) else wanted.tolist()]

    def __iter__(self) -> Iterator[str]:
        """Yield all prompts in turn."""
        for first in range(0, len(self), BLOCK):
            yield from self[range(first, min(first + BLOCK, len(self)))]

    def digest(self) -> str:
        """Return SHA-256 of the prompts, one per line: files may move, or change their format, without changing it."""
        return self._rows.digest


def open_prompts(prompts: Prompts) -> PromptSource:
    """Open the prompts of a configuration. All of them have been checked when this returns.

    Raises ConfigurationError for what can't be read or is malformed; the message names file, line and column.
    """
    files = find_files(prompts.path)
    format = prompts.format if prompts.format != "auto" else _format_of(prompts.path, files)
    if len(files) == 1 and files[0].is_dir() and not (format == "dataset" and _is_dataset(files[0])):
        files = _files_in(files[0], format)
    try:
        # Both take a moment to be imported, and only a run needs them.
        import datasets  # noqa: F401
        import pyarrow  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"prompts: {prompts.path} can't be read without {error.name}: {install.extra('train')}"
        ) from None
    from diffpp_fast.training.prompts.cache import Rows

    return PromptSource(prompts.path, Rows(files, format, prompts.column))


def find_files(path: str, key: str = "prompts") -> list[Path]:
    """Return what a path names, in order: itself, or all that its braces and wildcards stand for.

    `{a,b}` stands for each of its words and `{00..12}` for each number, as wide as the first one; `*`, `?` and `[...]`
    for all that is there, sorted by name. Raises ConfigurationError, naming the configuration's key, where there is
    nothing.
    """
    if os.path.exists(path):  # unlike Path's, it takes a name that is too long
        return [Path(path)]
    found: list[Path] = []
    for each in islice(_expand_braces(path), MOST_FILES + 1):
        if len(found) == MOST_FILES:
            raise ConfigurationError(f"{key}: {path} stands for more than {MOST_FILES} files")
        matches = sorted(map(Path, glob.glob(each))) if glob.has_magic(each) else [Path(each)]
        missing = [match for match in matches if not os.path.exists(match)] if matches else [each]
        if missing:
            raise ConfigurationError(f"{key}: can't read {str(missing[0])[:4096]}: No such file or directory")
        found += matches
    return found


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


def _expand_braces(path: str) -> Iterator[str]:
    braces = re.search(r"\{([^{}]*)\}", path)
    if braces is None:
        yield path
        return
    words: Iterable[str] = braces[1].split(",")
    if numbers := re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", braces[1]):
        first, last = int(numbers[1]), int(numbers[2])
        words = (f"{number:0{len(numbers[1])}}" for number in range(first, last + 1))
    before, after = path[: braces.start()], path[braces.end() :]
    for word in words:
        yield from _expand_braces(f"{before}{word}{after}")


def _format_of(path: str, files: Sequence[Path]) -> str:
    """Return the one format that the names of all files speak of; folders speak by what is in them."""
    inside = [file for each in files for file in (_visible(each) if each.is_dir() else [each])]
    suffixes_there = {file.suffix.lower() for file in inside}
    formats = [format for format, suffixes in SUFFIXES.items() if suffixes_there.intersection(suffixes)]
    if any(_is_dataset(each) for each in files):
        return "dataset"
    if len(formats) > 1:
        raise ConfigurationError(f"prompts: {path} holds files of the formats {', '.join(formats)}: set prompts.format")
    if not formats:
        known = ", ".join(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
        raise ConfigurationError(f"prompts: can't tell the format of {path} (known: {known}): set prompts.format")
    return formats[0]


def _files_in(folder: Path, format: str) -> list[Path]:
    files = [file for file in _visible(folder) if file.suffix.lower() in SUFFIXES[format]]
    if not files:
        raise ConfigurationError(f"prompts: {folder} holds no {' or '.join(SUFFIXES[format])} file")
    return files


def _visible(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if not file.name.startswith("."))


def _is_dataset(path: Path) -> bool:
    return (path / DATASET).is_file() or (path / SPLITS).is_file()
