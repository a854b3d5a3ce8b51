"""WebDataset: tar archives in which every sample's text is a member of its own."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Sequence, Set
from pathlib import Path
from typing import BinaryIO

import numpy as np

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.training.prompts.indexed import LONGEST, StableFile
from diffpp_fast.training.prompts.json_lines import prompt_in_json
from diffpp_fast.training.prompts.source import BLOCK, Digest, PromptFile, one_line
from diffpp_fast.training.prompts.tar_index import Member, members


class TarFile(PromptFile):
    """One shard. Its prompts are its `.txt` members, or what its `.json` members hold under a key.

    Pictures and all other members are passed over.

    Args:
        path: an uncompressed tar archive.
        column: the key in `.json` members; None: `.txt` members where there are any, else the key "prompt".
    """

    def __init__(self, path: Path, column: str | None, digest: Digest) -> None:
        self.path = path
        self.column = column
        self._file = StableFile(path, self._index, digest)
        if len(self._file.places) == 0 and column is None:
            self.column = "prompt"
            self._file = StableFile(path, self._index, digest)
        #: int64 [N, 2]: offset and size of every text.
        self._places = self._file.places
        if len(self) == 0:
            kinds = ".txt or .json" if column is None else ".json"
            raise ConfigurationError(f"prompts: {path} holds no {kinds} members")

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, indices: Sequence[int]) -> list[str]:
        with self._file.open() as file:
            places = self._places[np.asarray(indices, dtype=np.int64)].tolist()
            return [self._parse(os.pread(file.fileno(), size, offset)) for offset, size in places]

    def _index(self, file: BinaryIO, digest: Digest) -> np.ndarray:
        """The places of all texts of one kind. Each is read and checked."""
        places, prompts = array("q"), []
        try:
            for member in self._texts(members(file, os.fstat(file.fileno()).st_size)):
                if member.size > LONGEST:
                    raise ValueError(f"holds {member.name}, which has more than {LONGEST >> 20} MiB: is it text?")
                places.extend((member.offset, member.size))
                prompts.append(self._check(os.pread(file.fileno(), member.size, member.offset), member.name))
                if len(prompts) == BLOCK:
                    digest.add(prompts)
                    prompts.clear()
        except ValueError as error:
            raise ConfigurationError(f"prompts: {self.path} {error}") from None
        digest.add(prompts)
        return np.frombuffer(places, dtype=np.int64).reshape(-1, 2)

    def _texts(self, found: Iterable[Member]) -> list[Member]:
        """The members that hold a prompt, by the last suffix of their names, in whatever case.

        `x.tags.txt` beside `x.jpg` or `x.txt` is another text of sample `x`, and none of its own. Hidden files, which
        macOS puts beside others, hold none.
        """
        suffix = ".txt" if self.column is None else ".json"
        samples, texts = set(), []
        for member in found:
            name = member.name.lower()
            samples.add(name.rpartition(".")[0])
            if name.endswith(suffix) and not name.rpartition("/")[2].startswith("."):
                texts.append(member)
        return [member for member in texts if not _longer_names(member.name.lower(), samples)]

    def _check(self, data: bytes, name: str) -> str:
        try:
            return self._parse(data)
        except UnicodeDecodeError as error:
            said = f", byte {error.start + 1}: not UTF-8 ({error.reason})"
        except ValueError as error:
            said = str(error)
        raise ConfigurationError(f"prompts: {self.path}, member {name}{said}")

    def _parse(self, data: bytes) -> str:
        if self.column is not None:
            return prompt_in_json(data, self.column)
        prompt = one_line(data.decode())
        if not prompt:
            raise ValueError(": empty: remove it or give it a prompt")
        return prompt


def _longer_names(name: str, samples: Set[str]) -> bool:
    """Whether one of these samples' names, a dot and more than a suffix make up a member's name."""
    sample = name.rpartition(".")[0]
    while "." in sample.rpartition("/")[2]:
        sample = sample.rpartition(".")[0]
        if sample in samples:
            return True
    return False
