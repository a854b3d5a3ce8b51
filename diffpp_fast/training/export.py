"""A trained generator's way out of a run: as a folder in diffusers' format, and back into pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diffpp_fast.errors import CheckpointError
from diffpp_fast.networks.loading import resolve
from diffpp_fast.training.build import Sampler, build_sampler
from diffpp_fast.training.checkpoint import MANIFEST, Checkpoints, find_damage, publish, read_tensors, write_json
from diffpp_fast.training.config import Config
from diffpp_fast.training.engine import PlainEngine
from diffpp_fast.training.loading import load_config


def export_generator(folder: Path, config: Config, engine: PlainEngine) -> None:
    """Writes the averaged weights and the schedule in diffusers' format, and how to call them (`generator.json`).

    Raises CheckpointError if the folder can't be written; it is then as it was before.
    """
    from diffusers import DDPMScheduler

    models = config.models
    network: Any = engine.network
    # Of any scheduler: the file's name and form are the same for all classes.
    scheduler = DDPMScheduler.load_config(resolve(models.scheduler.path))

    def write(folder: Path) -> None:
        with engine.averaged():
            network.save_pretrained(folder)
        write_json(folder / "scheduler_config.json", scheduler)
        call = {"timestep": models.generator.timestep, "input_scale": models.generator.input_scale}
        write_json(folder / "generator.json", call)

    publish(folder, write)


def find_weights(source: Path | None) -> Path:
    """The file to sample from: averaged weights where there are any, of the newest undamaged checkpoint.

    Args:
        source: a run's output folder or a checkpoint; None: the run under runs/ that saved last.

    Raises CheckpointError where there is none.
    """
    source = source or _last_run()
    checkpoint: Path | None = source
    if not (source / MANIFEST).is_file():
        checkpoint = Checkpoints(source / "checkpoints").latest()
    elif damage := find_damage(source):
        raise CheckpointError(f"{source}: {damage}")
    if checkpoint is None:
        raise CheckpointError(f"{source} holds no checkpoint that is whole")
    averaged = checkpoint / "ema.safetensors"
    return averaged if averaged.is_file() else checkpoint / "generator.safetensors"


def _last_run() -> Path:
    manifests = sorted(Path("runs").glob(f"*/checkpoints/*/{MANIFEST}"), key=lambda path: path.stat().st_mtime)
    if not manifests:
        raise CheckpointError("no run under runs/ has a checkpoint: train one, or name one with --run FOLDER")
    return manifests[-1].parents[2]


def load_sampler(weights: Path, device: torch.device) -> tuple[Config, Sampler]:
    """The generator of a checkpoint, with the configuration that it was saved with."""
    config = load_config(weights.parent / "config.yaml")
    sampler = build_sampler(config, device)
    sampler.network.load_state_dict(read_tensors(weights))
    return config, sampler
