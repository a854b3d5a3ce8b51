"""`make gpu-build`: one kernel from end to end, what it refuses, and how it reads cuobjdump."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_build, variants
from benchmarks.gpu_build import BUDGET, Resources, Use
from diffpp_fast import backends
from diffpp_fast.errors import ConfigurationError

DUMP = """
Fatbin elf code:
================
arch = sm_80
code version = [1,8]
host = linux
compile_size = 64bit

Resource usage:
 Common:
  GLOBAL:0
 Function _ZN6diffpp9add_noise4cuda39_GLOBAL__N__5a29ad14_7_cuda_cu_a48784778backwardIdLb0EEEvNS0_8BackwardE:
  REG:40 STACK:0 SHARED:16 LOCAL:0 CONSTANT[0]:488 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN6diffpp9add_noise4cuda39_GLOBAL__N__5a29ad14_7_cuda_cu_a48784778backwardIfLb1EEEvNS0_8BackwardE:
  REG:24 STACK:48 SHARED:0 LOCAL:8 CONSTANT[0]:488 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_100a
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function _normal:
  REG:32 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:416 CONSTANT[2]:8 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin ptx code:
================
arch = sm_100
code version = [9,0]
"""


def run(*options: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu_build",
        "--no-csrc",
        "--archs",
        "90",
        "--jobs",
        "1",
        *options,
    ]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_a_kernel_from_end_to_end(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    budget = tmp_path / "budget.json"
    # By a script: the whole of an operator takes longer.
    script = f"""
import sys, torch
from pathlib import Path
from diffpp_fast import Noise
from benchmarks import gpu_build
with gpu_build.compiling(90) as cubins:
    Noise(1, torch.arange(3)).uniform()
((cubin, (kernel, shared)),) = cubins.items()
path = Path({str(tmp_path / "kernel.cubin")!r})
path.write_bytes(cubin)
(usage,) = gpu_build.dump(path)
found = [gpu_build.Resources(kernel, 90, *usage[2:])]
print(gpu_build.table(found))
assert kernel == "triton.philox.uniform" and 8 <= usage.registers <= 255, (kernel, usage)
gpu_build.write_budget(Path({str(budget)!r}), gpu_build.budget_of(gpu_build.uses(found), {{}}))
assert not gpu_build.failures(gpu_build.uses(found), gpu_build.read_budget(Path({str(budget)!r})))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(budget.read_text()).keys() == {"triton.philox.uniform"}


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    budget = tmp_path / "budget.json"
    options = ("--ops", "philox", "--budget-file", str(budget))
    refused = run(*options)
    assert refused.returncode == 1
    assert "triton.philox.normal on sm_90 has no budget of registers: `make gpu-build BUDGET=write`" in refused.stdout
    counted = "triton.philox.normal: philox normal sd15-b16, float32, forward on sm_90 has no budget of instructions"
    assert counted in refused.stdout
    assert run(*options, "--budget", "write").returncode == 0
    allowed = run(*options)
    assert allowed.returncode == 0 and "0 failures" in allowed.stdout


def test_what_cuobjdump_says() -> None:
    library, spilling, cubin = gpu_build.parse(DUMP)
    assert library[1:] == (80, 40, 16, 0)
    assert spilling[1:] == (80, 24, 0, 56)
    assert cubin == Resources("_normal", 100, 32, 0, 0)


@pytest.mark.parametrize(
    ("mangled", "name"),
    [
        (next(gpu_build.parse(DUMP)).kernel, "cuda.add_noise.backward"),
        ("_ZN6diffpp5geglu6finishIfEEvv", "cuda.geglu.finish"),
        ("_ZN6diffpp6finishIfEEvv", "cuda.finish"),
        ("_Z6kernelPf", "cuda.kernel"),
    ],
)
def test_names_of_kernels(mangled: str, name: str) -> None:
    assert gpu_build.kernel_name(mangled) == name


def test_the_largest_specialisation_counts() -> None:
    found = [Resources("k", 90, 40, 0, 0), Resources("k", 90, 32, 16, 8), Resources("k", 80, 24, 0, 0)]
    assert gpu_build.largest(found) == [Resources("k", 80, 24, 0, 0), Resources("k", 90, 40, 16, 8)]


def test_spills_overruns_and_new_kernels_are_caught() -> None:
    found = [Resources("k", 90, 40, 0, 0)]
    budget = gpu_build.budget_of(gpu_build.uses([Resources("k", 90, 33, 0, 0)]), {})
    assert budget == {"k": {"sm_90": {"registers": 40}}}
    assert gpu_build.failures(gpu_build.uses(found), budget) == []
    (overrun,) = gpu_build.failures(gpu_build.uses([found[0]._replace(registers=41)]), budget)
    assert overrun.startswith("k on sm_90 takes 48 registers, 40 are in the budget") and "BUDGET=write" in overrun
    (spill,) = gpu_build.spills([found[0]._replace(spilled=8)])
    assert spill.startswith("k on sm_90 spills 8 bytes") and gpu_build.spills(found) == []
    (new,) = gpu_build.failures(gpu_build.uses([found[0]._replace(arch=100)]), budget)
    assert new == "k on sm_100 has no budget of registers: `make gpu-build BUDGET=write` records one"


@pytest.mark.parametrize(
    ("limit", "what"),
    [("launches", "launches"), ("instructions", "instructions per element"), ("bytes", "bytes per element")],
)
def test_what_is_counted_is_held_against_the_budget(limit: str, what: str) -> None:
    amounts = {"launches": 1, "instructions": 63.6, "bytes": 4.02}
    recorded = gpu_build.budget_of([Use("k: case", "sm_90", amounts)], {})
    assert gpu_build.failures([Use("k: case", "sm_90", amounts)], recorded) == []
    (overrun,) = gpu_build.failures([Use("k: case", "sm_90", {**amounts, limit: 100.5})], recorded)
    assert overrun.startswith(f"k: case on sm_90 takes 100.5 {what}, {amounts[limit]:g} are in the budget: ")
    assert overrun.endswith("record it with `make gpu-build BUDGET=write`")


def test_another_triton_has_a_budget_of_its_own_where_it_takes_more() -> None:
    budget = {"triton.k": {gpu: {"registers": 40, "bytes": 4.0} for gpu in ("sm_80", "sm_90")}}
    more = Use("triton.k", "sm_80", {"registers": 48, "bytes": 4.0})
    less, other = Use("triton.k", "sm_90", {"registers": 32}), Use("cuda.k", "sm_90", {"registers": 48})
    assert gpu_build.failures([more, less], budget, "3.6") == gpu_build.failures([more, less], budget) != []
    written = gpu_build.budget_of([more, less, other], budget, "3.6")
    own = {"triton.k, triton 3.6": {"sm_80": {"registers": 48}}}
    assert written == {**budget, "cuda.k": {"sm_90": {"registers": 48}}, **own}
    assert gpu_build.failures([more, less], written, "3.6") == []
    assert len(gpu_build.failures([more], written)) == 1
    # When it takes no more again, nothing of its own is left.
    again = gpu_build.budget_of([more._replace(amounts={"registers": 40})], written, "3.6")
    assert again.keys() == {"triton.k", "cuda.k"}


def test_a_new_budget_keeps_what_was_not_compiled(tmp_path: Path) -> None:
    old = {"a": {"sm_80": {"registers": 16.0}, "sm_90": {"registers": 24.0}}, "b": {"sm_90": {"registers": 8.0}}}
    new = gpu_build.budget_of([Use("a", "sm_90", {"registers": 32.0})], old)
    assert new == {**old, "a": {"sm_80": {"registers": 16.0}, "sm_90": {"registers": 32.0}}}
    gpu_build.write_budget(tmp_path / "budget.json", new)
    assert gpu_build.read_budget(tmp_path / "budget.json") == new


def test_a_whole_new_budget_leaves_out_kernels_that_are_no_more() -> None:
    names = ("triton.k", "triton.k, triton 3.6", "triton.k: case", "triton.gone", "triton.gone: case")
    budget = {name: {"sm_90": {"registers": 8.0}} for name in names}
    counted, kernels = [Use("triton.k: case", "sm_90", {})], [Resources("triton.k", 90, 8, 0, 0)]
    assert [*gpu_build.without_leftovers(budget, counted, kernels)] == [*names[:3]]


def test_the_recorded_budget_knows_the_kernels_of_every_operator() -> None:
    recorded = {tuple(name.split(".")[:2]) for name in gpu_build.read_budget(BUDGET)}
    served = [backends._sources[op]["triton"]() for op in backends.OPS]
    launchers = [getattr(found, "forward", None) or found.normal for found in served]
    files = {function.__module__.rpartition(".")[2] for function in launchers}
    shared = {"ada_layer_norm", "gated_residual_norm"}  # whose kernels are those of modulated_norm
    assert {("triton", file) for file in (files - shared) | {"modulated_norm"}} <= recorded


def test_a_library_without_gpu_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_build.native, "LIBRARY", tmp_path / "none.so")
    with pytest.raises(ConfigurationError, match="csrc is not compiled: install CUDA's compiler"):
        gpu_build.library_resources([90])


@pytest.mark.parametrize("op", backends.OPS)
def test_the_first_variants_hold_every_pair_of_options(op: str) -> None:
    every, count = variants.ordered(op, variants.DTYPES[:2])
    assert len({variant.name for variant in every}) == len(every)

    def pairs(some: list[variants.Variant]) -> set[object]:
        return {(a, b) for variant in some for a in variant.options for b in variant.options}

    assert pairs(every[:count]) == pairs(every)
    assert count < len(every) or op == "philox"
