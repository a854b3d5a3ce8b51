"""`diffpp-fast train`."""

from __future__ import annotations

import argparse
import logging
import shlex

from diffpp_fast.cli.quiet import hide_loading_bars

DESCRIPTION = """\
Trains a one-step generator from a configuration.

  diffpp-fast train align.yaml
  diffpp-fast train align.yaml training.steps=200 rewards.optimised.scale=3 output=runs/strong
  diffpp-fast train align.yaml --resume latest

Into the configuration's `output` go checkpoints/, grids/ (sample pictures), metrics.jsonl, tensorboard/, config.yaml
(with every default written out) and, at the end, generator/ in diffusers' format. Ctrl-C saves a checkpoint first.
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "train",
        help="train a one-step generator from a configuration",
        description=DESCRIPTION,
        epilog="The configuration is explained key by key in docs/training.md.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="paths in it are relative to its folder")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="replaces a value of the configuration, written as in YAML; paths are relative to the working directory",
    )
    parser.add_argument(
        "--resume",
        choices=["latest"],
        help="go on from the newest undamaged checkpoint in the output folder; begin anew if it holds none",
    )
    parser.add_argument("--print-config", action="store_true", help="print the whole configuration and stop")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from diffpp_fast.training.loading import dump_config, load_config

    config = load_config(arguments.config, arguments.overrides)
    if arguments.print_config:
        print(dump_config(config), end="")
        return 0

    from diffpp_fast.training.trainer import Trainer

    logging.basicConfig(format="%(message)s")
    hide_loading_bars()
    logging.getLogger("diffpp_fast").setLevel(logging.INFO)
    outcome = Trainer(config, resume=arguments.resume is not None).run()
    if outcome.signal is not None:
        command = ["diffpp-fast", "train", arguments.config, *arguments.overrides, "--resume", "latest"]
        print(f"stopped after step {outcome.step}; to go on:\n  {shlex.join(command)}")
        return 128 + outcome.signal
    prompt = shlex.join(["diffpp-fast", "sample", "--run", config.output, "a prompt"])
    print(f"done: {outcome.step} steps, everything is in {config.output}; to see samples:\n  {prompt}")
    return 0
