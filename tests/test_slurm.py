"""examples/launch/slurm.sbatch under a stand-in for Slurm: what is stopped goes back into the queue, and goes on."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

SCRIPT = Path(__file__).parent.parent / "examples" / "launch" / "slurm.sbatch"

# A step in a session of its own, whose number is left for the one who sends its signals.
SRUN = """#!{python}
import os, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("-"):
    words.pop(0)
step = subprocess.Popen(words, start_new_session=True)
with open(os.environ["STAND_IN"] + "/step", "w") as file:
    file.write(str(step.pid))
sys.exit(step.wait())
"""
SCONTROL = """#!/bin/bash
echo "$*" >> "$STAND_IN/calls"
if [ "$1" = show ]; then echo localhost; fi
"""
# Runs until it is told to stop, then takes its time to save; or ends at once with a code.
TORCHRUN = """#!{python}
import os, signal, sys, time
from pathlib import Path
here = Path(os.environ["STAND_IN"])
def stop(*_):
    time.sleep(0.3)
    (here / "saved").write_text("saved")
    sys.exit(1)
signal.signal(signal.SIGTERM, stop)
(here / "arguments").write_text(" ".join(sys.argv[1:]))
if len(os.environ["ENDS_WITH"]):
    sys.exit(int(os.environ["ENDS_WITH"]))
time.sleep(60)
"""


class Slurm:
    """A scheduler with one node, which starts the script and sends signals to its step."""

    def __init__(self, folder: Path, *, torchrun: str) -> None:
        self.folder = folder
        programs = {"srun": SRUN, "scontrol": SCONTROL, "torchrun": torchrun}
        for name, text in programs.items():
            (folder / name).write_text(text.replace("{python}", sys.executable))
            (folder / name).chmod(0o755)
        with socket.socket() as probe:
            probe.bind(("", 0))
            # The script makes its port of the job's number.
            self.job = probe.getsockname()[1] - 20_000 if probe.getsockname()[1] >= 20_000 else 4711
        self.environment = {
            **os.environ,
            "PATH": os.pathsep.join((str(folder), os.environ["PATH"])),
            "PYTHONPATH": os.pathsep.join((str(SCRIPT.parent.parent.parent), os.environ.get("PYTHONPATH", ""))),
            "STAND_IN": str(folder),
            "SLURM_JOB_ID": str(self.job),
            "SLURM_JOB_NODELIST": "localhost",
            "SLURM_NNODES": "1",
            "SLURM_GPUS_ON_NODE": "1",
            "OMP_NUM_THREADS": "1",
        }

    def start(self, *arguments: str, **extra: str) -> subprocess.Popen[str]:
        (self.folder / "step").unlink(missing_ok=True)
        return subprocess.Popen(
            ["bash", str(SCRIPT), *arguments],
            env={**self.environment, **extra},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def preempt(self, job: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
        """Send what Slurm sends before a preemption: to the step, and in some configurations to the script, too."""
        until = time.monotonic() + 120
        while not ready():
            assert job.poll() is None and time.monotonic() < until, job.communicate()[0]
            time.sleep(0.02)
        for number in (signal.SIGCONT, signal.SIGTERM):
            os.killpg(int((self.folder / "step").read_text()), number)
            job.send_signal(number)

    def requeued(self) -> int:
        """Return how often the job was put back into the queue."""
        calls = (self.folder / "calls").read_text().splitlines()
        return calls.count(f"requeue {self.job}")


def test_a_job_that_is_preempted_saves_and_goes_back_into_the_queue(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path, torchrun=TORCHRUN)
    job = slurm.start("align.yaml", "prompts=a b.txt", ENDS_WITH="")
    slurm.preempt(job, (tmp_path / "arguments").exists)
    said = job.communicate(timeout=60)[0]
    assert job.returncode == 143 and "back into the queue" in said
    assert (tmp_path / "saved").exists(), "the script did not wait until the run had saved"
    assert slurm.requeued() == 1
    words = (tmp_path / "arguments").read_text()
    assert words.endswith("-m diffpp_fast train align.yaml prompts=a b.txt --resume latest")
    assert "--max-restarts 3" in words and f"--rdzv-endpoint localhost:{20_000 + slurm.job % 40_000}" in words


@pytest.mark.parametrize("code", [0, 1])
def test_a_job_that_is_complete_or_fails_stays_out_of_the_queue(tmp_path: Path, code: int) -> None:
    slurm = Slurm(tmp_path, torchrun=TORCHRUN)
    job = slurm.start("align.yaml", ENDS_WITH=str(code))
    job.communicate(timeout=60)
    assert job.returncode == code and slurm.requeued() == 0


@pytest.mark.slow
def test_a_real_run_is_preempted_and_trains_nothing_twice(tmp_path: Path) -> None:
    config = tiny.write(tmp_path)
    (tmp_path / "slurm").mkdir()
    slurm = Slurm(tmp_path / "slurm", torchrun='#!/bin/bash\nexec {python} -m torch.distributed.run "$@"\n')
    output = tmp_path / "run"
    arguments = (str(config), f"output={output}", "training.steps=300", "training.grid_every=null")
    settings = ("training.checkpoint_every=1000", "training.threads=1", "rewards.held_out=null")

    def steps() -> list[int]:
        path = output / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        # Warnings stand there, too, and the last line may be half written.
        return [json.loads(line)["step"] for line in lines if line.endswith("}") and "samples_per_second" in line]

    job = slurm.start(*arguments, *settings)
    slurm.preempt(job, lambda: len(steps()) >= 3)
    said = job.communicate(timeout=100)[0]
    assert job.returncode == 143 and slurm.requeued() == 1, said
    stopped = steps()[-1]
    assert 3 <= stopped < 300 and (output / "checkpoints" / f"step_{stopped:06d}").is_dir(), said
    job = slurm.start(*arguments, *settings, SLURM_RESTART_COUNT="1")
    said = job.communicate(timeout=100)[0]
    assert job.returncode == 0 and slurm.requeued() == 1, said
    assert f"resuming from {output}/checkpoints/step_{stopped:06d}" in said
    assert steps() == list(range(1, 301))
