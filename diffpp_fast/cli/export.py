"""`diffpp-fast export`."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffpp_fast.cli.options import Commands, add_command, add_override
from diffpp_fast.cli.quiet import hide_loading_bars
from diffpp_fast.errors import ConfigurationError
from diffpp_fast.terminal import say
from diffpp_fast.user_paths import real_path, refuse_no_folder, user_path

DESCRIPTION = """\
Writes a trained generator as a folder in diffusers' format.

  diffpp-fast export runs/sdxl --out generator
  diffpp-fast export runs/sdxl --out generator-fp16 --dtype float16
  diffpp-fast export runs/sdxl/checkpoints/step_002000 --out pipeline --pipeline
  diffpp-fast export runs/sdxl-lora --out lora --no-merge

The folder holds the weights, a scheduler with which diffusers makes the generator's single step, and generator.json.
With --pipeline it is a whole pipeline, which DiffusionPipeline.from_pretrained loads.
"""


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands, "export", run, help="write a trained generator in diffusers' format", description=DESCRIPTION
    )
    parser.add_argument(
        "source", type=user_path, metavar="RUN", help="a run's output folder, or one of its checkpoints"
    )
    parser.add_argument("--out", type=user_path, required=True, metavar="FOLDER", help="an earlier export is replaced")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights; default: float32")
    parser.add_argument("--raw", action="store_true", help="the weights themselves, not their moving average")
    parser.add_argument(
        "--merge",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="LoRA adapters as part of the weights (default), or as a file for load_lora_weights",
    )
    parser.add_argument("--pipeline", action="store_true", help="the whole pipeline of the run's models.base")
    add_override(parser)


def run(arguments: argparse.Namespace) -> int:
    from diffpp_fast.training.export import refuse_foreign_folder
    from diffpp_fast.training.output import lock_target

    if arguments.pipeline and not arguments.merge:
        raise ConfigurationError("--pipeline holds merged weights: leave --no-merge out, or export the adapters alone")
    refuse_no_folder("--out", arguments.out.parent)
    out = real_path(arguments.out)
    with lock_target(out):
        refuse_foreign_folder(out)
        return _export(out, arguments)


def _export(out: Path, arguments: argparse.Namespace) -> int:
    import torch

    from diffpp_fast.training.export import export_generator, export_pipeline, find_weights, warn_of_changed_base
    from diffpp_fast.training.exported import latents_scale
    from diffpp_fast.training.output import refuse_inputs
    from diffpp_fast.training.saved_config import load_saved_config, naming_moves

    weights = find_weights(arguments.source, raw=arguments.raw)
    say(f"weights: {weights}")
    hide_loading_bars()
    config = load_saved_config(weights.folder, arguments.override)
    refuse_inputs(config, [out])
    if not arguments.merge and config.models.generator.lora is None:
        raise ConfigurationError("--no-merge: the run trained all weights of its generator, there are no adapters")
    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    with naming_moves(weights.folder):
        warn_of_changed_base(weights, config)
        if arguments.pipeline:
            export_pipeline(out, config, weights, dtype=dtype)
        else:
            export_generator(out, config, weights, dtype=dtype, merge=arguments.merge)
    scale = latents_scale(config.models.generator.input_scale)
    latents = "" if scale == 1.0 else f", latents={scale:g} * z"
    say(f"exported: {arguments.out}")
    say(f"a call in diffusers: pipeline(prompt, num_inference_steps=1, guidance_scale=1.0{latents})")
    return 0
