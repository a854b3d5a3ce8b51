"""`make gpu-check` as far as it goes without a GPU: its checks, its processes, and a rehearsal."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gpu_gate
import pytest
import test_gpu
import torch
from gpu_gate import Checks, failure, judge
from torch import Tensor

from benchmarks import gpu_check, gpu_session, variants
from benchmarks.gpu_check import main
from benchmarks.gpu_session import Ended, Session, State, digest, run_limited
from diffpp_fast import backends

CPU = torch.device("cpu")
add_noise = backends._sources["add_noise"]["reference"]()
FEW = Checks(CPU, graphs=False, compiler=None, most=3)


@pytest.mark.parametrize("op", backends.OPS)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_every_pair_of_options_is_right_on_the_cpu(op: str, backend: str) -> None:
    verdict = judge(op, backend, FEW._replace(most=None), deadline=0.0)
    assert verdict.wrong == []
    assert verdict.checked == verdict.wanted and verdict.summary == "right"


class Noisy:
    """A kernel module that spoils the results of the reference."""

    def __init__(self, spoil: Any) -> None:
        self.spoil = spoil

    def forward(self, x0: Tensor, *others: Any) -> Tensor:
        return self.spoil(x0, add_noise.forward(x0, *others))

    def backward(self, *arguments: Any) -> Tensor:
        return add_noise.backward(*arguments)


def serve(monkeypatch: pytest.MonkeyPatch, kernels: Noisy) -> None:
    """Make `kernels` those of add_noise on the CPU."""
    monkeypatch.setitem(backends._sources["add_noise"], "cpu", lambda: kernels)
    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.setattr(backends, "_loaded", {})


def overwrite(x0: Tensor, x_t: Tensor) -> Tensor:
    x0.data[0] += 1.0
    return x_t


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x0, x_t: x_t * 1.01, "output has a relative error"),
        (lambda x0, x_t: x_t + 0.1 * torch.rand_like(x_t), "other bits than the first"),
        (lambda x0, x_t: torch.empty_like(x_t), "other bits than the first"),
        (overwrite, "an input was overwritten"),
        (lambda x0, x_t: 1 / 0, "ZeroDivisionError"),
    ],
    ids=["wrong", "random", "unwritten", "overwritten", "error"],
)
def test_faults_are_found(spoil: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, Noisy(spoil))
    verdict = judge("add_noise", "cpu", FEW, time.monotonic() + 60.0)
    assert verdict.summary == "WRONG" and len(verdict.wrong) >= 3
    assert message in verdict.wrong[0]


def test_a_backend_that_does_not_serve_says_why() -> None:
    (sentence,) = judge("add_noise", "cuda", FEW, 0.0).wrong
    assert sentence.startswith("it can't serve: ")


def test_strides_of_gradients_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    class Transposing(Noisy):
        def backward(self, grad_output: Tensor, alpha: Tensor) -> Tensor:
            grad = add_noise.backward(grad_output, alpha)
            return grad.transpose(1, 3).contiguous().transpose(1, 3)

    serve(monkeypatch, Transposing(lambda x0, x_t: x_t))
    chosen = next(
        variant
        for variant in variants.every("add_noise")
        if variant["gradient"] and variant["shape"] == "even" and variant["layout"] == "contiguous"
    )
    with backends.use_backend("cpu"):
        assert str(failure(chosen, CPU, graph=False)).startswith("gradient of x0 has strides")


@pytest.mark.slow
@pytest.mark.parametrize("op", backends.OPS)
def test_compiled_in_one_graph(op: str) -> None:
    verdict = judge(op, "cpu", FEW._replace(compiler="aot_eager"), time.monotonic() + 60.0)
    assert verdict.wrong == [] and verdict.compiled > 0


# Processes


def python(code: str, limit: float = 30.0) -> Ended:
    return run_limited([sys.executable, "-c", code], limit, {"SHOWN": "yes", "HOME": None})


def test_processes_end_fail_and_are_stopped() -> None:
    shown = python("import os; print(os.environ['SHOWN'], 'HOME' in os.environ)")
    assert (shown.code, shown.output) == (0, "yes False\n")
    assert python("import sys; print('some'); print('reason'); sys.exit(3)").why == "exit code 3: reason"
    began = time.monotonic()
    hangs = python("import subprocess; subprocess.run(['sleep', '60'])", limit=1.0)
    assert hangs.code is None and hangs.why.startswith("no end within 1 s")
    assert time.monotonic() - began < 20.0


def test_what_other_threads_have_started_is_stopped() -> None:
    with ThreadPoolExecutor() as pool:
        future = pool.submit(python, "import time; time.sleep(60)", 50.0)
        while not gpu_session._running:
            time.sleep(0.05)
        gpu_session.stop_all()
        assert future.result().code == -signal.SIGKILL


def test_the_state_survives_a_torn_end(tmp_path: Path) -> None:
    state = State(tmp_path / "state")
    assert state.read() == {}
    state.add(("a",), 1)
    state.add(("a",), 2)
    State(state.path).add(("b", "c"), None)
    whole = state.path.read_bytes()
    state.path.write_bytes(whole[:-3])
    assert state.read() == {("a",): 2}
    state.path.write_bytes(whole)
    assert state.read() == {("a",): 2, ("b", "c"): None}


def test_the_digest_tells_machines_apart() -> None:
    assert digest("one", "two") == digest("one", "two") != digest("onetwo")


# Rehearsal


def rehearse(out: Path, *options: str) -> str:
    """Return what a rehearsal says, which has to end well."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--rehearse", "--out", str(out), *options]
    done = subprocess.run(command, cwd=gpu_session.ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_rehearsal(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    options = ("--ops", "philox,add_noise", "--seconds", "200")
    said = rehearse(tmp_path, *options)
    table = [line.split() for line in said[said.rindex("op         backend") :].splitlines()]
    assert [line[:4] for line in table[1:5]] == [
        [op, backend, "right", "1"] for op in ("philox", "add_noise") for backend in ("triton", "cpu")
    ]
    files = {path.name for path in tmp_path.iterdir()}
    assert {"gpu-check.md", "gpu-check.log", "kernels-cpu-gpu-check.csv", "kernels-cpu-gpu-check.md"} <= files
    assert len(files) <= 8
    # A second call has nothing left to check or measure.
    began = time.monotonic()
    again = rehearse(tmp_path, *options)
    assert "triton: right" not in again and "cases to go" not in again
    assert time.monotonic() - began < 60.0


def test_a_rehearsal_builds_csrc_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(rehearse=True, ops=["add_noise"], out=tmp_path)
    assert test_gpu.build(session) is None
    monkeypatch.setattr(test_gpu.backends.native, "unavailable", lambda: "csrc was not compiled")
    check = test_gpu.build(session)
    assert check is not None
    assert check.command[-2:] == ["build_ext", "--inplace"] and check.environment["DIFFPP_FAST_CUDA"] == "0"


def test_a_check_that_dies_is_a_crash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session = Session(rehearse=True, ops=["add_noise"], out=tmp_path)
    (check, *_) = test_gpu.gates(session)
    test_gpu.note_verdicts(session, check, Ended(-11, "some\nSegmentation fault", 9.0))
    assert "add_noise, triton: CRASHED" in capsys.readouterr().out
    assert gpu_check._report(session, False) == 1
    said = capsys.readouterr().out
    assert "WRONG: add_noise, triton: exit code -11: Segmentation fault" in said
    assert gpu_check._is_fatal(session.state.read(), "add_noise", "triton")
    # Another call does not check it again.
    assert [each.name for each in test_gpu.gates(session)] == ["gate cpu add_noise", "gate reference add_noise"]


def test_time_that_is_over_is_said(tmp_path: Path) -> None:
    said = rehearse(tmp_path, "--ops", "add_noise", "--seconds", "0")
    assert "left out, the time was over" in said and "add_noise on triton" in said
    # Whole steps need diffusers.
    assert f"0 failures, {4 if gpu_check._missing(*gpu_check.NETWORKS) else 5} left out" in said


def test_without_pytest_it_says_what_to_carry(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "_missing", lambda *packages: list(packages))
    assert main(["--rehearse"]) == 2
    assert "pip install --target FOLDER pytest" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "make gpu-check REHEARSE=1" in capsys.readouterr().err


def test_unknown_operators_are_refused() -> None:
    with pytest.raises(SystemExit):
        main(["--rehearse", "--ops", "nothing"])


def test_what_is_never_written_shows() -> None:
    with gpu_gate._poisoned():
        assert torch.empty(4).isnan().all()
