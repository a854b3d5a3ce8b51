"""A trained generator's way out of a run: as a folder in diffusers' format, and back into pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from diffpp_fast.errors import CheckpointError, ConfigurationError
from diffpp_fast.networks.loading import load_scheduler, read_config
from diffpp_fast.networks.lora_formats import (
    LoraFormat,
    LowRank,
    factors_of_up,
    refuse_format,
    refuse_layers,
    write_lora,
)
from diffpp_fast.training.build import Sampler, Trained, build_sampler
from diffpp_fast.training.build.agreement import naming
from diffpp_fast.training.checkpoint import SavedGenerator, find_role, load_role, read_role, write_json
from diffpp_fast.training.config import Config
from diffpp_fast.training.distributed import World
from diffpp_fast.training.exported import Exported, copy_parts, pipeline_files, refuse_overflow
from diffpp_fast.training.extraction import Extraction, Extractor
from diffpp_fast.training.inputs import warn_of_changed_inputs
from diffpp_fast.training.model_card import NOTHING_SAID, CardFacts, write_card
from diffpp_fast.training.output import CALL, added_files, is_run
from diffpp_fast.training.private_paths import remove_private_paths
from diffpp_fast.training.publish import MANIFEST, publish
from diffpp_fast.training.saved_config import load_saved_config, naming_moves
from diffpp_fast.training.schedulers import generator_scheduler
from diffpp_fast.training.state import Which, open_checkpoint, read_record


def export_generator(
    folder: Path,
    config: Config,
    generator: SavedGenerator | Trained,
    *,
    dtype: torch.dtype | None = None,
    merge: bool = True,
    card: CardFacts = NOTHING_SAID,
) -> None:
    """Write a generator in diffusers' format: weights, `scheduler_config.json` with the schedule of training, a
    scheduler for one step in `scheduler/` where diffusers has one, how to call it (`generator.json`), and a model card.

    Tensors are made and written one at a time: what was trained is read from the checkpoint, all else from the weights
    that the generator began as, in the precision that they have there.

    Args:
        folder: is replaced as a whole.
        config: the run's.
        generator: in a checkpoint, or as it is in memory.
        dtype: of the weights in the file; None: float32.
        merge: of LoRA: into the weights, a network like any other. Else the adapters alone, as `export_lora` writes
            them for diffusers.
        card: what the user says for the model card.

    Raises:
        ConfigurationError: what the generator began as is no longer there.
        CheckpointError: the folder can't be written; it is then as it was before.
    """
    exported = Exported(config, generator)
    if exported.lora is not None and not merge:
        export_lora(folder, config, generator, LoraSource(exported, "diffusers"), dtype=dtype, card=card)
        return

    def write(folder: Path) -> None:
        exported.write_network(folder, dtype)
        scheduler = _write_schedulers(folder, config)
        write_card(folder, config, generator, "network", card, target=exported.target, scheduler=scheduler)

    _publish(folder, write)


class LoraSource:
    """Updates of low rank that will be written: a run's adapters, or what is extracted of its change.

    Args:
        exported: the generator.
        kind: the format.
        rank: of an extraction; None: the adapters that were trained.
        base: what an extraction subtracts; None: what the generator began as.

    Raises ConfigurationError, before anything is computed, for what the format, the run or the base does not allow.
    """

    def __init__(
        self, exported: Exported, kind: LoraFormat, *, rank: int | None = None, base: str | None = None
    ) -> None:
        self.kind, self.target = kind, exported.target
        self._exported = exported
        with naming(f"--format {kind}"):
            refuse_format(kind, self.target)
        self.extractor = None if rank is None else Extractor(exported, rank, base, kind)
        if rank is None and exported.lora is None:
            raise ConfigurationError(
                f"--format {kind} is of LoRA files, and the run trained all weights of its generator: add "
                "--extract-lora RANK, or leave --format out for the network"
            )
        with naming(f"--format {kind}"):
            refuse_layers(kind, [] if self.extractor else exported.adapted, self.target)

    def make(
        self, dtype: torch.dtype | None, progress: Callable[[], None] | None = None
    ) -> tuple[Mapping[str, LowRank], Extraction | None]:
        """Return the updates by layer, and what was lost where they are extracted."""
        if self.extractor is None:
            layers = self._exported.adapters()
            factors = factors_of_up(self.kind, layers, self.target)
            refuse_overflow(layers, dtype, factors)
            return layers, None
        extraction = self.extractor.run(dtype, progress)
        return extraction.layers, extraction


def export_lora(
    folder: Path,
    config: Config,
    generator: SavedGenerator | Trained,
    source: LoraSource,
    *,
    dtype: torch.dtype | None = None,
    card: CardFacts = NOTHING_SAID,
    progress: Callable[[], None] | None = None,
) -> Extraction | None:
    """Write a generator's LoRA for another program, with schedules and `generator.json` as `export_generator` has them.

    For diffusers the file is what `load_lora_weights` takes, and in peft's format for networks that diffusers has no
    such loader for (PixArt); for kohya's scripts and ComfyUI it is called like the folder. `extraction.json` tells what
    an extraction has lost, layer by layer.

    Args:
        folder, config, generator, card: see `export_generator`.
        source: of the updates.
        dtype: of the updates; None: float32, as trained.
        progress: told of every layer of an extraction.

    Returns what was lost, where the LoRA is extracted. Raises like `export_generator`, and CheckpointError where there
    is nothing to extract.
    """
    layers, extraction = source.make(dtype, progress)
    prediction = str(load_scheduler(config.models.scheduler.path).config.get("prediction_type"))

    def write(inside: Path) -> None:
        write_lora(
            inside, source.kind, layers, source.target, prediction_type=prediction, name=folder.name, dtype=dtype
        )
        if extraction is not None:
            write_json(inside / "extraction.json", extraction.facts())
        scheduler = _write_schedulers(inside, config)
        (file,) = inside.glob("*.safetensors")
        write_card(
            inside, config, generator, "lora", card, target=source.target, scheduler=scheduler, kind=source.kind,
            file=file.name, extraction=extraction,
        )  # fmt: skip

    _publish(folder, write)
    return extraction


def export_pipeline(
    folder: Path,
    config: Config,
    generator: SavedGenerator | Trained,
    *,
    dtype: torch.dtype | None = None,
    card: CardFacts = NOTHING_SAID,
) -> None:
    """Write the whole pipeline of `models.base` with the generator and a scheduler for its steps in it.

    The folder loads with diffusers' `DiffusionPipeline.from_pretrained`, and a call with the arguments of
    `schedulers.pipeline_call` is the generator's. Arguments are those of `export_generator`; adapters are merged. All
    other parts are copied file by file.

    Raises:
        ConfigurationError: the run has no base or does not compute with its encoders and decoder, or no scheduler
            makes the generator's steps.
        CheckpointError: the folder can't be written.
    """
    base = _pipeline_base(config)
    scheduler = generator_scheduler(config)
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
        name = type(scheduler).__name__
        write_json(folder / "model_index.json", {**index, "scheduler": ["diffusers", name]})
        _write_call(folder, config)
        write_card(folder, config, generator, "pipeline", card, target=exported.target, scheduler=name)

    _publish(folder, write)


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

    A folder inside of another export is refused, too: the next export into that one would remove it. So is one among
    a run's checkpoints, which the run would take it for.
    """
    among = next((parent for parent in folder.absolute().parents if _holds_checkpoints(parent)), None)
    if among is not None:
        raise CheckpointError(
            f"{folder} lies in {among}, which is for a run's checkpoints: choose another --out FOLDER"
        )
    outer = next((parent for parent in folder.absolute().parents if (parent / CALL).is_file()), None)
    if outer is not None:
        raise CheckpointError(f"{folder} lies in {outer}, an exported generator: choose another --out FOLDER")
    if not folder.is_symlink() and (not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))):
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


def _holds_checkpoints(folder: Path) -> bool:
    return folder.name == "checkpoints" and is_run(folder.parent)


def _last_run() -> Path:
    manifests = sorted(Path("runs").glob(f"*/checkpoints/*/{MANIFEST}"), key=lambda path: path.stat().st_mtime)
    if not manifests:
        raise CheckpointError("no run under runs/ has a checkpoint: train one, or name one with --run FOLDER")
    return manifests[-1].parents[2]


def _publish(folder: Path, write: Callable[[Path], None]) -> None:
    def write_public(inside: Path) -> None:
        write(inside)
        remove_private_paths(inside)

    publish(folder, write_public, World.alone("cpu"))


def _write_schedulers(folder: Path, config: Config) -> str | None:
    """Write the schedule, the scheduler of the steps and how to call a generator; return that scheduler's class."""
    scheduler = load_scheduler(config.models.scheduler.path)
    write_json(folder / "scheduler_config.json", _scheduler_config(scheduler))
    _write_call(folder, config)
    try:
        steps = generator_scheduler(config)
    except ConfigurationError:
        return None
    steps.save_pretrained(folder / "scheduler")
    return type(steps).__name__


def _write_call(folder: Path, config: Config) -> None:
    write_json(folder / CALL, config.models.generator.call())


def _scheduler_config(scheduler: Any) -> dict[str, Any]:
    return {**scheduler.config, "_class_name": type(scheduler).__name__}


def _pipeline_base(config: Config) -> str:
    models = config.models
    if models.base is None:
        raise ConfigurationError("--pipeline: the run's configuration has no models.base to take the other parts from")
    sections = {
        "text_encoder": models.text_encoder,
        "text_encoder_2": models.text_encoder_2,
        "text_encoder_3": models.text_encoder_3,
        "vae": models.decoder,
    }
    for part, section in sections.items():
        if section is not None and section.path != f"{models.base}/{part}":
            raise ConfigurationError(
                f"--pipeline: the run does not compute with the {part} of models.base but with {section.path}; "
                "export without --pipeline, and put the pipeline together in Python"
            )
    return models.base
