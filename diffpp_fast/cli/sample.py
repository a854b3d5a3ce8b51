"""`diffpp-fast sample`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffpp_fast.cli.options import (
    Commands,
    add_command,
    add_generator,
    check_addresses,
    find_generator,
    positive,
    refuse_idle_options,
)
from diffpp_fast.cli.quiet import hide_loading_bars
from diffpp_fast.errors import ConfigurationError
from diffpp_fast.terminal import say
from diffpp_fast.user_paths import user_path

if TYPE_CHECKING:
    import torch

    from diffpp_fast.evaluation.models import LoadedModel

DESCRIPTION = """\
Draws pictures with a trained generator: one row per prompt, one column per latent.

  diffpp-fast sample "a red apple"
  diffpp-fast sample --run runs/emoji "a red apple" "a green frog" --count 8 --seed 1 --out pictures.png
  diffpp-fast sample --run runs/emoji --prompts prompts.txt --count 1 --batch 16 --images pictures
  diffpp-fast sample --model generator --config align.yaml "a red apple"

A picture is a function of the weights, its prompt, the seed and its sample number, which is its column plus
--first-sample. Every file holds these facts as text.
"""
#: A grid is one picture in memory; with more cells than this nobody looks at it.
MOST_CELLS = 4096


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands, "sample", run, help="draw pictures with a trained generator", description=DESCRIPTION,
        epilog="Exported generators, prompt files and the text in the files: docs/evaluation.md.",
    )  # fmt: skip
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
    add_generator(parser, dtype="that networks compute in (the run's)")
    parser.add_argument(
        "--out", "--grid", type=user_path, metavar="FILE.png",
        help="all pictures as one (samples.png; none where --images is given alone)",
    )  # fmt: skip
    parser.add_argument("--images", type=user_path, metavar="FOLDER", help="every picture as a file of its own")
    parser.add_argument("--count", type=positive, default=4, metavar="N", help="pictures per prompt (4)")
    parser.add_argument("--seed", type=int, default=0, help="of the latents (0)")
    parser.add_argument("--first-sample", type=int, default=0, metavar="N", help="sample number of column 1 (0)")
    parser.add_argument("--batch", type=positive, metavar="N", help="pictures that are computed at a time (--count)")


def run(arguments: argparse.Namespace) -> int:
    from diffpp_fast.evaluation.pictures import refuse_foreign_pictures
    from diffpp_fast.training.distributed import choose_device

    check_addresses(arguments.seed, arguments.first_sample, arguments.count)
    prompts = _prompts(arguments)
    grid = arguments.out or (None if arguments.images else Path("samples.png"))
    _check_grid(grid, len(prompts) * arguments.count)
    cells = [divmod(cell, arguments.count) for cell in range(len(prompts) * arguments.count)]
    single = [] if arguments.images is None else [_file_of(arguments.images, *cell) for cell in cells]
    refuse_foreign_pictures([*single, *([] if grid is None else [grid])])
    source = find_generator(arguments.model or arguments.source, arguments)
    refuse_idle_options([source], arguments)
    say(f"weights: {source.origin}")
    hide_loading_bars()
    ahead = prompts if arguments.stream else None
    model = source.load(choose_device(arguments.device), ahead=ahead, embeddings=arguments.embeddings)
    drawn = _draw(model, prompts, cells, arguments, keep=grid is not None)
    if arguments.images is not None:
        say(f"pictures: {arguments.images}")
    if grid is not None:
        _write_grid(grid, drawn, model, prompts, arguments)
        say(f"pictures: {grid}")
    return 0


def _draw(
    model: LoadedModel,
    prompts: Sequence[str],
    cells: Sequence[tuple[int, int]],
    arguments: argparse.Namespace,
    *,
    keep: bool,
) -> list[torch.Tensor]:
    """Draw batch by batch and write every picture if --images asks for them; return them if they are to be kept.

    `cells`: each picture's prompt number and column.
    """
    from diffpp_fast.evaluation.pictures import draw, facts_of
    from diffpp_fast.training.grids import write_png

    kept, batch = [], arguments.batch or arguments.count
    for start in range(0, len(cells), batch):
        part = cells[start : start + batch]
        texts = [prompts[number] for number, _ in part]
        samples = [arguments.first_sample + column for _, column in part]
        pictures = draw(model, texts, samples, seed=arguments.seed)
        if keep:
            kept.append(pictures)
        if arguments.images is not None:
            for cell, text, sample, picture in zip(part, texts, samples, pictures, strict=True):
                file = _file_of(arguments.images, *cell)
                write_png(file, picture.permute(1, 2, 0), facts_of(model, text, seed=arguments.seed, sample=sample))
    return kept


def _file_of(folder: Path, number: int, column: int) -> Path:
    return folder / f"{number:06d}_{column}.png"


def _write_grid(
    path: Path, drawn: Sequence[torch.Tensor], model: LoadedModel, prompts: Sequence[str], arguments: argparse.Namespace
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
    write_png(path, tile_bytes(torch.cat(list(drawn)), columns=arguments.count), facts)


def _prompts(arguments: argparse.Namespace) -> list[str]:
    from diffpp_fast.evaluation.prompts import read_prompts
    from diffpp_fast.training.prompts.source import is_unicode

    if bool(arguments.prompts) == (arguments.prompt_file is not None):
        raise ConfigurationError("sample what? Give prompts, or a file of them with --prompts FILE, and not both")
    if arguments.prompt_file is None:
        for prompt in arguments.prompts:
            if not is_unicode(prompt):
                raise ConfigurationError(f"the prompt {prompt!a} is not UTF-8")
        return list(arguments.prompts)
    return [prompt.text for prompt in read_prompts(arguments.prompt_file, column=arguments.column)]


def _check_grid(grid: Path | None, cells: int) -> None:
    if grid is not None and grid.suffix.lower() != ".png":
        raise ConfigurationError(f"--grid {grid}: must be a file that ends in .png; --images takes a folder")
    if grid is not None and cells > MOST_CELLS:
        raise ConfigurationError(f"a grid of {cells} pictures is too large: write them into a folder, --images FOLDER")
