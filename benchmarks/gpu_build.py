"""`make gpu-build`: compiles every GPU kernel without a GPU and holds what it takes against a budget.

Triton's kernels are compiled through the public operators, exactly as a launch would specialise them, by a driver that
only names the GPU; nothing is launched. Those of csrc are read from the compiled library. A kernel that spills, or
takes more registers, launches, instructions or bytes than the budget beside this file allows, fails (`static` counts
the last three, at some of the benchmark's sizes); so does one that some value of an argument breaks:
an integer that is 1 becomes a constant, one that 16 divides is known to be; tensors that are missing and constants such
as WIDE switch whole branches. For these, nothing gets further than Triton's first stage, where all of it is decided.
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
from importlib.metadata import version
from inspect import BoundArguments
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks import backends, tables, variants
from benchmarks.backends import native
from benchmarks.cases import all_cases, make_inputs
from benchmarks.tables import Table
from diffpp_fast import selftest
from diffpp_fast.errors import ConfigurationError
from diffpp_fast.selftest import CPU, Call

ARCHS = (80, 90, 100)
BUDGET = Path(__file__).with_name("gpu_budget.json")
#: The hardware hands out a thread's registers in lots of this size: within one, a register more costs nothing.
LOT = 8

#: The Triton that the budget is for. What another supported one takes beyond it stands beside it under a name of its
#: own ("KERNEL, triton 3.6"): compilers schedule differently, and neither is to hide what the other does.
TRITON = "3.7"

#: Height, width, size, fit and layout of 16-bit images beside the benchmark's: no row of the first three is a vector,
#: and they once spilled for sm_80; of all others that were tried none takes more registers than the last.
IMAGES = (
    (160, 90, 24, "crop", "channels_last"),
    (480, 854, 128, "stretch", "channels_last"),
    (200, 300, 64, "stretch", "contiguous"),
    (720, 1280, 224, "crop", "contiguous"),
)

#: Kernel, or kernel and case -> GPU ("sm_90") -> limit -> how much.
Budget = dict[str, dict[str, dict[str, float]]]
#: Limit -> what it counts, and how a kernel gets by with less.
LIMITS = {
    "registers": ("registers", "give it less to hold at once"),
    "launches": ("launches", "launch it once for all"),
    "instructions": ("instructions per element", "move work out of its loops, or cheaper instructions in"),
    "bytes": ("bytes per element", "read and write each tensor once"),
}


class Resources(NamedTuple):
    """Resources of one kernel on one GPU: the most over its specialisations."""

    kernel: str  # backend.file.function; as `dump` has it, the name in the machine code
    arch: int
    registers: int  # per thread
    shared: int  # bytes per block; of csrc's kernels what is static
    spilled: int  # bytes of local memory per thread

    @property
    def gpu(self) -> str:
        return f"sm_{self.arch}"


class Use(NamedTuple):
    """A kernel's share of what the budget limits."""

    kernel: str  # with a case, where that matters
    gpu: str
    amounts: dict[str, float]


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
    """Return those of every Triton kernel that an operator launches.

    Args:
        op: the operator.
        arch: the GPU's.
        exhaustive: compile for all combinations of options, not only for every pair of them.
    """
    dtypes = [dtype for dtype in variants.DTYPES if backends.triton_takes(op, dtype)]
    with compiling(arch) as cubins:
        every, pairs = variants.ordered(op, dtypes)
        for variant in every if exhaustive else every[:pairs]:
            variants.make(variant, CPU).run()
        # Block lengths and specialisations may depend on the benchmark's sizes.
        for case in all_cases():
            if case.op == op:
                for dtype in dtypes:
                    make_inputs(case, dtype, CPU).call.run()
        for call in further_calls(op):
            call.run()
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for number, (cubin, (kernel, shared)) in enumerate(cubins.items()):
            path = Path(folder, f"{number}.cubin")
            path.write_bytes(cubin)
            found += [each._replace(kernel=kernel, arch=arch, shared=each.shared + shared) for each in dump(path)]
    return largest(found)


def further_calls(op: str) -> Iterator[Call]:
    """Yield calls at sizes that are nobody's benchmark."""
    for height, width, size, fit, layout in IMAGES if op == "reward_pixels" else ():
        for dtype in (torch.bfloat16, torch.float16):
            options: dict[str, Any] = {"layout": layout, "size": size, "fit": fit, "filter": "bicubic"}
            yield selftest.make(op, (1, 3, height, width), dtype=dtype, **options)


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

    # For the rest of the process: without a GPU there is no driver to go back to.
    driver.set_active(NamedGpu(arch))
    with mock.patch.object(JITFunction, "run", run), backends.triton_on_cpu_tensors():
        yield


def triton_name(kernel: Any) -> str:
    """triton.file.function of a kernel."""
    return f"triton.{kernel.__module__.rpartition('.')[2]}.{kernel.__name__.strip('_')}"


# The values of arguments


def refused(op: str, exhaustive: bool) -> list[str]:
    """Return the cases of an operator's kernels that do not compile, a sentence each."""
    with lowering(exhaustive) as wrong:
        every, pairs = variants.ordered(op, (torch.float32, torch.bfloat16))
        for variant in every[:pairs]:
            variants.make(variant, CPU).run()
    return wrong


@contextmanager
def lowering(exhaustive: bool) -> Iterator[list[str]]:
    """Within the block, operators on CPU tensors bring the cases of their launches through Triton's first stage.

    The value collects the cases that do not compile, a sentence each.

    Args:
        exhaustive: every combination of constants and missing tensors that launches have, and integers one at a time
            too; else each value of each, and all integers at once.
    """
    wrong: list[str] = []
    seen: set[Any] = set()

    def lower_cases(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        named = {name: options.pop(name) for name in kernel.arg_names if name in options}
        bound = kernel.signature.bind(*arguments, **named)
        switches = _switches(kernel, bound)
        new = {(kernel, tuple(switches))} if exhaustive else {(kernel, switch) for switch in switches}
        if new <= seen:
            return
        seen.update(new)
        for case in cases(kernel, bound, exhaustive):
            try:
                _lower(kernel, [{**bound.arguments, **case}[name] for name in kernel.arg_names], options)
            except Exception as error:  # of any kind: it is reported, and the others go on
                what = ", ".join(f"{name}={value}" for name, value in case.items()) or "a launch as it is"
                wrong.append(f"{triton_name(kernel)} does not compile for {what}: {_innermost(error)}")

    with launching_by(lower_cases, NamedGpu.ANY):
        yield wrong


def cases(kernel: Any, bound: BoundArguments, exhaustive: bool) -> Iterator[dict[str, Any]]:
    """Yield the arguments that other launches of this kernel would have instead."""
    integers = [
        parameter.name
        for parameter in kernel.params
        if not parameter.is_constexpr and type(bound.arguments[parameter.name]) is int
    ]
    yield {}
    yield dict.fromkeys(integers, 1)
    wide = {"WIDE": True} if "WIDE" in bound.arguments else {}
    if wide:
        yield wide
    if exhaustive:
        yield dict.fromkeys(integers, 16)
        yield from ({name: value} for name in integers for value in (1, 16))
        yield from ({**wide, name: 2**33} for name in integers)


def _switches(kernel: Any, bound: BoundArguments) -> list[tuple[str, Any]]:
    """Name what compiled code depends on, but for integers: constants, and whether a tensor is there."""
    return [
        (parameter.name, value if parameter.is_constexpr else value is None)
        for parameter in kernel.params
        for value in [bound.arguments[parameter.name]]
    ]


def _innermost(error: BaseException) -> str:
    """Return the last of Triton's errors, to which each function adds its own place."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip(" ^")]
    return f"{type(error).__name__}: {lines[-1].strip() if lines else ''}"


def _lower(kernel: Any, arguments: list[Any], options: dict[str, Any]) -> None:
    """Run Triton's first stage, from Python to its IR, for the case that a launch with these arguments is."""
    from triton._C.libtriton import ir

    _, _, target, backend, binder = kernel.device_caches[NamedGpu.ANY]
    bound, specialization, others = binder(*arguments, **options, debug=False)
    parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, others)
    # torch.compile makes a constant of every integer that is 1, also of one that a kernel asks not to specialise.
    for index, (parameter, value) in enumerate(zip(kernel.params, arguments, strict=True)):
        if type(value) is int and value == 1 and not parameter.is_constexpr:
            signature[parameter.name], constants[index,] = "constexpr", 1
    source = kernel.ASTSource(kernel, signature, constants, attributes)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source.make_ir(target, parsed, backend.get_codegen_implementation(parsed), backend.get_module_map(), context)


# csrc, and the budget


def library_resources(archs: Sequence[int]) -> list[Resources]:
    """Return those of csrc's kernels.

    Raises:
        ConfigurationError: the library is not there, or not compiled for all of `archs`.
    """
    remedy = f"install CUDA's compiler or set CUDA_HOME, remove {native.LIBRARY} and run again"
    if not native.LIBRARY.exists():
        raise ConfigurationError(f"csrc is not compiled: {remedy}")
    found = [each._replace(kernel=kernel_name(each.kernel)) for each in dump(native.LIBRARY) if each.arch in archs]
    missing = [f"sm_{arch}" for arch in archs if arch not in {resources.arch for resources in found}]
    if missing:
        raise ConfigurationError(f"{native.LIBRARY.name} holds no code for {', '.join(missing)}: {remedy}")
    return largest(found)


def dump(path: Path) -> list[Resources]:
    """Return what each function of a cubin or library takes."""
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
    """Return Triton's own, which is as new as the GPUs that it compiles for, else that of CUDA."""
    from importlib.util import find_spec

    spec = find_spec("triton")
    bundled = Path(spec.origin or "").parent / "backends/nvidia/bin/cuobjdump" if spec else Path()
    found = str(bundled) if bundled.is_file() else shutil.which("cuobjdump")
    if found is None:
        raise ConfigurationError("cuobjdump is not there: install triton, or put CUDA's on the PATH")
    return found


def parse(text: str) -> Iterator[Resources]:
    """Read the output of `cuobjdump --dump-resource-usage`."""
    arch, function = 0, ""
    for line in map(str.strip, text.splitlines()):
        if match := re.fullmatch(r"arch = sm_(\d+)[a-z]?", line):
            arch = int(match[1])
        elif match := re.fullmatch(r"Function (.+):", line):
            function = match[1]
        elif line.startswith("REG:"):
            numbers = {name: int(number) for name, number in re.findall(r"(\w+(?:\[\d+\])?):(\d+)", line)}
            yield Resources(function, arch, numbers["REG"], numbers["SHARED"], numbers["STACK"] + numbers["LOCAL"])


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


def uses(found: Iterable[Resources]) -> list[Use]:
    """Return the registers, in the lots that the hardware hands out."""
    return [Use(each.kernel, each.gpu, {"registers": -(-each.registers // LOT) * LOT}) for each in found]


def spills(found: Iterable[Resources]) -> list[str]:
    """List the kernels that spill, each with its remedy."""
    return [
        f"{each.kernel} on {each.gpu} spills {each.spilled} bytes per thread to local memory: give it smaller blocks, "
        "more warps or less to hold at once"
        for each in found
        if each.spilled
    ]


def failures(found: Sequence[Use], budget: Budget, release: str = TRITON) -> list[str]:
    """List what exceeds the budget with this version of Triton, each with its remedy."""
    sentences = []
    for use in found:
        place = f"{use.kernel} on {use.gpu}"
        for limit, amount in use.amounts.items():
            allowed = _allowed(use, limit, budget, release)
            what, remedy = LIMITS[limit]
            if allowed is None:
                sentences.append(f"{place} has no budget of {limit}: `make gpu-build BUDGET=write` records one")
            elif amount > allowed:
                sentences.append(
                    f"{place} takes {amount:g} {what}, {allowed:g} are in the budget: {remedy}, or, if it is worth it, "
                    "record it with `make gpu-build BUDGET=write`"
                )
    return sentences


def _allowed(use: Use, limit: str, budget: Budget, release: str) -> float | None:
    own = budget.get(_name_with(use.kernel, release), {}).get(use.gpu, {})
    return own.get(limit, budget.get(use.kernel, {}).get(use.gpu, {}).get(limit))


def _name_with(kernel: str, release: str) -> str:
    return kernel if release == TRITON or not kernel.startswith("triton.") else f"{kernel}, triton {release}"


def budget_of(found: Sequence[Use], old: Budget, release: str = TRITON) -> Budget:
    """Return the budget that allows just what was found; what was not compiled this time keeps its own.

    Of another Triton than the budget's, what is beyond the budget is recorded under its name.
    """
    budget = {kernel: {gpu: dict(limits) for gpu, limits in gpus.items()} for kernel, gpus in old.items()}
    for use in found:
        name = _name_with(use.kernel, release)
        common = budget.get(use.kernel, {}).get(use.gpu, {})
        for limit, amount in use.amounts.items():
            if name == use.kernel or amount > common.get(limit, 0):
                budget.setdefault(name, {}).setdefault(use.gpu, {})[limit] = amount
            elif name in budget:
                budget[name].get(use.gpu, {}).pop(limit, None)
    kept = ((kernel, {gpu: limits for gpu, limits in gpus.items() if limits}) for kernel, gpus in budget.items())
    return {kernel: gpus for kernel, gpus in kept if gpus}


def without_leftovers(budget: Budget, counted: Iterable[Use], kernels: Iterable[Resources]) -> Budget:
    """Return the budget without kernels and cases of what was compiled whole that are no more."""
    cases = {use.kernel for use in counted}
    known = {each.kernel for each in kernels}
    return {name: gpus for name, gpus in budget.items() if name.partition(", triton ")[0] in cases | known}


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
    return tables.text(Table([header, *((each.kernel, each.gpu, *map(str, each[2:])) for each in found)]))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_build", description=__doc__.partition("\n\n")[0])
    add = parser.add_argument
    add("--archs", type=_numbers, default=ARCHS, metavar="N,...", help="compute capabilities (80,90,100)")
    add("--ops", type=lambda text: text.split(","), metavar="NAME,...", help="operators of Triton's (all it has)")
    add("--no-csrc", dest="csrc", action="store_false", help="only Triton's kernels")
    add("--no-count", dest="count", action="store_false", help="registers and spills alone")
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
    if backends.triton_interprets():
        raise ConfigurationError("TRITON_INTERPRET is set, and what is interpreted is not compiled: unset it")
    served = [op for op in backends.OPS if backends.has_kernel(op, "triton")]
    ops = arguments.ops or served
    if unknown := [op for op in ops if op not in served]:
        raise ConfigurationError(f"--ops: Triton has no kernels for {', '.join(unknown)}; it has: {', '.join(served)}")
    found = library_resources(arguments.archs) if arguments.csrc else []
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
    wrong += spills(found)
    counted: list[Use] = []
    if arguments.count:
        counted, doubts = count(ops, arguments)
        wrong += doubts
    budget, release = read_budget(arguments.budget_file), ".".join(version("triton").split(".")[:2])
    taken = [*uses(found), *counted]
    if arguments.budget == "write":
        budget = budget_of(taken, budget, release)
        whole = arguments.csrc and arguments.count and ops == served and set(arguments.archs) >= set(ARCHS)
        if whole and release == TRITON and not wrong:
            budget = without_leftovers(budget, counted, found)
        write_budget(arguments.budget_file, budget)
        print(f"written: {arguments.budget_file}")
    wrong += failures(taken, budget, release)
    for sentence in wrong:
        print(sentence)
    print(f"{len(found)} rows, {len(counted)} kernels and cases counted, {len(wrong)} failures")
    return 1 if wrong else 0


def count(ops: Sequence[str], arguments: argparse.Namespace) -> tuple[list[Use], list[str]]:
    """Count launches, instructions and bytes at the budget's sizes. Return them, and what is in doubt."""
    from benchmarks import static

    gpu = static.BUDGET_GPU
    names = ["triton", "cuda"] if arguments.csrc else ["triton"]
    tasks = static.tasks_of(ops, static.BUDGET_SIZES, static.BUDGET_DTYPES, names, gpu)
    passes: list[static.Pass] = []
    for each in static.collect(tasks, arguments.jobs):
        if not passes or (passes[-1].backend, passes[-1].case.op) != (each.backend, each.case.op):
            print(f"counting: {each.case.op} on {each.backend}", file=sys.stderr)
        passes.append(each)
    return [Use(*use) for use in static.amounts(passes, static.GPUS[gpu].arch)], static.doubts(passes)


def _numbers(text: str) -> list[int]:
    return [int(part.strip().removeprefix("sm_")) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
