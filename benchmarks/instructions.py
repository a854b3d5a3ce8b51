"""`python -m benchmarks.instructions`: holds the instructions of csrc's kernels for the CPU against what is recorded.

Times differ from run to run; instructions of one thread on the same data do not. They depend on the compiler, whose
counts are recorded apart (`cpu_budget.json`), and not on the processor: the kernels are those for AVX2, which share
their source with those for AVX-512. Valgrind's Callgrind counts where it is installed, else the processor's trap flag
(`instructions.cpp`), which takes longer and finds the same but for an instruction that repeats itself.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
BUDGET = Path(__file__).with_name("cpu_budget.json")
SOURCE = Path(__file__).with_suffix(".cpp")
ISA = "avx2"
#: So much more is a regression, and so much less has to be recorded, or later regressions would hide in it.
TOLERANCE = 0.03
#: Loops stay loops: not calls of the functions that they define.
LOOPS = ("-fno-builtin", "-fno-tree-loop-distribute-patterns")
FLAGS = ("-std=c++17", "-O2", "-mavx2", *LOOPS, "-DDIFFPP_X86", f"-DDIFFPP_ISA={ISA}")

#: Case -> compiler -> instructions.
Budget = dict[str, dict[str, int]]


class Unavailable(Exception):
    """Nothing can be counted here; the message says why."""


class Counts(NamedTuple):
    """Instructions by case, and the compiler of the kernels."""

    compiler: str
    instructions: dict[str, int]


def count() -> Counts:
    """Compile csrc's kernels, or take those of the last build, and count.

    Raises:
        Unavailable: this machine can't.
    """
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "instructions")
        compile_to(program)
        return by_callgrind(program) if shutil.which("valgrind") else by_traps(program)


def compile_to(program: Path) -> None:
    """Compile the program that counts, with the kernels that the package ships.

    Raises:
        Unavailable: it would not run here, or not be theirs.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise Unavailable("instructions are counted on Linux and x86-64 alone")
    if not re.search(r"\bavx2\b", Path("/proc/cpuinfo").read_text(encoding="utf-8")):
        raise Unavailable("this processor does not run AVX2")
    if os.environ.get("CXXFLAGS"):
        raise Unavailable("CXXFLAGS change what is counted")
    sys.path.insert(0, str(ROOT / "csrc"))
    before = Path.cwd()
    # The build names its files from here.
    os.chdir(ROOT)
    try:
        from compilation import BuildExt  # type: ignore[import-not-found]
        from setuptools import Distribution  # type: ignore[import-untyped]
        from toolchain import find_compiler  # type: ignore[import-not-found]

        if find_compiler() is None:
            raise Unavailable("there is no C++17 compiler")
        build: Any = BuildExt(Distribution())
        build.finalize_options()
        compiler, objects = build.kernels()
        command = [*compiler, *FLAGS, str(SOURCE), *map(str, objects), "-o", str(program)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{shlex.join(command)}\n{done.stderr}")
    finally:
        os.chdir(before)
        sys.path.remove(str(ROOT / "csrc"))


def by_traps(program: Path, wanted: str = "") -> Counts:
    """Count the cases whose names begin with `wanted` by the processor's trap flag."""
    return read(subprocess.run([str(program), wanted], check=True, capture_output=True, text=True).stdout)


def by_callgrind(program: Path, wanted: str = "") -> Counts:
    """Count the same by Callgrind, under which no trap comes: a dump for each call, the first of them empty."""
    out = program.with_name("dumps")
    options = ["--toggle-collect=counted", "--dump-after=counted", f"--callgrind-out-file={out}"]
    done = subprocess.run(
        ["valgrind", "-q", "--tool=callgrind", *options, str(program), wanted],
        check=True,
        capture_output=True,
        text=True,
    )
    printed = read(done.stdout)
    totals = [_total(out.with_name(f"{out.name}.{number}")) for number in range(1, len(printed.instructions) + 2)]
    return Counts(
        printed.compiler, {name: n - totals[0] for name, n in zip(printed.instructions, totals[1:], strict=True)}
    )


def _total(dump: Path) -> int:
    match = re.search(r"^totals: (\d+)$", dump.read_text(encoding="utf-8"), re.MULTILINE)
    assert match is not None, dump
    return int(match[1])


def read(printed: str) -> Counts:
    compiler, *lines = printed.splitlines()
    return Counts(compiler, {name: int(n) for name, n in (line.split("\t") for line in lines)})


def failures(counts: Counts, budget: Budget) -> list[str]:
    """Say what takes more or less than is recorded, and what is not recorded or is no more."""
    recorded = {name: counted[counts.compiler] for name, counted in budget.items() if counts.compiler in counted}
    remedy = "record it with `python -m benchmarks.instructions --budget write`"
    sentences = []
    for name, now in counts.instructions.items():
        before = recorded.pop(name, None)
        if before is None:
            sentences.append(f"{name} is not recorded: {remedy}")
            continue
        change = f"{name} takes {now} instructions, {now / before - 1.0:+.1%} of the {before} recorded"
        if now > before * (1.0 + TOLERANCE):
            sentences.append(f"{change}: make it take fewer, or, if it is worth it, {remedy}")
        elif now < before * (1.0 - TOLERANCE):
            sentences.append(f"{change}: {remedy}, so that later kernels are held against that")
    return sentences + [f"{name} is recorded and is no more: {remedy}" for name in recorded]


def recorded_with(budget: Budget, counts: Counts) -> Budget:
    """Return the budget with these counts; those of other compilers stay, of cases that are still there."""
    return {name: {**budget.get(name, {}), counts.compiler: n} for name, n in counts.instructions.items()}


def compilers(budget: Budget) -> set[str]:
    """Return the compilers whose counts are recorded."""
    return {compiler for counted in budget.values() for compiler in counted}


def read_budget(path: Path = BUDGET) -> Budget:
    budget: Budget = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return budget


def write_budget(path: Path, budget: Mapping[str, Mapping[str, int]]) -> None:
    """One line for each case, so that changes to different ones merge."""
    lines = (f"{json.dumps(name)}: {json.dumps(counted, sort_keys=True)}" for name, counted in sorted(budget.items()))
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="instructions", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--budget", choices=["check", "write"], default="check", help="compare, or record anew")
    arguments = parser.parse_args(argv)
    try:
        counts = count()
    except Unavailable as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, n in counts.instructions.items():
        print(f"{n:8d}  {name}")
    budget = read_budget()
    if arguments.budget == "write":
        budget = recorded_with(budget, counts)
        write_budget(BUDGET, budget)
    wrong = failures(counts, budget)
    if counts.compiler not in compilers(budget):
        wrong = [f"no counts of {counts.compiler} are recorded, only of {', '.join(sorted(compilers(budget)))}"]
    print("\n".join([*wrong, f"{counts.compiler}: {len(counts.instructions)} cases, {len(wrong)} failures"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
