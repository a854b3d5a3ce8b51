"""Calls that not every file system serves: network shares, FUSE mounts of object stores, containers' volumes.

Each is replaced by what is possible there, and the promise that is lost is named once in a warning. What a disk refuses
for other reasons, such as being full, is raised as it is.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load

#: How file systems say that they don't serve a call.
UNSERVED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM)
#: Some don't open folders, or sync only what was opened for writing.
NO_SYNC = (*UNSERVED, errno.EACCES, errno.EBADF, errno.EISDIR)
#: Some rename no folder, or only small ones (gcsfuse: EMFILE).
NO_RENAME = (*UNSERVED, errno.EXDEV, errno.EMFILE)
#: Some map no file into memory.
NO_MAP = (*UNSERVED, errno.ENODEV)

logger = logging.getLogger(__name__)
_warned: set[str] = set()


def sync(path: Path) -> None:
    """Bring a file or a folder to the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
        kind = "folders" if path.is_dir() else "files"
        warn_once(path, error, f"{kind} can't be synced", "what was saved last may be lost in a power cut")


def allow(path: Path, mode: int) -> None:
    """Give a file its permissions."""
    try:
        path.chmod(mode)
    except OSError as error:
        if error.errno not in (*UNSERVED, errno.EACCES):
            raise
        warn_once(path, error, "permissions can't be set", "other users may not be able to read what is saved")


def move(source: Path, target: Path, last: str = "") -> None:
    """Rename a file or a folder; copy it where that is not served, of a folder the file named `last` at the end.

    A file at `target` is replaced; a folder may not be there.
    """
    try:
        source.rename(target)
    except OSError as error:
        if error.errno not in NO_RENAME:
            raise
        said = "a copy takes longer, and one that is cut off stays until the next start"
        warn_once(target, error, "what is saved can't be renamed", said)
        _copy(source, target, last)
        discard(source, last)


def discard(folder: Path, last: str) -> None:
    """Remove a file or a folder, first of it the file `last`, by which it is known to be whole."""
    if not folder.is_dir() or folder.is_symlink():
        folder.unlink(missing_ok=True)
        return
    if last:
        (folder / last).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Replace a text file in one rename: a reader sees the old text or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    move(partial, path)


def free_bytes(path: Path) -> int | None:
    """Return the bytes free where `path` is, or will be; None where the file system does not say."""
    while not path.exists():
        path = path.parent
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        return None
    return usage.free if usage.total else None


def open_tensors(path: Path) -> Any:
    """Open a safetensors file as `safe_open` does: mapped into memory, or read whole where files can't be mapped."""
    try:
        return safe_open(path, framework="pt")
    except OSError as error:
        # safetensors leaves `errno` empty.
        if error.errno not in NO_MAP and not any(f"(os error {number})" in str(error) for number in NO_MAP):
            raise
        warn_once(
            path, error, "files can't be mapped into memory", "whole files are read, which takes their size in memory"
        )
        return _ReadTensors(path)


def warn_once(path: Path, error: OSError, what: str, promise: str) -> None:
    """Say what a file system does not serve, and what can't be promised there."""
    if what not in _warned:
        _warned.add(what)
        logger.warning("%s: %s on this file system (%s): %s", path, what, error.strerror or error, promise)


def _copy(source: Path, target: Path, last: str) -> None:
    if not source.is_dir():
        shutil.copyfile(source, target)
        sync(target)
        return
    target.mkdir()
    names = sorted(source.rglob("*"), key=lambda path: (path == source / last, path))
    for path in names:
        copied = target / path.relative_to(source)
        if path.is_dir():
            copied.mkdir()
        else:
            shutil.copyfile(path, copied)
            sync(copied)


class _ReadTensors:
    """The tensors of a safetensors file in memory, under the names of `safe_open`."""

    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        self._metadata: dict[str, str] | None = header.get("__metadata__")
        self._tensors = load(data)

    def __enter__(self) -> _ReadTensors:
        return self

    def __exit__(self, *exception: object) -> None:
        self._tensors = {}

    def metadata(self) -> dict[str, str] | None:
        return self._metadata

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def get_slice(self, name: str) -> _Slice:
        return _Slice(self._tensors[name])


class _Slice:
    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def __getitem__(self, place: slice) -> torch.Tensor:
        return self._tensor[place]
