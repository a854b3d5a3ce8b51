"""A copy of the package whose backend "cpu" runs csrc's GPU kernels on an emulated GPU: `python build.py FOLDER`.

The operators' tests then run those kernels, on CPU tensors. Needs CUDA's headers, no GPU.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
COPIED = ("csrc", "diffpp_fast", "setup.py", "pyproject.toml", "README.md", "LICENSE")

#: Takes the place of csrc/torch/cuda.h.
CALLS = """#pragma once
#include "../cuda/kernels.h"
#define DIFFPP_ON_CUDA(tensor, launch, ...) (::diffpp::cuda::launch(__VA_ARGS__, nullptr), true)
#define DIFFPP_FOR_CUDA(tensor, on_cuda, otherwise) (::diffpp::cuda::on_cuda)
"""
RUNTIME = """#include "emulation.h"
// The launches so far, one a line.
extern "C" __attribute__((visibility("default"))) const char* diffpp_launched() {
  static std::string lines;
  lines.clear();
  for (const std::string& launch : emulation::launched) lines += launch + "\\n";
  return lines.c_str();
}
extern "C" cudaError_t cudaGetLastError() { return cudaSuccess; }
extern "C" const char* cudaGetErrorString(cudaError_t) { return "none"; }
"""


def rewritten(kernels: str, file: str, launches: list[str]) -> str:
    """`kernel<<<grid, threads, ...>>>(arguments)` as a call of emulation::launch; shared arrays as static ones.

    Adds the file's launches to `launches`, one for each kernel that a place chooses among.
    """
    kernels = kernels.replace("__shared__", "static thread_local")
    while (at := kernels.find("<<<")) >= 0:
        begin = kernel_begins(kernels, at)
        grid, threads = split(kernels[at + 3 : (end := kernels.index(">>>", at))])[:2]
        close = closing(kernels, end + 3)
        kernel, arguments = kernels[begin:at].rstrip(), kernels[end + 3 : close]
        call = (
            f"::emulation::launch({name_of(kernel, file, launches)}, {grid}, {threads}, [&] {{ {kernel}{arguments}; }})"
        )
        kernels = kernels[:begin] + call + kernels[close:]
    return kernels


def name_of(kernel: str, file: str, launches: list[str]) -> str:
    """An expression for the name of what is launched: `condition ? a : b` in parentheses chooses between two."""
    choice = re.fullmatch(r"\((.+?) \? (.+) : (.+)\)", " ".join(kernel.split()))
    names = [f"{file}: {name}" for name in (choice.groups()[1:] if choice else [" ".join(kernel.split())])]
    launches += names
    first, *second = (f'"{name}"' for name in names)
    return f"({choice[1]}) ? {first} : {second[0]}" if choice else first


def kernel_begins(text: str, end: int) -> int:
    """Where the expression before `<<<` begins: something in parentheses, or a name with its template's arguments."""
    at = len(text[:end].rstrip()) - 1
    if text[at] in ")>":
        opening = {")": "(", ">": "<"}[text[at]]
        depth, last = 0, text[at]
        while True:
            depth += (text[at] == last) - (text[at] == opening)
            if depth == 0:
                break
            at -= 1
        if last == ")":
            return at
        at -= 1
    while re.match(r"\w", text[at]):
        at -= 1
    return at + 1


def split(arguments: str) -> list[str]:
    """At the commas that are in no parentheses and no template's brackets."""
    parts, depth = [""], 0
    for letter in arguments:
        depth += (letter in "(<") - (letter in ")>")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def closing(text: str, begin: int) -> int:
    """Past the parenthesis that closes the one at `begin`."""
    depth = 0
    for at in range(begin, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at + 1
    raise ValueError("no closing parenthesis")


def headers() -> str:
    """The flag for CUDA's headers, as nvcc itself passes it on."""
    told = subprocess.run(["nvcc", "--dryrun", "-c", "probe.cu"], capture_output=True, text=True).stderr
    match = re.search(r'INCLUDES="(.*?)"', told)
    if match is None:
        sys.exit(f"nvcc does not tell where its headers are:\n{told}")
    return match[1].strip().strip('"')


def write(path: Path, text: str) -> None:
    """Leaves a file alone that has this text: what was compiled from it stays new."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def main() -> None:
    if shutil.which("nvcc") is None:
        sys.exit("the emulated GPU needs CUDA's headers: no nvcc on the PATH")
    to = Path(sys.argv[1]).resolve()
    launches: list[str] = []
    for name in COPIED:
        for source in (path for path in [ROOT / name, *(ROOT / name).rglob("*")] if path.is_file()):
            if source.suffix in {".so", ".pyc"}:
                continue
            path = to / source.relative_to(ROOT)
            if source.suffix == ".py" or source.parent == ROOT or "csrc" not in source.parts:
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, path)
                continue
            text = source.read_text()
            if source.parent.name == "cuda":
                text = rewritten(text, source.name, launches)
            elif source.parent.name == "torch":
                text = text.replace("is_cuda()", "is_cpu()")
            write(path, CALLS if source.name == "cuda.h" else text)
    write(to / "csrc/torch/emulation.h", (HERE / "emulation.h").read_text())
    for source in (ROOT / "csrc/cuda").glob("*.cu"):
        shim = f'#include "emulation.h"\n#include "../cuda/{source.name}"\n'
        write(to / f"csrc/torch/cuda_{source.stem}.cpp", shim)
    write(to / "csrc/torch/cuda_runtime.cpp", RUNTIME)
    write(to / "launches.txt", "\n".join(launches))
    flags = f"-DDIFFPP_CUDA {headers()} -Wno-unknown-pragmas -Wno-attributes {os.environ.get('CXXFLAGS', '')}"
    environment = os.environ | {"DIFFPP_FAST_CUDA": "0", "CXXFLAGS": flags}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    raise SystemExit(subprocess.run(command, cwd=to, env=environment).returncode)


if __name__ == "__main__":
    main()
