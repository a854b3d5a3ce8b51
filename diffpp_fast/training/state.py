"""The state of a run in a checkpoint, and whether a checkpoint belongs to the run that wants to go on from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffpp_fast.errors import CheckpointError
from diffpp_fast.training.checkpoint import read_tensors, write_json, write_tensors
from diffpp_fast.training.config import Config
from diffpp_fast.training.engine import PlainEngine
from diffpp_fast.training.loading import dump_config, load_config

#: Keys, and sections by their prefix, that don't change what a run computes. Of the prompts the text counts.
FREE_KEYS = (
    "output",
    "device",
    "prompts",
    "models.base",
    "models.decoder.checkpoint",
    "rewards.held_out",
    "training.steps",
    "training.micro_batch",
    "training.log_every",
    "training.grid_every",
    "training.checkpoint_every",
    "training.keep",
    "training.grid_prompts",
    "training.threads",
    "training.activation_checkpointing",
    "training.compile",
    "training.fuse",
    "training.attention",
)


@dataclass
class Position:
    """How far a run is. With the seed it decides every random number to come."""

    #: Updates of the generator.
    step: int = 0
    #: Rounds of the fake score before the first of them.
    warmup: int = 0
    #: The number of the next sample.
    samples: int = 0


def write_state(
    folder: Path, config: Config, prompts: Sequence[str], position: Position, engines: Sequence[PlainEngine]
) -> None:
    """Fills a checkpoint's folder."""
    for engine in engines:
        write_tensors(folder / f"{engine.role}.safetensors", engine.parameters)
        write_tensors(folder / f"{engine.role}_optimizer.safetensors", engine.optimizer_state())
        if engine.ema is not None:
            write_tensors(folder / f"{engine.role}_ema.safetensors", engine.ema.average)
    (folder / "config.yaml").write_text(dump_config(config))
    state = {
        **asdict(position),
        "seed": config.seed,
        "prompts": _digest(prompts),
        "updates": {engine.role: engine.updates for engine in engines},
    }
    write_json(folder / "state.json", state)


def read_state(folder: Path, engines: Sequence[PlainEngine]) -> Position:
    """Brings the engines to where they were, to the bit."""
    state = json.loads((folder / "state.json").read_text())
    for engine in engines:
        engine.network.load_state_dict(read_tensors(folder / f"{engine.role}.safetensors"), strict=False)
        engine.load_optimizer_state(read_tensors(folder / f"{engine.role}_optimizer.safetensors"))
        engine.updates = state["updates"][engine.role]
        if engine.ema is not None:
            engine.ema.load_state_dict(read_tensors(folder / f"{engine.role}_ema.safetensors"))
    return Position(state["step"], state["warmup"], state["samples"])


def refuse_other_run(folder: Path, config: Config, prompts: Sequence[str]) -> None:
    """Raises CheckpointError if the configuration would make another run of the one that saved this checkpoint."""
    before = dict(_flat(load_config(folder / "config.yaml").model_dump(mode="json")))
    after = dict(_flat(config.model_dump(mode="json")))
    changes = [
        f"{key} was {before.get(key)!r}, is {after.get(key)!r}"
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key) and not _free(key)
    ]
    if json.loads((folder / "state.json").read_text())["prompts"] != _digest(prompts):
        changes.append(f"prompts: the text of {config.prompts} has changed")
    if changes:
        raise CheckpointError(
            f"{folder} belongs to another run:\n  " + "\n  ".join(changes) + "\n"
            "Take these changes back, or start a new run with another output."
        )


def _digest(prompts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()


def _free(key: str) -> bool:
    return any(key == free or key.startswith(free + ".") for free in FREE_KEYS)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
