"""Builds the package for this machine: a folder for each variant, as `kernels` loads it.

The variants `torch-cpu` and `torch-cuda` are Python alone. `torch-stable-abi211-...` holds a compiled library as well,
made as build.toml says; `kernels` prefers it where it fits.
"""

import base64
import hashlib
import json
import platform
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count
from pathlib import Path

import project
from compilation import digest, torch_flags
from toolchain import DIALECT, cuda_release, find_static_runtime, find_toolchain, find_torch
from wheels import foreign, stubs, too_new

# kernel-builder writes the same into the variants that it builds.
OPS = """\
import torch
{load}
ops = torch.ops.{namespace}


def add_op_namespace_prefix(op_name):
    return f"{namespace}::{{op_name}}"
"""
#: An extension that asks for no more than Python 3.9's loads in later ones.
LIMITED_API = "-DPy_LIMITED_API=0x03090000"


def build(folder, name, compiled):
    """Build the variants of the package in `folder`, some with a library for a backend in `compiled`; return them."""
    # No two contents share a namespace.
    content = content_of(folder / "torch-ext", folder / "csrc")
    made = []
    for backend in ("cpu", "cuda"):
        namespace = f"_{project.python_name(name)}_{backend}_{content[:7]}"
        place = _python(folder, name, f"torch-{backend}", namespace)
        _metadata(place, name, namespace, {"type": backend})
        made.append(place)
        if backend in compiled:
            place = _python(folder, name, _named(backend), namespace, load=f"\nfrom . import {namespace}\n")
            _library(folder, backend, namespace, place)
            archs = [project.capability(arch) for arch in find_toolchain().archs]
            _metadata(place, name, namespace, {"type": backend, **({"archs": archs} if backend == "cuda" else {})})
            made.append(place)
    return made


def content_of(*folders):
    """Return a digest of folders of sources."""
    files = [(path, path.relative_to(folder)) for folder in folders for path in sorted(folder.rglob("*"))]
    return digest(*(f"{name} {path.read_text(encoding='utf-8')}" for path, name in files if path.is_file()))


def _named(backend):
    """Return a compiled variant's name; CUDA's has the release of nvcc, with whose later ones it works, too."""
    compute = backend
    if backend == "cuda":
        compute = f"cu{cuda_release(find_toolchain().nvcc).replace('.', '')}"
    return f"torch-stable-abi{project.TORCH.replace('.', '')}-{compute}-{platform.machine()}-linux"


def _python(folder, name, variant, namespace, load=""):
    """Write a variant's Python files; return its folder."""
    place = folder / "build" / variant
    shutil.copytree(folder / "torch-ext" / project.python_name(name), place)
    (place / "_ops.py").write_text(OPS.format(load=load, namespace=namespace), encoding="utf-8")
    return place


def _metadata(place, name, namespace, backend):
    """Write what `kernels` reads first, with the digests of all other files."""
    digests = {
        path.relative_to(place).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in sorted(place.rglob("*"))
        if path.is_file()
    }
    described = {
        "name": name,
        "id": namespace,
        "version": project.VERSION,
        "license": project.LICENSE,
        "python-depends": [],
        "backend": backend,
        "digest": {"algorithm": "sha256", "files": digests},
    }
    (place / "metadata.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def _library(folder, backend, namespace, place):
    """Compile and link the library of a backend, for any Python from 3.9 on and glibc from 2.28 on."""
    objects = folder.with_name(f"{folder.name}-objects")
    objects.mkdir(parents=True, exist_ok=True)
    content = content_of(folder / "csrc")

    def compile(command):
        made = objects / f"{digest(content, *command)}.o"
        if not made.exists():
            subprocess.run([*command, "-o", f"{made}.new"], cwd=folder, check=True)
            Path(f"{made}.new").rename(made)
        return str(made)

    with ThreadPoolExecutor(cpu_count()) as pool:
        made = list(pool.map(compile, _commands(backend, namespace)))
    library = place / f"{namespace}.abi3.so"
    compiler, nvcc, _ = find_toolchain()
    runtime = [f"-L{find_static_runtime(nvcc)}", "-lcudart_static"] if backend == "cuda" else []
    link = [*runtime, f"-L{find_torch() / 'lib'}", "-ltorch_cpu", "-s", "-Wl,--as-needed", *map(str, stubs(objects))]
    subprocess.run([*compiler, "-shared", *made, *link, "-o", str(library)], check=True)
    if found := too_new(library) + foreign(library):
        raise SystemExit(f"{library}: not for manylinux_2_28: {', '.join(found)}")


def _commands(backend, namespace):
    """Yield how each file is compiled."""
    compiler, nvcc, archs = find_toolchain()
    torch = [f"-DTORCH_EXTENSION_NAME={namespace}", *torch_flags(find_torch())]
    python = [LIMITED_API, f"-I{sysconfig.get_path('include')}"]
    yield [*compiler, *DIALECT, *torch, *python, "-c", "torch-ext/torch_binding.cpp"]
    # Machine code for each GPU, and PTX of the last for what comes after it.
    codes = [*((arch, f"sm_{arch}") for arch in archs), *((arch, f"compute_{arch}") for arch in archs[-1:])]
    gencode = [f"-gencode=arch=compute_{arch},code={code}" for arch, code in codes]
    for part, kernel in project.sections(project.native()):
        if kernel["backend"] != backend:
            continue
        if part == "cuda_kernels":
            command = [nvcc, "-std=c++17", "-Xcompiler=-fPIC", *kernel["cuda-flags"], *gencode]
        else:
            # Only bindings know torch: the others are the same for all names.
            command = [*compiler, *DIALECT, *kernel["cxx-flags"], *(torch if part.endswith("bindings") else [])]
        for source in kernel["src"]:
            yield [*command, "-c", source]
