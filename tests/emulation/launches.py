"""Whether the GPU gate's cases reach every launch of csrc's kernels: `python launches.py FOLDER`, on an emulated build.

Prints those that none reaches on any GPU; the exit code is then 1.
"""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import variants
from diffpp_fast import backends, native, use_backend

#: With clusters of blocks, and without.
ARCHS = ("90", "80")


def reached(ops: list[str]) -> list[str]:
    """Run the gate's cases of these operators on the emulated GPU and return what was launched."""
    with use_backend("cpu"):
        for op in ops:
            every, pairs = variants.ordered(op)
            for variant in every[:pairs]:
                variants.make(variant, torch.device("cpu")).run()
    library = ctypes.CDLL(str(native.LIBRARY))
    library.diffpp_launched.restype = ctypes.c_char_p
    return library.diffpp_launched().decode().splitlines()


def main() -> None:
    served = [op for op in backends.OPS if backends.has_kernels(op, "cuda")]
    if len(sys.argv) == 1:
        print("\n".join(reached(served)))
        return
    launched: set[str] = set()
    for arch in ARCHS:
        # A process for each: a library asks for its GPU once.
        environment = os.environ | {"DIFFPP_EMULATED_ARCH": arch}
        done = subprocess.run(
            [sys.executable, __file__], env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        launched.update(done.stdout.splitlines())
    missed = set(Path(sys.argv[1], "launches.txt").read_text().splitlines()) - launched
    for launch in sorted(missed):
        print(f"{launch}: no case of the GPU gate reaches it")
    print(f"{len(launched)} launches of csrc's kernels reached, {len(missed)} missed")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
