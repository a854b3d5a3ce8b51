"""A run's output folder: what the run did not write stays as it is."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from diffpp_fast.errors import ConfigurationError, UserError
from diffpp_fast.training.callbacks import read_sessions
from diffpp_fast.training.config import Config
from diffpp_fast.training.distributed import World
from diffpp_fast.training.durable import write_whole
from diffpp_fast.training.loading import dump_config
from diffpp_fast.training.lock import LOCK, FolderLock
from diffpp_fast.training.publish import MANIFEST, read_manifest
from diffpp_fast.user_paths import real_path
from diffpp_fast.version import __version__

#: Says that a folder is a run's, so that what has these names in it is the run's as well.
MARK = ".run.json"
FILES = ("config.yaml", "metrics.jsonl", "environment.json", "baseline.json")
FOLDERS = ("checkpoints", "grids", "generator", "tensorboard")
#: How a generator is called, and the mark of a folder that was exported.
CALL = "generator.json"
#: The model card of one.
CARD = "README.md"
#: Paths in a configuration that are written to.
WRITTEN_KEYS = ("output", "distributed.nvme_path")

logger = logging.getLogger(__name__)


def claim_output(config: Config, world: World, *, unlock: bool = False) -> FolderLock | None:
    """Make the main process the writer of a run's output folder, before anything in it is touched (collective).

    Returns the lock, of the main process; None in the others.

    Raises ConfigurationError in all processes where another run writes there, or this one would replace what no run has
    written.
    """
    lock = None
    try:
        with world.together(lambda said: ConfigurationError(f"output: {said}"), (UserError, OSError)):
            if world.is_main:
                lock = FolderLock(Path(config.output), unlock=unlock)
                refuse_foreign_output(config)
    except BaseException:
        if lock is not None:
            lock.release()
        raise
    return lock


def lock_target(target: Path) -> FolderLock:
    """Make this process the only writer of a folder that is replaced as a whole; of a run's, with all of the run."""
    return FolderLock(target.parent, name=LOCK if is_run(target.parent) else f".{target.name}{LOCK}")


def refuse_foreign_output(config: Config) -> None:
    """Raise ConfigurationError where a run would replace an input of its own, or a file that no run has written."""
    output = Path(config.output)
    refuse_inputs(config, [output / name for name in (*FILES, *FOLDERS)])
    found = [output / name for name in (*FILES, *FOLDERS) if (output / name).exists() or (output / name).is_symlink()]
    own = is_run(output)
    foreign = [path.name for path in found if not (own and _is_as_written(path)) and not _is_empty_folder(path)]
    if foreign:
        raise ConfigurationError(
            f"{output} holds {', '.join(foreign)}, which no run has written, and a run would replace: choose another "
            "output=FOLDER, or move it away"
        )


def refuse_inputs(config: Config, written: list[Path]) -> None:
    """Raise ConfigurationError where a path that a configuration reads from lies in one that is to be written."""
    folders = [real_path(path) for path in written]
    for key, text in _strings(config.model_dump(mode="json")):
        path = Path(text.partition(".py:")[0] + ".py" if ".py:" in text else text)
        if key in WRITTEN_KEYS or len(text) > 4096 or "\0" in text or not _exists(path):
            continue
        for folder in folders:
            if real_path(path).is_relative_to(folder):
                raise ConfigurationError(
                    f"{key} is {path}, which would be replaced with {folder}: write into another folder"
                )


def is_run(output: Path) -> bool:
    """Return whether a run has written into this folder: it has the mark, or what earlier versions left."""
    sessions = read_sessions(output / "environment.json")
    saved = any(
        (path / MANIFEST).is_file() for path in output.glob("checkpoints/step_*") if (path / "state.json").is_file()
    )
    return (output / MARK).is_file() or saved or any("first_step" in session for session in sessions)


def added_files(folder: Path) -> list[str]:
    """Return the names in a published folder that its manifest does not list; all of them where it has none.

    A model card that somebody has edited is added, too.
    """
    try:
        files = read_manifest(folder)["files"]
        written = {MANIFEST, *files}
    except ValueError:
        files, written = {}, set()
    if CARD in files and (folder / CARD).is_file() and _sha256(folder / CARD) != files[CARD]["sha256"]:
        written.discard(CARD)
    return sorted({str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()} - written)


def write_config(config: Config) -> None:
    """Mark a run's output folder and write its configuration into it; one that was edited there is kept beside it."""
    output, text = Path(config.output), dump_config(config)
    path, mark = output / "config.yaml", output / MARK
    digest = hashlib.sha256(text.encode()).hexdigest()
    try:
        written = json.loads(mark.read_text(encoding="utf-8"))["config"]
    except (OSError, ValueError, KeyError, TypeError):
        written = None
    if path.exists() and written is not None and _sha256(path) not in (written, digest):
        kept = next(beside for number in count(1) if not (beside := output / f"config.edited-{number}.yaml").exists())
        path.rename(kept)
        logger.warning("%s was edited: kept as %s", path, kept)
    # First of all: a run that is killed behind this line finds its folder again.
    write_whole(mark, json.dumps({"diffpp_fast": __version__, "config": written or digest}) + "\n")
    if not path.exists() or _sha256(path) != digest:
        write_whole(path, text)
    write_whole(mark, json.dumps({"diffpp_fast": __version__, "config": digest}) + "\n")


def _is_as_written(path: Path) -> bool:
    """Tell whether something in a run's folder is of the kind that runs write."""
    if path.name in FILES:
        return path.is_file() and not path.is_symlink()
    if path.name == "generator":
        return (path / CALL).is_file() and not path.is_symlink() and not added_files(path)
    return path.is_dir()  # or a link to one on a larger disk


def _is_empty_folder(path: Path) -> bool:
    return path.name != "generator" and path.is_dir() and not any(path.iterdir())


def _strings(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """All strings of a configuration with their dotted keys."""
    if isinstance(tree, str):
        yield key, tree
    elif isinstance(tree, dict):
        for name, value in tree.items():
            yield from _strings(value, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list):
        for value in tree:
            yield from _strings(value, key)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # no path at all
        return False


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
