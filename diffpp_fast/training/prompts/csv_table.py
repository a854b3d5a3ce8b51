"""Tables of comma- or tab-separated values with a header, the prompt in one of the columns."""

from __future__ import annotations

import csv
import io
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.training.prompts.indexed import RecordFile, refuse_encoding, skip_byte_order_mark
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
        prompt = one_line(row[self._place])
        if not prompt:
            raise ConfigurationError(
                f"prompts: {self.path}, line {line}, column {self.column!r}: empty: remove the row or give it a prompt"
            )
        return prompt

    def _parse(self, record: bytes) -> str:
        return one_line(next(self._reader(io.StringIO(record.decode())))[self._place])

    def _reader(self, lines: Iterable[str]) -> Iterator[list[str]]:
        return csv.reader(lines, delimiter=self._delimiter, strict=True)


class _Lines:
    """The lines of a file, decoded; `number` of them have been read, up to the byte `offset`."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.file = file
        self.offset = skip_byte_order_mark(file)
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        for line in self.file:
            self.offset += len(line)
            self.number += 1
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise refuse_encoding(self.path, self.number, line, error) from None
            yield text
