"""Tensors in safetensors files, of which neither a writer nor a reader ever holds more than one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError

from diffpp_fast.errors import CheckpointError
from diffpp_fast.training.durable import open_tensors

_DTYPES = {torch.float32: "F32", torch.int64: "I64"}


class TensorWriter:
    """Writes a safetensors file tensor by tensor, in the order that was announced.

    The header comes first in this format and holds every position, so that shapes have to be known beforehand.

    Args:
        path: of the file; replaced if there is one.
        tensors: name, dtype (float32 or int64) and shape of each.
    """

    def __init__(self, path: Path, tensors: Sequence[tuple[str, torch.dtype, Sequence[int]]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, dtype, shape in tensors:
            start, end = end, end + dtype.itemsize * torch.Size(shape).numel()
            header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data are aligned, as safetensors itself writes them
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, tensor: torch.Tensor) -> None:
        """Appends the next of the announced tensors."""
        self._file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def file_of(folder: Path, stem: str, writer: int, writers: int) -> Path:
    """`STEM.safetensors`, or one of several: `STEM-00001-of-00004.safetensors`."""
    part = f"-{writer + 1:05d}-of-{writers:05d}" if writers > 1 else ""
    return folder / f"{stem}{part}.safetensors"


class TensorReader:
    """The tensors of `STEM.safetensors`, or of all its parts, by name.

    Raises CheckpointError where a file or a tensor is missing, damaged, or of another shape than asked for.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        self._folder, self._stem = folder, stem
        whole, parts = folder / f"{stem}.safetensors", sorted(folder.glob(f"{stem}-*-of-*.safetensors"))
        paths = [whole] if whole.is_file() else parts
        if not paths or (paths is parts and len(parts) != int(parts[0].stem.rpartition("-")[2])):
            found = f"only {len(parts)} of its parts are there" if parts else "it is missing"
            raise CheckpointError(f"{whole}: {found}")
        try:
            # Opened without being read: the file is mapped into memory.
            files = [open_tensors(path) for path in paths]
            self._files = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (no mapping)
        except SafetensorError as error:
            raise CheckpointError(f"{whole} can't be read: {error}") from error

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def whole(self, name: str) -> torch.Tensor:
        """A tensor, on the CPU."""
        return self._file(name).get_tensor(name)

    def elements(self, name: str, shape: Sequence[int], start: int, count: int) -> torch.Tensor:
        """Elements [start, start + count) of a flattened tensor of this shape, [count]; other rows are not read."""
        file = self._file(name)
        found = file.get_slice(name).get_shape()
        if list(found) != list(shape):
            raise CheckpointError(f"{self._folder}: {self._stem} has {name} in shape {found}, not {list(shape)}")
        if count == 0 or len(shape) == 0:
            return file.get_tensor(name).reshape(-1) if count else torch.empty(0)
        row = torch.Size(shape[1:]).numel()
        first, end = start // row, -(-(start + count) // row)
        return file.get_slice(name)[first:end].reshape(-1)[start - first * row :][:count]

    def _file(self, name: str) -> Any:
        try:
            return self._files[name]
        except KeyError:
            raise CheckpointError(f"{self._folder}: {self._stem} holds no {name}") from None
