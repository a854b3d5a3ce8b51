"""`python -m benchmarks static`: what every GPU kernel executes and moves, counted in its machine code, without a GPU.

The public operators run on the CPU's tensors, their launches are compiled for the GPU that is named and not launched;
`machine_code.Walk` then goes through some programs of each launch with the launch's own arguments.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import backends, tables
from benchmarks import csrc_launches as csrc_launches_module
from benchmarks.cases import Case, all_cases, make_inputs
from benchmarks.csrc_launches import csrc_launches
from benchmarks.launches import Count, Launch, count, triton_launches
from benchmarks.tables import Table
from benchmarks.walk import WARP
from diffpp_fast.selftest import CPU


class Gpu(NamedTuple):
    """A GPU as the caps reckon with it."""

    name: str
    arch: int
    multiprocessors: int
    clock: float  # Hz, that it holds under load
    slots: int  # instructions of warps that a multiprocessor issues in a cycle
    copy: float  # bytes per second, read and written
    cache: int  # bytes of the last level

    @property
    def per_byte(self) -> float:
        """Instructions of threads that may go with a byte before issuing them limits, and not memory."""
        return WARP * self.multiprocessors * self.slots * self.clock / self.copy


GPUS = {gpu.name: gpu for gpu in (Gpu("H200", 90, 132, 1.755e9, 4, 4.3e12, 50 * 2**20),)}


def counts_of(case: Case, dtype: torch.dtype, gpu: Gpu, backend: str, library: Path | None) -> list[list[Count]]:
    """Return the launches of a case's forward and, if there is one, of its backward pass, counted."""
    inputs = make_inputs(case, dtype, CPU)
    call = inputs.call
    found: list[list[Count]] = [[]]

    def launched(launch: Launch) -> None:
        found[-1].append(count(launch, gpu.cache))

    if backend == "triton":
        context = triton_launches(gpu.arch, launched)
    else:
        assert library is not None
        tensors = [(name, value) for name, value in call.arguments.items() if isinstance(value, Tensor)]
        if call.outer is not None:
            tensors.append(("outer", call.outer))
        context = csrc_launches(library, gpu.arch, case.op, tensors, launched)
    with context:
        output = call.forward(**call.arguments)
        if call.wrt:
            found.append([])
            first = output if isinstance(output, Tensor) else output[0]
            torch.autograd.grad(first, [call.arguments[name] for name in call.wrt], call.outer)
    return found


def elements_of(case: Case) -> int:
    """Return the elements of what a case's operator works on."""
    return case.elements("y" if case.op == "geglu" else "x")


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def add_arguments(add: Callable[..., Any]) -> None:
    add("--ops", type=lambda text: text.split(","), default=list(backends.OPS), metavar="NAME,...")
    add("--dtypes", type=lambda text: text.split(","), default=["bf16"], metavar="NAME,...")
    add("--sizes", type=lambda text: text.split(","), metavar="NAME,...")
    add("--backends", type=lambda text: text.split(","), default=["triton"], metavar="NAME,...")
    add("--gpu", default="H200", choices=[*GPUS])
    add("--no-inductor", dest="inductor", action="store_false", help="leave torch.compile's code out")
    add("--opcodes", action="store_true", help="print each launch's opcodes too")


def run(arguments: argparse.Namespace, device: torch.device) -> int:
    gpu = GPUS[arguments.gpu]
    header = (
        "case", "dtype", "kernel", "instr/el", "FMA", "ALU", "XU", "LSU", "ctl", "uni", "B/el", "req B/el",
        "ld bits", "st bits", "regs", "shared", "spill", "grid", "warps", "cap %", "large tensors requested / doubts",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = [header]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(os.environ["TOLD"]) if "cuda" in arguments.backends else None
        for case in all_cases():
            if case.op not in arguments.ops or (arguments.sizes and case.size not in arguments.sizes):
                continue
            for backend in arguments.backends:
                for name in arguments.dtypes:
                    dtype = DTYPES[name]
                    if not backends.has_kernel(case.op, backend):
                        continue
                    elements = elements_of(case)
                    found = counts_of(case, dtype, gpu, backend, library)
                    for direction, counted in zip(("forward", "backward"), found, strict=False):
                        for each in counted:
                            rows.append(_row(case, name, each, elements, gpu))
                            if arguments.opcodes:
                                opcodes = each.opcodes.most_common(40)
                                print(case.name, each.kernel, {k: round(v * WARP / elements, 3) for k, v in opcodes})
                        instructions = sum(c.instructions for c in counted) / elements
                        moved = sum(c.moved for c in counted) / elements
                        cap = f"{100 * moved * gpu.per_byte / instructions:.0f}" if instructions else "-"
                        total = (f"= {backend} {direction}, {len(counted)} launches", f"{instructions:.1f}", *[""] * 6, f"{moved:.2f}")
                        rows.append((case.name, name, *total, *[""] * 8, cap, ""))
    print(tables.text(Table(rows)))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__)
    add_arguments(parser.add_argument)
    return run(parser.parse_args(argv), CPU)


def _row(case: Case, dtype: str, each: Count, elements: int, gpu: Gpu) -> tuple[str, ...]:
    per = WARP / elements
    pipes = [f"{each.pipes[pipe] * per:.1f}" for pipe in ("FMA", "ALU", "XU", "LSU", "control", "uniform")]
    return (
        case.name, dtype, each.kernel, f"{each.instructions / elements:.1f}", *pipes, f"{each.moved / elements:.2f}", f"{each.asked / elements:.2f}",
        _widths(each.loads), _widths(each.stores), str(each.registers), str(each.shared), str(each.spilled),
        str(each.programs), str(each.warps), f"{100 * each.moved * gpu.per_byte / each.instructions:.0f}",
        " ".join(f"{name} {ratio:.2f}" for name, ratio in each.covered.items()) + ("" if not each.doubts else " DOUBT: " + "; ".join(each.doubts)),
    )  # fmt: skip


def _widths(widths: Counter[int]) -> str:
    total = sum(widths.values())
    return " ".join(f"{bits}:{100 * number / total:.0f}%" for bits, number in sorted(widths.items(), reverse=True)) or "-"


if __name__ == "__main__":
    sys.exit(main())
