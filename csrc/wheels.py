"""Builds wheels that other machines can install: for x86-64, glibc 2.28 or newer, and every Python from 3.10 on.

Run `python csrc/wheels.py cpu`, or `cuda`, in the root of the sources. As torch's, a wheel's version says which it is:
0.1.0+cpu, or 0.1.0+cu130 with the GPU kernels that CUDA 13.0 has compiled. In a folder with both pip takes the latter,
which serves machines without a GPU, too.

The library knows no interpreter; the host module, which does, is left out. A new glibc still has the old versions of
its functions. Linked first are stubs that name the newest that 2.28 had, and definitions of what only newer libraries
have.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from toolchain import cuda_release, find_nvcc

PLATFORM = "manylinux_2_28_x86_64"
#: The newest versions of manylinux_2_28, and the shared libraries that a wheel may ask for beside torch's.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
SHARED = {"c", "m", "pthread", "dl", "rt", "gcc_s", "stdc++", "torch_cpu", "ld-linux-x86-64"}
#: The libraries that functions were in before glibc 2.34 moved them into libc.
ROOMS = {"pthread_": "libpthread.so.0", "sem_": "libpthread.so.0", "dl": "libdl.so.2", "shm_": "librt.so.1"}
#: In the library, in the place of newer libraries' symbols. The flag says that there may be threads.
DEFINED = """\
#include <new>
#include <sstream>
template class std::basic_ostringstream<char>;
template class std::basic_stringstream<char>;
namespace std {
__attribute__((visibility("hidden"))) void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
"""


def numbers(release):
    return tuple(map(int, release.split(".")))


def symbols(library):
    """Return the dynamic symbols of a library: whether it defines each, its name and its version."""
    listed = subprocess.run(["objdump", "-T", str(library)], capture_output=True, text=True, check=True).stdout
    rows = re.findall(
        r"^.{15}.*?\s(\*UND\*|\S+)\s+[0-9a-f]{16}\s+\(?([A-Z]+_[0-9.]+)\)?\s+(\S+)$", listed, re.MULTILINE
    )
    return [(room != "*UND*", name, release) for room, release, name in rows]


def too_new(library):
    """Return the symbols that a library needs and manylinux_2_28 lacks."""
    found = set()
    for defined, name, version in symbols(library):
        family, _, release = version.partition("_")
        if not defined and numbers(release) > NEWEST.get(family, ()):
            found.add(f"{name}@{version}")
    return sorted(found)


def foreign(library):
    """Return the shared libraries that a wheel may not ask for."""
    listed = subprocess.run(["objdump", "-p", str(library)], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED\s+(\S+)", listed)
    return [name for name in needed if name.removeprefix("lib").split(".so")[0] not in SHARED]


def stubs(folder):
    """Write what is linked before the machine's own libraries; return the files."""
    rooms = {}
    for library in ("libc.so.6", "libm.so.6"):
        path = subprocess.run(["c++", f"-print-file-name={library}"], capture_output=True, text=True).stdout.strip()
        versions = {}
        for defined, name, version in symbols(path):
            if defined and version.startswith("GLIBC_2"):
                versions.setdefault(name, set()).add(numbers(version.removeprefix("GLIBC_")))
        for name, known in versions.items():
            old = [release for release in known if release <= NEWEST["GLIBC"]]
            # Others mean the same to every linker.
            if old and max(known) > NEWEST["GLIBC"]:
                room = next((room for prefix, room in ROOMS.items() if name.startswith(prefix)), library)
                rooms.setdefault(room, {})[name] = "GLIBC_" + ".".join(map(str, max(old)))
    files = []
    for room, versions in rooms.items():
        nodes = "".join(f"{node} {{}};\n" for node in sorted(set(versions.values())))
        (folder / "versions").write_text(nodes, encoding="utf-8")
        lines = [
            f".globl stub_{i}\n.type stub_{i}, @function\nstub_{i}:\n.symver stub_{i}, {name}@@@{node}\n"
            for i, (name, node) in enumerate(versions.items())
        ]
        (folder / "stub.s").write_text(".text\n" + "".join(lines), encoding="utf-8")
        files.append(folder / room)
        link = ["-shared", "-nostdlib", f"-Wl,-soname,{room}", f"-Wl,--version-script={folder / 'versions'}"]
        subprocess.run(["c++", *link, str(folder / "stub.s"), "-o", str(files[-1])], check=True)
    (folder / "defined.cpp").write_text(DEFINED, encoding="utf-8")
    files.append(folder / "defined.o")
    subprocess.run(
        ["c++", "-std=c++17", "-O2", "-fPIC", "-w", "-c", str(folder / "defined.cpp"), "-o", str(files[-1])], check=True
    )
    return files


def copy_sources(to, local):
    """Copy what a wheel is made of, with the local version in the one place where the version stands."""
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    for name in ("diffpp_fast", "csrc"):
        shutil.copytree(name, to / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy2(name, to)
    place = to / "diffpp_fast/version.py"
    text, found = re.subn(r'(__version__ = "[^"+]+)"', rf'\1+{local}"', place.read_text(encoding="utf-8"))
    assert found == 1, f"{place} should state one version"
    place.write_text(text, encoding="utf-8")


def local_version(kind):
    """Return `cpu`, or `cu130` for CUDA 13.0."""
    nvcc = find_nvcc()
    if kind == "cuda" and nvcc is None:
        raise SystemExit("diffpp_fast: a wheel with GPU kernels needs nvcc: on the PATH, or in CUDA_HOME")
    return "cu" + cuda_release(nvcc).replace(".", "") if kind == "cuda" else "cpu"


def build(kind):
    """Build the wheel of a kind, `cpu` or `cuda`, and return where it is."""
    base, place = Path("build/wheels", kind).resolve(), Path("dist", kind).resolve()
    copy_sources(base / "source", local_version(kind))
    (base / "stubs").mkdir(parents=True, exist_ok=True)
    shutil.rmtree(place, ignore_errors=True)
    environment = {
        "DIFFPP_FAST_BUILD": "library",
        "DIFFPP_FAST_CUDA": "1" if kind == "cuda" else "0",
        "LDFLAGS": shlex.join(["-s", "-Wl,--as-needed", *map(str, stubs(base / "stubs"))]),
    }
    shutil.rmtree(base / "lib", ignore_errors=True)
    named = ["--build-base", str(base), "--build-lib", str(base / "lib")]
    wheel = ["--py-limited-api", "cp310", "--plat-name", PLATFORM, "--dist-dir", str(place)]
    command = [sys.executable, "setup.py", "--quiet", "build", *named, "bdist_wheel", *wheel]
    subprocess.run(command, cwd=base / "source", env={**os.environ, **environment}, check=True)
    (built,) = place.glob("*.whl")
    library = base / "lib/diffpp_fast/native/_library.so"
    if found := too_new(library) + foreign(library):
        raise SystemExit(f"{built}: not for {PLATFORM}: {', '.join(found)}")
    with zipfile.ZipFile(built) as archive:
        assert "diffpp_fast/native/_library.so" in archive.namelist(), "a wheel without the library"
    return built


if __name__ == "__main__":
    if sys.argv[1:] not in (["cpu"], ["cuda"]):
        raise SystemExit("usage: python csrc/wheels.py cpu|cuda")
    built = build(sys.argv[1])
    print(f"{built}: {built.stat().st_size / 2**20:.1f} MiB")
