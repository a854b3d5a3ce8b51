"""`diffpp-fast sample`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffpp_fast.cli.quiet import hide_loading_bars
from diffpp_fast.terminal import say
from diffpp_fast.user_paths import user_path

if TYPE_CHECKING:
    import torch

    from diffpp_fast.evaluation.models import Model

DESCRIPTION = """\
Draws pictures with a trained generator: one row per prompt, one column per latent.

  diffpp-fast sample "a red apple"
  diffpp-fast sample --run runs/emoji "a red apple" "a green frog" --count 8 --seed 1 --grid pictures.png
  diffpp-fast sample --run runs/emoji --prompts prompts.txt --count 1 --batch 16 --images pictures
  diffpp-fast sample --model generator --config align.yaml "a red apple"

A picture is a function of the weights, its prompt, the seed and its sample number, which is its column plus
--first-sample. Every file holds these facts as text.
"""
#: A grid is one picture in memory; with more cells than this nobody looks at it.
MOST_CELLS = 4096


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "sample",
        help="draw pictures with a trained generator",
        description=DESCRIPTION,
        epilog="Exported generators, prompt files and the text in the files: docs/evaluation.md.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompts", nargs="*", metavar="PROMPT")
    parser.add_argument(
        "--prompts", dest="prompt_file", metavar="FILE", help="prompts in any format that a run reads, instead"
    )
    parser.add_argument("--column", metavar="NAME", help="of the prompt in a table (prompt)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--run",
        dest="source",
        type=user_path,
        metavar="FOLDER",
        help="a run's output folder, or one of its checkpoints; default: the run under runs/ that saved last",
    )
    which.add_argument("--model", type=user_path, metavar="FOLDER", help="a folder that `diffpp-fast export` wrote")
    add_surroundings(parser)
    parser.add_argument(
        "--out", "--grid", type=user_path, metavar="FILE.png",
        help="all pictures as one (samples.png; none where --images is given alone)",
    )  # fmt: skip
    parser.add_argument("--images", type=user_path, metavar="FOLDER", help="every picture as a file of its own")
    parser.add_argument("--count", type=positive, default=4, metavar="N", help="pictures per prompt (4)")
    parser.add_argument("--seed", type=int, default=0, help="of the latents (0)")
    parser.add_argument("--first-sample", type=int, default=0, metavar="N", help="sample number of column 1 (0)")
    parser.add_argument("--batch", type=positive, metavar="N", help="pictures that are computed at a time (--count)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="that networks compute in (the run's)")
    parser.set_defaults(run=run)


def add_surroundings(parser: argparse.ArgumentParser) -> None:
    """The options that say what a generator's folder leaves open."""
    parser.add_argument(
        "--checkpoint",
        choices=["latest", "best"],
        default="latest",
        help="of a run's checkpoints the newest, or the best by its training.keep_best (latest)",
    )
    parser.add_argument(
        "--config", type=user_path, metavar="CONFIG.yaml", help="names text encoder and decoder of an exported network"
    )
    parser.add_argument("--base", metavar="PIPELINE", help="has them, in diffusers' format, instead of --config")
    add_override(parser)


def add_override(parser: argparse.ArgumentParser) -> None:
    """The option that changes what a run's configuration says, e.g. where its models are now."""
    parser.add_argument(
        "--override", action="append", default=[], metavar="section.key=value",
        help="replaces a value of the run's configuration, e.g. models.base=FOLDER where the models have moved",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    from diffpp_fast.evaluation.models import find_source
    from diffpp_fast.evaluation.pictures import refuse_foreign_pictures
    from diffpp_fast.training.distributed import choose_device

    check_addresses(arguments.seed, arguments.first_sample, arguments.count)
    prompts = _prompts(arguments)
    grid = arguments.out or (None if arguments.images else Path("samples.png"))
    _check_grid(grid, len(prompts) * arguments.count)
    places = [divmod(place, arguments.count) for place in range(len(prompts) * arguments.count)]
    single = [] if arguments.images is None else [_file_of(arguments.images, *place) for place in places]
    refuse_foreign_pictures([*single, *([] if grid is None else [grid])])
    source = find_source(
        arguments.model or arguments.source,
        which=arguments.checkpoint,
        config=arguments.config,
        base=arguments.base,
        precision=arguments.dtype,
        overrides=arguments.override,
    )
    say(f"weights: {source.origin}")
    hide_loading_bars()
    model = source.load(choose_device(arguments.device))
    cells = _draw(model, prompts, arguments, keep=grid is not None)
    if arguments.images is not None:
        say(f"pictures: {arguments.images}")
    if grid is not None:
        _write_grid(grid, cells, model, prompts, arguments)
        say(f"pictures: {grid}")
    return 0


def _draw(model: Model, prompts: Sequence[str], arguments: argparse.Namespace, *, keep: bool) -> list[torch.Tensor]:
    """Writes the pictures where they are wanted one by one, batch by batch; returns them if they are to be kept."""
    from diffpp_fast.evaluation.pictures import draw, facts_of
    from diffpp_fast.training.grids import write_png

    kept, count, batch = [], arguments.count, arguments.batch or arguments.count
    for start in range(0, len(prompts) * count, batch):
        places = [divmod(place, count) for place in range(start, min(start + batch, len(prompts) * count))]
        texts = [prompts[number] for number, _ in places]
        samples = [arguments.first_sample + column for _, column in places]
        pictures = draw(model, texts, samples, seed=arguments.seed)
        if keep:
            kept.append(pictures)
        if arguments.images is not None:
            for (number, column), text, sample, picture in zip(places, texts, samples, pictures, strict=True):
                file = _file_of(arguments.images, number, column)
                write_png(file, picture.permute(1, 2, 0), facts_of(model, text, seed=arguments.seed, sample=sample))
    return kept


def _file_of(folder: Path, number: int, column: int) -> Path:
    return folder / f"{number:06d}_{column}.png"


def _write_grid(
    path: Path, cells: Sequence[torch.Tensor], model: Model, prompts: Sequence[str], arguments: argparse.Namespace
) -> None:
    import torch

    from diffpp_fast.evaluation.pictures import facts_of
    from diffpp_fast.training.grids import tile_bytes, write_png

    facts = facts_of(model, prompts[0], seed=arguments.seed, sample=arguments.first_sample)
    del facts["prompt"], facts["sample"]
    facts |= {
        "prompts": json.dumps(list(prompts), ensure_ascii=False),
        "first_sample": str(arguments.first_sample),
        "columns": str(arguments.count),
    }
    write_png(path, tile_bytes(torch.cat(list(cells)), columns=arguments.count), facts)


def _prompts(arguments: argparse.Namespace) -> list[str]:
    from diffpp_fast.errors import ConfigurationError
    from diffpp_fast.evaluation.prompts import read_prompts

    if bool(arguments.prompts) == (arguments.prompt_file is not None):
        raise ConfigurationError("sample what? Give prompts, or a file of them with --prompts FILE, and not both")
    if arguments.prompt_file is None:
        return list(arguments.prompts)
    return [prompt.text for prompt in read_prompts(arguments.prompt_file, column=arguments.column)]


def _check_grid(grid: Path | None, cells: int) -> None:
    from diffpp_fast.errors import ConfigurationError

    if grid is not None and grid.suffix.lower() != ".png":
        raise ConfigurationError(f"--grid {grid}: must be a file that ends in .png; --images takes a folder")
    if grid is not None and cells > MOST_CELLS:
        raise ConfigurationError(f"a grid of {cells} pictures is too large: write them into a folder, --images FOLDER")


def check_addresses(seed: int, first_sample: int, count: int) -> None:
    """Raises ConfigurationError for numbers that address no latent."""
    from diffpp_fast.errors import ConfigurationError

    if not 0 <= seed < 2**64:
        raise ConfigurationError(f"--seed must be in [0, 2^64), got {seed}")
    if not 0 <= first_sample <= 2**63 - count:
        raise ConfigurationError(f"--first-sample must be in [0, 2^63 - {count}], got {first_sample}")


def positive(text: str) -> int:
    """An argument of the command line that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 1 up, got {text}")
    return int(text)
