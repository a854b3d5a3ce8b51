"""Installs the wheels of dist/ where only torch is and no compiler, tries their operators, and prints a table.

Run `python csrc/wheels_check.py` after `python csrc/wheels.py cpu` (and `cuda`), in the root of the sources; `make
wheels-check` does both. Each Python gets an empty environment, and in it one torch after the other.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path

PLATFORM = (2, 28)
#: What torch imports, besides CUDA's libraries and numpy, which the package asks for.
TORCH_IMPORTS = ("numpy", "filelock", "typing_extensions", "sympy", "networkx", "jinja2", "fsspec", "setuptools<82")


def say(*command, **more):
    """Run a command and return what it printed; an error is shown whole."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace", **more
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}")
    return done.stdout


def find_python(release):
    """Return pyenv's Python of a release like 3.12, else the PATH's, or None."""
    found = sorted(Path.home().glob(f".pyenv/versions/{release}.*/bin/python"))
    return str(found[-1]) if found else shutil.which(f"python{release}")


def audit(wheel, auditwheel):
    """Return what auditwheel says of a wheel; refuse one that asks for more than manylinux_2_28 and torch."""
    if auditwheel is None:
        return "no auditwheel here; csrc/wheels.py has checked the symbols"
    facts = json.loads(say(auditwheel, "show", "--json", wheel))
    needs = tuple(map(int, re.fullmatch(r"manylinux_(\d+)_(\d+)_x86_64", facts["sym_tag"]).groups()))
    foreign = set(facts["external_libs"]) - {"libtorch_cpu.so"}
    if needs > PLATFORM or foreign or facts["unsupported_isa"]:
        raise SystemExit(f"{wheel.name}: {facts['sym_tag']}, {foreign or 'no foreign libraries'}")
    return f"auditwheel: symbols of {facts['sym_tag']}, no library but torch's"


class Environment:
    """An empty environment, and what runs in it: without a compiler on the PATH."""

    def __init__(self, folder, python, options, cuda):
        shutil.rmtree(folder, ignore_errors=True)
        say(python, "-m", "venv", folder)
        self.folder, self.bin = folder, folder.resolve() / "bin"
        self.options, self.cuda = options, cuda
        kept = {name: value for name, value in os.environ.items() if name == "HOME" or name.startswith("PIP_")}
        self.variables = {**kept, "PATH": str(self.bin), "OMP_WAIT_POLICY": "PASSIVE"}

    def run(self, program, *arguments, **variables):
        return say(self.bin / program, *arguments, cwd=self.folder, env={**self.variables, **variables})

    def pip(self, command, *arguments):
        return self.run("python", "-m", "pip", command, "--quiet", *arguments)

    def install_torch(self, torch):
        if self.cuda is None:
            self.pip("install", *self.options, f"torch=={torch}", "numpy")
            return
        self.pip("install", *self.options, "--no-deps", f"torch=={torch}")
        self.pip("install", *self.options, *TORCH_IMPORTS)
        (packages,) = self.bin.parent.glob("lib/python*/site-packages")
        if not (packages / "nvidia").exists():
            (packages / "nvidia").symlink_to(Path(self.cuda).resolve())

    def check(self, wheel):
        """Install a wheel without an index, try it, and return the seconds that pip took."""
        began = time.monotonic()
        self.pip("install", "--no-index", *([] if self.cuda is None else ["--no-deps"]), wheel)
        took = time.monotonic() - began
        version = wheel.name.split("-")[1]
        for isa in ("", "baseline"):
            check_doctor(self.run("diffpp-fast", "doctor", DIFFPP_FAST_ISA=isa), version, isa)
        self.run("python", "-c", TRY, version)
        self.pip("uninstall", "--yes", "diffpp-fast")
        return took


def check_doctor(said, version, isa):
    """Refuse what `doctor` printed where it names another version, or a compiled operator that does not serve."""
    rows = re.findall(r"^  \w+ +(?:cpu|cuda|triton|reference)[ |].*$", said, re.MULTILINE)
    right = re.findall(r"^  \w+ +cpu +right ", said, re.MULTILINE)
    assert said.startswith(f"diffpp-fast   {version}\n"), said
    assert len(rows) == len(right) >= 10 and "WRONG" not in said, said
    assert re.search(rf"^running on +{isa or '(avx512|avx2|baseline)'}$", said, re.MULTILINE), said
    assert bool(re.search("^GPU kernels +none$", said, re.MULTILINE)) == version.endswith("+cpu"), said


#: Beside `doctor`: one version everywhere, and a gradient through two compiled operators.
TRY = """
import importlib.metadata, sys, torch, diffpp_fast
from diffpp_fast import Noise, ops
assert diffpp_fast.__version__ == importlib.metadata.version("diffpp-fast") == sys.argv[1]
noise = Noise(3, torch.arange(2))
x0, times, gradients = torch.randn(2, 4, 8, 8), torch.rand(2), []
for backend in ("cpu", "reference"):
    with diffpp_fast.use_backend(backend):
        leaf = x0.clone().requires_grad_()
        y = ops.group_norm_silu(ops.add_noise(leaf, times, 1 - times, noise), 2)
        gradients += torch.autograd.grad(y.square().sum(), leaf)
torch.testing.assert_close(*gradients)
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pythons", nargs="+", default=["3.10", "3.11", "3.12", "3.13"])
    parser.add_argument("--torches", nargs="+", default=["2.11.0", "2.12.1", "2.13.0"])
    parser.add_argument("--folder", type=Path, default=Path("build/wheels-check"), help="where environments are made")
    parser.add_argument(
        "--pip", type=shlex.split, default=[], help="--pip='OPTIONS': those with which torch is fetched"
    )
    parser.add_argument("--cuda", help="a folder site-packages/nvidia of another environment, to fetch 2.3 GB less")
    arguments = parser.parse_args()
    wheels = sorted(Path("dist").resolve().glob("*/*.whl"))
    if not wheels:
        raise SystemExit("no wheels in dist/: make wheels")
    for wheel in wheels:
        print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB, {audit(wheel, shutil.which('auditwheel'))}")
    versions = [wheel.name.split("-")[1] for wheel in wheels]
    print(f"\n| Python | torch | {' | '.join(versions)} |")
    print("|---|---|" + "---|" * len(wheels))
    for release in arguments.pythons:
        python = find_python(release)
        if python is None:
            print(f"| {release} | is not here |" + " |" * len(wheels))
            continue
        environment = Environment(arguments.folder / release, python, arguments.pip, arguments.cuda)
        for torch in arguments.torches:
            environment.install_torch(torch)
            cells = [f" right; installed in {environment.check(wheel):.1f} s |" for wheel in wheels]
            print(f"| {release} | {torch} |{''.join(cells)}", flush=True)
        shutil.rmtree(environment.folder)


if __name__ == "__main__":
    main()
