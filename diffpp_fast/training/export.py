"""A trained generator's way out of a run: as a folder in diffusers' format, and back into pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from diffpp_fast.errors import CheckpointError, ConfigurationError
from diffpp_fast.networks.loading import load_scheduler, resolve
from diffpp_fast.training.build import Networks, Sampler, Trained, build_sampler
from diffpp_fast.training.checkpoint import write_json, write_tensors
from diffpp_fast.training.config import Config
from diffpp_fast.training.distributed import World
from diffpp_fast.training.inputs import warn_of_changed_inputs
from diffpp_fast.training.loading import load_config
from diffpp_fast.training.one_step_scheduler import one_step_scheduler
from diffpp_fast.training.output import CALL, added_files
from diffpp_fast.training.publish import MANIFEST, publish
from diffpp_fast.training.resume import Which, open_checkpoint
from diffpp_fast.training.state import read_record
from diffpp_fast.training.weights import find_role, load_role, read_role


class Weights(NamedTuple):
    """A generator in a checkpoint: the folder, and which of its weights, `generator` or `generator_ema`."""

    folder: Path
    name: str

    def __str__(self) -> str:
        return str(self.folder / self.name)


def export_generator(
    folder: Path,
    config: Config,
    generator: Trained,
    state: Mapping[str, torch.Tensor] | None = None,
    *,
    dtype: torch.dtype | None = None,
    merge: bool = True,
) -> None:
    """Writes a generator in diffusers' format: weights, `scheduler_config.json` with the schedule of training, a
    scheduler for one step in `scheduler/` where diffusers has one, and how to call it (`generator.json`).

    Args:
        folder: is replaced as a whole.
        config: the run's.
        generator: from `build_run`.
        state: the network's `state_dict` with whole tensors; None: as they are now.
        dtype: of the weights in the file; None: as they are, and float32 where adapters were merged.
        merge: of LoRA: into the weights, a network like any other. Else the adapters alone, in the format that
            pipelines load with `load_lora_weights`, and in peft's for PixArt, where diffusers has no such loader.

    Raises CheckpointError if the folder can't be written; it is then as it was before.
    """

    def write(folder: Path) -> None:
        whole = generator.network.state_dict() if state is None else state
        if generator.adapters is not None and not merge:
            _write_adapter(folder, generator, whole, dtype)
        else:
            plain_network(generator, whole, dtype).save_pretrained(folder)
        scheduler = load_scheduler(config.models.scheduler.path)
        write_json(folder / "scheduler_config.json", _scheduler_config(scheduler))
        if hasattr(scheduler, "betas"):
            _one_step_scheduler(config).save_pretrained(folder / "scheduler")
        _write_call(folder, config)

    publish(folder, write, World.alone("cpu"))


def export_pipeline(
    folder: Path,
    config: Config,
    generator: Trained,
    state: Mapping[str, torch.Tensor] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes the whole pipeline of `models.base` with the generator and a scheduler for one step in it.

    The folder loads with diffusers' `DiffusionPipeline.from_pretrained`, and a call with `num_inference_steps=1` and
    `guidance_scale=1.0` is the generator's. Arguments are those of `export_generator`; adapters are merged.

    Raises:
        ConfigurationError: the run has no base or does not compute with its encoders and decoder, or no scheduler
            makes one step of its schedule.
        CheckpointError: the folder can't be written.
    """
    from diffusers import DiffusionPipeline

    base = _pipeline_base(config)
    scheduler = _one_step_scheduler(config)

    def write(folder: Path) -> None:
        whole = generator.network.state_dict() if state is None else state
        network = plain_network(generator, whole, dtype)
        parts = {_part(generator.network): network, "scheduler": scheduler}
        pipeline = DiffusionPipeline.from_pretrained(
            base, **parts, torch_dtype=dtype or torch.float32, use_safetensors=True
        )
        pipeline.save_pretrained(folder)
        _write_call(folder, config)

    publish(folder, write, World.alone("cpu"))


def plain_network(generator: Trained, state: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> Any:
    """A network of diffusers for saving: the generator's without adapters, fused blocks and other changes.

    Its weights are those of `state`, not copied unless `dtype` says so; buffers that are not saved are empty.
    """
    network: Any = generator.network
    if generator.adapters is not None:
        state = generator.adapters.merged(state, generator.role)
    # Without the path that the network was loaded from, which is this machine's.
    facts = {name: value for name, value in network.config.items() if name != "_name_or_path"}
    with torch.device("meta"):
        plain = type(network).from_config(facts)
    # The frozen part of merged weights may be in another dtype than the merged ones.
    dtype = dtype or (torch.float32 if generator.adapters is not None else None)
    plain.load_state_dict({name: tensor.detach().to("cpu", dtype) for name, tensor in state.items()}, assign=True)
    return plain


def find_weights(source: Path | None, which: Which = "latest", *, raw: bool = False) -> Weights:
    """What to sample from or to export: averaged weights where there are any, of an undamaged checkpoint.

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
    return Weights(checkpoint, "generator_ema" if averaged else "generator")


def load_sampler(weights: Weights, device: torch.device) -> tuple[Config, Sampler]:
    """The generator of a checkpoint with what surrounds it, and the configuration that it was saved with."""
    config = load_config(weights.folder / "config.yaml")
    sampler = build_sampler(config, device)
    warn_of_changed_inputs(weights.folder, read_record(weights.folder).get("inputs"), sampler.inputs)
    load_role(sampler.trained, read_role(*weights), weights.folder)
    return config, sampler


def load_generator(weights: Weights) -> tuple[Config, Trained]:
    """The generator of a checkpoint alone, on the CPU, and the configuration that it was saved with."""
    config = load_config(weights.folder / "config.yaml")
    networks = Networks(config, None, torch.device("cpu"))
    generator = networks.trained("generator")
    warn_of_changed_inputs(weights.folder, read_record(weights.folder).get("inputs"), networks.inputs)
    load_role(generator, read_role(*weights), weights.folder)
    return config, generator


def refuse_foreign_folder(folder: Path) -> None:
    """Raise CheckpointError for a folder that an export would replace and that holds what no export has written."""
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


def _write_adapter(
    folder: Path, generator: Trained, state: Mapping[str, torch.Tensor], dtype: torch.dtype | None
) -> None:
    """In diffusers' format, for `load_lora_weights`; in peft's for networks that have no such loader (PixArt)."""
    network: Any = generator.network
    settings, role = network.peft_config[generator.role], generator.role
    weights = {
        f"{name.removesuffix(f'.{role}.weight')}.weight": state[name].detach().to("cpu", dtype)
        for name in generator.parameters
    }
    if not hasattr(network, "load_lora_adapter"):
        settings.save_pretrained(folder)
        named = {f"base_model.model.{name}": tensor for name, tensor in weights.items()}
        write_tensors(folder / "adapter_model.safetensors", named)
        return
    from diffusers.loaders.lora_base import LoraBaseMixin

    part = _part(generator.network)
    LoraBaseMixin.write_lora_layers(
        state_dict={f"{part}.{name}": tensor.contiguous() for name, tensor in weights.items()},
        save_directory=str(folder),
        is_main_process=True,
        weight_name=None,
        save_function=None,
        safe_serialization=True,
        lora_adapter_metadata={f"{part}.{key}": value for key, value in settings.to_dict().items()},
    )


def _part(network: nn.Module) -> str:
    """What pipelines call the network."""
    return "transformer" if "Transformer" in type(network).__name__ else "unet"


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
    return resolve(models.base)
