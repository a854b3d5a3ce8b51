"""`diffpp-fast`: the entry point. Every subcommand imports its packages when it runs."""

from __future__ import annotations

import argparse
import errno
import gc
import io
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from diffpp_fast import install
from diffpp_fast.cli import controls, doctor, embed, evaluate, export, plan, report, sample, train
from diffpp_fast.cli.environment import check_environment
from diffpp_fast.cli.quiet import drop_output, open_streams, silence_libraries
from diffpp_fast.errors import UserError
from diffpp_fast.terminal import complain
from diffpp_fast.version import __version__

DESCRIPTION = """\
Aligns one-step text-to-image generators with a reward (Diff-Instruct++), from prompts alone.

  diffpp-fast plan --model sd15 --gpus 8 --gpu h100
  diffpp-fast train align.yaml training.steps=200
  diffpp-fast controls align.yaml --resume latest
  diffpp-fast report runs/emoji
  diffpp-fast sample --run runs/emoji "a red apple" --out apple.png
  diffpp-fast evaluate runs/emoji --prompts prompts.txt --metrics image_reward --output scores
  diffpp-fast export runs/emoji --out generator
  diffpp-fast doctor
"""
EPILOG = "`diffpp-fast COMMAND --help` tells more. The configuration is explained key by key in docs/training.md."

#: Packages of the extra `train`; operators and methods do without.
TRAIN_PACKAGES = (
    "diffusers", "transformers", "safetensors", "pydantic", "yaml", "PIL", "rich", "tensorboard", "ftfy", "jinja2",
    "matplotlib",
)  # fmt: skip

#: With this in the environment, errors come with the place in the code.
TRACEBACK = "DIFFPP_FAST_TRACEBACK"


def run() -> NoReturn:
    """Run a subcommand as this process, which ends with its exit code."""
    try:
        code = main()
    finally:
        # What is alive ends with the process: the interpreter need not search it for cycles first.
        gc.freeze()
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):  # a launcher's, or set on joining the others
        from diffpp_fast.training.distributed import leave

        leave(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return the exit code.

    It is 0, 2 for a user's error, 75 where other processes of the run are gone, 128 + n after signal n.
    """
    open_streams()
    try:
        return _main(argv)
    except BrokenPipeError:  # the reader has seen enough, as `head` has
        return 128 + signal.SIGPIPE
    finally:
        drop_output()


def _main(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="diffpp-fast",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"diffpp-fast {__version__}")
    # DeepSpeed's launcher puts this in front of a program's own arguments; LOCAL_RANK says the same.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (plan, embed, train, controls, report, sample, evaluate, export, doctor):
        command.add_parser(commands)
    # Other names are argparse's to refuse; this one was a command once.
    if (sys.argv[1:] if argv is None else list(argv))[:1] == ["bench"]:
        return _fail("bench is no command: measuring is `python -m benchmarks ...` in a clone of the repository")
    # A terminal whose encoding lacks a letter is shown its number.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    silence_libraries()
    try:
        arguments, late = parser.parse_known_args(argv)
        if late:
            # argparse takes no more positional arguments once an option has stood between them.
            if not hasattr(arguments, "overrides") or any(word.startswith("-") for word in late):
                parser.error(f"unrecognized arguments: {' '.join(late)}")
            arguments.overrides += late
        check_environment(os.environ)
        try:
            code: int = arguments.run(arguments)
        except SystemExit as error:  # of no command, but of code that a configuration names
            return _fail(f"a reward, or other code that was named, has ended the program (exit code {error.code})")
        return code
    except UserError as error:
        return _fail(error)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in TRAIN_PACKAGES:
            raise
        return _fail(f"{package} is not installed: {install.extra('train')}")
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        # With a file's name it is a path that was given or made of one: not there, no folder, too long, a full disk.
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        return _fail(f"{error} ({TRACEBACK}=1 shows where)")


def _fail(error: object) -> int:
    if os.environ.get(TRACEBACK):
        traceback.print_exc()
    complain(f"error: {error}")
    return error.exit_code if isinstance(error, UserError) else UserError.exit_code
