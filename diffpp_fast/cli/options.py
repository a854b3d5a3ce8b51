"""Options that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.user_paths import user_path

if TYPE_CHECKING:
    from diffpp_fast.evaluation.models import ModelSource

Commands = argparse._SubParsersAction


def add_command(
    commands: Commands[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    help: str,
    description: str,
    epilog: str | None = None,
) -> argparse.ArgumentParser:
    """Add a subcommand that calls `run`, and return its parser. The description keeps its lines."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(name, help=help, description=description, epilog=epilog, formatter_class=formatter)
    parser.set_defaults(run=run)
    return parser


def add_config(parser: argparse.ArgumentParser, overrides: str = "as for `diffpp-fast train`") -> None:
    """Add a configuration and values that replace its own; `overrides` is what the help says of these."""
    parser.add_argument("config", metavar="CONFIG.yaml", help="paths in it are relative to its folder")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help=overrides)


def add_unlock(parser: argparse.ArgumentParser) -> None:
    """Add the option that breaks the lock of an output folder."""
    parser.add_argument(
        "--unlock",
        action="store_true",
        help="write into the output folder although a process on another machine may be doing so: only if it is gone",
    )


def add_override(parser: argparse.ArgumentParser) -> None:
    """Add the option that changes the configuration of a run, e.g. where its models are now."""
    parser.add_argument(
        "--override", action="append", default=[], metavar="section.key=value",
        help="replaces a value of the run's configuration, e.g. models.base=FOLDER where the models have moved",
    )  # fmt: skip


def add_generator(parser: argparse.ArgumentParser, dtype: str) -> None:
    """Add the options that say what a generator's folder leaves open; `dtype` is the help of --dtype."""
    add = parser.add_argument
    add(
        "--checkpoint", choices=["latest", "best"],
        help="of a run's checkpoints the newest, or the best by its training.keep_best (latest)",
    )  # fmt: skip
    add("--config", type=user_path, metavar="CONFIG.yaml", help="names text encoder and decoder of an exported network")
    add("--base", metavar="PIPELINE", help="has them, in diffusers' format, instead of --config")
    add_override(parser)
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--dtype", choices=["float32", "bfloat16"], help=dtype)
    text = parser.add_mutually_exclusive_group()
    text.add_argument(
        "--stream", action="store_true", help="encode all prompts first, with one block of a text encoder in memory"
    )
    text.add_argument(
        "--embeddings", type=user_path, metavar="FOLDER", help="that `embed` wrote, in place of text encoders"
    )


def find_generator(path: Path | None, arguments: argparse.Namespace, name: str | None = None) -> ModelSource:
    """Find the generator that a path and the options of `add_generator` name; see `evaluation.models.find_source`."""
    from diffpp_fast.evaluation.models import find_source

    return find_source(
        path,
        name=name,
        which=arguments.checkpoint or "latest",
        config=arguments.config,
        base=arguments.base,
        precision=arguments.dtype,
        overrides=arguments.override,
    )


def refuse_idle_options(sources: Sequence[ModelSource], arguments: argparse.Namespace) -> None:
    """Raise ConfigurationError for an option of `add_generator` that says something of none of the generators."""
    for option in ("checkpoint", "config", "base", "override"):
        if getattr(arguments, option) and not any(option in source.takes for source in sources):
            taken = sorted({f"--{each}" for source in sources for each in source.takes})
            raise ConfigurationError(
                f"--{option} says nothing of {', '.join(source.origin for source in sources)}"
                + (f": what can be said is {', '.join(taken)}" if taken else ": leave it out")
            )


def check_addresses(seed: int, first_sample: int, count: int) -> None:
    """Raise ConfigurationError for numbers that address no latent."""
    if not 0 <= seed < 2**64:
        raise ConfigurationError(f"--seed must be in [0, 2^64), got {seed}")
    if not 0 <= first_sample <= 2**63 - count:
        raise ConfigurationError(f"--first-sample must be in [0, 2^63 - {count}], got {first_sample}")


def positive(text: str) -> int:
    """Parse a number that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 1 up, got {text}")
    return int(text)
