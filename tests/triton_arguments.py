"""Prints the cases of Triton's kernels that do not compile, one a line: `benchmarks.gpu_build`, and shapes.

A process of its own, in which Triton is a compiler and not the interpreter.
"""

import torch

from benchmarks.gpu_build import lowering, refused
from diffpp_fast import backends, ops

#: Groups of one channel, of one pixel, and of one of each.
GROUPS = (
    ((1, 32, 100, 100), 32, torch.contiguous_format),
    ((1, 8, 128, 128), 8, torch.channels_last),
    ((1, 1, 200, 200), 1, torch.contiguous_format),
    ((2, 32), 32, torch.contiguous_format),
    ((1, 20000), 1, torch.contiguous_format),
)

wrong = [sentence for op in backends.OPS for sentence in refused(op, exhaustive=False)]
with lowering(exhaustive=False) as more:
    for shape, groups, memory_format in GROUPS:
        x = torch.zeros(shape).contiguous(memory_format=memory_format).requires_grad_()
        weight, bias = torch.ones(2, shape[1]).requires_grad_()
        ops.group_norm_silu(x, groups, weight, bias).sum().backward()
    x, scale, shift = torch.zeros(2, 3, 1), torch.zeros(2, 1, 1), torch.zeros(2, 1, 1)
    ops.ada_layer_norm(x.requires_grad_(), scale.requires_grad_(), shift).sum().backward()
for sentence in (*wrong, *more):
    print(sentence)
