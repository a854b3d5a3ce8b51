"""`diffpp-fast export`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffpp_fast.cli.options import Commands, add_command, add_override, positive
from diffpp_fast.cli.quiet import hide_loading_bars
from diffpp_fast.errors import ConfigurationError
from diffpp_fast.terminal import say
from diffpp_fast.user_paths import real_path, refuse_no_folder, user_path

if TYPE_CHECKING:
    from diffpp_fast.cli.hub import HubRepository
    from diffpp_fast.networks.lora_formats import LoraFormat

DESCRIPTION = """\
Writes a trained generator as a folder in diffusers' format, or as a LoRA.

  diffpp-fast export runs/sdxl --out generator
  diffpp-fast export runs/sdxl --out generator-fp16 --dtype float16
  diffpp-fast export runs/sdxl/checkpoints/step_002000 --out pipeline --pipeline
  diffpp-fast export runs/sdxl-lora --out lora --format comfyui
  diffpp-fast export runs/sdxl --out lora --extract-lora 64 --format kohya
  diffpp-fast export runs/sdxl --out pipeline --pipeline --push OWNER/NAME --license openrail++

The folder holds the weights, a scheduler with which diffusers makes the generator's single step, generator.json and a
model card. With --pipeline it is a whole pipeline, which DiffusionPipeline.from_pretrained loads.
"""
#: As `networks.lora_formats.FORMATS`, whose import takes longer than the help should.
FORMATS = ("diffusers", "kohya", "comfyui")


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands, "export", run, help="write a trained generator in diffusers' format", description=DESCRIPTION
    )
    add = parser.add_argument
    add("source", type=user_path, metavar="RUN", help="a run's output folder, or one of its checkpoints")
    add("--out", type=user_path, required=True, metavar="FOLDER", help="an earlier export is replaced")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights; default: float32")
    add("--raw", action="store_true", help="the weights themselves, not their moving average")
    add(
        "--merge",
        action=argparse.BooleanOptionalAction,
        help="LoRA adapters as part of the weights (default), or as a file for load_lora_weights",
    )
    add("--pipeline", action="store_true", help="the whole pipeline of the run's models.base")
    add("--format", choices=FORMATS, help="a LoRA file as this program reads it: of adapters, or with --extract-lora")
    add(
        "--extract-lora",
        type=positive,
        metavar="RANK",
        help="a LoRA from whole weights: the nearest of this rank to their difference from the base",
    )
    add(
        "--base",
        metavar="NETWORK",
        help="what --extract-lora subtracts: a network or pipeline, a folder, hub id or file; default: the run's own",
    )
    add("--evaluation", type=user_path, metavar="FOLDER", help="of `diffpp-fast evaluate`: its figures for the card")
    add("--license", metavar="ID", help="for the card: the hub's identifier, or a name with --license-link")
    add("--license-link", metavar="URL", help="to the text of a licence that the hub has no identifier for")
    add("--push", metavar="OWNER/NAME", help="upload the folder to the Hugging Face hub; a new repository is private")
    add("--public", action="store_true", help="of --push: a new repository is public")
    add_override(parser)


def run(arguments: argparse.Namespace) -> int:
    from diffpp_fast.training.export import refuse_foreign_folder
    from diffpp_fast.training.output import lock_target

    _refuse_contradictions(arguments)
    refuse_no_folder("--out", arguments.out.parent)
    out = real_path(arguments.out)
    with lock_target(out):
        refuse_foreign_folder(out)
        return _export(out, arguments, _find_repository(arguments))


def _refuse_contradictions(arguments: argparse.Namespace) -> None:
    """Raise ConfigurationError for options that contradict each other, by themselves alone."""
    lora = next(
        (
            name
            for name, given in (
                ("--format", arguments.format),
                ("--extract-lora", arguments.extract_lora),
                ("--no-merge", arguments.merge is False),
            )
            if given
        ),
        None,
    )
    if arguments.pipeline and lora == "--no-merge":
        raise ConfigurationError("--pipeline holds merged weights: leave --no-merge out, or export the adapters alone")
    whole = "--pipeline" if arguments.pipeline else "--merge" if arguments.merge else None
    if whole and lora:
        raise ConfigurationError(f"{whole} writes whole weights, and {lora} a LoRA alone: leave one of them out")
    if arguments.base and not arguments.extract_lora:
        raise ConfigurationError("--base says what --extract-lora RANK subtracts: give that, too")
    if arguments.public and not arguments.push:
        raise ConfigurationError("--public says something of --push OWNER/NAME: give that, too")
    if arguments.license_link and not arguments.license:
        raise ConfigurationError("--license-link leads to the text of a licence: name it with --license, too")


def _find_repository(arguments: argparse.Namespace) -> HubRepository | None:
    if arguments.push is None:
        return None
    from diffpp_fast.cli.hub import HubRepository, refuse_name

    refuse_name(arguments.push)
    return HubRepository(arguments.push, private=not arguments.public)


def _export(out: Path, arguments: argparse.Namespace, repository: HubRepository | None) -> int:
    import torch

    from diffpp_fast.training.export import (
        LoraSource,
        export_generator,
        export_lora,
        export_pipeline,
        find_weights,
        warn_of_changed_base,
    )
    from diffpp_fast.training.exported import Exported
    from diffpp_fast.training.model_card import CardFacts, Licence, read_evaluation
    from diffpp_fast.training.output import refuse_inputs
    from diffpp_fast.training.saved_config import load_saved_config, naming_moves
    from diffpp_fast.training.schedulers import pipeline_call

    licence = Licence(arguments.license, arguments.license_link) if arguments.license else None
    weights = find_weights(arguments.source, raw=arguments.raw)
    say(f"weights: {weights}")
    hide_loading_bars()
    config = load_saved_config(weights.folder, arguments.override)
    refuse_inputs(config, [out])
    if arguments.merge is False and not arguments.extract_lora and config.models.generator.lora is None:
        raise ConfigurationError(
            "--no-merge: the run trained all weights of its generator, there are no adapters: --extract-lora RANK "
            "makes a LoRA of them"
        )
    evaluation = None if arguments.evaluation is None else read_evaluation(arguments.evaluation, weights)
    title = None if arguments.push is None else arguments.push.partition("/")[2]
    shared: dict[str, Any] = {
        "dtype": None if arguments.dtype is None else getattr(torch, arguments.dtype),
        "card": CardFacts(licence, evaluation, title),
    }
    with naming_moves(weights.folder):
        if arguments.format or arguments.extract_lora or arguments.merge is False:
            kind: LoraFormat = arguments.format or "diffusers"
            exported = Exported(config, weights)
            source = LoraSource(exported, kind, rank=arguments.extract_lora, base=arguments.base)
            warn_of_changed_base(weights, config)
            with _layers_done(0 if source.extractor is None else len(source.extractor)) as progress:
                extraction = export_lora(out, config, weights, source, progress=progress, **shared)
            for sentence in [] if extraction is None else extraction.sentences():
                say(sentence)
        else:
            warn_of_changed_base(weights, config)
            (export_pipeline if arguments.pipeline else export_generator)(out, config, weights, **shared)
    say(f"exported: {arguments.out}")
    say(f"a call in diffusers: pipeline(prompt=prompt, {pipeline_call(config)})")
    if repository is not None:
        say(f"pushed: {repository.upload(out, f'Export of {weights.folder.name} by diffpp_fast')}")
    return 0


@contextmanager
def _layers_done(count: int) -> Iterator[Callable[[], None] | None]:
    """Show how many layers are done, on a terminal."""
    if count == 0:
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("layers", total=count)
        yield lambda: bar.advance(task)
