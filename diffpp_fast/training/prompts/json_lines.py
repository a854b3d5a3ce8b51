"""JSON lines: one object per line, the prompt in one of its keys."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import BinaryIO

import numpy as np

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.training.prompts.indexed import RecordFile, line_blocks, refuse_encoding
from diffpp_fast.training.prompts.source import AROUND, Digest, one_line

#: Bytes of a line that holds nothing: ASCII's white space, and those of a byte order mark.
BLANK = b" \t\n\r\x0b\x0c\xef\xbb\xbf"

# `json.loads` spends half its time on the white space around a value.
_parse_json = json.JSONDecoder().raw_decode


class JsonLinesFile(RecordFile):
    """UTF-8, one JSON object per line; blank lines are skipped."""

    def __init__(self, path: Path, column: str, digest: Digest) -> None:
        self.column = column
        super().__init__(path, digest)

    def _index(self, file: BinaryIO, digest: Digest) -> np.ndarray:
        offset, number, starts = 0, 0, array("q")
        for lines in line_blocks(self.path, file):
            prompts = []
            for line in lines:
                number += 1
                if line.strip(BLANK):
                    starts.append(offset)
                    prompts.append(self._check(line, number))
                offset += len(line)
            digest.add(prompts)
        starts.append(offset)
        return np.frombuffer(starts, dtype=np.int64)

    def _check(self, line: bytes, number: int) -> str:
        try:
            return prompt_in_json(line, self.column)
        except UnicodeDecodeError as error:
            raise refuse_encoding(self.path, number, line, error) from None
        except ValueError as error:
            raise ConfigurationError(f"prompts: {self.path}, line {number}{error}") from None

    def _parse(self, record: bytes) -> str:
        return prompt_in_json(record, self.column)


def prompt_in_json(data: bytes, column: str) -> str:
    """The prompt that a JSON object in UTF-8 has under the key `column`.

    Raises ValueError, whose message goes on where the place was named, and UnicodeDecodeError.
    """
    line = data.decode()
    text = line.strip(AROUND)
    try:
        value, end = _parse_json(text)
    except json.JSONDecodeError as error:
        raise ValueError(f", column {line.index(text) + error.pos + 1}: {error.msg}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise ValueError(f": {error}") from None
    except RecursionError:
        raise ValueError(": too many brackets within brackets") from None
    if end != len(text):
        raise ValueError(f", column {line.index(text) + end + 1}: more after the end of the object")
    if not isinstance(value, dict):
        raise ValueError(f': must be a JSON object, e.g. {{"{column}": "a red apple"}}, got {text[:40]}')
    if column not in value:
        raise ValueError(f": no key {column!r}: {known_columns(list(value))}")
    prompt = value[column]
    if not isinstance(prompt, str):
        raise ValueError(f": {column!r} must be text, got {json.dumps(prompt)[:40]}")
    prompt = one_line(prompt)
    if not prompt:
        raise ValueError(f": {column!r} is empty: remove it or give it a prompt")
    if not prompt.isascii():
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise ValueError(f": {column!r} holds half of a surrogate pair, which is no character") from None
    return prompt


def known_columns(names: list[str]) -> str:
    """What there is instead of the column that was asked for."""
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"set prompts.column to one of {shown}" if names else "it has none at all"
