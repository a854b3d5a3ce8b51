"""Finds what this machine has for compiling csrc: compilers, headers, torch, and the GPUs to build for."""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

# Structs are filled by the names of fields. gcc and clang know that in C++17, too; clang warns that it is C++20's.
DIALECT = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wno-c++20-designator"]
CUDA_ARCHS = ("80", "90", "100")


class Toolchain(NamedTuple):
    compiler: list[str]
    nvcc: str | None
    archs: list[str]


@cache
def find_toolchain():
    """Return the compilers to use, or None where none for C++17 works."""
    wanted = setting("DIFFPP_FAST_CUDA", "0", "1")
    compiler = find_compiler()
    nvcc = find_nvcc() if wanted != "0" else None
    if wanted == "1" and (compiler is None or nvcc is None):
        where = f"in CUDA_HOME, {os.environ['CUDA_HOME']}" if os.environ.get("CUDA_HOME") else "on the PATH"
        missing = "C++17 compiler (c++, g++, clang++ or CXX)" if compiler is None else f"nvcc {where}"
        raise SystemExit(f"diffpp_fast: DIFFPP_FAST_CUDA is 1, and there is no {missing}")
    if compiler is None:
        return None
    return Toolchain(compiler, nvcc, find_archs(nvcc) if nvcc else [])


def setting(name, *known):
    """Return what a variable of the environment says, "" where it is unset; refuse what is not known."""
    value = os.environ.get(name, "")
    if value and value not in known:
        raise SystemExit(f"diffpp_fast: {name} is {value!r}: known are {', '.join(known)}, or unset")
    return value


def words(name):
    """Return the words of a variable of the environment, as a shell reads them."""
    try:
        return shlex.split(os.environ.get(name, ""))
    except ValueError as error:
        raise SystemExit(f"diffpp_fast: {name} is {os.environ[name]!r}: {error}") from None


def find_compiler():
    """Return a C++17 compiler that works, or None."""
    for command in filter(None, (words("CXX"), ["c++"], ["g++"], ["clang++"])):
        if shutil.which(command[0]) is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text(
                "#include <optional>\nint main() { return std::optional<int>(0).value(); }\n", encoding="utf-8"
            )
            probe = [*command, *DIALECT, str(source), "-o", str(Path(folder, "probe"))]
            if subprocess.run(probe, capture_output=True).returncode == 0:
                return command
    return None


def find_nvcc():
    """Return CUDA's compiler, or None. Whether a GPU is there is not asked: kernels are for all that they serve."""
    home = os.environ.get("CUDA_HOME")
    if home:
        return shutil.which("nvcc", path=str(Path(home, "bin")))
    # Where CUDA installs it, not always on the PATH.
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def find_static_runtime(nvcc):
    """Return the folder of libcudart_static.a: linked in, it lets the library load where CUDA is not."""
    answer = subprocess.run(
        [nvcc, "--dryrun", "-c", "probe.cu"], capture_output=True, encoding="utf-8", errors="replace"
    ).stderr
    homes = [line.split("=", 1)[1] for line in answer.splitlines() if line.startswith("#$ TOP=")]
    for home in homes:
        for folder in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib"):
            if Path(home, folder, "libcudart_static.a").exists():
                return Path(home, folder)
    raise SystemExit(f"diffpp_fast: no libcudart_static.a beside {nvcc}; install it, or set DIFFPP_FAST_CUDA=0")


def find_torch():
    """Return the folder of the installed torch, or None.

    pip builds in an isolated environment; sysconfig still names the one that the package is for.
    """
    spec = importlib.util.find_spec("torch")
    places = [Path(spec.origin).parent] if spec and spec.origin else []
    places += [Path(sysconfig.get_path(name), "torch") for name in ("platlib", "purelib")]
    return next((place for place in places if Path(place, "include/torch/csrc/stable/library.h").exists()), None)


def find_python_headers():
    """Return the folders of Python's and pybind11's headers, or None."""
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").exists() or importlib.util.find_spec("pybind11") is None:
        return None
    import pybind11

    return [include, pybind11.get_include()]


def find_archs(nvcc):
    """Return the GPUs to build for: those asked for, else those of CUDA_ARCHS that this nvcc knows."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, encoding="utf-8", errors="replace").stdout
    known = [line.removeprefix("compute_") for line in listed.split()]
    asked = os.environ.get("DIFFPP_FAST_CUDA_ARCHS")
    if asked:
        archs = list(dict.fromkeys(arch for arch in re.split(r"[;, ]+", asked) if arch))
        # nvcc lists no 90a beside 90.
        if not archs or not {re.sub(r"(?<=\d)[af]$", "", arch) for arch in archs} <= set(known):
            raise SystemExit(
                f"diffpp_fast: DIFFPP_FAST_CUDA_ARCHS is {asked!r}: for compute capabilities 8.0 and 9.0 it is 80;90, "
                f"and {nvcc} knows {', '.join(known)}"
            )
        return archs
    archs = [arch for arch in CUDA_ARCHS if arch in known]
    if not archs:
        raise SystemExit(f"diffpp_fast: {nvcc} knows none of the GPUs {CUDA_ARCHS}; set DIFFPP_FAST_CUDA=0")
    return archs


def cuda_release(nvcc):
    """Return the version of a CUDA toolkit, as 13.0."""
    found = re.search(r"release (\d+\.\d+)", version([nvcc]))
    return found[1] if found else "0.0"


def version(command):
    """Return what a compiler says of itself."""
    return subprocess.run([*command, "--version"], capture_output=True, encoding="utf-8", errors="replace").stdout
