"""`python -m benchmarks static`: machine code that is walked, kernels whose loops are known, what the counts become."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks import machine_code, static
from benchmarks.cases import Case
from benchmarks.launches import Count, Launch, count, fill_bank
from benchmarks.machine_code import Function
from benchmarks.walk import Memory, Region, Shape, WalkError, chosen_programs

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
#: Where the test's tensor lies, and its elements of 4 bytes.
BEGIN, ELEMENTS = 0x10000, 4096

# Sums every 32nd element of a part of a tensor: as many loads as the second parameter says, thread by thread.
LOOP = """
        Function : loop
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   S2R R1, SR_CTAID.X ;
        /*0020*/                   ULDC.64 UR4, c[0x0][0x208] ;
        /*0030*/                   LDC.64 R2, c[0x0][0x210] ;
        /*0040*/                   IMAD R0, R1, 0x100, R0 ;
        /*0050*/                   IMAD.WIDE R2, R0, 0x4, R2 ;
        /*0060*/                   MOV R4, RZ ;
        /*0070*/                   LDG.E R5, desc[UR4][R2.64] ;
        /*0080*/                   IADD3 R4, R4, 0x1, RZ ;
        /*0090*/                   IADD3 R2, P1, R2, 0x80, RZ ;
        /*00a0*/                   IMAD.X R3, RZ, RZ, R3, P1 ;
        /*00b0*/                   ISETP.GE.AND P0, PT, R4, c[0x0][0x218], PT ;
        /*00c0*/                   FADD R6, R6, R5 ;
        /*00d0*/              @!P0 BRA 0x70 ;
        /*00e0*/                   EXIT ;
        /*00f0*/                   BRA 0xf0;
"""
BEFORE, TURN = 7, 7
# Stores where the thread's number is below the parameter; a number that was read decides about a root's slow path.
BRANCHES = """
        Function : branches
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   LDC.64 R2, c[0x0][0x210] ;
        /*0020*/                   IMAD.WIDE.U32 R2, R0, 0x4, R2 ;
        /*0030*/                   LDG.E R5, desc[UR4][R2.64] ;
        /*0040*/                   ISETP.GT.U32.AND P0, PT, R5, 0x727fffff, PT ;
        /*0050*/              @!P0 BRA 0x90 ;
        /*0060*/                   MOV R7, 0xb0 ;
        /*0070*/                   CALL.REL.NOINC 0xf0 ;
        /*0080*/                   BRA 0xb0 ;
        /*0090*/                   MUFU.RSQ R6, R5 ;
        /*00a0*/                   FMUL.FTZ R5, R5, R6 ;
        /*00b0*/                   ISETP.GE.AND P1, PT, R0, c[0x0][0x218], PT ;
        /*00c0*/              @!P1 STG.E desc[UR4][R2.64], R5 ;
        /*00d0*/               @P1 EXIT ;
        /*00e0*/                   EXIT ;
        /*00f0*/                   RET.REL.NODEC R7 0x0 ;
"""
DATA_LOOP = LOOP.replace("ISETP.GE.AND P0, PT, R4, c[0x0][0x218], PT", "FSETP.GEU.AND P0, PT, R5, 1, PT")


def launch(text: str, parameter: int, programs: int = 2, threads: int = 32) -> Launch:
    (code,) = machine_code.functions(text).values()
    function = Function(code, parameters=(0x210, 12), layout=[(0, 8), (8, 4)])
    shape = Shape((threads, 1, 1), (programs, 1, 1))
    bank = fill_bank(function, shape, [BEGIN.to_bytes(8, "little"), parameter.to_bytes(8, "little")])
    return Launch("k", function, bank, shape, Memory([Region("x", BEGIN, 4 * ELEMENTS)]), 8, 0, 0)


@pytest.mark.parametrize("turns", [1, 2, 7])
def test_a_loop_turns_as_often_as_the_launch_says(turns: int) -> None:
    counted = count(launch(LOOP, turns), cache=0)
    assert counted.instructions == 2 * 32 * (BEFORE + turns * TURN + 1)
    assert counted.loads == {32: 2 * turns}
    assert counted.asked == counted.moved == 2 * 32 * 4 * turns
    assert counted.pipes["LSU"] == 2 * turns and not counted.doubts


def test_all_programs_are_reckoned_from_some() -> None:
    few, many = (count(launch(LOOP, 3, programs), cache=0) for programs in (8, 800))
    assert many.instructions == pytest.approx(100 * few.instructions)
    assert any("outside" in doubt for doubt in many.doubts), "the tensor ends before the last programs' parts"


def test_programs_stand_for_a_grid_of_any_period() -> None:
    assert chosen_programs(5, 12) == [0, 1, 2, 3, 4]
    for period in (2, 3, 8, 16):
        rests = Counter(program % period for program in chosen_programs(2048, 64))
        assert len(rests) == period and max(rests.values()) <= 2.5 * 64 / period


@pytest.mark.parametrize("stored", [0, 5, 64])
def test_a_predicate_decides_whose_bytes_move(stored: int) -> None:
    counted = count(launch(BRANCHES, stored, programs=1, threads=64), cache=0)
    assert counted.asked == 64 * 4 + stored * 4
    assert counted.opcodes["STG.E"] == 2, "an instruction takes its slot whoever takes part"


def test_ordinary_numbers_stay_away_from_slow_paths() -> None:
    counted = count(launch(BRANCHES, 64, programs=1, threads=64), cache=0)
    assert counted.opcodes["MUFU.RSQ"] == 2 and "CALL.REL.NOINC" not in counted.opcodes


def test_a_loop_that_depends_on_data_is_refused() -> None:
    with pytest.raises(WalkError, match="k can't be followed: a loop at 0xd0 depends on data"):
        count(launch(DATA_LOOP, 1), cache=0)


def test_a_tensor_that_fits_in_the_cache_is_fetched_once() -> None:
    counted = count(launch(LOOP, 9), cache=2**20)
    assert counted.asked == counted.moved  # each element once
    again = launch(LOOP.replace("0x80, RZ", "RZ, RZ"), 1000)
    assert count(again, cache=2**20).moved == 4 * ELEMENTS
    assert count(again, cache=0).moved == 2 * 32 * 4 * 1000


def test_integers_in_memory_are_known() -> None:
    known = np.arange(ELEMENTS, dtype=np.uint32)
    at = known.ctypes.data
    memory = Memory([Region("table", at, known.nbytes, known.view(np.uint8))])
    addresses = np.array([at + 4 * 17, at + 4 * 300], dtype=np.uint64)
    (words,) = memory.read(addresses, 1, 32) or ([],)
    assert list(words) == [17, 300]
    assert memory.read(addresses + np.uint64(known.nbytes), 1, 32) is None


KERNELS = """
import torch, triton
import triton.language as tl
from benchmarks.launches import count, triton_launches

@triton.jit
def turns(p_to, n, step):
    pid = tl.program_id(0)
    for i in range(0, pid // n, step):
        tl.store(p_to + pid * 64 + i, 1.0)

to, found = torch.empty(20 * 64), []
with triton_launches(90, lambda launch: found.append(count(launch, 2**20))):
    for n, step in ((3, 1), (1, 1), (2, 3)):
        turns[(20,)](to, n, step)
        print(n, step, found[-1].asked, found[-1].doubts)
from benchmarks.static import Task, counted
for each in counted(Task("triton", "add_noise", ("sd15-b1",), ("bfloat16",), "H200")):
    (one,) = each.counts
    assert one.covered and all(abs(share - 1) < 0.01 for share in one.covered.values()), one.covered
    assert abs(each.bytes - 4) < 0.1 and one.loads[128] and not one.doubts and not one.spilled, one
    assert (30 if each.direction == "forward" else 5) < each.instructions < 60, each.instructions
"""


def test_kernels_whose_loops_and_bytes_are_known(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    script = tmp_path / "kernels.py"
    script.write_text(KERNELS, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    programs = chosen_programs(20, 12)
    for line in done.stdout.splitlines():
        n, step, asked, doubts = line.split(maxsplit=3)
        stores = sum(len(range(0, program // int(n), int(step))) for program in programs)
        assert float(asked) == pytest.approx(4 * stores * 20 / len(programs)) and doubts == "()", line


# What is made of the counts


def a_pass(instructions: float, moved: float, **of_count: object) -> static.Pass:
    case = Case("add_noise", "", "small", (1, 1, 8, 8), "contiguous", "drawn", "epsilon", "")
    one = Count(
        "triton.add_noise.forward", 4, 1, Counter({"FMA": instructions * 64 / 32}), Counter(), Counter({128: 3, 32: 1}),
        Counter({128: 1}), moved * 64, moved * 64, {"x read": 1.0}, 32, 0, 0, (),
    )._replace(**of_count)  # type: ignore[arg-type]  # fmt: skip
    return static.Pass(case, "bfloat16", "triton", "forward", (one,))


def test_the_cap_is_where_issuing_takes_as_long_as_copying() -> None:
    gpu = static.GPUS["H200"]
    assert gpu.per_byte == pytest.approx(132 * 4 * 32 * 1.755e9 / 4.3e12)
    assert a_pass(4 * gpu.per_byte, 4).cap(gpu) == pytest.approx(1.0)
    assert a_pass(2 * gpu.per_byte, 4).cap(gpu) == pytest.approx(2.0)


def test_rows_tell_pipes_widths_and_the_pass() -> None:
    launch_row, all_row = static.rows([a_pass(10, 4)], "H200")
    assert launch_row["kernel"] == "triton.add_noise.forward" and launch_row["fma"] == "10.00"
    assert launch_row["load_bits"] == "128 75 %, 32 25 %" and launch_row["cap_percent"] == "276"
    assert (all_row["launch"], all_row["launches"], all_row["instructions"]) == ("all", 1, "10.00")
    assert {*launch_row, *all_row} <= {*static.COLUMNS}


def test_bytes_that_do_not_add_up_are_doubted() -> None:
    assert static.doubts([a_pass(10, 4)]) == []
    for share in (0.7, 2.0):
        (sentence,) = static.doubts([a_pass(10, 4, covered={"x read": share})])
        assert sentence.endswith(f"triton.add_noise.forward asks for {share:.2f} of the bytes of x read")


def test_the_budget_holds_launches_instructions_and_bytes_of_a_pass() -> None:
    ((name, gpu, amounts),) = static.amounts([a_pass(10.001, 4)], 90)
    assert name == "triton.add_noise.forward: add_noise drawn noise small, bfloat16, forward" and gpu == "sm_90"
    assert amounts == {"launches": 1, "instructions": 10.01, "bytes": 4.0}


def test_the_page_shows_the_table_that_was_written() -> None:
    begin, end = (f"<!-- python -m benchmarks static, H200: {edge} -->" for edge in ("begin", "end"))
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    assert (
        page.split(begin)[1].split(end)[0].strip() == (RESULTS / "static-h200.md").read_text(encoding="utf-8").strip()
    )
    with (RESULTS / "static-h200.csv").open(newline="", encoding="utf-8") as file:
        written = list(csv.DictReader(file))
    assert {row["op"] for row in written} == {case.op for case in static.choose(None, ["full"])}
    assert set(static.BACKENDS) == {row["backend"] for row in written}


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "op"), [("compile", "geglu"), ("cuda", "add_noise")])
def test_code_of_torch_compile_and_of_csrc(backend: str, op: str) -> None:
    pytest.importorskip("triton")
    if backend == "cuda" and not list(ROOT.glob("build/temp*/*_cuda.o")):
        pytest.skip("csrc's objects for GPUs are not there")
    passes = list(static.collect([static.Task(backend, op, ("quick",), ("bfloat16",), "H200")], 1))
    assert [each.failure for each in passes] == ["", ""]
    expected = {"geglu": (6, 10), "add_noise": (4, 4)}[op]
    assert [round(each.bytes, 1) for each in passes] == pytest.approx(expected, rel=0.02)
