"""The state of a run in a checkpoint, and the checkpoint that a run goes on from, or that pictures are drawn from."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from diffpp_fast.errors import CheckpointError
from diffpp_fast.training.build.agreement import idle_keys
from diffpp_fast.training.checkpoint import Checkpoints, find_shared_damage, write_json
from diffpp_fast.training.config import Config
from diffpp_fast.training.distributed import World
from diffpp_fast.training.engines import Engine
from diffpp_fast.training.loading import dump_config, load_config, may_change
from diffpp_fast.training.prompts import PromptSource
from diffpp_fast.training.publish import MANIFEST
from diffpp_fast.user_paths import real_path


@dataclass
class Position:
    """The point that a run has reached. With the seed it decides every random number to come."""

    #: Updates of the generator.
    step: int = 0
    #: Rounds of the fake score before the first of them.
    warmup: int = 0
    #: The number of the next sample.
    samples: int = 0
    #: Rounds of the fake score since the last of the generator's updates; not 0 where an error ended the run.
    rounds: int = 0


def write_state(
    folder: Path,
    config: Config,
    prompts: PromptSource,
    position: Position,
    engines: Sequence[Engine],
    world: World,
    record: Mapping[str, Any],
) -> None:
    """Fills a checkpoint's folder, of which every process has one of its own (collective).

    `record` is kept for `read_record`, as JSON has it.
    """
    for engine in engines:
        engine.write(folder)
    if world.is_main:
        (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        facts = {**asdict(position), "seed": config.seed, "prompts": prompts.digest(), "prompt_count": len(prompts)}
        write_json(folder / "state.json", {**facts, **record})


def read_record(folder: Path) -> dict[str, Any]:
    """All of a checkpoint's `state.json`."""
    record: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return record


def read_state(folder: Path, engines: Sequence[Engine]) -> Position:
    """Brings the engines to where they were, to the bit where nothing about the processes has changed (collective)."""
    state = read_record(folder)
    for engine in engines:
        engine.read(folder)
    return Position(state["step"], state["warmup"], state["samples"], state.get("rounds", 0))


def refuse_other_run(folder: Path, config: Config, prompts: PromptSource) -> None:
    """Raises CheckpointError if the configuration would make another run of the one that saved this checkpoint.

    A project that has moved as a whole is the same: paths are compared by their place in it, and their content by
    `refuse_changed_inputs`. An earlier version noted no content: paths must be the same then.
    """
    record = read_record(folder)
    before, after = (dict(flat(each.model_dump(mode="json"))) for each in (load_config(folder / "config.yaml"), config))
    idle = tuple(idle_keys(config))
    keys = [
        key
        for key in sorted({*before, *after})
        if not may_change(key) and not any(f"{key}.".startswith(f"{unused}.") for unused in idle)
    ]
    was, now = (_placed(values, keys) if "inputs" in record else values for values in (before, after))
    changes = [f"{key} was {before.get(key)!r}, is {after.get(key)!r}" for key in keys if was.get(key) != now.get(key)]
    if record["prompts"] != prompts.digest():
        changes.append(f"prompts: the text of {config.prompts.path} has changed")
    if changes:
        raise CheckpointError(
            f"{folder} belongs to another run:\n  " + "\n  ".join(changes) + "\n"
            "Take these changes back, or start a new run with another output. A key that the configuration leaves out "
            "may have had another default when the run began: write the old value there."
        )


def _placed(values: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Values with absolute paths among them relative to the folder that all of them are in."""
    paths = [value for key in keys if isinstance(value := values.get(key), str) and value.startswith("/")]
    root = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
    return {
        key: os.path.relpath(value, root) if isinstance(value, str) and value.startswith("/") and key in keys else value
        for key, value in values.items()
    }


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys with dots and their values, of a configuration as nested mappings."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


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
        if not checkpoints.world.any(Path(str(resume)).exists()):
            raise CheckpointError(f"--resume {resume}: there is no such checkpoint and no such run")
        if there and not real_path(Path(str(resume))).is_relative_to(real_path(output)):
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
