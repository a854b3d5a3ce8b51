"""Folders that are there whole or not at all, written by one process or by many."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from diffpp_fast.errors import CheckpointError
from diffpp_fast.training.distributed import World
from diffpp_fast.training.durable import NO_RENAME, allow, discard, free_bytes, move, sync

#: The last file that is written: a folder with an undamaged one is complete.
MANIFEST = "manifest.json"
#: The manifest's version; to be raised when an older version could misread a newer folder.
FORMAT = 1
#: A process's facts about the files that it wrote, until rank 0 makes the manifest of it.
PART = ".part.json"
READ_BYTES = 1 << 20
#: Hashing and syncing leave the interpreter lock: while the disk takes one file in, others are hashed.
THREADS = 8


class Failed(Exception):
    """The error for which all processes give up; its message is that of the first one that failed."""


def publish(
    target: Path, write: Callable[[Path], None], world: World, scores: Mapping[str, float] | None = None
) -> None:
    """Makes the folder `target`, with a manifest: in one rename, when every byte is on the disk (collective).

    The folder has to lie on a file system that all processes see. Each process hashes and syncs what it wrote itself,
    which is still in its memory; rank 0 moves the files together and makes the manifest of what the others found.

    Args:
        target: the folder; one that is there is replaced.
        write: called in every process with an empty folder of its own. Files of two processes may not have one name.
        world: the processes.
        scores: finite numbers for the manifest, of rank 0.

    Raises CheckpointError in every process if that fails in one, with `target` as it was before.
    """
    partial = _beside(target, "partial")
    own = partial / f".rank_{world.rank}"

    def prepare() -> None:
        if world.is_main:
            tidy(target)
            partial.mkdir(parents=True)

    def fill() -> None:
        own.mkdir()
        write(own)

    def finish() -> None:
        if world.is_main:
            _assemble(partial, world.size, scores or {})
            _replace(target, partial)

    try:
        for stage in (prepare, fill, lambda: _describe(own), finish):
            together(world, stage)
    except BaseException as error:
        if world.is_main:
            tidy(target)
        if not isinstance(error, Failed):
            raise
        raise CheckpointError(
            f"can't write {target}: {error}{_free_text(target)}. What was saved before is untouched: make room or "
            "remove the cause, and start again; a run goes on with --resume latest"
        ) from error


def together(world: World, action: Callable[[], None]) -> None:
    """Does in every process what may fail in one, without leaving the others to wait for it (collective).

    Raises Failed in every process if a disk or a safetensors file fails in one. Any other error is raised as it is, in
    the process that has it, and as Failed elsewhere.
    """
    error: Exception | None = None
    try:
        action()
    except Exception as caught:
        error = caught
    told = error
    if error is not None and not isinstance(error, Failed) and world.size > 1:
        told = Failed(f"rank {world.rank}: {error or type(error).__name__}")
    said = world.first_error(told)
    if error is not None and not isinstance(error, (OSError, SafetensorError, Failed)):
        raise error
    if said is not None:
        raise Failed(said) from error


def tidy(target: Path) -> None:
    """Removes what a crash left of a `publish`, and puts back what was being replaced at that moment."""
    shutil.rmtree(_beside(target, "partial"), ignore_errors=True)
    old = _beside(target, "old")
    if old.exists() and not target.exists():
        move(old, target, MANIFEST)
    elif (old / MANIFEST).is_file() and not (target / MANIFEST).is_file():
        # Where folders can't be renamed, the new one was being copied.
        discard(target, MANIFEST)
        move(old, target, MANIFEST)
    shutil.rmtree(old, ignore_errors=True)


def leftovers(folder: Path) -> list[Path]:
    """The places in `folder` that a crash has left something of."""
    found = {path.name[1:].rpartition(".")[0] for ending in ("partial", "old") for path in folder.glob(f".*.{ending}")}
    return [folder / name for name in sorted(found)]


def remove(target: Path) -> None:
    """Takes a published folder away in one rename, so that none is ever seen half removed."""
    # As if it had been replaced, but with nothing to put back: the bytes go with the next `tidy` at the latest.
    doomed = _beside(target, "partial")
    shutil.rmtree(doomed, ignore_errors=True)
    try:
        target.rename(doomed)
    except OSError as error:
        if error.errno not in NO_RENAME:
            raise
        discard(target, MANIFEST)
    shutil.rmtree(doomed, ignore_errors=True)


def read_manifest(path: Path) -> dict[str, Any]:
    """`files` (size and SHA-256 by name) and `scores` of a published folder.

    Raises ValueError, with the reason, where it is not complete or its manifest is damaged.
    """
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
        manifest: dict[str, Any] = json.loads(text)
        if manifest["format"] != FORMAT:
            raise ValueError(f"{MANIFEST} has format {manifest['format']}, this version reads {FORMAT}")
        if text != _manifest_text(manifest["files"], manifest["scores"]):
            raise ValueError(f"{MANIFEST} is damaged: its SHA-256 has changed")
    except FileNotFoundError:
        raise ValueError(f"incomplete: it has no {MANIFEST}" if path.is_dir() else "there is no such folder") from None
    except OSError as error:
        raise ValueError(f"{MANIFEST} can't be read: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{MANIFEST} is damaged") from None
    return manifest


def find_damage(path: Path, rank: int = 0, size: int = 1) -> str | None:
    """Say what is wrong with a published folder by its manifest, or a process's part of its files; None if nothing.

    A file that the manifest does not list is damage, too: it is another folder's, and would be read in the place of, or
    besides, what belongs here. Hidden files are not looked at, for nothing reads them.

    Args:
        path: the folder.
        rank, size: reading it is shared among so many processes; each must look at its own part.
    """
    try:
        files = read_manifest(path)["files"]
    except ValueError as error:
        return str(error)
    foreign = sorted(name for name in _visible(path) if name != MANIFEST and name not in files)
    if foreign:
        others = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        return f"{foreign[0]}{others} is no part of it: {MANIFEST} doesn't list it, so take it out of the folder"
    part = sorted(files, key=lambda name: (-files[name]["size"], name))[rank::size]
    for name in part:
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != files[name]["size"]:
            return f"{name} has {file.stat().st_size} bytes instead of {files[name]['size']}"

    def damage(name: str) -> str | None:
        try:
            same = _sha256(path / name) == files[name]["sha256"]
        except OSError as error:
            return f"{name} can't be read: {error.strerror}"
        return None if same else f"{name} is damaged: its SHA-256 has changed"

    with ThreadPoolExecutor(THREADS) as pool:
        return next(filter(None, pool.map(damage, part)), None)


def size_text(size: float) -> str:
    """A number of bytes as people write it."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _visible(folder: Path) -> Iterator[str]:
    """Files in it and in folders within it, by their path from there, but for hidden ones."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if not path.is_dir() and not any(part.startswith(".") for part in name.parts):
            yield name.as_posix()


def _beside(target: Path, ending: str) -> Path:
    return target.with_name(f".{target.name}.{ending}")


def _describe(own: Path) -> None:
    """Syncs and hashes a process's files."""
    files = sorted(path for path in own.rglob("*") if path.is_file())
    mode = own.stat().st_mode & 0o666
    for path in files:
        # safetensors makes files that their owner alone can read; the folder's mode follows the umask.
        allow(path, mode)
    with ThreadPoolExecutor(THREADS) as pool:
        syncs = [pool.submit(sync, path) for path in files]
        digests = list(pool.map(_sha256, files))
        for pending in syncs:
            pending.result()
    facts = {
        str(path.relative_to(own)): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, digests, strict=True)
    }
    (own / PART).write_text(json.dumps(facts), encoding="utf-8")


def _assemble(partial: Path, size: int, scores: Mapping[str, float]) -> None:
    """Moves the processes' files into one folder and writes its manifest."""
    files: dict[str, Any] = {}
    for rank in range(size):
        own = partial / f".rank_{rank}"
        for name, facts in json.loads((own / PART).read_text(encoding="utf-8")).items():
            if name in files:
                raise FileExistsError(f"two processes wrote {name}")
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            move(own / name, partial / name)
            files[name] = facts
        shutil.rmtree(own)
    (partial / MANIFEST).write_text(_manifest_text(files, scores), encoding="utf-8")
    for path in (partial / MANIFEST, *(path for path in partial.rglob("*") if path.is_dir()), partial):
        sync(path)


def _replace(target: Path, partial: Path) -> None:
    if target.exists():
        move(target, _beside(target, "old"), MANIFEST)
    move(partial, target, MANIFEST)
    sync(target.parent)
    shutil.rmtree(_beside(target, "old"), ignore_errors=True)


def _free_text(target: Path) -> str:
    free = free_bytes(target)
    return "" if free is None else f" ({size_text(free)} are free there)"


def _manifest_text(files: Mapping[str, Any], scores: Mapping[str, float]) -> str:
    """The one text of a manifest, with its own checksum, so that no bit of it can change unnoticed."""
    content = {"format": FORMAT, "scores": dict(sorted(scores.items())), "files": dict(sorted(files.items()))}
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=2) + "\n"


def _sha256(path: Path) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()
