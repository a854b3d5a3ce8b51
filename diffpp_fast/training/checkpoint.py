"""The checkpoints of a run: which of them stay, which one a run goes on from, and the weights in one."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import save_file

from diffpp_fast.errors import CheckpointError
from diffpp_fast.tensor_files import StoredTensors
from diffpp_fast.training.config import KeepBest
from diffpp_fast.training.distributed import World
from diffpp_fast.training.durable import free_bytes
from diffpp_fast.training.publish import find_damage, leftovers, publish, read_manifest, remove, size_text, tidy

if TYPE_CHECKING:
    from diffpp_fast.training.build import Trained

logger = logging.getLogger(__name__)


class Checkpoints:
    """The folder `checkpoints/` of a run, with `step_000200/` and so on in it.

    Args:
        folder: created with the first checkpoint; all processes must see the same one.
        world: the processes that write a checkpoint together.
        keep: how many of the newest stay; older ones are removed once a newer one is complete.
        keep_best: which of the others stay, too.
    """

    def __init__(self, folder: Path, world: World, keep: int = 3, keep_best: KeepBest | None = None) -> None:
        self.folder = folder
        self.world = world
        self.keep = keep
        self.keep_best = keep_best

    def save(self, step: int, write: Callable[[Path], None], scores: Mapping[str, float] | None = None) -> Path:
        """Writes a checkpoint, in place of one of the same step if there is one (collective).

        Args:
            step: of the generator.
            write: called in every process with an empty folder of its own, in which it writes its files. Where it is
                collective, a process that can't write a file must still take part in what follows: see `together`.
            scores: the last value of every logged scalar, of rank 0. They are kept in the checkpoint; those that are
                not finite are left out.

        Raises CheckpointError in every process if one can't write its part; earlier checkpoints are untouched then,
        and nothing half-written stays.
        """
        target = self.folder / f"step_{step:06d}"
        finite = {name: float(value) for name, value in (scores or {}).items() if math.isfinite(value)}
        self._warn_of_full_disk()
        publish(target, write, self.world, finite)
        if self.world.is_main:
            self._remove_old(step)
        # The next one is some time away: enough to make room.
        self._warn_of_full_disk()
        return target

    def paths(self) -> list[Path]:
        """All checkpoints, damaged or not, oldest first."""
        paths = self.folder.glob("step_*")
        return sorted((path for path in paths if path.name.removeprefix("step_").isdigit()), key=_step)

    def latest(self) -> Path | None:
        """The newest undamaged checkpoint; for each newer one a warning says what is wrong with it (collective)."""
        return self._first_whole(self.paths()[::-1])

    def best(self) -> Path | None:
        """The undamaged checkpoint with the best score by `keep_best`; warns like `latest` (collective).

        Raises CheckpointError where `keep_best` is not set.
        """
        if self.keep_best is None:
            raise CheckpointError("training.keep_best is not set, so no checkpoint is the best one: take the latest")
        return self._first_whole(self._ranked(self.paths(), self.keep_best))

    def tidy(self) -> None:
        """Before a run: removes what a crash has left half written, puts back what it has left half replaced."""
        if self.world.is_main:
            for target in leftovers(self.folder):
                tidy(target)
        self.world.barrier()

    def _first_whole(self, candidates: Sequence[Path]) -> Path | None:
        # Rank 0 decides: on a network's file system others may still see an older state of the folder.
        for place in range(self._of_main(len(candidates))):
            path = self.folder / f"step_{self._of_main(_step(candidates[place]) if self.world.is_main else 0):06d}"
            damage = find_shared_damage(path, self.world)
            if damage is None:
                return path
            if self.world.is_main:
                logger.warning("skipping a checkpoint: %s: %s", path, damage)
        return None

    def _of_main(self, number: int) -> int:
        """The number of rank 0, in all processes (collective)."""
        return int(self.world.sum(torch.tensor(number if self.world.is_main else 0)))

    def _ranked(self, paths: Sequence[Path], by: KeepBest) -> list[Path]:
        """Sort those that have a score, the best first. Of equal ones the oldest leads: the others repeat its score."""
        sign = -1 if by.mode == "max" else 1
        scores = {path: _scores(path).get(by.metric) for path in paths}
        scored = [(sign * score, _step(path), path) for path, score in scores.items() if score is not None]
        return [path for _, _, path in sorted(scored)]

    def _remove_old(self, step: int) -> None:
        """All up to `step` but the newest and the best; newer ones are left over from before a resume."""
        candidates = [path for path in self.paths() if _step(path) <= step]
        stay = set(candidates[-self.keep :])
        if self.keep_best is not None:
            ranked = self._ranked(candidates, self.keep_best)
            stay.update(ranked[: self.keep_best.count])
            if candidates[-1] not in ranked:
                known = ", ".join(_scores(candidates[-1])) or "nothing"
                logger.warning(
                    "training.keep_best: no %s was logged by step %d; logged was %s (finite values count)",
                    self.keep_best.metric,
                    step,
                    known,
                )
        for path in candidates:
            if path not in stay:
                try:
                    remove(path)
                except OSError as error:
                    logger.warning("can't remove the old checkpoint %s: %s", path, error.strerror)

    def _warn_of_full_disk(self) -> None:
        paths = self.paths() if self.world.is_main else []
        if not paths:
            return
        try:
            size = sum(facts["size"] for facts in read_manifest(paths[-1])["files"].values())
        except ValueError:
            return
        free = free_bytes(self.folder)
        if free is not None and free < size:
            logger.warning(
                "the next checkpoint takes about %s, and %s are free in %s: make room, or it can't be written",
                size_text(size),
                size_text(free),
                self.folder,
            )


def find_shared_damage(path: Path, world: World) -> str | None:
    """Say what is wrong with a checkpoint, the same in all processes, each of which reads a part of it (collective)."""
    damage = find_damage(path, world.rank, world.size)
    return world.first_error(None if damage is None else CheckpointError(damage))


def read_scores(path: Path) -> dict[str, float]:
    """The last value of every scalar that was logged before an undamaged checkpoint was saved."""
    scores: dict[str, float] = read_manifest(path)["scores"]
    return scores


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """A safetensors file, whatever the tensors' device and memory format."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, on the CPU."""
    return dict(StoredTensors([path]))


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _scores(path: Path) -> dict[str, float]:
    try:
        return read_scores(path)
    except ValueError:
        return {}


class SavedGenerator(NamedTuple):
    """A generator in a checkpoint: the folder, and which of its weights, `generator` or `generator_ema`."""

    folder: Path
    name: str

    def __str__(self) -> str:
        return str(self.folder / self.name)


def find_role(folder: Path, name: str) -> list[Path]:
    """The files `NAME.safetensors` or `NAME-00001-of-00004.safetensors` and so on; [] where there are none.

    Raises CheckpointError where some of the parts are missing.
    """
    whole = folder / f"{name}.safetensors"
    if whole.is_file():
        return [whole]
    parts = sorted(folder.glob(f"{name}-*-of-*.safetensors"))
    counts = {re.fullmatch(r".*-\d+-of-(\d+)\.safetensors", part.name)[1] for part in parts}  # type: ignore[index]
    if parts and (len(counts) > 1 or len(parts) != int(next(iter(counts)))):
        raise CheckpointError(
            f"{folder}: parts of {name} are missing, there are only {', '.join(part.name for part in parts)}"
        )
    return parts


def open_role(folder: Path, name: str) -> StoredTensors:
    """Return the tensors of `generator`, `generator_ema` or `fake`, each of which is read when it is asked for.

    Raises CheckpointError where there are none, or not all.
    """
    files = find_role(folder, name)
    if not files and not folder.is_dir():
        raise CheckpointError(f"{folder} is gone: a run that goes on removes its oldest checkpoints. Start again")
    if not files:
        raise CheckpointError(f"{folder} holds no weights of {name}")
    try:
        return StoredTensors(files)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def read_role(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Return the tensors of `generator`, `generator_ema` or `fake`, on the CPU; raises like `open_role`."""
    return dict(open_role(folder, name))


@torch.no_grad()
def load_role(trained: Trained, tensors: dict[str, torch.Tensor], source: Path) -> None:
    """Copies a role's trained weights into its network.

    Raises CheckpointError where names or shapes are not those of the network.
    """
    unknown = sorted(tensors.keys() ^ trained.parameters.keys())
    if unknown:
        raise CheckpointError(
            f"{source}: the weights are not those of this {trained.role}, {len(unknown)} names differ, "
            f"e.g. {unknown[0]}: is models.{trained.role}.lora what it was?"
        )
    for name, parameter in trained.parameters.items():
        if tensors[name].shape != parameter.shape:
            raise CheckpointError(
                f"{source}: {name} has shape {list(tensors[name].shape)}, the {trained.role}'s {list(parameter.shape)}"
            )
        parameter.copy_(tensors[name])
