"""Launches of csrc's GPU kernels without a GPU, told by a library in which CUDA's runtime launches nothing.

The library is linked from the objects that nvcc has made for the real one, and bindings that take tensors on the CPU
for those of a GPU (`csrc_launches.cpp`). A process that has loaded it can't have the real one.
"""

from __future__ import annotations

import ctypes
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
#: Operators whose kernels read tables of integers that the host has made.
WITH_TABLES = ("reward_pixels",)

_ON_LAUNCH = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p)
)


def build(folder: Path) -> Path:
    """Compile and link the library that tells of launches. Return its path."""
    objects = _objects()
    sys.path.insert(0, str(ROOT / "csrc"))
    try:
        import compilation
        import toolchain
    finally:
        sys.path.pop(0)
    found = toolchain.find_toolchain()
    if found is None or found.nvcc is None:
        raise ConfigurationError("csrc's launches can't be told without a C++ compiler and nvcc: use --no-csrc")
    bindings = folder / "bindings.h"
    sources = sorted((ROOT / "csrc").glob("*/binding.cpp"))
    bindings.write_text("".join(f'#include "{source}"\n' for source in sources), encoding="utf-8")
    dry = subprocess.run([found.nvcc, "--dryrun", "-c", "probe.cu"], capture_output=True, text=True).stderr
    headers = re.search(r'INCLUDES="(-I\S+?)"?\s', dry)
    told, library = folder / "told.o", folder / "library.so"
    torch_folder = toolchain.find_torch()
    compile_ = [
        *found.compiler, *toolchain.DIALECT, "-O1", compilation.TORCH_TARGET, f"-I{torch_folder / 'include'}",
        headers[1] if headers else "", f"-I{ROOT / 'csrc'}", f'-DBINDINGS="{bindings}"', "-c", str(SOURCE), "-o", str(told),
    ]  # fmt: skip
    link = [*found.compiler, "-shared", str(told), *map(str, objects), f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
    remember = [*found.compiler, *toolchain.DIALECT, "-O1", "-shared", str(ALLOCATIONS), "-o", str(folder / "allocations.so"), "-ldl"]
    remember = [part for part in remember if part != "-fvisibility=hidden"]
    for command in (compile_, [*link, "-o", str(library)], remember):
        done = subprocess.run([part for part in command if part], capture_output=True, text=True)
        if done.returncode != 0:
            raise ConfigurationError(f"the library that tells of csrc's launches can't be built: {done.stderr[-2000:]}")
    return library


def _objects() -> list[Path]:
    """Return those that the real library is made of, but for the bindings."""
    names = {source.parent.name + "_" + source.stem for source in (ROOT / "csrc").glob("*/*.c*")}
    folders = sorted((ROOT / "build").glob("temp*"))
    found = [path for folder in folders[:1] for path in folder.glob("*.o") if path.name.split(".")[0] in names]
    objects = [path for path in found if not path.name.startswith("host_") and not path.stem.endswith("_binding")]
    if not any(path.stem.endswith("_cuda") for path in objects):
        raise ConfigurationError(
            "csrc's objects are not there: run `python setup.py build_ext --inplace` with nvcc, or use --no-csrc"
        )
    return sorted(objects)


class _Library:
    """The library, loaded, with the machine code for one GPU."""

    def __init__(self, path: Path, arch: int) -> None:
        self.path, self.arch = path, arch
        with tempfile.TemporaryDirectory() as folder:
            command = [gpu_build.cuobjdump(), "-xelf", f"sm_{arch}", str(path)]
            subprocess.run(command, cwd=folder, capture_output=True, check=True)
            cubins = sorted(Path(folder).glob("*.cubin"))
            self.functions: dict[str, Function] = {}
            self.usage: dict[str, gpu_build.Resources] = {}
            for cubin in cubins:
                self.functions |= machine_code.read(cubin.read_bytes(), disassembly(cubin))
                self.usage |= {each.kernel: each for each in gpu_build.dump(cubin)}
        self.handle = ctypes.CDLL(str(path))


@cache
def _load(path: Path, arch: int) -> _Library:
    return _Library(path, arch)


@contextmanager
def csrc_launches(
    path: Path, arch: int, op: str, tensors: Sequence[tuple[str, Tensor]], launched: Callable[[Launch], None]
) -> Iterator[None]:
    """Within the block, `launched` is called for each launch of a csrc kernel by an operator on CPU tensors.

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
            function, usage = library.functions[mangled], library.usage[mangled]
            parameters = [ctypes.string_at(arguments[n], size) for n, (_, size) in enumerate(function.layout)]
            shape = Shape((sizes[3], sizes[4], sizes[5]), (sizes[0], sizes[1], sizes[2]))
            launched(
                Launch(
                    gpu_build.kernel_name(mangled), function, fill_bank(function, shape, parameters), shape,
                    Memory(_regions(b"".join(parameters), known, op)),
                    usage.registers, usage.shared + shared, usage.spilled,
                )  # fmt: skip
            )
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
