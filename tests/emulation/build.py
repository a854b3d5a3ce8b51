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

RUNTIME = """#include "../emulation.h"
// The launches so far, one a line.
extern "C" __attribute__((visibility("default"))) const char* diffpp_launched() {
  static std::string lines;
  lines.clear();
  for (const std::string& launch : emulation::launched) lines += launch + "\\n";
  return lines.c_str();
}
extern "C" cudaError_t cudaGetLastError() { return cudaSuccess; }
extern "C" const char* cudaGetErrorString(cudaError_t) { return "none"; }
extern "C" cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
// Which GPU is emulated: 80 has no clusters, 90 has them.
extern "C" cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  const char* arch = std::getenv("DIFFPP_EMULATED_ARCH");
  attributes->ptxVersion = arch == nullptr ? 90 : std::atoi(arch);
  return cudaSuccess;
}
"""


def rewritten(kernels: str, file: str, launches: list[str]) -> str:
    """Rewrite launches, `kernel<<<grid, threads, ...>>>(arguments)` and those of clusters, for `emulation`.

    Shared arrays become static ones. Adds the file's launches, one for each kernel that a place chooses among.
    """
    kernels = kernels.replace("__shared__", "static thread_local")
    # launch_clusters((kernel), grid, blocks, shared, stream, arguments...), where it is called.
    for match in reversed(list(re.finditer(r"(?<=\s)launch_clusters\((?=\s*\()", kernels))):
        close = closing(kernels, match.end() - 1)
        kernel, grid, blocks, shared, _, *given = split(kernels[match.end() : close - 1])
        call = f"{name_of(kernel, file, launches)}, {grid}, kThreads, {blocks}, {shared}"
        run = f"[&] {{ {kernel}({', '.join(given)}); }}"
        kernels = f"{kernels[: match.start()]}::emulation::launch_clusters({call}, {run}){kernels[close:]}"
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


#: The files that `write` was told.
WRITTEN: set[Path] = set()


def write(path: Path, text: str) -> None:
    """Write a file, or leave it alone if it has this text: what was compiled from it stays new."""
    WRITTEN.add(path)
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def main() -> None:
    if shutil.which("nvcc") is None:
        sys.exit("the emulated GPU needs CUDA's headers: no nvcc on the PATH")
    to = Path(sys.argv[1]).resolve()
    launches: list[str] = []
    kept = set(to.glob("csrc/**/*.*"))
    for name in COPIED:
        for source in (path for path in [ROOT / name, *(ROOT / name).rglob("*")] if path.is_file()):
            if source.suffix in {".so", ".pyc"}:
                continue
            path = to / source.relative_to(ROOT)
            if source.suffix == ".py" or "csrc" not in source.relative_to(ROOT).parts:
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, path)
                WRITTEN.add(path)
                continue
            text = source.read_text()
            if source.suffix in {".cu", ".cuh"}:
                text = rewritten(text, source.parent.name, launches)
            # Without nvcc nothing is registered for GPUs: instead every tensor on the CPU is taken for one of theirs.
            write(path, text.replace("kCuda && ", "").replace("is_cuda()", "is_cpu()"))
    write(to / "csrc/emulation.h", (HERE / "emulation.h").read_text())
    for source in (ROOT / "csrc").glob("*/cuda.cu"):
        write(to / f"csrc/{source.parent.name}/cuda.cpp", '#include "../emulation.h"\n#include "cuda.cu"\n')
    write(to / "csrc/common/cuda_runtime.cpp", RUNTIME)
    # What an older tree has left there would be compiled, too.
    for path in kept - WRITTEN:
        path.unlink()
    write(to / "launches.txt", "\n".join(launches))
    flags = f"{headers()} -Wno-unknown-pragmas -Wno-attributes {os.environ.get('CXXFLAGS', '')}"
    environment = os.environ | {"DIFFPP_FAST_CUDA": "0", "CXXFLAGS": flags}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    raise SystemExit(subprocess.run(command, cwd=to, env=environment).returncode)


if __name__ == "__main__":
    main()
