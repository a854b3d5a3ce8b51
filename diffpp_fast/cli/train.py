"""`diffpp-fast train`."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from diffpp_fast.cli.options import Commands, add_command, add_config, add_unlock
from diffpp_fast.cli.plan import add_machine, print_plan_of
from diffpp_fast.cli.quiet import show_log
from diffpp_fast.terminal import printable, say
from diffpp_fast.user_paths import refuse_no_folder

DESCRIPTION = """\
Trains a one-step generator from a configuration.

  diffpp-fast train align.yaml
  diffpp-fast train align.yaml training.steps=200 rewards.optimised.scale=3 output=runs/strong
  diffpp-fast train align.yaml --resume latest
  diffpp-fast train align.yaml --resume runs/align/checkpoints/step_000500 output=runs/again
  diffpp-fast train align.yaml --dry-run --gpus 8 --gpu a100-80

Into the configuration's `output` go checkpoints/, grids/ (sample pictures), metrics.jsonl, tensorboard/, config.yaml
(with every default written out) and, at the end, generator/ in diffusers' format. Ctrl-C saves a checkpoint first.
What no run has written is not replaced, and one run at a time writes into a folder.
"""


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands, "train", run, help="train a one-step generator from a configuration", description=DESCRIPTION,
        epilog="The configuration is explained key by key in docs/training.md.",
    )  # fmt: skip
    add_config(
        parser, "replaces a value of the configuration, written as in YAML; paths are relative to the working directory"
    )
    parser.add_argument(
        "--resume",
        metavar="latest|auto|best|FOLDER",
        help="latest, or auto: go on from the newest undamaged checkpoint in the output folder (begin anew if it holds "
        "none, so that a launcher may start the command again); from the "
        "best one by training.keep_best, or from a given checkpoint or run",
    )
    parser.add_argument(
        "--accept-changed",
        metavar="INPUT,...",
        default="",
        help="with --resume: go on although the content of these has changed: reference, decoder, reward, ... "
        "(docs/checkpoints.md)",
    )
    add_unlock(parser)
    parser.add_argument("--print-config", action="store_true", help="print the whole configuration and stop")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build the networks without numbers, print what the run would take (as `diffpp-fast plan`) and stop",
    )
    add_machine(parser.add_argument_group("with --dry-run"))


def run(arguments: argparse.Namespace) -> int:
    from diffpp_fast.training.loading import dump_config, load_config
    from diffpp_fast.training.local_inputs import check_local_inputs

    planned = arguments.print_config or arguments.dry_run
    config = load_config(arguments.config, arguments.overrides, check=None if planned else check_local_inputs)
    if arguments.print_config:
        written = dump_config(config)
        # On a terminal nothing is obeyed; a file gets every letter as it is.
        print(printable(written) if sys.stdout.isatty() else written, end="")
        return 0
    if arguments.dry_run:
        from diffpp_fast.training.build.networks import refuse_quantization, refuse_weights
        from diffpp_fast.training.output import refuse_foreign_output

        # Whether one may write there is for the machine of the run.
        refuse_no_folder("output", Path(config.output), writable=False)
        refuse_foreign_output(config)
        code = print_plan_of(arguments)
        refuse_quantization(config)
        refuse_weights(config, download=False)
        return code

    from diffpp_fast.training.trainer import Trainer

    show_log()
    accepted = [name for name in arguments.accept_changed.split(",") if name]
    resume = "latest" if arguments.resume == "auto" else arguments.resume
    trainer = Trainer(config, resume=resume, accept_changed=accepted, unlock=arguments.unlock)
    complete = trainer.step >= config.training.steps
    outcome = trainer.run()
    tell = say if trainer.world.is_main else lambda _: None
    if outcome.signal is not None:
        command = ["diffpp-fast", "train", arguments.config, *arguments.overrides, "--resume", "latest"]
        tell(f"stopped after step {outcome.step}; to go on:\n  {shlex.join(command)}")
        return 128 + outcome.signal
    prompt = shlex.join(["diffpp-fast", "sample", "--run", config.output, "a prompt"])
    done = f"nothing left to do after {outcome.step} steps" if complete else f"done: {outcome.step} steps"
    tell(f"{done}, everything is in {config.output}; to see samples:\n  {prompt}")
    return 0
