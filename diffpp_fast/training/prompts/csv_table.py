"""Tables of comma- or tab-separated values with a header, the prompt in one of the columns."""

from __future__ import annotations

import csv
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.training.prompts.indexed import RecordFile, line_blocks, refuse_encoding
from diffpp_fast.training.prompts.json_lines import known_columns
from diffpp_fast.training.prompts.source import BLOCK, Digest, one_line


class CsvFile(RecordFile):
    """UTF-8 with a header; fields may be quoted, and quoted ones may hold line breaks. `.tsv` files have tabs."""

    def __init__(self, path: Path, column: str, digest: Digest) -> None:
        self.column = column
        self._delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        super().__init__(path, digest)

    def _index(self, file: BinaryIO, digest: Digest) -> np.ndarray:
        lines = _Lines(self.path, file)
        rows = self._reader(lines)
        starts, prompts = array("q"), []
        line = 1  # the first of the row that is read
        try:
            header = next(rows, [])
            self._place = self._find_column(header)
            start, line = lines.offset, lines.number + 1
            for row in rows:
                if row == header:
                    raise ConfigurationError(
                        f"prompts: {self.path}, line {line}: the header stands here again: it is no prompt, remove it"
                    )
                if row:
                    starts.append(start)
                    prompts.append(self._check(row, len(header), line))
                    if len(prompts) == BLOCK:
                        digest.add(prompts)
                        prompts.clear()
                start, line = lines.offset, lines.number + 1
        except csv.Error as error:
            raise ConfigurationError(
                f"prompts: {self.path}, line {line}: {error}; look at the quotes of the row that begins there"
            ) from None
        digest.add(prompts)
        starts.append(lines.offset)
        return np.frombuffer(starts, dtype=np.int64)

    def _find_column(self, header: list[str]) -> int:
        if self.column not in header:
            raise ConfigurationError(
                f"prompts: {self.path}, line 1: no column {self.column!r}: {known_columns(header)}"
            )
        return header.index(self.column)

    def _check(self, row: list[str], fields: int, line: int) -> str:
        if len(row) != fields:
            raise ConfigurationError(
                f"prompts: {self.path}, line {line}: {len(row)} fields, the header has {fields}: quote those that hold "
                "the delimiter"
            )
        place = f"prompts: {self.path}, line {line}, column {self.column!r}"
        try:
            prompt = one_line(row[self._place])
        except ValueError as error:
            raise ConfigurationError(f"{place}{error}") from None
        if not prompt:
            raise ConfigurationError(f"{place}: empty: remove the row or give it a prompt")
        return prompt

    def _parse(self, record: bytes) -> str:
        lines = map(_text, record.splitlines(keepends=True))
        return one_line(next(self._reader(lines))[self._place])

    def _reader(self, lines: Iterable[str]) -> Iterator[list[str]]:
        return csv.reader(lines, delimiter=self._delimiter, strict=True)


class _Lines:
    """The lines of a file, decoded; `number` of them have been read, up to the byte `offset`."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.file = file
        self.offset = 0
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        for block in line_blocks(self.path, self.file):
            for line in block:
                self.offset += len(line)
                self.number += 1
                try:
                    text = _text(line)
                except UnicodeDecodeError as error:
                    raise refuse_encoding(self.path, self.number, line, error) from None
                yield text


def _text(line: bytes) -> str:
    """A line without the byte order mark that it may begin with, in front of a quotation mark, say."""
    return line.decode().removeprefix("\ufeff")
