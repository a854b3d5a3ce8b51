"""`python -m benchmarks loops`: training loops written by hand, unfused, against the same loops with this package.

The loops are those of docs/embedding.md, before and after, at the sizes that stand there. Networks are stand-ins of one
convolution, so that the times show the arithmetic around them; the last one's autoencoder is small, but a true one.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any

import torch

from benchmarks.memory import saved_bytes
from benchmarks.tables import Table, markdown
from benchmarks.timing import clock_of, intra_op_threads, turns

PAGE = Path(__file__).parent.parent / "docs/embedding.md"
NAMES = ("DMD", "SiD", "ReFL")
PARTS = ("before", "after")
WARM_UPS = 3


def block(name: str, part: str) -> CodeType:
    """Return a loop's code, or the code that makes what both parts are given."""
    found = re.search(
        rf'^```python title="{name}: {part}"\n(.*?)^```$', PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    assert found is not None, f"{PAGE}: no block {name}: {part}"
    return compile(found[1], f"{name}: {part}", "exec")


def measure(name: str, rounds: int, device: torch.device) -> list[str]:
    """Return the row of one loop: the median time of both parts, and what autograd keeps."""
    given: dict[str, Any] = {}
    exec(block(name, "what is given"), given)
    codes = {part: block(name, part) for part in PARTS}
    samples: dict[str, list[float]] = {part: [] for part in PARTS}
    for turn, part in turns(PARTS, rounds, WARM_UPS):
        seconds = clock_of(device)(lambda: exec(codes[part], dict(given)))  # noqa: B023
        if turn >= 0:
            samples[part].append(seconds)
    faster = statistics.median(b / a for b, a in zip(*samples.values(), strict=True))
    networks = [value for value in given.values() if isinstance(value, torch.nn.Module)]
    kept = [saved_bytes(lambda: exec(code, dict(given)), *networks) for code in codes.values()]  # noqa: B023
    times = (f"{1e3 * statistics.median(each):.2f}" for each in samples.values())
    return [name, *times, f"{faster:.2f} x", *(f"{size / 2**20:.1f}" for size in kept)]


def add_arguments(add: Callable[..., Any]) -> None:
    add("--threads", type=int, default=1, help="of the CPU (1)")
    add("--rounds", type=int, default=200, help="in which both are timed by turns (200)")


def run(arguments: argparse.Namespace, device: torch.device) -> int:
    header = ["loop", "before ms", "after ms", "faster", "kept before MiB", "after MiB"]
    with intra_op_threads(arguments.threads):
        print(markdown(Table([header, *(measure(name, arguments.rounds, device) for name in NAMES)])), end="")
    return 0
