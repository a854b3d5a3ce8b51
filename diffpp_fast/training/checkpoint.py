"""Checkpoints on disk: each a folder that is there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from diffpp_fast.errors import CheckpointError

MANIFEST = "manifest.json"

logger = logging.getLogger(__name__)


class Checkpoints:
    """The folder `checkpoints/` of a run, with `step_000200/` and so on in it.

    Args:
        folder: created with the first checkpoint.
        keep: how many stay; older ones are removed once a newer one is complete.
    """

    def __init__(self, folder: Path, keep: int = 3) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Writes a checkpoint; `write` fills an empty folder. A damaged checkpoint of the same step is replaced.

        Raises CheckpointError if it can't be written; earlier checkpoints are untouched then, and nothing half-written
        stays.
        """
        target = self.folder / f"step_{step:06d}"
        publish(target, write)
        for old in [path for path in self.paths() if _step(path) <= step][: -self.keep]:
            shutil.rmtree(old)
        return target

    def paths(self) -> list[Path]:
        """All checkpoints, complete or not, oldest first."""
        paths = self.folder.glob("step_*")
        return sorted((path for path in paths if path.name.removeprefix("step_").isdigit()), key=_step)

    def latest(self) -> Path | None:
        """The newest undamaged checkpoint; for each newer one a warning is logged that says what is wrong with it."""
        for path in reversed(self.paths()):
            damage = find_damage(path)
            if damage is None:
                return path
            logger.warning("skipping a checkpoint: %s: %s", path, damage)
        return None


def publish(target: Path, write: Callable[[Path], None]) -> None:
    """Makes the folder `target`, filled by `write`, with a manifest: in one rename, when every byte is on the disk.

    Raises CheckpointError if that fails, with `target` as it was before.
    """
    partial = target.with_name(f".{target.name}.partial")
    old = target.with_name(f".{target.name}.old")
    try:
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        manifest = {"files": {str(path.relative_to(partial)): _facts(path) for path in files}, "complete": True}
        write_json(partial / MANIFEST, manifest)
        for path in files:
            # safetensors makes files that their owner alone can read; the folder's mode follows the umask.
            path.chmod(partial.stat().st_mode & 0o666)
        for path in [*files, partial / MANIFEST, partial]:
            _sync(path)
        if target.exists():
            target.rename(old)
        partial.rename(target)
        _sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"can't write {target}: {error}. What was saved before is untouched; make room or choose another output."
        ) from error


def find_damage(path: Path) -> str | None:
    """What is wrong with a published folder by its manifest; None if it is whole."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = manifest["files"].items() if manifest["complete"] else ()
    except FileNotFoundError:
        return f"incomplete: it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    for name, facts in files:
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != facts["size"]:
            return f"{name} has {file.stat().st_size} bytes instead of {facts['size']}"
        if _facts(file) != facts:
            return f"{name} is damaged: its SHA-256 has changed"
    return None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """A safetensors file, whatever the tensors' device and memory format."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, on the CPU; copies, for `load_file` maps the file and dies with it."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _facts(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
