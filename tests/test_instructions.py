"""The instructions of csrc's kernels for the CPU are those that are recorded."""

import re
import shutil
from pathlib import Path

import pytest

from benchmarks import instructions
from benchmarks.instructions import Counts, Unavailable, failures

CSRC = Path(__file__).parent.parent / "csrc"
COMPILER = "gcc 1.0"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("instructions") / "program"
    try:
        instructions.compile_to(path)
    except Unavailable as error:
        pytest.skip(str(error))
    return path


def test_kernels_take_what_is_recorded(program: Path) -> None:
    count = instructions.by_callgrind if shutil.which("valgrind") else instructions.by_traps
    counts = count(program)
    budget = instructions.read_budget()
    if counts.compiler not in instructions.compilers(budget):
        pytest.skip(f"no counts of {counts.compiler} are recorded: CI counts with the compiler that has some")
    wrong = "\n".join(failures(counts, budget))
    assert not wrong, wrong


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
def test_both_ways_of_counting_agree(program: Path) -> None:
    traps, callgrind = instructions.by_traps(program, "gap_loss"), instructions.by_callgrind(program, "gap_loss")
    assert traps.instructions.keys() == callgrind.instructions.keys() and len(traps.instructions) == 12
    for name, n in traps.instructions.items():
        # Callgrind counts the end of an instruction that repeats itself.
        assert abs(callgrind.instructions[name] - n) <= 1, name


def test_every_kernel_is_counted() -> None:
    declared = {
        f"{path.parent.name} {name}"
        for path in CSRC.glob("*/arguments.h")
        for name in re.findall(r"^DIFFPP_CPU_KERNEL\((\w+),", path.read_text(), re.MULTILINE)
    }
    # For known answers alone.
    declared.remove("noise philox_block")
    assert {re.split("[,:]", name)[0] for name in instructions.read_budget()} == declared


def test_three_percent_more_or_less_is_red() -> None:
    budget = {"a": {COMPILER: 1000, "another": 1}, "b": {COMPILER: 1000}, "c": {COMPILER: 1000}}
    assert failures(Counts(COMPILER, {"a": 1030, "b": 970, "c": 1000}), budget) == []
    more, less = failures(Counts(COMPILER, {"a": 1031, "b": 969, "c": 1000}), budget)
    assert more.startswith("a takes 1031 instructions, +3.1% of the 1000 recorded: make it take fewer")
    assert less.startswith("b takes 969 instructions, -3.1% of the 1000 recorded: record it")


def test_cases_come_and_go_with_the_record() -> None:
    budget = {"a": {COMPILER: 1000}, "gone": {COMPILER: 5}, "elsewhere": {"another": 7}}
    counts = Counts(COMPILER, {"a": 1000, "new": 10})
    new, gone = failures(counts, budget)
    assert new.startswith("new is not recorded") and gone.startswith("gone is recorded and is no more")
    written = instructions.recorded_with(budget, counts)
    assert written == {"a": {COMPILER: 1000}, "new": {COMPILER: 10}}
    assert failures(counts, written) == []
