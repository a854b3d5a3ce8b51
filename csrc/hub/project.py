"""Writes the package as kernel-builder takes it: Python files, csrc, the description of the build, and the card."""

import json
import re
import shutil
from pathlib import Path

import relative
from compilation import AVX2, AVX512, KERNEL
from toolchain import CUDA_ARCHS

CSRC = Path(__file__).resolve().parents[1]
ROOT = CSRC.parent
FILES = Path(__file__).parent / "files"

VERSION = 0  # of the package's interface; 0 promises nothing yet
LICENSE = "Apache-2.0"
TORCH = "2.11"  # whose stable ABI the library asks for
HEADERS = (".h", ".cuh")
ISAS = {"baseline": [], "avx2": AVX2, "avx512": AVX512}
#: Python imports the library as a module without contents: the operators are in torch.ops when it is loaded.
MODULE = """\
#include <Python.h>

#define JOINED(a, b) a##b
#define INIT(name) JOINED(PyInit_, name)
#define QUOTED(a) #a
#define NAME(name) QUOTED(name)

PyMODINIT_FUNC INIT(TORCH_EXTENSION_NAME)() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, NAME(TORCH_EXTENSION_NAME), nullptr, 0, nullptr};
  return PyModule_Create(&module);
}
"""


def write(folder, name):
    """Write the package `name` into a folder. What was written there before goes."""
    if folder.exists() and any(folder.iterdir()) and not (folder / "build.toml").exists():
        raise SystemExit(f"{folder} holds something else; name an empty folder")
    shutil.rmtree(folder, ignore_errors=True)
    sources = native()
    relative.write({"build.toml": description(name, sources), **sources}, folder)
    own = {path.relative_to(FILES): path.read_text(encoding="utf-8") for path in FILES.rglob("*.py")}
    relative.write({**relative.copied(ROOT / relative.PACKAGE), **own}, folder / "torch-ext" / python_name(name))
    card = (FILES / "CARD.md").read_text(encoding="utf-8").replace("NAME", name)
    others = {
        "torch-ext/torch_binding.cpp": MODULE,
        "CARD.md": card,
        "README.md": card,
        "flake.nix": (FILES / "flake.nix").read_text(encoding="utf-8"),
        "LICENSE": (ROOT / "LICENSE").read_text(encoding="utf-8"),
    }
    relative.write(others, folder)


def python_name(name):
    return name.replace("-", "_")


def native():
    """Return the files of csrc that are compiled, by path.

    A builder compiles a file once, so the kernels for the CPU become headers, and each instruction set a file.
    """
    files = {}
    for source in sorted(CSRC.glob("*/*")):
        path = Path("csrc", source.relative_to(CSRC))
        if source.parent.name in ("host", "hub") or source.suffix not in (*HEADERS, ".cpp", ".cu"):
            continue
        if source.name == "cpu.cpp":
            for isa in ISAS:
                lines = f'#define DIFFPP_ISA {isa}\n#include "cpu_kernels.h"\n'
                files[path.with_name(f"cpu_{isa}.cpp")] = lines
            path = path.with_name("cpu_kernels.h")
        files[path] = source.read_text(encoding="utf-8")
    return files


def sections(sources):
    """Yield files that are compiled alike: a name, and what kernel-builder calls a kernel.

    The library for GPUs serves the CPU as well.
    """
    for backend in ("cpu", "cuda"):
        common = ["-fvisibility=hidden", "-DDIFFPP_X86"]
        parts = {isa: (f"cpu_{isa}.cpp", [*KERNEL, *flags]) for isa, flags in ISAS.items()}
        parts["bindings"] = ("binding.cpp", ["-O2", *(["-DDIFFPP_CUDA"] if backend == "cuda" else [])])
        for part, (file, flags) in parts.items():
            chosen = [str(path) for path in sources if path.name == file]
            yield f"{backend}_{part}", _kernel(backend, chosen, [*common, *flags])
        rest = [str(path) for path in sources if path.suffix == ".cpp" and path.name not in dict(parts.values())]
        yield f"{backend}_common", _kernel(backend, rest, [*common, "-O2", "-ffp-contract=off"])
    chosen = [str(path) for path in sources if path.suffix == ".cu"]
    *others, last = map(capability, CUDA_ARCHS)
    yield (
        "cuda_kernels",
        {
            "backend": "cuda",
            "depends": ["torch"],
            "cuda-capabilities": [*others, f"{last}+PTX"],
            "cuda-flags": ["-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fvisibility=hidden", "-DDIFFPP_X86"],
            "src": chosen,
        },
    )


def capability(arch):
    """Return what CUDA calls a GPU's compute capability: 90 is 9.0."""
    return re.sub(r"^(\d+)(\d)", r"\1.\2", arch)


def _kernel(backend, src, flags):
    return {"backend": backend, "depends": ["torch"], "cxx-flags": flags, "src": src}


def description(name, sources):
    """Return build.toml, of kernel-builder's fifth edition."""
    headers = [str(path) for path in sources if path.suffix in HEADERS]
    tables = {
        "general": {"name": name, "version": VERSION, "edition": 5, "license": LICENSE, "backends": ["cpu", "cuda"]},
        "torch": {"src": ["torch-ext/torch_binding.cpp", *headers]},
        "torch.stable-abi": {"cpu": TORCH, "cuda": TORCH},
        **{f"kernel.{part}": kernel for part, kernel in sections(sources)},
    }
    # Strings, numbers and lists of strings are written in TOML as in JSON.
    return "\n".join(
        f"[{table}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in entries.items())
        for table, entries in tables.items()
    )
