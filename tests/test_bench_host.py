"""`python -m benchmarks host`: Triton's own code runs as far as the driver, and rows hold what was measured."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import host
from benchmarks.timing import Timing


@pytest.mark.skipif(shutil.which("cc") is None, reason="the stub of a driver is C")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a process has one driver, and here it is CUDA's")
def test_a_call_is_measured_down_to_the_driver(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "host",
        "--ops",
        "geglu",
        "--min-time",
        "0.001",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    with (tmp_path / "host.csv").open() as file:
        rows = list(csv.DictReader(file))
    measured = [(row["pass"], row["provider"]) for row in rows]
    assert measured == [(each, name) for each in ("forward", "forward + backward") for name in host.PROVIDERS]
    assert all(float(row["median_us"]) > 0.0 for row in rows)


def test_rows_compare_with_eager() -> None:
    timings = {name: Timing((us * 1e-6,)) for name, us in (("eager", 20.0), ("cpu", 15.0), ("triton", 30.0))}
    row = host.Row(host.SUBJECTS[0], True, torch.bfloat16, timings)
    assert host.table([row]).rows[1][3:] == ("forward + backward", "20.0", "15.0", "30.0", "0.75", "1.50")
    assert [each["of_eager"] for each in host.csv_rows([row])] == ["1", "0.75", "1.5"]


@pytest.mark.parametrize("subject", host.SUBJECTS, ids=lambda subject: f"{subject.op} {subject.name}")
def test_both_kinds_of_code_take_the_tiny_inputs(subject: host.Subject) -> None:
    inputs = subject.inputs(tiny=True, dtype=torch.float32)
    assert len(inputs.step_unfused(subject.unfused)) >= len(inputs.call.wrt)
    assert len(inputs.call.run()) >= len(inputs.call.wrt)
