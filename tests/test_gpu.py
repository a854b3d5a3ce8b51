"""Checks that are right on a GPU alone: `make gpu-check` runs these tests, and `pytest -m gpu` alone does.

Each check is a process of its own: a kernel that brings the device down takes nothing else with it. As many run at once
as there are processors for; a test waits for its own. What an earlier call has found right is not checked again.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch

from benchmarks import backends, gpu_session
from benchmarks.gpu_session import ROOT, Ended, Session, Verdict, stop_all

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(
        gpu_session.current is None and not torch.cuda.is_available(),
        reason="needs a GPU; make gpu-check REHEARSE=1 goes through the steps without",
    ),
]
SESSION = gpu_session.current or (Session(rehearse=False) if torch.cuda.is_available() else None)
#: Seconds after which a check is stopped.
GATE, SANITIZER, TESTS, BUILD, PLAN = 170.0, 150.0, 170.0, 200.0, 60.0
#: As many checks run at once as there are processors: torch and its compiler are not to use all of them for each.
FEW_THREADS = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
#: The exit code of compute-sanitizer when it has found errors.
SANITIZER_ERRORS = 86
#: What a run needs besides torch.
TRAINING = ("diffusers", "pydantic", "safetensors", "transformers", "yaml")
FILES = ("test_triton_*.py", "test_ops_*.py", "test_noise.py")


class Check(NamedTuple):
    """A process that says by its exit code whether something is right."""

    name: str
    command: list[str]
    limit: float
    needs_csrc: bool = True
    environment: Mapping[str, str | None] = MappingProxyType({})


def python(*arguments: str | Path) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def build(session: Session) -> Check | None:
    """csrc in place, for the GPU that is there alone; a rehearsal compiles it for the CPU, where it is missing."""
    if session.rehearse and backends.native.unavailable() is None:
        return None
    command = python("setup.py", "--quiet", "build_ext", "--inplace")
    if session.rehearse:
        return Check("build", command, BUILD, False, {"DIFFPP_FAST_CUDA": "0"})
    # Objects for other GPUs stay apart.
    arch = "{}{}".format(*torch.cuda.get_device_capability())
    command += ["--build-temp", str(ROOT / "build" / f"gpu-check-sm_{arch}")]
    return Check("build", command, BUILD, False, {"DIFFPP_FAST_CUDA_ARCHS": arch})


def gates(session: Session) -> Iterator[Check]:
    """One for each operator and backend; in a rehearsal one for each backend, since starting takes longest."""
    # Triton's kernels need no build, so they are checked while csrc is compiled.
    for backend in (*session.backends, "reference"):
        ops = [op for op in session.ops if backends.has_kernel(op, backend) and session.verdict(op, backend) is None]
        for group in [ops] if session.rehearse else [[op] for op in ops]:
            if group:
                more = ["--rehearse"] if session.rehearse else []
                command = python(ROOT / "tests/gpu_gate.py", backend, ",".join(group), session.state.path, *more)
                yield Check(f"gate {backend} {','.join(group)}", command, GATE, backend in ("cpu", "cuda"))


def operators_tests(session: Session) -> Check:
    """The tests of the operators, on the GPU; a rehearsal only collects a file."""
    files = sorted(str(path) for pattern in FILES for path in (ROOT / "tests").glob(pattern))
    command = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", ROOT)
    if session.rehearse:
        return Check("tests", [*command, "--collect-only", files[0]], TESTS)
    command += ["-m", "gpu and not slow"]
    workers = ["-n", "4"] if importlib.util.find_spec("xdist") is not None else []
    return Check("tests", [*command, *workers, *files], TESTS)


def sanitizer(session: Session, backend: str) -> Check:
    """Out-of-bounds and misaligned accesses, on a few combinations of options."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    ops = ",".join(op for op in session.ops if backends.has_kernel(op, backend))
    command = [program, "--tool", "memcheck", "--error-exitcode", str(SANITIZER_ERRORS), "--print-limit", "20"]
    command += python(ROOT / "tests/gpu_gate.py", backend, ops, session.state.path, "--sanitized")
    # Torch's cache would hide accesses beyond a tensor but within a block of its own.
    return Check(f"sanitizer {backend}", command, SANITIZER, True, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def plan(session: Session) -> Check:
    """The bytes that `diffpp-fast plan` says against those that an engine holds."""
    return Check("plan", python(ROOT / "tests/planning_check.py", "--device", session.device.type), PLAN)


def captured(session: Session) -> Check:
    """Both updates in CUDA graphs against uncaptured ones."""
    command = python(ROOT / "tests/capture_check.py", "--device", session.device.type)
    return Check("captured", command, PLAN)


def left_out(session: Session, check: Check) -> str | None:
    """Return the reason why a check can't be made here; None if it can."""
    needs = {"tests": ("hypothesis",), "plan": ("diffusers", "pydantic"), "captured": TRAINING}.get(check.name, ())
    missing = [package for package in needs if importlib.util.find_spec(package) is None]
    if missing:
        return f"{' and '.join(missing)} is not installed"
    if check.name.startswith("sanitizer") and (session.rehearse or not shutil.which(check.command[0])):
        return "a rehearsal checks no accesses" if session.rehearse else "compute-sanitizer is not installed"
    return "an earlier call has found it right" if session.is_done(check.name) else None


def all_checks(session: Session) -> list[Check]:
    """Return the checks, what takes longest first."""
    judged = list(gates(session))
    watched = [sanitizer(session, backend) for backend in session.backends]
    by_triton = [check for check in judged if not check.needs_csrc and " reference " not in check.name]
    others = [check for check in judged if check not in by_triton]
    return [*by_triton, operators_tests(session), *watched, *others, plan(session), captured(session)]


CHECKS = [] if SESSION is None else all_checks(SESSION)


@pytest.fixture(scope="session")
def running() -> Iterator[dict[str, Future[Ended | None]]]:
    """All checks that can be made, begun in their order."""
    session = SESSION
    assert session is not None
    pool = ThreadPoolExecutor(max(1, min(12, (os.cpu_count() or 1) - 2 * (not session.rehearse))))

    def run(check: Check) -> Ended | None:
        if check.needs_csrc:
            built.result()
        if time.monotonic() >= session.checks_end:
            return None
        environment = {**FEW_THREADS, **check.environment}
        return session.run(check.name, check.command, check.limit, session.checks_end, **environment)

    made = build(session)
    built: Future[Ended | None] = pool.submit(run, made) if made is not None else pool.submit(lambda: None)
    try:
        begun = {each.name: pool.submit(run, each) for each in CHECKS if left_out(session, each) is None}
        yield {"build": built, **begun}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        stop_all()


def test_csrc_is_built(running: dict[str, Future[Ended | None]]) -> None:
    assert SESSION is not None
    ended = running["build"].result()
    if ended is not None:
        SESSION.say(f"build: {ended.why}")
        SESSION.state.add(("step", "build"), (ended.why, ended.code == 0))
        assert ended.code == 0, ended.output[-3000:]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_right(check: Check, running: dict[str, Future[Ended | None]]) -> None:
    assert SESSION is not None
    if reason := left_out(SESSION, check):
        SESSION.say(f"{check.name}: left out, for {reason}", aside="earlier" in reason)
        pytest.skip(reason)
    try:
        ended = running[check.name].result()
    except CancelledError:
        ended = None
    if ended is None or (ended.code is None and time.monotonic() >= SESSION.checks_end):
        SESSION.say(f"{check.name}: stopped")
        pytest.skip("the time was over; another call goes on from here")
    if check.name.startswith("gate "):
        note_verdicts(SESSION, check, ended)
    else:
        errors = [
            line for line in ended.output.splitlines() if line.startswith("========= ") and "memcheck" not in line
        ]
        why = "; ".join(errors[:3]) if ended.code == SANITIZER_ERRORS else ended.why
        SESSION.say(f"{check.name}: {why}")
        SESSION.state.add(("step", check.name), (why, ended.code == 0))
    assert ended.code == 0, ended.output[-3000:]


def note_verdicts(session: Session, check: Check, ended: Ended) -> None:
    """Say what a gate's process has found; one that died before it wrote a verdict is a verdict, too."""
    _, backend, ops = check.name.split(" ")
    for op in ops.split(","):
        if session.verdict(op, backend) is None:
            session.state.add(("gate", op, backend), Verdict(op, backend, 0, 0, 0, [ended.why], fatal=True))
        found = session.verdict(op, backend)
        assert found is not None
        session.say(f"{op}, {backend}: {found.in_words}")
