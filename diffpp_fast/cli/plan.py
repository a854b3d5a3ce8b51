"""`diffpp-fast plan`."""

from __future__ import annotations

import argparse
import gc
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from diffpp_fast.cli.options import Commands, add_command, positive
from diffpp_fast.cli.quiet import hide_loading_bars

if TYPE_CHECKING:
    from diffpp_fast.training.planning import PlannedRun

DESCRIPTION = """\
Says what a run would take before any weight is read: memory per GPU by role and kind, operations, and an estimate of
the time of a step.

  diffpp-fast plan align.yaml --gpus 8 --gpu a100-80
  diffpp-fast plan align.yaml training.micro_batch=4 precision=bfloat16
  diffpp-fast plan --model sd15 --gpus 8 --gpu h100 --stage 2 --batch 256 --micro-batch 8
  diffpp-fast plan --model sdxl --gpu rtx4090 --lora 64 --checkpointing --batch 4 --json

Networks are built without numbers from their configurations alone, and the method runs on them. The exit code is 1 if
the run does not fit.
"""
#: Options that describe a run without a configuration, with their defaults.
DEFAULTS: dict[str, Any] = {
    "batch": 8,
    "micro_batch": None,
    "latent": None,
    "precision": "bfloat16",
    "stage": None,
    "reference": "replica",
    "optimizer": "adamw",
    "lora": None,
    "reward": "hpsv2.1",
    "checkpointing": False,
    "decoder_checkpoint": False,
    "decoder_rows": None,
    "fake_rounds": 1,
}
#: The keys of a configuration that these options set.
KEYS = {
    "batch": "training.global_batch",
    "micro_batch": "training.micro_batch",
    "precision": "precision",
    "reference": "distributed.reference",
    "checkpointing": "training.activation_checkpointing",
    "decoder_checkpoint": "models.decoder.checkpoint",
    "decoder_rows": "models.decoder.rows",
    "fake_rounds": "method.fake_rounds",
}


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands, "plan", run, help="say what a run would take", description=DESCRIPTION,
        epilog="What is counted, and what is assumed, is in docs/planning.md.",
    )  # fmt: skip
    parser.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="of the run; or --model")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="as for `diffpp-fast train`"
    )
    add_machine(parser)
    known = parser.add_argument_group("a run without a configuration")
    known.add_argument(
        "--model",
        metavar="NAME",
        help="sd15, sdxl, pixart, sd3, sd35, sd35-large, sana, sana-600m, "
        "zimage, flux, flux2-klein, flux2-klein-9b, flux2-dev or qwen-image",
    )
    add = known.add_argument
    add("--batch", type=positive, metavar="N", help="samples of an update, on all GPUs (8)")
    add("--micro-batch", type=positive, metavar="N", help="samples that a GPU computes at a time (all of its own)")
    add("--latent", type=positive, metavar="N", help="side of the latents (the model's)")
    add("--precision", choices=["float32", "bfloat16"], help="(bfloat16)")
    add("--stage", type=int, choices=range(4), help="of ZeRO, for generator and fake (2, on one GPU 0)")
    add("--reference", choices=["replica", "shard", "offload"], help="where the frozen model is (replica)")
    add("--optimizer", metavar="NAME", help="of generator and fake (adamw)")
    add("--lora", type=positive, metavar="RANK", help="train adapters of this rank instead of all weights")
    add(
        "--reward",
        metavar="NAME,...",
        help="pickscore, hpsv2.1, hpsv3, vqascore, mps, imagereward, clip, aesthetic (hpsv2.1), none",
    )
    add("--checkpointing", action="store_true", default=None, help="compute blocks again in the backward pass")
    add("--decoder-checkpoint", action="store_true", default=None, help="compute the decode again, too")
    add("--decoder-rows", type=positive, metavar="N", help="decode so many rows at a time (all)")
    add(
        "--fake-rounds",
        type=positive,
        metavar="N",
        help="updates of the teaching assistant for each of the generator (1)",
    )


def add_machine(parser: argparse._ActionsContainer) -> None:
    """The options that say where a run would be, and how the plan is printed."""
    parser.add_argument("--gpus", type=positive, default=1, metavar="N", help="how many (1)")
    parser.add_argument(
        "--gpu", default="h100", metavar="NAME", help="a100-40, a100-80, h100, h200, l40s, rtx4090 or b200 (h100)"
    )
    parser.add_argument("--efficiency", type=_share, metavar="X", help="share of the GPU's peak that is reached (0.4)")
    parser.add_argument("--network", type=_speed, metavar="GB/S", help="per GPU between machines (25)")
    parser.add_argument("--json", action="store_true", help="print data")


@contextmanager
def _uncollected() -> Iterator[None]:
    """Leave cycles of references alone: libraries make a million objects that stay, to be searched again and again."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@_uncollected()
def run(arguments: argparse.Namespace) -> int:
    from diffpp_fast.errors import ConfigurationError

    given = {name: value for name in DEFAULTS if (value := getattr(arguments, name)) is not None}
    if arguments.model is None:
        if arguments.config is None:
            raise ConfigurationError("plan what? Give a CONFIG.yaml, or --model NAME")
        if given:
            option = next(iter(given)).replace("_", "-")
            raise ConfigurationError(f"--{option} belongs to --model: of a configuration override the key instead")
        return print_plan_of(arguments)
    if arguments.config is not None:
        raise ConfigurationError(f"plan either {arguments.config} or --model {arguments.model}")
    return _print(arguments, _known_run(arguments.model, arguments.gpus, DEFAULTS | given))


@_uncollected()
def print_plan_of(arguments: argparse.Namespace) -> int:
    """Print the plan of a configuration; 1 if it does not fit."""
    from diffpp_fast.training.loading import load_config
    from diffpp_fast.training.planning import run_of

    return _print(arguments, run_of(load_config(arguments.config, arguments.overrides), arguments.gpus))


def _known_run(model: str, gpus: int, chosen: Mapping[str, Any]) -> PlannedRun:
    from diffpp_fast.training.planning import KNOWN, PlannedRun, known_config

    changes = {key: chosen[name] for name, key in KEYS.items()} | _reward(chosen["reward"])
    stage = chosen["stage"] if chosen["stage"] is not None else (2 if gpus > 1 else 0)
    changes["distributed.engine"] = "deepspeed" if stage or gpus > 1 else "auto"
    for role in ("generator", "fake"):
        changes[f"distributed.{role}.stage"] = stage
        changes[f"optimizers.{role}.name"] = chosen["optimizer"]
        changes[f"models.{role}.lora"] = None if chosen["lora"] is None else {"rank": chosen["lora"]}
    return PlannedRun(known_config(model, changes, side=chosen["latent"]), KNOWN[model], gpus)


def _reward(names: str) -> dict[str, object]:
    """The keys of a reward, or of several, by their names."""
    from diffpp_fast.errors import ConfigurationError
    from diffpp_fast.training.planning.architectures import TOWERS

    if names == "none":
        return {"method.name": "diff_instruct", "rewards.optimised": None}
    for name in names.split(","):
        if name not in TOWERS:
            raise ConfigurationError(f"--reward: there is no {name!r}; known: {', '.join(TOWERS)}, none")
    return {
        "rewards.optimised.factory": "diffpp_fast.rewards:mixture",
        "rewards.optimised.arguments": {"rewards": {name: {"weight": 1.0} for name in names.split(",")}},
    }


def _print(arguments: argparse.Namespace, run: PlannedRun) -> int:
    from rich.console import Console

    from diffpp_fast.training.planning import gpu_named, make_plan, savings, timing
    from diffpp_fast.training.planning.report import as_data, print_plan

    hide_loading_bars()
    plan = make_plan(
        run,
        gpu_named(arguments.gpu),
        efficiency=arguments.efficiency or timing.EFFICIENCY,
        network=arguments.network or timing.NETWORK,
    )
    advice = savings(plan) if plan.spare < 0 else []
    if arguments.json:
        print(json.dumps(as_data(plan, advice), indent=2))
    else:
        console = Console(soft_wrap=True, highlight=False)
        print_plan(
            plan, advice, console if console.is_terminal else Console(width=140, soft_wrap=True, highlight=False)
        )
    return 0 if plan.spare >= 0 else 1


def _speed(text: str) -> float:
    value = float(text)
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0 and finite, got {text}")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return value
