"""Text files: one prompt per line."""

from __future__ import annotations

from typing import BinaryIO

import numpy as np

from diffpp_fast.training.prompts.indexed import CHUNK, RecordFile, refuse_encoding, skip_byte_order_mark
from diffpp_fast.training.prompts.source import Digest


class TextFile(RecordFile):
    """UTF-8, one prompt per line. Blank lines are skipped, and so is white space around a prompt."""

    def _index(self, file: BinaryIO, digest: Digest) -> np.ndarray:
        offset, number, parts = skip_byte_order_mark(file), 0, []
        while data := file.read(CHUNK):
            data += file.readline()  # so that a chunk ends with a line
            lines = list(map(str.strip, self._decode(data, number).split("\n")))
            ends = np.flatnonzero(np.frombuffer(data, dtype=np.uint8) == ord("\n")) + 1
            starts = np.concatenate([[0], ends])
            parts.append(starts[np.fromiter(map(bool, lines), dtype=bool, count=len(lines))] + offset)
            digest.add(filter(None, lines))
            offset += len(data)
            number += len(ends)
        return np.concatenate([*parts, [offset]]).astype(np.int64, copy=False)

    def _parse(self, record: bytes) -> str:
        return record.decode().strip()

    def _decode(self, data: bytes, number: int) -> str:
        """data: whole lines, the first of which comes after `number` others."""
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            start = data.rfind(b"\n", 0, error.start) + 1
            line = number + data.count(b"\n", 0, error.start) + 1
            error.start -= start
            raise refuse_encoding(self.path, line, data[start:], error) from None
