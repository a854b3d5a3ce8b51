"""`diffpp-fast evaluate`."""

from __future__ import annotations

import argparse
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

    from diffpp_fast.evaluation.distances import Distances
    from diffpp_fast.evaluation.models import ModelSource

DESCRIPTION = """\
Scores generators: each draws the same prompts at the same latents, and what it draws is scored.

  diffpp-fast evaluate runs/align --prompts prompts.txt --metrics pick_score,clip_score --output build/scores
  diffpp-fast evaluate before=align.yaml after=runs/align --prompts prompts.txt --metrics rewards.py:imagenet \\
      --output build/compared
  diffpp-fast evaluate generator --config align.yaml --prompts captions_val2014.json --limit 5000 \\
      --metrics fid,kid --reference-images val2014 --inception weights-inception-2015-12-05-6726825d.pth \\
      --output build/fid

A MODEL is a run, a checkpoint, a folder that `diffpp-fast export` wrote, or a configuration, whose generator is then
taken as it begins. Metrics are image_reward, pick_score, hps_v21, clip_score, aesthetic, fid, kid, and any scorer as
configurations name it, file.py:name or module:name.
"""


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands, "evaluate", run, help="score generators on the same prompts and latents", description=DESCRIPTION,
        epilog="What each metric computes, and how published tables compare: docs/evaluation.md.",
    )  # fmt: skip
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="or NAME=MODEL, for the tables")
    add("--prompts", required=True, metavar="FILE", help="as a run reads them, or HPSv2's, PartiPrompts, MS-COCO's")
    add("--column", metavar="NAME", help="of the prompt in a table (prompt)")
    add("--limit", type=positive, metavar="N", help="only the first prompts (all)")
    add("--metrics", required=True, metavar="NAME,...", help="what to compute")
    add(
        "--set", dest="settings", action="append", default=[], metavar="METRIC.ARGUMENT=VALUE",
        help="an argument of a metric's factory, e.g. pick_score.path=/weights/PickScore_v1",
    )  # fmt: skip
    add("--output", type=user_path, required=True, metavar="FOLDER", help="for tables and pictures")
    add("--reference-images", type=user_path, metavar="FOLDER", help="of fid and kid")
    add("--inception", type=user_path, metavar="FILE", help="Inception's weights, for fid and kid")
    add("--images-per-prompt", type=positive, default=1, metavar="N", help="(1)")
    add("--seed", type=int, help="of the latents (20250101, which no training begins with)")
    add("--first-sample", type=int, default=0, metavar="N", help="sample number of the first prompt (0)")
    add("--batch", type=positive, default=8, metavar="N", help="pictures that are drawn and scored at a time (8)")
    add("--no-images", dest="images", action="store_false", help="keep no picture but the grid")
    add_generator(parser, dtype="that generators compute in (the run's)")


def run(arguments: argparse.Namespace) -> int:
    from diffpp_fast.evaluation.tables import refuse_used_folder
    from diffpp_fast.training.lock import FolderLock

    refuse_used_folder(arguments.output)
    with FolderLock(arguments.output, unlock=None, other="--output FOLDER"):
        refuse_used_folder(arguments.output)
        return _evaluate(arguments)


def _evaluate(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from diffpp_fast.evaluation.metrics import Scores, parse_metrics
    from diffpp_fast.evaluation.models import refuse_equal_names
    from diffpp_fast.evaluation.pictures import SEED, STRIDE, EvaluationPlan
    from diffpp_fast.evaluation.prompts import read_prompts
    from diffpp_fast.evaluation.run import evaluate
    from diffpp_fast.evaluation.tables import print_summary
    from diffpp_fast.training.distributed import choose_device

    seed = SEED if arguments.seed is None else arguments.seed
    check_addresses(seed, arguments.first_sample, arguments.images_per_prompt * STRIDE)
    wanted, distances = parse_metrics([name.strip() for name in arguments.metrics.split(",")], arguments.settings)
    prompts = read_prompts(arguments.prompts, column=arguments.column, limit=arguments.limit)
    sources = [_source(text, arguments) for text in arguments.models]
    refuse_equal_names(sources)
    refuse_idle_options(sources, arguments)
    hide_loading_bars()
    device = choose_device(arguments.device)
    plan = EvaluationPlan(
        sources=sources,
        prompts=prompts,
        prompt_file=arguments.prompts,
        images_per_prompt=arguments.images_per_prompt,
        seed=seed,
        first_sample=arguments.first_sample,
        batch=arguments.batch,
        device=device,
        keep_images=arguments.images,
        stream=arguments.stream,
        embeddings=arguments.embeddings,
    )
    judge = Scores(wanted, device) if wanted else None
    reference = _distances(distances, arguments, device) if distances else None
    total = len(prompts) * arguments.images_per_prompt
    with Progress(console=Console(stderr=True), transient=True) as bar:
        tasks = {source.name: bar.add_task(source.name, total=total) for source in sources}
        summary = evaluate(
            plan, judge, reference, arguments.output, lambda name, done: bar.update(tasks[name], completed=done)
        )
    # Where it isn't read from a terminal, tables should not be broken at 80 columns.
    width = None if Console().is_terminal else 200
    print_summary(summary, Console(width=width, soft_wrap=True, highlight=False, markup=False))
    say(f"everything is in {arguments.output}: summary.json, prompts.csv, pictures.csv, grid.png")
    return 0


def _source(text: str, arguments: argparse.Namespace) -> ModelSource:
    name, equals, path = text.partition("=")
    named = bool(equals) and "/" not in name and not Path(text).exists()
    return find_generator(Path(path if named else text), arguments, name if named else None)


def _distances(names: list[str], arguments: argparse.Namespace, device: torch.device) -> Distances:
    from diffpp_fast.evaluation.distances import Distances
    from diffpp_fast.evaluation.inception import load_inception

    if arguments.reference_images is None:
        raise ConfigurationError(f"{' and '.join(names)}: the pictures to compare with are missing: --reference-images")
    network = load_inception(arguments.inception, device)
    return Distances(names, network, arguments.reference_images, batch=arguments.batch, device=device)
