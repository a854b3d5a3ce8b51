"""A trained generator's way out of a run: as a folder in diffusers' format, and back into pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diffpp_fast.errors import CheckpointError, ConfigurationError
from diffpp_fast.networks.loading import load_scheduler, read_config
from diffpp_fast.training.build import Sampler, Trained, build_sampler
from diffpp_fast.training.build.agreement import naming
from diffpp_fast.training.checkpoint import SavedGenerator, find_role, load_role, read_role, write_json
from diffpp_fast.training.config import Config
from diffpp_fast.training.distributed import World
from diffpp_fast.training.exported import Exported, copy_parts, one_step_scheduler, pipeline_files
from diffpp_fast.training.inputs import warn_of_changed_inputs
from diffpp_fast.training.output import CALL, added_files
from diffpp_fast.training.publish import MANIFEST, publish
from diffpp_fast.training.saved_config import load_saved_config, naming_moves
from diffpp_fast.training.state import Which, open_checkpoint, read_record


def export_generator(
    folder: Path,
    config: Config,
    generator: SavedGenerator | Trained,
    *,
    dtype: torch.dtype | None = None,
    merge: bool = True,
) -> None:
    """Write a generator in diffusers' format: weights, `scheduler_config.json` with the schedule of training, a
    scheduler for one step in `scheduler/` where diffusers has one, and how to call it (`generator.json`).

    Tensors are made and written one at a time: what was trained is read from the checkpoint, all else from the weights
    that the generator began as, in the precision that they have there.

    Args:
        folder: is replaced as a whole.
        config: the run's.
        generator: in a checkpoint, or as it is in memory.
        dtype: of the weights in the file; None: float32.
        merge: of LoRA: into the weights, a network like any other. Else the adapters alone, in the format that
            pipelines load with `load_lora_weights`, and in peft's for PixArt, where diffusers has no such loader.

    Raises:
        ConfigurationError: what the generator began as is no longer there.
        CheckpointError: the folder can't be written; it is then as it was before.
    """
    exported = Exported(config, generator)

    def write(folder: Path) -> None:
        if exported.lora is not None and not merge:
            exported.write_adapter(folder, dtype)
        else:
            exported.write_network(folder, dtype)
        scheduler = load_scheduler(config.models.scheduler.path)
        write_json(folder / "scheduler_config.json", _scheduler_config(scheduler))
        if hasattr(scheduler, "betas"):
            _one_step_scheduler(config).save_pretrained(folder / "scheduler")
        _write_call(folder, config)

    publish(folder, write, World.alone("cpu"))


def export_pipeline(
    folder: Path, config: Config, generator: SavedGenerator | Trained, *, dtype: torch.dtype | None = None
) -> None:
    """Write the whole pipeline of `models.base` with the generator and a scheduler for one step in it.

    The folder loads with diffusers' `DiffusionPipeline.from_pretrained`, and a call with `num_inference_steps=1` and
    `guidance_scale=1.0` is the generator's. Arguments are those of `export_generator`; adapters are merged. All other
    parts are copied file by file.

    Raises:
        ConfigurationError: the run has no base or does not compute with its encoders and decoder, or no scheduler
            makes one step of its schedule.
        CheckpointError: the folder can't be written.
    """
    base = _pipeline_base(config)
    scheduler = _one_step_scheduler(config)
    exported = Exported(config, generator)
    with naming("models.base", base):
        parts = pipeline_files(base, config.models.variant, leave_out=(exported.part, "scheduler"))

    def write(folder: Path) -> None:
        copy_parts(parts, folder)
        exported.write_network(folder / exported.part, dtype)
        scheduler.save_pretrained(folder / "scheduler")
        index = {
            name: value for name, value in read_config(base, "model_index.json").items() if name != "_name_or_path"
        }
        write_json(folder / "model_index.json", {**index, "scheduler": ["diffusers", type(scheduler).__name__]})
        _write_call(folder, config)

    publish(folder, write, World.alone("cpu"))


def find_weights(source: Path | None, which: Which = "latest", *, raw: bool = False) -> SavedGenerator:
    """Choose what to sample from or to export: averaged weights where there are any, of an undamaged checkpoint.

    Args:
        source: a run's output folder or a checkpoint; None: the run under runs/ that saved last.
        which: of a run's checkpoints.
        raw: the weights themselves, not their average.

    Raises CheckpointError where there is none.
    """
    source = source or _last_run()
    checkpoint = open_checkpoint(source, World.alone("cpu"), which)
    if not (checkpoint / "state.json").is_file():
        raise CheckpointError(f"{source} is no checkpoint: name a run's output folder, or one of its checkpoints")
    averaged = not raw and bool(find_role(checkpoint, "generator_ema"))
    return SavedGenerator(checkpoint, "generator_ema" if averaged else "generator")


def load_sampler(weights: SavedGenerator, device: torch.device) -> tuple[Config, Sampler]:
    """The generator of a checkpoint with what surrounds it, and the configuration that it was saved with."""
    config = load_saved_config(weights.folder)
    with naming_moves(weights.folder):
        sampler = build_sampler(config, device)
    warn_of_changed_inputs(weights.folder, read_record(weights.folder).get("inputs"), sampler.inputs)
    load_role(sampler.trained, read_role(*weights), weights.folder)
    return config, sampler


def warn_of_changed_base(weights: SavedGenerator, config: Config) -> None:
    """Warn where the frozen weights below a generator's adapters are not those that it was trained on."""
    if config.models.generator.lora is not None:
        now = Exported(config, weights).inputs()
        warn_of_changed_inputs(weights.folder, read_record(weights.folder).get("inputs"), now)


def refuse_foreign_folder(folder: Path) -> None:
    """Raise CheckpointError for a folder that an export would replace and that holds what no export has written.

    A folder inside of another export is refused, too: the next export into that one would remove it.
    """
    outer = next((parent for parent in folder.absolute().parents if (parent / CALL).is_file()), None)
    if outer is not None:
        raise CheckpointError(f"{folder} lies in {outer}, an exported generator: choose another --out FOLDER")
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.is_symlink() or not (folder / CALL).is_file():
        raise CheckpointError(f"{folder} exists and is no exported generator: choose another --out FOLDER")
    added = added_files(folder)
    if added:
        more = f" and {len(added) - 4} more" if len(added) > 4 else ""
        raise CheckpointError(
            f"{folder} holds {', '.join(added[:4])}{more}, which no export has written, and an export would remove: "
            "choose another --out FOLDER, or move it away"
        )


def _last_run() -> Path:
    manifests = sorted(Path("runs").glob(f"*/checkpoints/*/{MANIFEST}"), key=lambda path: path.stat().st_mtime)
    if not manifests:
        raise CheckpointError("no run under runs/ has a checkpoint: train one, or name one with --run FOLDER")
    return manifests[-1].parents[2]


def _write_call(folder: Path, config: Config) -> None:
    call = config.models.generator
    write_json(folder / CALL, {"timestep": call.timestep, "input_scale": call.input_scale})


def _scheduler_config(scheduler: Any) -> dict[str, Any]:
    return {**scheduler.config, "_class_name": type(scheduler).__name__}


def _one_step_scheduler(config: Config) -> Any:
    call = config.models.generator
    return one_step_scheduler(load_scheduler(config.models.scheduler.path), call.timestep, call.input_scale)


def _pipeline_base(config: Config) -> str:
    models = config.models
    if models.base is None:
        raise ConfigurationError("--pipeline: the run's configuration has no models.base to take the other parts from")
    sections = {"text_encoder": models.text_encoder, "text_encoder_2": models.text_encoder_2, "vae": models.decoder}
    for part, section in sections.items():
        if section is not None and section.path != f"{models.base}/{part}":
            raise ConfigurationError(
                f"--pipeline: the run does not compute with the {part} of models.base but with {section.path}; "
                "export without --pipeline, and put the pipeline together in Python"
            )
    return models.base
