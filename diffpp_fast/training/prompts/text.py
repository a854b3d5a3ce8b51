"""Text files: one prompt per line."""

from __future__ import annotations

from typing import BinaryIO

import numpy as np

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.training.prompts.indexed import RecordFile, line_blocks, refuse_encoding
from diffpp_fast.training.prompts.source import Digest, one_line


class TextFile(RecordFile):
    """UTF-8, one prompt per line. Blank lines are skipped, and so is white space around a prompt."""

    def _index(self, file: BinaryIO, digest: Digest) -> np.ndarray:
        offset, number, parts = 0, 0, []
        for lines in line_blocks(self.path, file):
            prompts = [self._check(line, number + place) for place, line in enumerate(lines, 1)]
            ends = offset + np.cumsum(np.fromiter(map(len, lines), dtype=np.int64, count=len(lines)))
            starts = np.concatenate([[offset], ends[:-1]])
            parts.append(starts[np.fromiter(map(bool, prompts), dtype=bool, count=len(lines))])
            digest.add(filter(None, prompts))
            offset, number = int(ends[-1]) if lines else offset, number + len(lines)
        return np.concatenate([*parts, [offset]]).astype(np.int64, copy=False)

    def _check(self, line: bytes, number: int) -> str:
        try:
            return self._parse(line)
        except UnicodeDecodeError as error:
            raise refuse_encoding(self.path, number, line, error) from None
        except ValueError as error:
            raise ConfigurationError(f"prompts: {self.path}, line {number}{error}") from None

    def _parse(self, record: bytes) -> str:
        return one_line(record.decode())
