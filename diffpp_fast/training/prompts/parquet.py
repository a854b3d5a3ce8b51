"""Parquet files: the prompt in one of the columns."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.training.prompts.arrow import ROWS, as_text, check_column, check_rows, need, prompts_of
from diffpp_fast.training.prompts.indexed import StableFile
from diffpp_fast.training.prompts.source import Digest, PromptFile

logger = logging.getLogger(__name__)

#: Rows of a group beyond which picking single ones is slow, unless what was decoded stays.
MANY_ROWS = 20_000


class DecodedGroups:
    """The last row groups that were decoded, of all files of a run, up to `capacity` bytes."""

    def __init__(self, capacity: int = 256 * 2**20) -> None:
        self.capacity = capacity
        self._kept: OrderedDict[tuple[Path, int], Any] = OrderedDict()
        self._bytes = 0

    def get(self, key: tuple[Path, int]) -> Any | None:
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def keep(self, key: tuple[Path, int], values: Any) -> None:
        self._kept[key] = values
        self._bytes += values.nbytes
        while self._bytes > self.capacity and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes


class ParquetFile(PromptFile):
    """One file. A row group is the least that can be read of it; what was decoded last stays in `decoded`."""

    def __init__(self, path: Path, column: str, digest: Digest, decoded: DecodedGroups) -> None:
        need("pyarrow.parquet", str(path))
        self.path = path
        self.column = column
        self._decoded = decoded
        self._metadata: Any = None  # read once
        self._file = StableFile(path, self._index, digest)
        #: How many prompts there are up to the end of each row group.
        self._ends = self._file.places
        self._advise(range(len(self._ends)))

    def _index(self, opened: BinaryIO, digest: Digest) -> np.ndarray:
        with self._read(opened) as file:
            self._metadata = file.metadata
            check_column(file.schema_arrow, self.column, str(self.path))
            first = 1
            for batch in file.iter_batches(ROWS, columns=[self.column]):
                digest.add(check_rows(batch.column(0), str(self.path), self.column, first))
                first += batch.num_rows
            if first == 1:
                raise ConfigurationError(f"prompts: {self.path} holds no prompt")
            groups = range(self._metadata.num_row_groups)
            return np.cumsum([self._metadata.row_group(number).num_rows for number in groups])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, indices: Sequence[int]) -> list[str]:
        wanted = np.asarray(indices, dtype=np.int64)
        numbers = np.searchsorted(self._ends, wanted, side="right")
        prompts = [""] * len(wanted)
        for number in np.unique(numbers).tolist():
            group = self._group(number)
            places = np.flatnonzero(numbers == number)
            inside = wanted[places] - (self._ends[number] - len(group))
            for place, prompt in zip(places.tolist(), prompts_of(group.take(inside)), strict=True):
                prompts[place] = prompt
        return prompts

    def _group(self, number: int) -> Any:
        key = self.path, number
        values = self._decoded.get(key)
        if values is None:
            with self._file.open() as opened, self._read(opened, self._metadata) as file:
                values = as_text(file.read_row_group(number, columns=[self.column]).column(0))
            self._decoded.keep(key, values)
        return values

    def _advise(self, numbers: range) -> None:
        groups = [self._metadata.row_group(number) for number in numbers]
        rows = max(group.num_rows for group in groups)
        columns = (group.column(place) for group in groups for place in range(group.num_columns))
        size = sum(column.total_uncompressed_size for column in columns if column.path_in_schema == self.column)
        if rows > MANY_ROWS and size > self._decoded.capacity:
            logger.warning(
                "prompts: %s has row groups of up to %d rows, and every prompt costs the reading of one: write it with "
                "row_group_size=4096",
                self.path,
                rows,
            )

    @contextmanager
    def _read(self, opened: BinaryIO, metadata: Any = None) -> Iterator[Any]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            yield pq.ParquetFile(opened, metadata=metadata)
        except (pa.ArrowException, OSError) as error:
            raise ConfigurationError(f"prompts: can't read {self.path}: {error}") from None
