"""Launches of csrc's GPU kernels without a GPU, told by a library in which CUDA's runtime launches nothing.

The library is linked from the objects that nvcc has made for the real one, and bindings that take tensors on the CPU
for those of a GPU (`csrc_launches.cpp`). A process that has loaded it can't have the real one.
"""

from __future__ import annotations

import ctypes
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor

from benchmarks import gpu_build, machine_code
from benchmarks.launches import Launch, bytes_at, disassembly, fill_bank, region
from benchmarks.machine_code import Function
from benchmarks.walk import Memory, Region, Shape
from diffpp_fast import backends
from diffpp_fast.errors import ConfigurationError

ROOT = Path(__file__).resolve().parent.parent
SOURCE = Path(__file__).with_suffix(".cpp")
ALLOCATIONS = SOURCE.with_name("allocations.cpp")
#: Loaded before a process begins, it remembers where torch's tensors lie.
REMEMBERED = "allocations.so"
#: Operators whose kernels read tables of integers that the host has made.
WITH_TABLES = ("reward_pixels",)
LEAVE_OUT = "leave csrc out with benchmarks.gpu_build --no-csrc or benchmarks static --backends triton,compile"

_ON_LAUNCH = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p)
)


def build(folder: Path) -> Path:
    """Compile and link the library that tells of launches, and one that remembers memory. Return the former's path."""
    objects = _objects()
    sys.path.insert(0, str(ROOT / "csrc"))
    try:
        compilation: Any = importlib.import_module("compilation")
        toolchain: Any = importlib.import_module("toolchain")
    finally:
        sys.path.pop(0)
    found, torch = toolchain.find_toolchain(), toolchain.find_torch()
    if found is None or found.nvcc is None or torch is None:
        raise ConfigurationError(f"csrc's launches can't be told without a C++ compiler, nvcc and torch: {LEAVE_OUT}")
    bindings, told, library = folder / "bindings.h", folder / "told.o", folder / "library.so"
    sources = sorted((ROOT / "csrc").glob("*/binding.cpp"))
    bindings.write_text("".join(f'#include "{source}"\n' for source in sources), encoding="utf-8")
    compiler = [*found.compiler, *toolchain.DIALECT, "-O1", "-fvisibility=default"]
    includes = [f"-I{torch / 'include'}", *_cuda_headers(found.nvcc), f"-I{ROOT / 'csrc'}"]
    defined = [compilation.TORCH_TARGET, f'-DBINDINGS="{bindings}"']
    for command in (
        [*compiler, "-fvisibility=hidden", *includes, *defined, "-c", str(SOURCE), "-o", str(told)],
        [*compiler, "-shared", str(told), *map(str, objects), f"-L{torch / 'lib'}", "-ltorch_cpu", "-o", str(library)],
        [*compiler, "-shared", str(ALLOCATIONS), "-o", str(folder / REMEMBERED), "-ldl"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise ConfigurationError(f"the library that tells of csrc's launches can't be built: {done.stderr[-2000:]}")
    return library


def _cuda_headers(nvcc: str) -> list[str]:
    """Return the flag for CUDA's headers, as nvcc itself passes it on."""
    told = subprocess.run([nvcc, "--dryrun", "-c", "probe.cu"], capture_output=True, text=True).stderr
    match = re.search(r'INCLUDES="(-I\S+?)"?\s', told)
    return [match[1]] if match else []


def _objects() -> list[Path]:
    """Return those that the real library is made of, but for the bindings."""
    names = {source.parent.name + "_" + source.stem for source in (ROOT / "csrc").glob("*/*.c*")}
    folders = sorted((ROOT / "build").glob("temp*"))
    found = [path for folder in folders[:1] for path in folder.glob("*.o") if path.name.split(".")[0] in names]
    objects = [path for path in found if not path.name.startswith("host_") and not path.stem.endswith("_binding")]
    if not any(path.stem.endswith("_cuda") for path in objects):
        raise ConfigurationError(
            f"csrc's objects are not there: run `python setup.py build_ext --inplace` with nvcc, or {LEAVE_OUT}"
        )
    return sorted(objects)


class _Library:
    """The library, loaded, with the machine code for one GPU, of which a kernel is read when it is launched."""

    def __init__(self, path: Path, arch: int) -> None:
        self.handle = ctypes.CDLL(str(path))
        self._folder = tempfile.TemporaryDirectory()
        command = [gpu_build.cuobjdump(), "-xelf", f"sm_{arch}", str(path)]
        subprocess.run(command, cwd=self._folder.name, capture_output=True, check=True)
        self._cubins = {
            name.removeprefix(".text."): cubin
            for cubin in Path(self._folder.name).glob("*.cubin")
            for name, _ in machine_code.sections(cubin.read_bytes())
            if name.startswith(".text.")
        }
        self._read: dict[str, tuple[Function, gpu_build.Resources]] = {}

    def kernel(self, mangled: str) -> tuple[Function, gpu_build.Resources]:
        if mangled not in self._read:
            cubin = self._cubins[mangled]
            usage = {each.kernel: each for each in gpu_build.dump(cubin)}
            functions = machine_code.read(cubin.read_bytes(), disassembly(cubin))
            self._read |= {name: (function, usage[name]) for name, function in functions.items()}
        return self._read[mangled]


@cache
def _load(path: Path, arch: int) -> _Library:
    return _Library(path, arch)


@contextmanager
def csrc_launches(
    path: Path, arch: int, op: str, tensors: Sequence[tuple[str, Tensor]], launched: Callable[[Launch], None]
) -> Iterator[None]:
    """Within the block, `launched` is called for each launch of a csrc kernel by an operator on CPU tensors.

    The process began with `REMEMBERED` and has loaded the library instead of the real one.

    Args:
        path: of the library.
        arch: the GPU's.
        op: the operator.
        tensors: what is known of its arguments.
        launched: what takes the launches.
    """
    library = _load(path, arch)
    known = [region(name, tensor) for name, tensor in tensors]
    errors: list[BaseException] = []

    def on_launch(name: bytes, sizes: Any, shared: int, arguments: Any) -> None:
        try:
            mangled = name.decode()
            function, usage = library.kernel(mangled)
            parameters = [ctypes.string_at(arguments[n], size) for n, (_, size) in enumerate(function.layout)]
            grid, block, cluster = ((sizes[at], sizes[at + 1], sizes[at + 2]) for at in (0, 3, 6))
            shape = Shape(block, grid, cluster)
            memory = Memory(_regions(b"".join(parameters), known, op))
            kernel, bank = gpu_build.kernel_name(mangled), fill_bank(function, shape, parameters)
            resources = usage.registers, usage.shared + shared, usage.spilled
            launched(Launch(kernel, function, bank, shape, memory, *resources))
        except BaseException as error:  # of any kind: C++ is between here and who can handle it
            errors.append(error)

    callback = _ON_LAUNCH(on_launch)
    library.handle.diffpp_on_launch(callback)
    try:
        with mock.patch.dict(backends._chosen, clear=True), backends.use_backend("cpu"):
            yield
    finally:
        library.handle.diffpp_on_launch(_ON_LAUNCH())
    if errors:
        raise errors[0]


def _regions(parameters: bytes, known: Sequence[Region], op: str) -> list[Region]:
    """Return the memory that a kernel's arguments point to: tensors that are known, and what else was allocated."""
    allocation: Any = ctypes.CDLL(None).diffpp_allocation
    allocation.restype, allocation.argtypes = ctypes.c_size_t, [ctypes.c_size_t, ctypes.POINTER(ctypes.c_size_t)]
    found = {each.begin: each for each in known if each.size}
    begin = ctypes.c_size_t()
    for at in range(0, len(parameters) - 7, 8):
        address = int.from_bytes(parameters[at : at + 8], "little")
        size = allocation(address, ctypes.byref(begin))
        inside = any(each.begin <= address < each.begin + each.size for each in known)
        if size and not inside and begin.value not in found:
            content = bytes_at(begin.value, size) if op in WITH_TABLES else None
            found[begin.value] = Region(f"argument at {at}", begin.value, size, content)
    return list(found.values())
