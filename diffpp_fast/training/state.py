"""The state of a run in a checkpoint, and whether a checkpoint belongs to the run that wants to go on from it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffpp_fast.errors import CheckpointError
from diffpp_fast.training.build.agreement import idle_keys
from diffpp_fast.training.checkpoint import write_json
from diffpp_fast.training.config import Config
from diffpp_fast.training.distributed import World
from diffpp_fast.training.engines import Engine
from diffpp_fast.training.loading import dump_config, load_config, may_change
from diffpp_fast.training.prompts import PromptSource


@dataclass
class Position:
    """How far a run is. With the seed it decides every random number to come."""

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
        facts = {**asdict(position), "seed": config.seed, "prompts": prompts.digest()}
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
            "Take these changes back, or start a new run with another output."
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
