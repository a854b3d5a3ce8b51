"""`diffpp-fast controls`."""

from __future__ import annotations

import argparse
import gc
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffpp_fast.cli.options import Commands, add_command, add_config, add_unlock
from diffpp_fast.cli.quiet import show_log
from diffpp_fast.errors import CheckpointError, ConfigurationError
from diffpp_fast.terminal import say
from diffpp_fast.user_paths import refuse_no_folder, user_path

if TYPE_CHECKING:
    from diffpp_fast.training import Outcome
    from diffpp_fast.training.controls import Control

DESCRIPTION = """\
Trains a configuration and its controls, one after the other: without the reward's gradient, without guidance, and
without both, from the same seed on the same prompts, latents, times and noise. Then it writes a report on them.

  diffpp-fast controls align.yaml
  diffpp-fast controls align.yaml training.steps=200 output=runs/emoji-controls
  diffpp-fast controls align.yaml --resume latest
  diffpp-fast controls align.yaml output=runs/emoji-controls --full runs/emoji
  torchrun --nproc-per-node 8 -m diffpp_fast controls align.yaml --only no-reward

Into the configuration's `output` go full/, no-reward/, no-guidance/ and neither/, as far as there is something to
switch off, and report.html.
"""


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands, "controls", run, help="train a configuration with and without reward and guidance",
        description=DESCRIPTION, epilog="What each control tells is in docs/reporting.md.",
    )  # fmt: skip
    add_config(parser)
    parser.add_argument(
        "--resume", choices=["latest"], help="leave out what is complete, and go on with what was interrupted"
    )
    add_unlock(parser)
    parser.add_argument("--only", metavar="NAME", help="train this one alone; several processes need it")
    parser.add_argument(
        "--full",
        type=user_path,
        metavar="RUN",
        help="a complete run of the same configuration, which is not trained again",
    )


def run(arguments: argparse.Namespace) -> int:
    from diffpp_fast.report import check_drawing, is_run, refuse_foreign_report, write_report
    from diffpp_fast.training.controls import NAMES, check_control, controls_of
    from diffpp_fast.training.launch import find_place
    from diffpp_fast.training.loading import load_config
    from diffpp_fast.training.local_inputs import check_local_inputs
    from diffpp_fast.training.prompts import open_prompts

    check_drawing()
    config = load_config(arguments.config, arguments.overrides, check=check_local_inputs)
    controls = controls_of(config)
    if arguments.full is not None:
        controls[0] = controls[0].at(arguments.full)
    chosen = _chosen(controls, arguments.only)
    for control in chosen:
        refuse_no_folder("output", control.folder)
    prompts = open_prompts(config.prompts)
    # All of them before the first one begins.
    complete = [_check(control, arguments, check_control(control, prompts)) for control in chosen]
    refuse_foreign_report(Path(config.output) / "report.html")

    is_main = find_place(os.environ).rank == 0
    show_log()
    tell = say if is_main else lambda _: None
    left_out = [name for name in NAMES if name not in {control.name for control in controls}]
    if left_out:
        absent = "reward" if "no-reward" in left_out else "guidance"
        tell(f"{', '.join(left_out)}: left out, there is no {absent} to switch off")
    for control, done in zip(chosen, complete, strict=True):
        tell(f"{control.name}: {'complete, in' if done else 'into'} {control.folder}")
        if done:
            continue
        outcome = _train(control, arguments)
        if outcome.signal is not None:
            tell(f"stopped after step {outcome.step} of {control.name}; to go on:\n  {_command(arguments)}")
            return 128 + outcome.signal
    if is_main:
        runs = [control.folder for control in controls if is_run(control.folder)]
        say(f"report: {write_report(runs, Path(config.output) / 'report.html')}")
    return 0


def _chosen(controls: Sequence[Control], only: str | None) -> list[Control]:
    from diffpp_fast.training.launch import find_place

    names = ", ".join(control.name for control in controls)
    if only is None and find_place(os.environ).size > 1:
        raise ConfigurationError(
            f"several processes train one run per launch: launch one after the other with --only NAME, of {names}"
        )
    chosen = [control for control in controls if only in (None, control.name)]
    if not chosen:
        raise ConfigurationError(f"--only {only}: the runs of this configuration are {names}")
    return chosen


def _check(control: Control, arguments: argparse.Namespace, complete: bool | None) -> bool:
    """Whether this run is complete; refuse one that may not go on. `complete` is None where nothing is done yet."""
    from diffpp_fast.training.controls import steps_done

    if control.folder == arguments.full:
        if not complete:
            done, steps = steps_done(arguments.full), control.config.training.steps
            shorter = (
                f", which ended at step {done} of this configuration's {steps}" if done not in (None, steps) else ""
            )
            raise CheckpointError(
                f"--full {arguments.full}: it is no complete run{shorter}: train it to its end first"
                + (f", or say training.steps={done}" if shorter else "")
            )
    elif complete is not None and arguments.resume is None:
        raise CheckpointError(
            f"{control.folder} already holds checkpoints: go on with --resume latest, or choose another output=FOLDER"
        )
    return bool(complete)


def _train(control: Control, arguments: argparse.Namespace) -> Outcome:
    from diffpp_fast.training.trainer import Trainer

    # The run before leaves cycles of references: a trainer's listeners know it and it knows them.
    gc.collect()
    return Trainer(control.config, resume=arguments.resume, unlock=arguments.unlock).run()


def _command(arguments: argparse.Namespace) -> str:
    command = ["diffpp-fast", "controls", arguments.config, *arguments.overrides, "--resume", "latest"]
    for option in ("only", "full"):
        if getattr(arguments, option) is not None:
            command += [f"--{option}", str(getattr(arguments, option))]
    return shlex.join(command)
