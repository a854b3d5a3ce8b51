"""`diffpp-fast doctor`: the table of operators and backends, its self-tests, and the build facts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from diffpp_fast import availability, backends, library
from diffpp_fast.cli.main import main


@pytest.fixture(autouse=True)
def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on most machines without a GPU: the interpreter would take a minute for all operators."""
    limits = backends.LIMITS["triton"]._replace(unavailable=lambda: "there is no GPU")
    monkeypatch.setitem(backends.LIMITS, "triton", limits)
    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.setattr(backends, "_loaded", {})


def without_interpreter(**more: str) -> dict[str, str]:
    """The same for another process."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | more


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    for word in ("torch", "deepspeed", "_library.so", "compiler", "running on", "cuda: "):
        assert word in said
    for op in backends.OPS:
        line = next(line for line in said.splitlines() if line.split()[:1] == [op])
        assert line.split()[1] == "cpu" and line.split().count("right") >= 2 and "no (" in line


def test_doctor_finds_a_wrong_backend(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = backends._sources["add_noise"]["reference"]()
    wrong = SimpleNamespace(forward=lambda x0, *rest: 1.001 * right.forward(x0, *rest), backward=right.backward)
    monkeypatch.setitem(backends.LIMITS, "triton", backends.LIMITS["cpu"])
    for op in backends.OPS:
        monkeypatch.delitem(backends._sources[op], "triton")
    monkeypatch.setitem(backends._sources["add_noise"], "triton", lambda: wrong)
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "WRONG: triton on cpu: add_noise(): output has a relative error of" in said


def test_doctor_shows_both_defaults(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = backends._sources["add_noise"]["reference"]
    monkeypatch.setitem(backends.LIMITS, "cpu", backends.LIMITS["triton"])
    for name in ("triton", "cuda"):
        monkeypatch.setitem(backends.LIMITS, name, availability.UNLIMITED)
        for op in backends.OPS:
            monkeypatch.delitem(backends._sources[op], name, raising=False)
        monkeypatch.setitem(backends._sources["add_noise"], name, right)
    assert main(["doctor"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert any(line.startswith("add_noise cuda | triton ") for line in lines)
    assert any(line.startswith("score_gap reference ") for line in lines)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_doctor_on_every_instruction_set(isa: str) -> None:
    command = [sys.executable, "-m", "diffpp_fast", "doctor"]
    doctor = subprocess.run(command, env=without_interpreter(DIFFPP_FAST_ISA=isa), capture_output=True, text=True)
    assert doctor.returncode == 0, doctor.stdout
    (running,) = re.findall(r"running on +(\w+)", doctor.stdout)
    # A processor that lacks it says so and takes the best that it has.
    assert running == isa or "DIFFPP_FAST_ISA" in doctor.stderr


def test_doctor_without_the_library(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    library.library_unavailable.cache_clear()
    monkeypatch.setattr(library, "LIBRARY", Path("nowhere.so"))
    try:
        assert main(["doctor"]) == 0
    finally:
        library.library_unavailable.cache_clear()
    said = capsys.readouterr().out
    assert "cpu: csrc was not compiled when the package was installed" in said
    assert re.search(r"group_norm_silu +(triton|reference)", said)


@pytest.mark.parametrize(("command", "code"), [("train nowhere.yaml", 2), ("sample apple", 2), ("doctor", 0)])
def test_without_the_train_extra_it_says_what_to_install(command: str, code: int) -> None:
    """A process in which pydantic and diffusers can't be imported."""
    script = f"""
import sys
sys.modules.update(dict.fromkeys(["pydantic", "diffusers", "transformers"]))
from diffpp_fast.cli.main import main
sys.exit(main({command.split()!r}))
"""
    result = subprocess.run([sys.executable, "-c", script], env=without_interpreter(), capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    if code:
        assert re.search(r'is not installed: pip install .*\[train\]"', result.stderr)
        assert "Traceback" not in result.stderr
