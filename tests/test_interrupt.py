"""Signals stop a run after the step, all of its processes after the same one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest

from diffpp_fast.training import interrupt
from diffpp_fast.training.distributed import World
from diffpp_fast.training.interrupt import SIGNALS, Interrupt
from diffpp_fast.training.publish import find_damage

ALONE = World.alone("cpu")


@pytest.fixture(autouse=True)
def without_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_a_wish_and_the_second_an_order(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    ordered = []
    before = signal.signal(number, lambda *_: ordered.append(number))
    try:
        with Interrupt(ALONE) as wish:
            assert wish.agree() is None
            signal.raise_signal(number)
            assert wish.agree() == wish.signal == number and not ordered
            assert f"{signal.Signals(number).name}: finishing this step" in capfd.readouterr().err
            signal.raise_signal(number)
            assert ordered == [number]
            assert wish.agree() == number
        signal.raise_signal(number)
        assert ordered == [number] * 2
    finally:
        signal.signal(number, before)


def test_what_a_launcher_passes_on_is_no_second_signal(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    # Of a shell without job control, what runs in the background has it ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with Interrupt(ALONE) as wish:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert wish.agree() == signal.SIGTERM
    assert capfd.readouterr().err.count("again after 5 s to stop at once") == 1
    monkeypatch.setattr(interrupt, "ECHO_SECONDS", 0.01)
    with Interrupt(ALONE):
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.3)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


# A run of many steps; the faster process is one that waits at every `agree`.
WORKER = """
import sys, time
from pathlib import Path
from diffpp_fast.training.checkpoint import Checkpoints
from diffpp_fast.training.distributed import World
from diffpp_fast.training.interrupt import Interrupt

world = World.join("cpu")
step = 0
with Interrupt(world) as interrupt:
    while interrupt.agree() is None:
        step += 1
        time.sleep(0.02 * world.rank)
        print("step", step, flush=True)

    def write(folder):
        time.sleep(float(sys.argv[2]))
        (folder / f"rank-{world.rank}").write_text(str(step))

    Checkpoints(Path(sys.argv[1]), world).save(step, write)
world.close()
sys.exit(128 + interrupt.signal)
"""


@pytest.fixture
def worker(tmp_path: Path) -> Path:
    (tmp_path / "worker.py").write_text(WORKER)
    return tmp_path / "worker.py"


def assert_saved(checkpoints: Path) -> int:
    (saved,) = checkpoints.iterdir()
    assert find_damage(saved) is None
    step = int(saved.name.removeprefix("step_"))
    assert [(saved / f"rank-{rank}").read_text() for rank in range(2)] == [str(step)] * 2
    return step


def test_a_signal_to_one_process_stops_all_after_the_same_step(worker: Path, tmp_path: Path) -> None:
    started = processes.start([str(worker), str(tmp_path / "checkpoints"), "0"], 2)
    assert started[1].stdout is not None
    while started[1].stdout.readline().strip() != "step 3":
        assert started[1].poll() is None
    # Twice, as from a scheduler and from the launcher that it stops.
    for _ in range(2):
        started[1].send_signal(signal.SIGUSR1)
    ended = processes.finish(started, timeout=120)
    assert [code for code, _ in ended] == [128 + signal.SIGUSR1] * 2, ended
    assert assert_saved(tmp_path / "checkpoints") >= 3
    assert "SIGUSR1 in another process" in ended[0][1]


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node=2", "--standalone", "--shutdown-timeout=60"],
    "deepspeed": ["deepspeed.launcher.runner", "--num_gpus=2", "--no_local_rank", "--master_port=29713"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_real_launchers_leave_the_time_to_save(launcher: str, worker: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", *LAUNCHERS[launcher], str(worker), str(tmp_path / "checkpoints"), "3"],
        env={**processes.environments(1)[0], "CUDA_VISIBLE_DEVICES": "0,1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        while "step 3" not in (line := process.stdout.readline()):
            assert line, process.wait()
        # To the launcher and to its processes, as a scheduler does it.
        os.killpg(process.pid, signal.SIGTERM)
        output = process.communicate(timeout=120)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    print(output)  # told where the next line fails
    assert assert_saved(tmp_path / "checkpoints") >= 3
