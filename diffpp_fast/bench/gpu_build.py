"""`make gpu-build`: compiles every GPU kernel without a GPU and holds its registers and spills against a budget.

Triton's kernels are compiled through the public operators, exactly as a launch would specialise them, by a driver that
only names the GPU; nothing is launched. Those of csrc are read from the compiled library. A kernel that spills, or
takes more registers than the budget beside this file allows, fails; so does one that some value of an argument breaks
(gpu_arguments.py).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from diffpp_fast.bench import variants
from diffpp_fast.bench.cases import Case, all_cases
from diffpp_fast.bench.operators import fused, make_inputs, step
from diffpp_fast.errors import ConfigurationError
from diffpp_fast.kernels import dispatch, native

ARCHS = (80, 90, 100)
BUDGET = Path(__file__).with_name("gpu_budget.json")
#: The hardware hands out a thread's registers in lots of this size: within one, a register more costs nothing.
LOT = 8
CPU, CUDA = torch.device("cpu"), torch.device("cuda")

#: The Triton that the budget is for. What another supported one takes beyond it stands beside it under a name of its
#: own ("KERNEL, triton 3.6"): compilers schedule differently, and neither is to hide what the other does.
TRITON = "3.7"

#: Kernel -> GPU ("sm_90") -> registers per thread.
Budget = dict[str, dict[str, int]]


class Resources(NamedTuple):
    """What one kernel takes on one GPU: the most over its specialisations."""

    kernel: str  # backend.file.function
    arch: int
    registers: int  # per thread
    shared: int  # bytes per block; of csrc's kernels what is static
    spilled: int  # bytes of local memory per thread

    @property
    def gpu(self) -> str:
        return f"sm_{self.arch}"


class Usage(NamedTuple):
    """One function of a cubin or library, as cuobjdump tells it."""

    function: str
    arch: int
    registers: int
    shared: int
    spilled: int


class NamedGpu:
    """As much of a Triton driver as compiling needs: it names the GPU."""

    #: For what does not depend on it.
    ANY = 90

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        # Triton keeps compiled kernels by device.
        return self.arch

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return CPU


def triton_resources(op: str, arch: int, exhaustive: bool = False) -> list[Resources]:
    """Those of every Triton kernel that an operator launches.

    Args:
        exhaustive: compile for all combinations of options, not only for every pair of them.
    """
    dtypes = [dtype for dtype in variants.DTYPES if dispatch._kernels[op, "triton"].refuses(CUDA, dtype) is None]
    with compiling(arch) as cubins:
        every, pairs = variants.ordered(op, dtypes)
        for variant in every if exhaustive else every[:pairs]:
            inputs = variants.make(variant, CPU)
            step(variants.forward(variant), inputs.fused, inputs.wrt, inputs.outer)
        for case in all_cases():
            if case.op == op:
                _compile_case(case, dtypes)
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for number, (cubin, (kernel, shared)) in enumerate(cubins.items()):
            path = Path(folder, f"{number}.cubin")
            path.write_bytes(cubin)
            found += [
                Resources(kernel, arch, usage.registers, usage.shared + shared, usage.spilled) for usage in dump(path)
            ]
    return largest(found)


def _compile_case(case: Case, dtypes: Sequence[torch.dtype]) -> None:
    """For one of the benchmark's sizes: block lengths and specialisations may depend on them."""
    for dtype in dtypes:
        inputs = make_inputs(case, dtype, CPU)
        step(fused(case), inputs.fused, inputs.wrt, inputs.outer)


@contextmanager
def compiling(arch: int) -> Iterator[dict[bytes, tuple[str, int]]]:
    """Within the block, operators on CPU tensors compile their Triton kernels for `arch` instead of launching them.

    The value collects cubin -> (kernel, bytes of shared memory).
    """
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run
    cubins: dict[bytes, tuple[str, int]] = {}

    def compile_only(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = launch(kernel, *arguments, grid=grid, warmup=True, **options)
        cubins[compiled.asm["cubin"]] = triton_name(kernel), compiled.metadata.shared
        return compiled

    with launching_by(compile_only, arch):
        yield cubins


@contextmanager
def launching_by(run: Callable[..., Any], arch: int) -> Iterator[None]:
    """Within the block, operators on CPU tensors hand their Triton launches to `run`, an unbound `JITFunction.run`."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    on_cpu = {
        key: replace(kernel, unavailable=lambda: None, refuses=lambda device, dtype: None)
        for key, kernel in dispatch._kernels.items()
        if key[1] == "triton"
    }
    # For the rest of the process: without a GPU there is no driver to go back to.
    driver.set_active(NamedGpu(arch))
    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.dict(dispatch._kernels, on_cpu),
        dispatch.use_backend("triton"),
    ):
        yield


def triton_name(kernel: Any) -> str:
    """triton.file.function of a kernel."""
    return f"triton.{kernel.__module__.rpartition('.')[2]}.{kernel.__name__.strip('_')}"


def library_resources(archs: Sequence[int]) -> list[Resources]:
    """Those of csrc's kernels.

    Raises:
        ConfigurationError: the library is not there, or not compiled for all of `archs`.
    """
    remedy = f"install CUDA's compiler or set CUDA_HOME, remove {native.LIBRARY} and run again"
    if not native.LIBRARY.exists():
        raise ConfigurationError(f"csrc is not compiled: {remedy}")
    found = [
        Resources(kernel_name(usage.function), *usage[1:]) for usage in dump(native.LIBRARY) if usage.arch in archs
    ]
    missing = [f"sm_{arch}" for arch in archs if arch not in {resources.arch for resources in found}]
    if missing:
        raise ConfigurationError(f"{native.LIBRARY.name} holds no code for {', '.join(missing)}: {remedy}")
    return largest(found)


def dump(path: Path) -> list[Usage]:
    """What each function of a cubin or library takes."""
    done = subprocess.run(
        [cuobjdump(), "--dump-resource-usage", str(path)], capture_output=True, encoding="utf-8", errors="replace"
    )
    if done.returncode != 0:
        # The answer to a library without code for GPUs.
        if "does not contain device code" in done.stdout + done.stderr:
            return []
        raise ConfigurationError(f"cuobjdump {path}: {done.stderr.strip()}")
    return list(parse(done.stdout))


def cuobjdump() -> str:
    """Triton's own, which is as new as the GPUs that it compiles for, else that of CUDA."""
    from importlib.util import find_spec

    spec = find_spec("triton")
    bundled = Path(spec.origin or "").parent / "backends/nvidia/bin/cuobjdump" if spec else Path()
    found = str(bundled) if bundled.is_file() else shutil.which("cuobjdump")
    if found is None:
        raise ConfigurationError("cuobjdump is not there: install triton, or put CUDA's on the PATH")
    return found


def parse(text: str) -> Iterator[Usage]:
    """The output of `cuobjdump --dump-resource-usage`."""
    arch, function = 0, ""
    for line in map(str.strip, text.splitlines()):
        if match := re.fullmatch(r"arch = sm_(\d+)[a-z]?", line):
            arch = int(match[1])
        elif match := re.fullmatch(r"Function (.+):", line):
            function = match[1]
        elif line.startswith("REG:"):
            numbers = {name: int(number) for name, number in re.findall(r"(\w+(?:\[\d+\])?):(\d+)", line)}
            yield Usage(function, arch, numbers["REG"], numbers["SHARED"], numbers["STACK"] + numbers["LOCAL"])


def kernel_name(mangled: str) -> str:
    """Return cuda.operator.function of a kernel: csrc has a namespace for each operator."""
    parts = []
    rest = re.sub(r"^_ZN?", "", mangled)
    while match := re.match(r"\d+", rest):
        end = match.end() + int(match[0])
        parts.append(rest[match.end() : end])
        rest = rest[end:]
    operator = parts[1:2] if parts[:1] == ["diffpp"] and len(parts) > 2 else []
    return ".".join(("cuda", *operator, parts[-1] if parts else mangled))


def largest(found: Iterable[Resources]) -> list[Resources]:
    """One row for each kernel and GPU, with the most that any specialisation takes."""
    rows: dict[tuple[str, int], Resources] = {}
    for resources in found:
        key = resources.kernel, resources.arch
        most = map(max, zip(resources[2:], rows.get(key, resources)[2:], strict=True))
        rows[key] = Resources(*key, *most)
    return sorted(rows.values())


def failures(found: Sequence[Resources], budget: Budget, release: str = TRITON) -> list[str]:
    """List the kernels that spill or exceed their budget with this version of Triton, each with its remedy."""
    sentences = []
    for resources in found:
        place = f"{resources.kernel} on {resources.gpu}"
        allowed = _allowed(resources, budget, release)
        if resources.spilled:
            sentences.append(
                f"{place} spills {resources.spilled} bytes per thread to local memory: give it smaller blocks, more "
                "warps or less to hold at once"
            )
        if allowed is None:
            sentences.append(f"{place} has no budget: `make gpu-build BUDGET=write` records one")
        elif resources.registers > allowed:
            sentences.append(
                f"{place} takes {resources.registers} registers, {allowed} are in the budget: give it less to hold at "
                f"once, or, if it is worth the occupancy, record it with `make gpu-build BUDGET=write`"
            )
    return sentences


def _allowed(resources: Resources, budget: Budget, release: str) -> int | None:
    own = budget.get(_name_with(resources.kernel, release), {})
    return own.get(resources.gpu, budget.get(resources.kernel, {}).get(resources.gpu))


def _name_with(kernel: str, release: str) -> str:
    return kernel if release == TRITON or not kernel.startswith("triton.") else f"{kernel}, triton {release}"


def budget_of(found: Sequence[Resources], old: Budget, release: str = TRITON) -> Budget:
    """The budget that allows just what was found; what was not compiled this time keeps its own.

    Of another Triton than the budget's, what is beyond the budget is recorded under its name.
    """
    budget = {kernel: dict(gpus) for kernel, gpus in old.items()}
    for resources in found:
        name, lots = _name_with(resources.kernel, release), -(-resources.registers // LOT) * LOT
        if name == resources.kernel or lots > budget.get(resources.kernel, {}).get(resources.gpu, 0):
            budget.setdefault(name, {})[resources.gpu] = lots
        elif name in budget:
            budget[name].pop(resources.gpu, None)
    return {kernel: gpus for kernel, gpus in budget.items() if gpus}


def read_budget(path: Path) -> Budget:
    budget: Budget = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return budget


def write_budget(path: Path, budget: Budget) -> None:
    """One line for each kernel, so that changes to different ones merge."""
    lines = (f"{json.dumps(kernel)}: {json.dumps(gpus)}" for kernel, gpus in sorted(budget.items()))
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def table(found: Sequence[Resources]) -> str:
    """Kernel x GPU: registers, shared memory, spills."""
    header = ("kernel", "GPU", "registers", "shared", "spilled")
    rows = [header, *((r.kernel, r.gpu, str(r.registers), str(r.shared), str(r.spilled)) for r in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  "
        + "  ".join(cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True))
        for row in rows
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_build", description=__doc__.partition("\n\n")[0])
    add = parser.add_argument
    add("--archs", type=_numbers, default=ARCHS, metavar="N,...", help="compute capabilities (80,90,100)")
    add("--ops", type=lambda text: text.split(","), metavar="NAME,...", help="operators of Triton's (all it has)")
    add("--no-csrc", dest="csrc", action="store_false", help="only Triton's kernels")
    add("--exhaustive", action="store_true", help="all combinations of options instead of all pairs")
    add("--budget", choices=["check", "write"], default="check", help="hold against the budget, or record a new one")
    add("--budget-file", type=Path, default=BUDGET, metavar="FILE", help=argparse.SUPPRESS)
    add("--jobs", type=int, default=os.cpu_count(), metavar="N", help="processes (as many as processors)")
    arguments = parser.parse_args(argv)
    try:
        return _run(arguments)
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace) -> int:
    from diffpp_fast.kernels import triton

    if triton.INTERPRETED:
        raise ConfigurationError("TRITON_INTERPRET is set, and what is interpreted is not compiled: unset it")
    served = [op for op in dispatch.OPS if (op, "triton") in dispatch._kernels]
    ops = arguments.ops or served
    if unknown := [op for op in ops if op not in served]:
        raise ConfigurationError(f"--ops: Triton has no kernels for {', '.join(unknown)}; it has: {', '.join(served)}")
    found = library_resources(arguments.archs) if arguments.csrc else []
    from diffpp_fast.bench.gpu_arguments import refused

    tasks = [(op, arch) for op in ops for arch in arguments.archs]
    wrong = []
    # Not forked: torch's threads would be missing.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(arguments.jobs, len(tasks)), mp_context=context) as pool:
        futures = [pool.submit(triton_resources, op, arch, arguments.exhaustive) for op, arch in tasks]
        cases = [pool.submit(refused, op, True) for op in ops]
        for (op, arch), future in zip(tasks, futures, strict=True):
            try:
                found += future.result()
            except Exception as error:  # of any kind: it is reported, and the other kernels go on
                wrong.append(f"Triton's {op} can't be compiled for sm_{arch}: {type(error).__name__}: {error}")
            print(f"done: Triton's {op} for sm_{arch}", file=sys.stderr)
        wrong += [sentence for case in cases for sentence in case.result()]
    found = largest(found)
    print(table(found))
    budget, release = read_budget(arguments.budget_file), ".".join(version("triton").split(".")[:2])
    if arguments.budget == "write":
        budget = budget_of(found, budget, release)
        write_budget(arguments.budget_file, budget)
        print(f"written: {arguments.budget_file}")
    wrong += failures(found, budget, release)
    for sentence in wrong:
        print(sentence)
    print(f"{len(found)} rows, {len(wrong)} failures")
    return 1 if wrong else 0


def _numbers(text: str) -> list[int]:
    return [int(part.strip().removeprefix("sm_")) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
