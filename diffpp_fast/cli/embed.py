"""`diffpp-fast embed`."""

from __future__ import annotations

import argparse
import os
import time
from contextlib import nullcontext
from pathlib import Path

from diffpp_fast.cli.options import Commands, add_command, add_config, positive
from diffpp_fast.cli.quiet import hide_loading_bars
from diffpp_fast.errors import ConfigurationError
from diffpp_fast.terminal import say
from diffpp_fast.user_paths import refuse_no_folder, user_path

DESCRIPTION = """\
Writes the text encoder's embeddings of a configuration's prompts to the disk. A run with `prompts.embeddings` reads
them and doesn't load the encoder.

  diffpp-fast embed align.yaml --out embeddings
  torchrun --nproc-per-node 8 -m diffpp_fast embed align.yaml --out embeddings
  diffpp-fast embed align.yaml --out embeddings --shard 3/8
  diffpp-fast train align.yaml prompts.embeddings=embeddings

Started again it goes on where it was stopped: shards that are complete stay.
"""


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands, "embed", run, help="write the prompts' text embeddings to the disk", description=DESCRIPTION,
        epilog="docs/prompts.md tells what they take and what they are checked against.",
    )  # fmt: skip
    add_config(parser)
    parser.add_argument(
        "--out", type=user_path, metavar="FOLDER", help="default: the configuration's prompts.embeddings"
    )
    parser.add_argument(
        "--batch",
        type=positive,
        help="prompts that are encoded together (16, or as the folder was begun). The last bits of their embeddings "
        "depend on it",
    )
    parser.add_argument(
        "--shard",
        type=_part,
        default=(1, 1),
        metavar="I/N",
        help="write the I-th of N parts: for N jobs that know nothing of each other but the folder",
    )
    parser.add_argument(
        "--check", action="store_true", help="read all that is there, too, and write what is damaged anew"
    )
    parser.add_argument(
        "--stream",
        action="store_true",
        help="keep one block of a text encoder in memory at a time, and read them for each shard anew",
    )


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 1 to N, got {text}")
    return int(part), int(parts)


def run(arguments: argparse.Namespace) -> int:
    from diffpp_fast.networks.streaming import in_step, streaming
    from diffpp_fast.training.build.text import embedding_facts, extra_prompts, load_text
    from diffpp_fast.training.distributed import choose_device
    from diffpp_fast.training.launch import find_place
    from diffpp_fast.training.loading import load_config
    from diffpp_fast.training.lock import LOCK, FolderLock
    from diffpp_fast.training.prompts import open_prompts
    from diffpp_fast.training.prompts.embed import EmbeddingWriter, one_by_one
    from diffpp_fast.training.prompts.embeddings import read_manifest

    config = load_config(arguments.config, arguments.overrides)
    folder = arguments.out or (Path(config.prompts.embeddings) if config.prompts.embeddings else None)
    if folder is None:
        raise ConfigurationError("embed: name a folder with --out FOLDER or prompts.embeddings=FOLDER")
    refuse_no_folder("embeddings into", folder)
    # No process group is needed, so no address.
    rank, size, local_rank, _ = find_place(os.environ)
    part, parts = arguments.shard
    rank, size = (part - 1) * size + rank, parts * size
    hide_loading_bars()
    prompts = open_prompts(config.prompts)
    manifest = read_manifest(folder)
    facts = embedding_facts(config, prompts, manifest["seen"] if manifest else {})
    with streaming() if arguments.stream else nullcontext():
        encoder = load_text(config.models)[0].to(choose_device(config.device, local_rank))
    # Each process of another launch has a counterpart here: it is refused.
    with FolderLock(folder, name=f".{rank}{LOCK}", unlock=None, other="--out FOLDER"):
        writer = EmbeddingWriter(
            folder, facts, prompts, encoder, encoder.null(), batch=arguments.batch, rank=rank, size=size,
            check=arguments.check, run_all=in_step if arguments.stream else one_by_one,
        )  # fmt: skip
        who = f"process {rank} of {size}: " if size > 1 else ""
        for said in writer.damaged.values():
            say(f"{who}written anew: {said}")
        kept = len(writer.shards) - len(writer.missing)
        say(f"{who}{len(prompts)} prompts; {kept} of {len(writer.shards)} shards are there already")
        start, written = time.monotonic(), 0
        for number, count in enumerate(writer.write(extra_prompts(config)), 1):
            written += count
            speed = written / (time.monotonic() - start)
            say(f"{who}shard {kept + number} of {len(writer.shards)}, {speed:.0f} prompts/s")
    left = writer.left()
    say(
        f"{who}done. "
        + (f"{left} shards are left to other processes" if left else f"Train with prompts.embeddings={folder}")
    )
    return 0
