"""From a path and a format to a source of prompts."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.training.config import Prompts
from diffpp_fast.training.prompts.csv_table import CsvFile
from diffpp_fast.training.prompts.dataset import DATASET, SPLITS, DiskDataset
from diffpp_fast.training.prompts.json_lines import JsonLinesFile
from diffpp_fast.training.prompts.parquet import DecodedGroups, ParquetFile
from diffpp_fast.training.prompts.source import Digest, PromptFile, PromptSource
from diffpp_fast.training.prompts.text import TextFile
from diffpp_fast.training.prompts.webdataset import TarFile

SUFFIXES = {
    "text": (".txt",),
    "jsonl": (".jsonl", ".ndjson"),
    "csv": (".csv", ".tsv"),
    "parquet": (".parquet",),
    "dataset": (".arrow",),
    "webdataset": (".tar",),
}
#: What braces may stand for; more is a slip of the finger.
MOST_FILES = 100_000


def open_prompts(prompts: Prompts) -> PromptSource:
    """Opens the prompts of a configuration. All of them are checked before this returns.

    Raises ConfigurationError for what can't be read or is malformed; the message names file, line and column.
    """
    files = find_files(prompts.path)
    format = prompts.format if prompts.format != "auto" else _format_of(prompts.path, files)
    if len(files) == 1 and files[0].is_dir() and not (format == "dataset" and _is_dataset(files[0])):
        files = _files_in(files[0], format)
    column = prompts.column or "prompt"
    digest, decoded = Digest(), DecodedGroups()
    openers: dict[str, Callable[[Path], PromptFile]] = {
        "text": lambda path: TextFile(path, digest),
        "jsonl": lambda path: JsonLinesFile(path, column, digest),
        "csv": lambda path: CsvFile(path, column, digest),
        "parquet": lambda path: ParquetFile(path, column, digest, decoded),
        "dataset": lambda path: DiskDataset(path, column, digest),
        "webdataset": lambda path: TarFile(path, prompts.column, digest),
    }
    return PromptSource(prompts.path, [openers[format](path) for path in files], digest)


def find_files(path: str) -> list[Path]:
    """What a path names, in order: itself, or all that its braces and wildcards stand for.

    `{a,b}` stands for each of its words and `{00..12}` for each number, as wide as the first one; `*`, `?` and `[...]`
    for all that is there, sorted by name. Raises ConfigurationError where there is nothing.
    """
    if os.path.exists(path):  # unlike Path's, it takes a name that is too long
        return [Path(path)]
    found: list[Path] = []
    for each in islice(_expand_braces(path), MOST_FILES + 1):
        if len(found) == MOST_FILES:
            raise ConfigurationError(f"prompts: {path} stands for more than {MOST_FILES} files")
        matches = sorted(map(Path, glob.glob(each))) if glob.has_magic(each) else [Path(each)]
        missing = [match for match in matches if not os.path.exists(match)] if matches else [each]
        if missing:
            raise ConfigurationError(f"prompts: can't read {str(missing[0])[:4096]}: No such file or directory")
        found += matches
    return found


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
    """The one format that the names of all files speak of; folders speak by what is in them."""
    inside = [file for each in files for file in (_visible(each) if each.is_dir() else [each])]
    formats = {
        format: file for file in inside for format, suffixes in SUFFIXES.items() if file.suffix.lower() in suffixes
    }
    if any(_is_dataset(each) for each in files):
        return "dataset"
    if len(formats) > 1:
        raise ConfigurationError(f"prompts: {path} holds files of the formats {', '.join(formats)}: set prompts.format")
    if not formats:
        known = ", ".join(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
        raise ConfigurationError(f"prompts: can't tell the format of {path} (known: {known}): set prompts.format")
    return next(iter(formats))


def _files_in(folder: Path, format: str) -> list[Path]:
    files = [file for file in _visible(folder) if file.suffix.lower() in SUFFIXES[format]]
    if not files:
        raise ConfigurationError(f"prompts: {folder} holds no {' or '.join(SUFFIXES[format])} file")
    return files


def _visible(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if not file.name.startswith("."))


def _is_dataset(path: Path) -> bool:
    return (path / DATASET).is_file() or (path / SPLITS).is_file()
