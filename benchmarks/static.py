"""`python -m benchmarks static`: what every GPU kernel executes and moves, counted in its machine code, without a GPU.

The public operators run on the CPU's tensors, their launches are compiled for the GPU that is named and not launched;
`machine_code.Walk` then goes through some programs of each launch with the launch's own arguments.
"""

from __future__ import annotations

import argparse
import ctypes
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks import backends, gpu_build, tables
from benchmarks.cases import Case, all_cases, make_inputs
from benchmarks.machine_code import PARAMETERS, WARP, Instruction, Tensors, Walk, chosen_programs, functions
from benchmarks.tables import Table
from diffpp_fast.errors import ConfigurationError
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

#: Programs of a launch that are walked.
PROGRAMS = 12


@dataclass
class Launch:
    """One launch of a kernel, as compiled."""

    kernel: str
    arguments: list[tuple[str, str, Any]]  # name, type and value of those that are passed
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cubin: bytes
    registers: int = 0
    shared: int = 0
    spilled: int = 0


class Counted(NamedTuple):
    """A launch's instructions and bytes, of all its programs."""

    kernel: str
    instructions: Counter[str]  # of warps, by opcode
    pipes: Counter[str]
    loads: Counter[int]  # of warps, by bits
    stores: Counter[int]
    bytes: float
    requested: float
    registers: int
    shared: int
    spilled: int
    doubts: tuple[str, ...]
    tensors: tuple[tuple[str, float], ...]  # large ones: name, bytes requested / bytes

    @property
    def total(self) -> float:
        return sum(self.pipes.values())


@contextmanager
def recording(arch: int) -> Iterator[list[Launch]]:
    """Within the block, operators on CPU tensors compile their Triton kernels; the value collects the launches."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run
    launches: list[Launch] = []

    def compile_only(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        named = {name: options[name] for name in kernel.arg_names if name in options}
        compiled = run(kernel, *arguments, grid=grid, warmup=True, **options)
        bound = kernel.signature.bind(*arguments, **named)
        bound.apply_defaults()
        if callable(grid):
            grid = grid(bound.arguments)
        grid = (*grid, 1, 1)[:3]
        signature = compiled.src.signature
        passed = [(name, signature[name], bound.arguments[name]) for name in kernel.arg_names if signature[name] != "constexpr"]
        metadata = compiled.metadata
        launches.append(
            Launch(gpu_build.triton_name(kernel), passed, grid, (WARP * metadata.num_warps, 1, 1), compiled.asm["cubin"])
        )
        launches[-1].shared = metadata.shared
        return compiled

    with gpu_build.launching_by(compile_only, arch):
        yield launches


_SIZES = {"i1": 1, "u1": 1, "i8": 1, "i16": 2, "i32": 4, "u32": 4, "i64": 8, "u64": 8, "fp32": 4, "fp64": 8, "bf16": 2, "fp16": 2}


def constants_of(launch: Launch, arch: int) -> bytes:
    """Return constant bank 0 as the driver fills it for a launch of Triton's."""
    bank = bytearray(PARAMETERS[arch])
    struct.pack_into("<6I", bank, 0, *launch.block, *launch.grid)
    for _, kind, value in launch.arguments:
        if kind.startswith("*"):
            size, packed = 8, struct.pack("<Q", value.data_ptr() if isinstance(value, Tensor) else int(value or 0))
        elif kind == "fp32":
            size, packed = 4, struct.pack("<f", value)
        elif kind == "fp64":
            size, packed = 8, struct.pack("<d", value)
        else:
            size = _SIZES[kind]
            packed = int(value).to_bytes(8, "little", signed=value < 0)[:size] if size < 8 else (int(value) & (2**64 - 1)).to_bytes(8, "little")
        bank += bytes(-len(bank) % size)
        bank += packed
    # Two pointers to scratch memory follow.
    bank += bytes(-len(bank) % 8 + 16)
    return bytes(bank)


def extent(tensor: Tensor) -> int:
    if tensor.numel() == 0:
        return 0
    return tensor.element_size() * (1 + sum((n - 1) * abs(s) for n, s in zip(tensor.shape, tensor.stride(), strict=True)))


def tensors_of(launch: Launch) -> tuple[Tensors, dict[int, tuple[str, int]]]:
    """Return the memory of a launch's tensors, and name and bytes of each region."""
    found = []
    for name, kind, value in launch.arguments:
        if kind.startswith("*") and isinstance(value, Tensor):
            size = extent(value)
            memory = None
            if not value.is_floating_point() and size:
                memory = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(value.data_ptr()))
            found.append((value.data_ptr(), size, memory, name))
    found.sort(key=lambda each: each[0])
    regions = Tensors([each[:3] for each in found])
    return regions, {number: (each[3], each[1]) for number, each in enumerate(found)}


@cache
def code_of(cubin: bytes) -> tuple[list[Instruction], gpu_build.Resources]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        done = subprocess.run([gpu_build.cuobjdump(), "-sass", str(path)], capture_output=True, text=True, check=True)
        (usage,) = gpu_build.dump(path)
    (code,) = functions(done.stdout).values()
    return code, usage


def count(launch: Launch, gpu: Gpu, programs: int = PROGRAMS) -> Counted:
    """Walk some programs of a launch, and reckon from them what all execute and move."""
    code, usage = code_of(launch.cubin)
    regions, names = tensors_of(launch)
    total = launch.grid[0] * launch.grid[1] * launch.grid[2]
    chosen = chosen_programs(total, programs)
    walk = Walk(code, {0: constants_of(launch, gpu.arch)}, launch.block, launch.grid, chosen, regions)
    counts = walk.run()
    factor = total / len(chosen)
    instructions: Counter[str] = Counter()
    pipes: Counter[str] = Counter()
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    for instruction in code:
        times = counts.executed[instruction.address] * factor
        if not times:
            continue
        instructions[instruction.opcode] += times  # type: ignore[assignment]
        pipes[instruction.pipe] += times  # type: ignore[assignment]
        if instruction.name in ("LDG", "STG"):
            (loads if instruction.name == "LDG" else stores)[instruction.bits] += times  # type: ignore[assignment]
    moved, requested, large = 0.0, 0.0, []
    most = max([size for _, size in names.values()], default=0)
    for (region, how), nbytes in counts.moved.items():
        nbytes *= factor
        requested += nbytes
        name, size = names.get(region, ("?", 0))
        # What fits in the cache is fetched once, however many programs read it.
        moved += min(nbytes, size) if 0 < size <= gpu.cache else nbytes
        if size >= most / 8:
            large.append((f"{name} {how}", nbytes / max(size, 1)))
    doubts = sorted(counts.doubts)
    doubts += [f"{name} is not modelled" for name in sorted(counts.unmodelled & CONTROL_RISK)]
    if counts.outside:
        doubts.append(f"{counts.outside} addresses outside of the tensors")
    if counts.unknown_addresses:
        doubts.append(f"{counts.unknown_addresses} unknown addresses")
    return Counted(
        launch.kernel, instructions, pipes, loads, stores, moved, requested,
        usage.registers, launch.shared + usage.shared, usage.spilled, tuple(doubts), tuple(sorted(large)),
    )  # fmt: skip


#: Opcodes of integers; of others nothing is asked.
CONTROL_RISK = {"IADD3", "ISETP", "BRX", "IDP", "LOP3"}


def passes(case: Case, dtype: torch.dtype, arch: int) -> list[list[Launch]]:
    """Return the launches of a case's forward and, if there is one, of its backward pass."""
    inputs = make_inputs(case, dtype, CPU)
    call = inputs.call
    result = []
    with recording(arch) as launches:
        output = call.forward(**call.arguments)
        result.append(list(launches))
        if call.wrt:
            launches.clear()
            first = output if isinstance(output, Tensor) else output[0]
            outer = call.outer
            torch.autograd.grad(first, [call.arguments[name] for name in call.wrt], outer)
            result.append(list(launches))
    # The tensors have to live while they are walked.
    result.append([call, output])  # type: ignore[list-item]
    return result


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def add_arguments(add: Callable[..., Any]) -> None:
    add("--ops", type=lambda text: text.split(","), default=list(backends.OPS), metavar="NAME,...")
    add("--dtypes", type=lambda text: text.split(","), default=["bf16"], metavar="NAME,...")
    add("--sizes", type=lambda text: text.split(","), metavar="NAME,...")
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
    for case in all_cases():
        if case.op not in arguments.ops or (arguments.sizes and case.size not in arguments.sizes):
            continue
        for name in arguments.dtypes:
            dtype = DTYPES[name]
            if not backends.triton_takes(case.op, dtype):
                continue
            elements = torch.Size(case.shape).numel()
            *found, _alive = passes(case, dtype, gpu.arch)
            for direction, launches in zip(("forward", "backward"), found, strict=False):
                counted = [count(launch, gpu) for launch in launches]
                for launch, each in zip(launches, counted, strict=True):
                    rows.append(_row(case, name, each, elements, gpu, launch))
                    if arguments.opcodes:
                        opcodes = each.instructions.most_common(40)
                        print(case.name, each.kernel, {k: round(v * WARP / elements, 3) for k, v in opcodes})
                instructions = sum(c.total for c in counted) * WARP / elements
                moved = sum(c.bytes for c in counted) / elements
                cap = f"{100 * moved * gpu.per_byte / instructions:.0f}" if instructions else "-"
                total = (f"= {direction}, {len(launches)} launches", f"{instructions:.1f}", *[""] * 6, f"{moved:.2f}")
                rows.append((case.name, name, *total, *[""] * 8, cap, ""))
    print(tables.text(Table(rows)))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__)
    add_arguments(parser.add_argument)
    return run(parser.parse_args(argv), CPU)


def _row(case: Case, dtype: str, each: Counted, elements: int, gpu: Gpu, launch: Launch) -> tuple[str, ...]:
    per = WARP / elements
    pipes = [f"{each.pipes[pipe] * per:.1f}" for pipe in ("FMA", "ALU", "XU", "LSU", "control", "uniform")]
    grid = "x".join(str(n) for n in launch.grid if n > 1) or "1"
    return (
        case.name, dtype, each.kernel, f"{each.total * per:.1f}", *pipes, f"{each.bytes / elements:.2f}", f"{each.requested / elements:.2f}",
        _widths(each.loads), _widths(each.stores), str(each.registers), str(each.shared), str(each.spilled),
        grid, str(launch.block[0] // WARP), f"{100 * each.bytes * gpu.per_byte / (each.total * WARP):.0f}",
        " ".join(f"{name} {ratio:.2f}" for name, ratio in each.tensors) + ("" if not each.doubts else " DOUBT: " + "; ".join(each.doubts)),
    )  # fmt: skip


def _widths(widths: Counter[int]) -> str:
    total = sum(widths.values())
    return " ".join(f"{bits}:{100 * number / total:.0f}%" for bits, number in sorted(widths.items(), reverse=True)) or "-"


if __name__ == "__main__":
    sys.exit(main())
