"""Launches of GPU kernels without a GPU: those of the public operators for tensors on the CPU, compiled and walked."""

from __future__ import annotations

import ctypes
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from benchmarks import gpu_build, machine_code
from benchmarks.machine_code import Function
from benchmarks.walk import WARP, Memory, Region, Shape, WalkError, chosen_programs, walk

#: Programs of a launch that are walked.
PROGRAMS = 12
#: Tensors are large from this share of the largest on.
LARGE = 1 / 8
_CODES = {"fp32": "<f", "fp64": "<d"}


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel."""

    kernel: str
    function: Function
    bank: bytes  # constant bank 0
    shape: Shape
    memory: Memory
    registers: int
    shared: int
    spilled: int


class Count(NamedTuple):
    """A launch, counted over all of its programs."""

    kernel: str
    warps: int  # of a program
    programs: int
    pipes: Counter[str]  # instructions of warps
    opcodes: Counter[str]
    loads: Counter[int]  # instructions of warps by bits
    stores: Counter[int]
    asked: float  # bytes that loads and stores ask for
    moved: float  # bytes from and to memory
    covered: dict[str, float]  # large tensors: bytes asked for / bytes
    registers: int
    shared: int
    spilled: int
    doubts: tuple[str, ...]

    @property
    def instructions(self) -> float:
        """Instructions of threads: all of a warp take part, in one slot of issue."""
        return WARP * sum(self.pipes.values())


def count(launch: Launch, cache: int, most: int = PROGRAMS) -> Count:
    """Walk some programs of a launch, and reckon from them what all do.

    A tensor that fits in the last-level cache, of so many bytes, is fetched once, however many programs read it.
    """
    total = launch.shape.programs
    programs = chosen_programs(total, most)
    try:
        counts = walk(launch.function, launch.bank, launch.shape, launch.memory, programs)
    except WalkError as error:
        raise WalkError(f"{launch.kernel} can't be followed: {error}") from error
    scale = total / len(programs)
    pipes: Counter[str] = Counter()
    opcodes: Counter[str] = Counter()
    widths: dict[str, Counter[int]] = {"LDG": Counter(), "STG": Counter()}
    for instruction in launch.function.code:
        times: Any = counts.executed[instruction.address] * scale
        if times:
            pipes[instruction.pipe] += times
            opcodes[instruction.opcode] += times
            if instruction.name in widths:
                widths[instruction.name][instruction.bits] += times
    asked, moved = 0.0, 0.0
    covered: dict[str, float] = {}
    largest = max((region.size for region in launch.memory.regions), default=0)
    for (number, how), nbytes in sorted(counts.moved.items()):
        asked += nbytes * scale
        region = launch.memory.regions[number] if number >= 0 else Region("outside", 0, 0)
        moved += min(nbytes * scale, region.size) if 0 < region.size <= cache else nbytes * scale
        if number >= 0 and region.size >= LARGE * largest:
            covered[f"{region.name} {how}"] = nbytes * scale / region.size
    doubts = sorted(counts.doubts)
    if outside := sum(nbytes for (number, _), nbytes in counts.moved.items() if number < 0):
        doubts.append(f"{outside} bytes lie outside of the tensors or somewhere unknown")
    return Count(
        launch.kernel, -(-launch.shape.threads // WARP), total, pipes, opcodes, widths["LDG"], widths["STG"], asked,
        moved, covered, launch.registers, launch.shared, launch.spilled, tuple(doubts),
    )  # fmt: skip


def region(name: str, tensor: Tensor) -> Region:
    """Return where a tensor lies. Integers are known: lengths and offsets may be read from them."""
    steps = ((n - 1) * abs(stride) for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    size = tensor.element_size() * (1 + sum(steps)) if tensor.numel() else 0
    known = size and not tensor.is_floating_point()
    return Region(name, tensor.data_ptr(), size, bytes_at(tensor.data_ptr(), size) if known else None)


def bytes_at(address: int, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def fill_bank(function: Function, shape: Shape, parameters: Sequence[bytes]) -> bytes:
    """Return constant bank 0 of a launch."""
    begin, size = function.parameters
    bank = bytearray(begin + size)
    struct.pack_into("<6I", bank, 0, *shape.block, *shape.grid)
    for (offset, length), value in zip(function.layout, parameters, strict=False):
        bank[begin + offset : begin + offset + length] = value[:length].ljust(length, b"\0")
    return bytes(bank).ljust(begin + size + 8, b"\0")  # a byte at the end is read as a word


# Triton's


@contextmanager
def triton_launches(arch: int, launched: Callable[[Launch], None]) -> Iterator[None]:
    """Within the block, `launched` takes each launch of a Triton kernel on CPU tensors, which is compiled alone."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def compile_only(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        named = {name: options[name] for name in kernel.arg_names if name in options}
        compiled = run(kernel, *arguments, grid=grid, warmup=True, **options)
        bound = kernel.signature.bind(*arguments, **named)
        bound.apply_defaults()
        sizes = grid(bound.arguments) if callable(grid) else grid
        launched(triton_launch(gpu_build.triton_name(kernel), compiled, bound.arguments, sizes))
        return compiled

    with gpu_build.launching_by(compile_only, arch):
        yield


def triton_launch(kernel: str, compiled: Any, arguments: dict[str, Any], grid: Sequence[int]) -> Launch:
    """Return the launch of a compiled kernel with these arguments, by name."""
    function, usage = _read(compiled.asm["cubin"])
    metadata = compiled.metadata
    shape = Shape((WARP * metadata.num_warps, 1, 1), (*grid, 1, 1)[:3])  # type: ignore[arg-type]
    passed = [(kind, arguments[name]) for name, kind in compiled.src.signature.items() if kind != "constexpr"]
    tensors = [region(name, value) for name, value in arguments.items() if isinstance(value, Tensor)]
    bank = fill_bank(function, shape, [_packed(kind, value) for kind, value in passed])
    return Launch(
        kernel, function, bank, shape, Memory(tensors), usage.registers, usage.shared + metadata.shared, usage.spilled
    )


def _packed(kind: str, value: Any) -> bytes:
    if kind in _CODES:
        return struct.pack(_CODES[kind], value)
    number = value.data_ptr() if isinstance(value, Tensor) else int(value)
    return (number & (2**64 - 1)).to_bytes(8, "little")


@cache
def _read(cubin: bytes) -> tuple[Function, gpu_build.Resources]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        (function,) = machine_code.read(cubin, disassembly(path)).values()
        (usage,) = gpu_build.dump(path)
    return function, usage


def disassembly(path: Path) -> str:
    command = [gpu_build.cuobjdump(), "-sass", str(path)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=True).stdout
