"""A folder has one writer: another one is refused, and one that is gone is no hindrance."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffpp_fast.errors import CheckpointError, ConfigurationError
from diffpp_fast.training import lock
from diffpp_fast.training.lock import LOCK, FolderLock

HOLDER = """
import sys, time
from pathlib import Path
from diffpp_fast.training.lock import FolderLock

held = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lock, "SILENCE_SECONDS", 0.4)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds `tmp_path / "run"` until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")],
        env={**os.environ, "LOCAL_RANK": "0"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def write(folder: Path, **changes: Any) -> dict[str, Any]:
    """The lock of another process."""
    folder.mkdir(exist_ok=True)
    record = {**lock._identity(), "token": "other", "beat": "000000000000", "command": "diffpp-fast train x.yaml"}
    (folder / LOCK).write_text(json.dumps(record | changes))
    return record | changes


def test_another_process_is_refused_and_a_killed_one_is_not_waited_for(
    holder: subprocess.Popen[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    (run / "kept").write_text("")
    said = rf"{run} is being written by process {holder.pid} on .*since 20.*\(kill {holder.pid}\), or choose another"
    for unlock in (False, True):
        with pytest.raises(ConfigurationError, match=said):
            FolderLock(run, unlock=unlock)
    assert sorted(path.name for path in run.iterdir()) == [LOCK, "kept"]
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with caplog.at_level(logging.WARNING):
        held = FolderLock(run)
    assert f"taking over from process {holder.pid}" in caplog.text and "which is gone" in caplog.text
    held.check()
    held.release()
    assert [path.name for path in run.iterdir()] == ["kept"]


def test_a_worker_whose_launcher_is_gone_is_named_as_such(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    path = tmp_path / "run" / LOCK
    path.write_text(json.dumps(json.loads(path.read_text()) | {"launcher": 1 if os.getpid() != 1 else 2}))
    with pytest.raises(ConfigurationError, match=rf"Its launcher is gone: .*Stop it \(kill {holder.pid}\)"):
        FolderLock(tmp_path / "run")


def test_a_process_number_that_is_used_again_is_another_process(tmp_path: Path) -> None:
    write(tmp_path, pid=os.getppid(), start="1")
    FolderLock(tmp_path).release()
    assert not list(tmp_path.iterdir())


def test_another_machine_s_lock_is_left_to_the_user(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = write(tmp_path, host="node7", boot="another", job=None, pid=4242)
    said = rf"process 4242 on node7 \(`diffpp-fast train x.yaml`, since {other['began'][:10]}.*can't be told.*--unlock"
    with pytest.raises(ConfigurationError, match=said):
        FolderLock(tmp_path)
    with pytest.raises(ConfigurationError, match=r"choose another --out FOLDER\. If it is gone, remove .*\.lock$"):
        FolderLock(tmp_path, unlock=None, other="--out FOLDER")
    assert json.loads((tmp_path / LOCK).read_text()) == other
    with caplog.at_level(logging.WARNING):
        held = FolderLock(tmp_path, unlock=True)
    assert "taking over from process 4242 on node7" in caplog.text
    held.release()


@pytest.mark.parametrize("same", [{"host": None}, {"job": "SLURM_JOB_ID=12"}])
def test_the_same_job_goes_on_elsewhere_once_there_is_no_sign_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same: dict[str, str | None]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    # A machine that was started again or a container's; a job that its scheduler has started elsewhere.
    host = lock._identity()["host"] if "host" in same else "node7"
    changes = {"boot": "another", "host": host, "job": None, **{k: v for k, v in same.items() if v}}
    record = write(tmp_path, **changes)
    done = threading.Event()

    def beat() -> None:
        for number in range(1, 1000):
            if done.wait(0.05):
                return
            write(tmp_path, **record | {"beat": f"{number:012d}"})

    alive = threading.Thread(target=beat)
    alive.start()
    try:
        with pytest.raises(ConfigurationError, match=r"process .*; it is alive"):
            FolderLock(tmp_path)
    finally:
        done.set()
        alive.join()
    FolderLock(tmp_path).release()


def test_a_holder_that_was_replaced_notices(tmp_path: Path) -> None:
    first = FolderLock(tmp_path)
    second = FolderLock(tmp_path)  # of the same process, as in a notebook
    with pytest.raises(CheckpointError, match=r"has been taken over by process .*: this one saves nothing more"):
        first.check()
    first.release()
    second.check()
    (tmp_path / LOCK).unlink()  # by hand, as if there were no run
    second.check()
    assert (tmp_path / LOCK).exists()
    second.release()


def test_it_beats(tmp_path: Path) -> None:
    held = FolderLock(tmp_path)
    record = lock._read(tmp_path / LOCK)
    assert record is not None and not lock._is_silent(tmp_path / LOCK, record)
    held.release()


def test_a_lock_that_a_kill_left_empty_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_patient_read", lock._read)
    (tmp_path / LOCK).write_text("")
    FolderLock(tmp_path).release()


def test_a_folder_that_was_made_for_it_goes_with_it(tmp_path: Path) -> None:
    FolderLock(tmp_path / "new" / "run").release()
    assert not (tmp_path / "new" / "run").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"file is a file: name a folder"):
        FolderLock(tmp_path / "file")


@pytest.mark.parametrize("program", ["/env/bin/diffpp-fast", "/src/diffpp_fast/__main__.py"])
def test_a_command_is_named_as_it_is_typed(program: str) -> None:
    assert lock._command([program, "train", "a b.yaml"]) == "diffpp-fast train 'a b.yaml'"
    assert lock._command(["my.py", "train"]) == "my.py train"
