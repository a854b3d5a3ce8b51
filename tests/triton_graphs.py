"""Traces every operator's Triton kernels with torch.compile, without a GPU: prints how many graphs each took.

Kernels are compiled for sm_90 instead of launched, so that results hold nothing; whether they are right is for the
interpreter and for `make gpu-check`.
"""

import torch
import torch.utils._triton
from gpu_gate import to_compile, traced

from benchmarks import variants
from benchmarks.gpu_build import CPU, compiling
from diffpp_fast import backends

# Without a GPU Dynamo takes Triton's kernels for any other Python.
torch.utils._triton.has_triton = lambda *_: True


def graphs(variant: variants.Variant) -> int:
    each = traced(variant, CPU, "aot_eager")
    list(each.steps(each.compiled))
    return int(each.counter.frame_count)


with compiling(90):
    for op in backends.OPS:
        every, _ = variants.ordered(op, (torch.float32, torch.bfloat16))
        print(op, max(graphs(variant) for variant in to_compile(every)))
