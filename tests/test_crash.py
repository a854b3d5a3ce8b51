"""Real runs that are killed, and a real disk that is full: what was saved stays, and the rest is computed again."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import tiny
import torch

from diffpp_fast.cli.main import main
from diffpp_fast.training.checkpoint import Checkpoints, read_tensors
from diffpp_fast.training.distributed import World
from diffpp_fast.training.publish import find_damage

SETTINGS = (
    "training.grid_every=null",
    "rewards.held_out=null",
    "training.threads=1",
    "training.checkpoint_every=1",
    "training.keep=2",
)

# Of a disk that takes its time, so that a kill falls into the middle of saving.
SLOW_DISK = """
import os, time
from functools import wraps

def slowly(call):
    @wraps(call)
    def slow(*arguments, **options):
        time.sleep(0.1)
        result = call(*arguments, **options)
        time.sleep(0.1)
        return result
    return slow

os.fsync, os.rename = slowly(os.fsync), slowly(os.rename)
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration file of a tiny run."""
    return tiny.write(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def straight(config: Path) -> Callable[[int], Path]:
    """The output of a run of so many steps that nothing stops."""

    @functools.cache
    def run(steps: int) -> Path:
        output = config.parent / f"straight {steps}"
        assert main(["train", str(config), f"output={output}", f"training.steps={steps}", *SETTINGS]) == 0
        return output

    return run


def checkpoints_of(output: Path) -> Checkpoints:
    return Checkpoints(output / "checkpoints", World.alone("cpu"))


def assert_same_end(output: Path, straight: Path) -> None:
    """All tensors of the last checkpoint, to the bit."""
    one, other = (checkpoints_of(folder).paths()[-1] for folder in (output, straight))
    files = sorted(file.name for file in other.glob("*.safetensors"))
    assert one.name == other.name and files == sorted(file.name for file in one.glob("*.safetensors"))
    for file in files:
        tensors, expected = read_tensors(one / file), read_tensors(other / file)
        assert tensors.keys() == expected.keys()
        assert not [name for name, tensor in expected.items() if not torch.equal(tensor, tensors[name])], file


def train(config: Path, output: Path, steps: int, environment: Mapping[str, str] = os.environ) -> subprocess.Popen[str]:
    """`diffpp-fast train`, its output in a pipe."""
    command = ["train", str(config), f"output={output}", f"training.steps={steps}", *SETTINGS, "--resume", "latest"]
    return subprocess.Popen(
        [sys.executable, "-m", "diffpp_fast", *command],
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_when(process: subprocess.Popen[str], ready: Callable[[], bool], seconds: float) -> None:
    """kill -9 so many seconds after the run is where it should be."""
    while not ready():
        if process.poll() is not None:
            raise AssertionError(f"the run ended before its kill:\n{process.communicate()[0]}")
        time.sleep(0.002)
    time.sleep(seconds)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run was over before its kill"


def kill_and_go_on(
    config: Path, output: Path, straight: Path, steps: int, *, kills: int, in_saving: int, slow: Path, seed: int
) -> None:
    """Kills a run at random instants, some of them while it saves to a slow disk; in the end it has the same bits."""
    draw = random.Random(seed)
    checkpoints, half_written = checkpoints_of(output), 0
    (slow / "sitecustomize.py").write_text(SLOW_DISK)
    paths = filter(None, (str(slow), os.environ.get("PYTHONPATH")))
    slowed = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    for number in range(kills + in_saving):
        before = checkpoints.latest()
        if number < in_saving:
            process = train(config, output, steps, slowed)
            # What an earlier kill left goes when the run begins; from then on such a folder means that it saves.
            known = {path.stat().st_ino for path in checkpoints.folder.glob(".step_*")}
            kill_when(
                process,
                lambda known=known: any(
                    path.stat(follow_symlinks=False).st_ino not in known
                    for path in checkpoints.folder.glob(".step_*.partial")
                ),
                draw.uniform(0, 1.0),
            )
        else:
            process = train(config, output, steps)
            kill_when(process, lambda before=before: checkpoints.paths()[-1:] != [before], draw.uniform(0, 0.4))
        half_written += bool(list(checkpoints.folder.glob(".step_*")))
        assert [find_damage(path) for path in checkpoints.paths()] == [None] * len(checkpoints.paths())
        after = checkpoints.latest()
        assert before is None or (after is not None and after >= before)
    assert half_written >= in_saving / 2, "hardly a kill fell into the middle of saving"

    process = train(config, output, steps)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    assert_same_end(output, straight)
    assert [path.name for path in checkpoints.folder.glob(".*")] == []
    lines = (output / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, steps + 1))


def test_a_run_that_is_killed_goes_on_to_the_same_bits(
    config: Path, straight: Callable[[int], Path], tmp_path: Path
) -> None:
    kill_and_go_on(config, tmp_path / "run", straight(16), 16, kills=1, in_saving=1, slow=tmp_path, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_run_that_is_killed_again_and_again_goes_on_to_the_same_bits(
    config: Path, straight: Callable[[int], Path], tmp_path: Path, seed: int
) -> None:
    kill_and_go_on(config, tmp_path / "run", straight(80), 80, kills=6, in_saving=8, slow=tmp_path, seed=seed)


# Within a mount namespace of its own: a small file system, a run that fills it, and one that goes on in the room made.
FULL_DISK = """
import shutil, subprocess, sys
from pathlib import Path
from diffpp_fast.cli.main import main
from diffpp_fast.errors import CheckpointError
from diffpp_fast.training.checkpoint import Checkpoints
from diffpp_fast.training.distributed import World
from diffpp_fast.training.publish import find_damage

disk, size, command = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={8 * size}", "tmpfs", str(disk)], check=True)
ballast, checkpoints = disk / "ballast", Checkpoints(disk / "run" / "checkpoints", World.alone("cpu"), keep=2)

def leave(free):
    ballast.write_bytes(b"")
    ballast.write_bytes(bytes(shutil.disk_usage(disk).free - int(free)))

leave(1.6 * size)
assert main([*command, f"output={disk / 'run'}"]) == 2
(good,) = checkpoints.folder.iterdir()
assert good.name == "step_000001" and checkpoints.latest() == good

# Full at every place of a checkpoint.
def copy(folder):
    for file in good.iterdir():
        if file.name != "manifest.json":
            shutil.copy(file, folder)

outcomes = []
for part in range(0, 24):
    leave(size * part / 20)
    try:
        checkpoints.save(2, copy)
        outcomes.append("saved")
        shutil.rmtree(checkpoints.folder / "step_000002")
    except CheckpointError as error:
        assert "No space left on device" in str(error), error
        outcomes.append("full")
    assert list(checkpoints.folder.iterdir()) == [good] and find_damage(good) is None
assert outcomes == sorted(outcomes) and set(outcomes) == {"full", "saved"}, outcomes

ballast.unlink()
assert main([*command, f"output={disk / 'run'}", "--resume", "latest"]) == 0
shutil.copytree(disk / "run", disk.parent / "run")
"""


def test_a_full_disk_costs_no_checkpoint_and_the_run_goes_on_once_there_is_room(
    config: Path, straight: Callable[[int], Path], tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    own_mounts = ["unshare", "--map-root-user", "--mount"]
    try:
        subprocess.run([*own_mounts, "mount", "-t", "tmpfs", "tmpfs", disk], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs to mount a small file system: a user namespace (`unshare --map-root-user --mount`) or root")
    size = sum(file.stat().st_size for file in checkpoints_of(straight(16)).paths()[-1].iterdir())
    command = ["train", str(config), "training.steps=16", *SETTINGS]
    ended = subprocess.run(
        [*own_mounts, sys.executable, "-c", FULL_DISK, str(disk), str(size), *command],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    assert "the next checkpoint takes about" in ended.stderr
    error = next(line for line in ended.stderr.splitlines() if line.startswith("error: "))
    assert f"can't write {disk}/run/checkpoints/step_000002: " in error and "No space left on device" in error
    assert "make room" in error and "--resume latest" in error
    assert_same_end(tmp_path / "run", straight(16))
