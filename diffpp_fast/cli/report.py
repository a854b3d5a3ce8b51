"""`diffpp-fast report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffpp_fast.cli.options import Commands, add_command
from diffpp_fast.terminal import say
from diffpp_fast.user_paths import user_path

DESCRIPTION = """\
Writes what runs have logged as one HTML page that needs nothing else: curves of rewards and divergences with the
warnings, sample grids before and after, configurations, versions, and where a step's time goes.

  diffpp-fast report runs/emoji
  diffpp-fast report runs/emoji runs/control --output comparison.html
  diffpp-fast report runs/emoji-controls

Several runs stand side by side, all compared with the first; a folder of `diffpp-fast controls` is all runs in it. The
curves and pictures are beside the page as PNGs, too. A run may still be going, or have been killed.
"""


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands, "report", run, help="write a page about runs", description=DESCRIPTION,
        epilog="How to read it is in docs/reporting.md.",
    )  # fmt: skip
    parser.add_argument(
        "runs", nargs="+", type=user_path, metavar="RUN", help="the output folder of a run or of controls"
    )
    parser.add_argument(
        "--output",
        type=user_path,
        metavar="FILE.html",
        help="the page to write; default: report.html in the folder, of several folders in the working directory",
    )


def run(arguments: argparse.Namespace) -> int:
    from diffpp_fast.report import find_runs, write_report

    folders = [run for folder in arguments.runs for run in find_runs(folder)]
    output = arguments.output or (arguments.runs[0] if len(arguments.runs) == 1 else Path()) / "report.html"
    say(f"report: {write_report(folders, output)}")
    return 0
