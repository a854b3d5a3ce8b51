"""The checkpoint that a run goes on from, or that pictures are drawn from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from diffpp_fast.errors import CheckpointError
from diffpp_fast.training.checkpoint import Checkpoints, find_shared_damage
from diffpp_fast.training.config import Config
from diffpp_fast.training.distributed import World
from diffpp_fast.training.loading import load_config
from diffpp_fast.training.prompts import PromptSource
from diffpp_fast.training.publish import MANIFEST
from diffpp_fast.training.state import refuse_other_run

Which = Literal["latest", "best"]

logger = logging.getLogger(__name__)


def find_checkpoint(resume: str | None, checkpoints: Checkpoints, config: Config, prompts: PromptSource) -> Path | None:
    """The checkpoint that a run goes on from; None: it begins anew (collective).

    Args:
        resume: "latest" or "best" of the output folder's checkpoints, or the folder of a checkpoint or of a run, of
            which the newest is taken. None: begin anew.
        checkpoints: of the output folder.
        config, prompts: of the run, which must be the one that saved the checkpoint.

    Raises CheckpointError where the output folder holds checkpoints that would be written over, none is whole, or the
    checkpoint belongs to another run.
    """
    checkpoints.tidy()
    output, there = Path(config.output), checkpoints.world.any(bool(checkpoints.paths()))
    if not there and checkpoints.world.any((output / "generator").exists()):
        raise CheckpointError(
            f"{output} holds the generator of a run whose checkpoints are gone, and this run would replace it: choose "
            "another output=FOLDER, or move it away"
        )
    if resume not in (None, "latest", "best"):
        if there and not Path(str(resume)).resolve().is_relative_to(output.resolve()):
            raise CheckpointError(
                f"{output} already holds checkpoints, of another run than {resume}: go on with --resume latest, or "
                "choose another output=FOLDER"
            )
        found: Path | None = open_checkpoint(Path(str(resume)), checkpoints.world)
    elif not there:
        if resume is not None and checkpoints.world.is_main:
            logger.warning("%s holds no checkpoint: starting from the beginning", checkpoints.folder)
        return None
    elif resume is None:
        raise CheckpointError(
            f"{config.output} already holds checkpoints: go on with --resume latest, or choose another output=FOLDER"
        )
    else:
        found = checkpoints.latest() if resume == "latest" else checkpoints.best()
    if found is None:
        raise CheckpointError(
            f"no checkpoint in {checkpoints.folder} is whole{' and has a score' if resume == 'best' else ''}: "
            "choose another output=FOLDER"
        )
    refuse_other_run(found, config, prompts)
    return found


def open_checkpoint(source: Path, world: World, which: Which = "latest") -> Path:
    """A checkpoint by its folder, or one of a run's by the run's folder (collective).

    Raises CheckpointError where it is damaged, or the run has none that is whole.
    """
    folder = source / "checkpoints"
    is_run = world.any(folder.is_dir())
    # In a run's folder a manifest is that of embeddings, say, which were written there, too.
    if world.any((source / MANIFEST).is_file()) and not is_run:
        damage = find_shared_damage(source, world)
        if damage is not None:
            raise CheckpointError(f"{source} is damaged: {damage}")
        return source
    if not is_run:
        raise CheckpointError(f"{source} is neither a whole checkpoint (no {MANIFEST}) nor a run (no checkpoints/)")
    keep_best = load_config(source / "config.yaml").training.keep_best if which == "best" else None
    checkpoints = Checkpoints(folder, world, keep_best=keep_best)
    found = checkpoints.latest() if which == "latest" else checkpoints.best()
    if found is None:
        raise CheckpointError(f"{source} holds no checkpoint that is whole")
    return found
