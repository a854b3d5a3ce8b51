"""Makes of the operators a package in the layout that Hugging Face's `kernels` loads.

Run `python csrc/hub/make.py` for everything that this machine can build. In build/hub-kernels are then the sources as
kernel-builder takes them and, in its folder `build`, variants that `kernels.get_local_kernel` loads.
"""

import argparse
import platform
import re
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
import project
import variants
from toolchain import find_toolchain


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--into", type=Path, default=project.ROOT / "build/hub-kernels", help="a folder; it is emptied")
    parser.add_argument("--name", default="diffpp-fast", help="the package's, in lower case with dashes")
    parser.add_argument("--compile", choices=("none", "cpu", "cuda", "all"), default="all", help="libraries to build")
    arguments = parser.parse_args()
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", arguments.name):
        parser.error(f"--name {arguments.name!r}: a package's name is of lower-case letters, digits and single dashes")
    folder = arguments.into.resolve()
    if folder.exists() and not folder.is_dir():
        parser.error(f"--into {folder}: it is a file")
    project.write(folder, arguments.name)
    for variant in variants.build(folder, arguments.name, chosen(arguments.compile)):
        size = sum(path.stat().st_size for path in variant.rglob("*") if path.is_file())
        print(f"{variant}: {size / 2**20:.1f} MiB")


def chosen(asked):
    """Return the backends to compile for, of those asked for that this machine has a compiler for."""
    if asked == "none":
        return ()
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise SystemExit("libraries are for Linux on x86-64; --compile none builds the variants in Python alone")
    compiler = find_toolchain()
    if compiler is None:
        raise SystemExit("no working C++17 compiler; --compile none builds the variants in Python alone")
    if asked in ("all", "cuda") and compiler.nvcc is None:
        if asked == "cuda":
            raise SystemExit("no nvcc; --compile cpu builds without it")
        print("no nvcc: no library with GPU kernels")
        return ("cpu",)
    return ("cpu", "cuda") if asked == "all" else (asked,)


if __name__ == "__main__":
    main()
