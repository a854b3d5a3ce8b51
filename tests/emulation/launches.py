"""Whether the GPU gate's cases reach every launch of csrc's kernels: `python launches.py FOLDER`, on an emulated build.

Prints those that none reaches; the exit code is then 1.
"""

import ctypes
import sys
from pathlib import Path

import torch

from benchmarks import variants
from diffpp_fast import backends, native, use_backend

with use_backend("cpu"):
    for op in backends.OPS:
        if not backends.has_kernels(op, "cuda"):
            continue
        every, pairs = variants.ordered(op)
        for variant in every[:pairs]:
            variants.make(variant, torch.device("cpu")).run()
library = ctypes.CDLL(str(native.LIBRARY))
library.diffpp_launched.restype = ctypes.c_char_p
launched = library.diffpp_launched().decode().splitlines()
missed = set(Path(sys.argv[1], "launches.txt").read_text().splitlines()) - set(launched)
for launch in sorted(missed):
    print(f"{launch}: no case of the GPU gate reaches it")
print(f"{len(launched)} launches of csrc's kernels reached, {len(missed)} missed")
sys.exit(bool(missed))
