"""`diffpp-fast sample`."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffpp_fast.cli.quiet import hide_loading_bars

DESCRIPTION = """\
Draws pictures with a trained generator: one row per prompt, one column per latent.

  diffpp-fast sample "a red apple"
  diffpp-fast sample --run runs/emoji "a red apple" "a green frog" --count 8 --seed 1 --out pictures.png

A picture is a function of the weights, its prompt, the seed and its column.
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "sample",
        help="draw pictures with a trained generator",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    parser.add_argument(
        "--run",
        dest="source",
        type=Path,
        metavar="FOLDER",
        help="a run's output folder, or one of its checkpoints; default: the run under runs/ that saved last",
    )
    parser.add_argument(
        "--checkpoint",
        choices=["latest", "best"],
        default="latest",
        help="of a run's checkpoints the newest, or the best by its training.keep_best (latest)",
    )
    parser.add_argument("--out", type=Path, default=Path("samples.png"), help="the picture to write (samples.png)")
    parser.add_argument("--count", type=_positive, default=4, help="pictures per prompt (4)")
    parser.add_argument("--seed", type=int, default=0, help="of the latents (0)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    import torch

    from diffpp_fast.errors import ConfigurationError
    from diffpp_fast.training.distributed import choose_device
    from diffpp_fast.training.export import find_weights, load_sampler
    from diffpp_fast.training.grids import decode, sample_latents, tile, write_png

    if not 0 <= arguments.seed < 2**64:
        raise ConfigurationError(f"--seed must be in [0, 2^64), got {arguments.seed}")
    weights = find_weights(arguments.source, arguments.checkpoint)
    print(f"weights: {weights}")
    hide_loading_bars()
    device = choose_device(arguments.device)
    config, sampler = load_sampler(weights, device)
    if sampler.decoder is None:
        raise ConfigurationError(f"{weights.folder / 'config.yaml'}: models.decoder is missing, so there are no images")
    count = arguments.count
    latents = sample_latents(
        sampler,
        [prompt for prompt in arguments.prompts for _ in range(count)],
        torch.arange(count, device=device).repeat(len(arguments.prompts)),
        seed=arguments.seed,
        shape=config.models.latent_shape,
        batch=count,
    )
    write_png(arguments.out, tile(decode(sampler, latents, batch=count), columns=count))
    print(f"pictures: {arguments.out}")
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
