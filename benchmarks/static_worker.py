"""A process of `benchmarks static`: reads a task from its input, writes what it counted to the file that is named."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import torch

#: The library that tells of csrc's launches, in the environment.
LIBRARY = "DIFFPP_FAST_TOLD"


def main() -> None:
    if library := os.environ.get(LIBRARY):
        # Before the package is imported, which loads the real one.
        load = torch.ops.load_library
        torch.ops.load_library = lambda path: load(library)  # type: ignore[method-assign]
    from benchmarks import static

    task = pickle.load(sys.stdin.buffer)
    Path(sys.argv[1]).write_bytes(pickle.dumps(static.counted(task)))


if __name__ == "__main__":
    main()
