"""The compiled library as a whole."""

from __future__ import annotations

import ctypes
import re
import resource
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cases import all_cases, make_inputs, small
from diffpp_fast import availability, backends, native

CSRC = Path(__file__).parent.parent / "csrc"


def read_with(*sources: Path) -> set[Path]:
    """Return the files of csrc that the sources are made of: themselves and what they include."""
    found: set[Path] = set()
    waiting = list(sources)
    while waiting:
        path = waiting.pop().resolve()
        if path not in found:
            found.add(path)
            waiting += [path.parent / name for name in re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE)]
    return found


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in CSRC.glob("*/binding.cpp")))
def test_an_operator_is_read_from_few_files(folder: str) -> None:
    binding, cpu, gpu = (CSRC / folder / name for name in ("binding.cpp", "cpu.cpp", "cuda.cu"))
    sources = [path for path in (binding, cpu, gpu) if path.exists()]
    assert len(read_with(*sources)) <= 9
    # Kernels know neither torch nor those for the other device.
    for kernels in sources[1:]:
        assert CSRC / "common/binding.h" not in read_with(kernels)
    for kernels in sources[2:]:
        assert not read_with(kernels) & {CSRC / "common/cpu.h", CSRC / "common/cpu_noise.h"}


def test_every_operator_has_a_compiled_kernel() -> None:
    assert native.unavailable() is None
    for op in backends.OPS:
        assert backends.default_backend(op, torch.device("cpu")) == "cpu"


def test_the_library_says_how_it_was_built() -> None:
    facts = native.facts()
    assert facts["compiler"].split()[0] in ("gcc", "clang")
    assert "-ffp-contract=off" in facts["flags"] and "-ffast-math" not in facts["flags"]
    assert facts["running on"] in facts["built for"].split()
    assert "baseline" in facts["built for"].split()
    assert (facts["GPU kernels"] == "none") == (facts["CUDA"] == "none")


def test_a_driver_that_is_older_than_cuda_is_refused() -> None:
    """Before a kernel fails: small calls would prefer it to Triton."""
    assert availability.driver_refuses("13.2", 13000) is None
    assert availability.driver_refuses("12.8", 13000) is None
    reason = availability.driver_refuses("13.0", 12080)
    assert reason is not None
    assert reason.startswith("csrc was compiled with CUDA 13.0, the driver knows up to 12.8: install a newer driver")


def test_the_driver_is_asked_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def gpu(**said: Any) -> str | None:
        with monkeypatch.context() as patch:
            patch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: True)
            patch.setattr(torch.cuda, "is_available", lambda: True)
            for name, value in said.items():
                patch.setattr(availability, name, value)
            return availability.cuda_unavailable.__wrapped__()

    def absent(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    facts = {"CUDA": "13.0"}
    assert gpu(library_facts=lambda: facts, cuda_driver=lambda: 13010) is None
    assert "the driver knows up to 12.4" in str(gpu(library_facts=lambda: facts, cuda_driver=lambda: 12040))
    monkeypatch.setattr(ctypes, "CDLL", absent)
    reason = gpu(library_facts=lambda: facts)
    assert reason == "there is no driver of CUDA's: libcuda.so.1: cannot open shared object file"


def test_no_schema_takes_a_string(cpu_backend: Any) -> None:
    """The headers of torch's stable ABI (2.13 included) leak every string that an operator takes."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("diffpp_fast::")]
    assert len(names) >= 15
    for name in names:
        schema = getattr(torch.ops.diffpp_fast, name.split("::")[1]).default._schema
        assert "str" not in {str(argument.type) for argument in schema.arguments}, schema


def test_calls_leak_no_memory(cpu_backend: Any) -> None:
    """Every operator, called often on small tensors, leaves the process as large as it was."""
    cases = {small(case) for case in all_cases()}
    calls = [make_inputs(case, torch.float32, torch.device("cpu")).call for case in sorted(cases)]

    def call(times: int) -> int:
        for _ in range(times):
            for each in calls:
                each.run()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB

    sizes = [call(times) for times in (100, 200, 200, 200)]
    # Allocators grow now and then; a leak grows every time. A string or a small tensor lost per call would take more.
    assert min(after - before for before, after in pairwise(sizes)) < 200 * len(calls) * 16 / 1024


@pytest.mark.parametrize("op", backends.OPS)
def test_expanded_inputs(op: str, cpu_backend: Any) -> None:
    """Tensors that hold one sample in memory and are a batch of it give what their copies give."""
    for case in sorted({small(case)._replace(layout="contiguous") for case in all_cases() if case.op == op}):
        case = case._replace(shape=(2, *case.shape[1:]))
        expanded: dict[str, Any] = {}
        copied: dict[str, Any] = {}
        given = make_inputs(case, torch.float32, torch.device("cpu")).call
        for name, value in given.arguments.items():
            if isinstance(value, torch.Tensor) and value.dim() > 1:
                once = value.detach()[:1].clone()
                expanded[name] = once.requires_grad_(value.requires_grad).expand_as(value)
                copied[name] = (
                    once.detach().repeat(len(value), *[1] * (value.dim() - 1)).requires_grad_(value.requires_grad)
                )
            else:
                expanded[name] = copied[name] = value
        for actual, expected in zip(
            replace(given, arguments=expanded).run(),
            replace(given, arguments=copied).run(),
            strict=True,
        ):
            assert torch.equal(actual, expected), case.name


def test_the_library_tells_no_folder_of_the_machine_that_built_it() -> None:
    """Messages of torch's headers name their files, which lie in somebody's environment."""
    assert str(Path(torch.__file__).parent).encode() not in native.LIBRARY.read_bytes()
    assert b"torch/include/torch/csrc/stable/" in native.LIBRARY.read_bytes()
