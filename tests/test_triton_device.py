"""The needs of Triton kernels from the process around them: the right device, and graphs of torch.compile."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffpp_fast import backends
from diffpp_fast.availability import interpreter_refuses
from diffpp_fast.ops.triton import plans
from diffpp_fast.ops.triton.device import on_its_device

TESTS = Path(__file__).parent


@pytest.mark.parametrize("op", backends.OPS)
def test_every_operator_launches_on_the_device_of_its_tensors(op: str) -> None:
    found = backends._sources[op]["triton"]()
    names = [name for name in ("forward", "backward", "normal", "uniform", "integers") if hasattr(found, name)]
    assert names
    for name in names:
        assert getattr(found, name).__code__ is on_its_device(lambda: None).__code__, name


@pytest.mark.parametrize(("current", "entered"), [(0, [1]), (1, [])])
def test_the_current_device_changes_only_where_it_must(
    current: int, entered: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    class OnDeviceOne(torch.Tensor):
        is_cuda = True
        device: Any = SimpleNamespace(index=1)

        def get_device(self) -> int:
            return 1

    def enter(device: Any) -> Any:
        seen.append(device.index)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", enter)
    assert on_its_device(lambda x, y: y)(torch.zeros(1).as_subclass(OnDeviceOne), 5) == 5
    assert seen == entered


@pytest.mark.parametrize(
    ("versions", "serves"),
    [(("3.6.0", "2.3.5"), True), (("3.6.0", "2.4.6"), False), (("3.7.1", "2.4.6"), True), (("3.10.0", "2.10.1"), True)],
)
def test_which_numpy_the_interpreter_needs(versions: tuple[str, str], serves: bool) -> None:
    reason = interpreter_refuses(*versions)
    assert (reason is None) == serves
    assert serves or "needs numpy before 2.4, here is 2.4.6: pip install" in str(reason)


def compiled_by(script: str) -> str:
    """The output of a script, which runs in a process whose Triton is not an interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, TESTS / script], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="make gpu-check compiles them for the GPU that is there")
def test_every_operator_compiles_to_one_graph() -> None:
    lines = compiled_by("triton_graphs.py").splitlines()
    assert dict(line.split() for line in lines) == dict.fromkeys(backends.OPS, "1")


@pytest.mark.skipif(torch.cuda.is_available(), reason="make gpu-check compiles them for the GPU that is there")
def test_every_kernel_compiles_whatever_its_integers_are() -> None:
    assert compiled_by("triton_arguments.py") == ""


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="make gpu-check calls each operator twice on the GPU that is there"
)
def test_a_plan_launches_what_triton_would_without_asking_it() -> None:
    assert compiled_by("triton_plans.py") == ""


def test_a_lazy_negation_is_not_overlooked() -> None:
    x = torch.ones(3)
    read = on_its_device(lambda *values: [value.is_neg() for value in values])
    assert read(x, torch._neg_view(x)) == [False, False]


def test_plans_tell_apart_what_is_equal_but_another_kernel() -> None:
    """1, 1.0 and True are equal to a dictionary, and tensors of one shape differ in dtype, strides or alignment."""
    memory = torch.zeros(8)
    tensors = memory[:4], memory[1:5], memory[::2], memory[:4].view(torch.int32), torch._neg_view(memory[:4])
    different = [[value] for value in (1, 1.0, True, None, *tensors)]
    assert len({plans.kind(0, arguments) for arguments in different}) == len(different)
    assert plans.kind(0, [1, memory[:4]]) == plans.kind(0, [1, memory[4:]])
