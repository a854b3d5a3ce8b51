"""How often a launch executes each instruction of its machine code, and which bytes it asks for.

Some programs of a launch are walked, all their threads in lockstep, with the arguments that the launch has: integers,
predicates and addresses are computed as the GPU would, so that every loop turns as often as it would there. Numbers
that are read from tensors, and what follows from them, are unknown and are not asked for: only a branch can depend on
them, and it is then taken as ordinary numbers would have it (`interpreter.Walk`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.machine_code import Function
from benchmarks.walk import accesses, integers, numbers  # noqa: F401 - they enter the functions of instructions
from benchmarks.walk.interpreter import Counts, Walk, WalkError
from benchmarks.walk.memory import Memory, Region
from benchmarks.walk.threads import WARP, Shape

__all__ = ["WARP", "Counts", "Memory", "Region", "Shape", "WalkError", "chosen_programs", "walk"]


def chosen_programs(total: int, most: int) -> list[int]:
    """Return the programs that stand for all: every one of few, else some that no period of the grid lines up with."""
    if total <= most:
        return list(range(total))
    golden = (5**0.5 - 1) / 2
    return sorted({int((number + 0.5) * golden % 1.0 * total) for number in range(most)})


def walk(kernel: Function, bank: bytes, shape: Shape, memory: Memory, programs: Sequence[int]) -> Counts:
    """Follow some programs of a launch.

    Args:
        kernel: what is launched.
        bank: constant bank 0, as the driver fills it.
        shape: of block and grid.
        memory: its tensors.
        programs: their numbers in the grid.

    Raises:
        WalkError: a loop or an address of code depends on numbers that are not known.
    """
    walker = Walk(kernel, {0: bank, **kernel.banks}, shape, memory, programs)
    with np.errstate(all="ignore"):
        walker.run()
    return walker.counts
