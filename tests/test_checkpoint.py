"""Checkpoints appear whole or not at all, and a damaged one is never taken for a good one."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import processes
import pytest
import torch

from diffpp_fast.training import CheckpointError
from diffpp_fast.training.checkpoint import Checkpoints, read_scores, read_tensors, write_tensors
from diffpp_fast.training.config import KeepBest
from diffpp_fast.training.distributed import World
from diffpp_fast.training.publish import MANIFEST, find_damage, publish, read_manifest, tidy
from diffpp_fast.training.state import open_checkpoint

ALONE = World.alone("cpu")


def fill(folder: Path) -> None:
    write_tensors(folder / "weights.safetensors", {"a": torch.arange(6.0).view(2, 3).t()})
    (folder / "state.json").write_text("{}")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_saved_and_read_back(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", ALONE)
    path = checkpoints.save(200, fill, {"grid/reward": 0.5, "generator/loss": float("nan")})
    assert path.name == "step_000200"
    assert find_damage(path) is None
    assert torch.equal(read_tensors(path / "weights.safetensors")["a"], torch.arange(6.0).view(2, 3).t())
    assert names(path.parent) == ["step_000200"]
    assert names(path) == [MANIFEST, "state.json", "weights.safetensors"]
    assert read_scores(path) == {"grid/reward": 0.5}
    modes = {file.stat().st_mode & 0o777 for file in path.iterdir()}
    assert modes == {path.stat().st_mode & 0o666}


def test_folders_within_a_folder(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "adapters").mkdir()
        fill(folder / "adapters")

    publish(tmp_path / "generator", write, ALONE)
    assert find_damage(tmp_path / "generator") is None
    (tmp_path / "generator" / "adapters" / "state.json").write_text("[]")
    assert find_damage(tmp_path / "generator") == "adapters/state.json is damaged: its SHA-256 has changed"


def test_every_byte_is_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, str]] = []
    sync, rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        sync(descriptor)
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))

    def note_rename(source: str, target: str) -> None:
        rename(source, target)
        events.append(("rename", Path(target).name))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    publish(tmp_path / "a", fill, ALONE)
    appears = events.index(("rename", "a"))
    for name in ("weights.safetensors", "state.json", MANIFEST, ".a.partial"):
        assert ("sync", name) in events[:appears], name
    assert events[appears + 1 :] == [("sync", tmp_path.name)]


def test_the_last_ones_stay(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, ALONE, keep=2)
    for step in (8, 999_999, 1_000_000, 1_000_001):
        checkpoints.save(step, fill)
    assert names(tmp_path) == ["step_1000000", "step_1000001"]


def test_a_newer_damaged_one_neither_counts_nor_costs_a_good_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, ALONE, keep=1)
    checkpoints.save(30, fill)
    checkpoints.save(20, fill)
    assert [path.name for path in checkpoints.paths()] == ["step_000020", "step_000030"]


@pytest.mark.parametrize(("mode", "best"), [("max", [2, 5]), ("min", [1, 3])])
def test_the_best_stay_besides_the_last(tmp_path: Path, mode: str, best: list[int]) -> None:
    by = KeepBest.model_validate({"metric": "grid/held_out", "mode": mode, "count": 2})
    checkpoints = Checkpoints(tmp_path, ALONE, keep=2, keep_best=by)
    for step, score in enumerate((0.1, 0.9, 0.2, 0.3, 0.8, 0.8, 0.5, 0.4), 1):
        checkpoints.save(step, fill, {"grid/held_out": score})
    # Of the equal scores the first counts: it was measured there.
    assert [int(path.name[5:]) for path in checkpoints.paths()] == [*best, 7, 8]
    assert checkpoints.best() == tmp_path / f"step_{2 if mode == 'max' else 1:06d}"
    # What is best stands in the checkpoints alone.
    assert Checkpoints(tmp_path, ALONE, keep_best=by).best() == checkpoints.best()


def test_a_damaged_best_one_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = Checkpoints(tmp_path, ALONE, keep_best=KeepBest(metric="reward"))
    for step, score in ((1, 0.5), (2, 0.9), (3, 0.1)):
        checkpoints.save(step, fill, {"reward": score})
    os.truncate(tmp_path / "step_000002" / "state.json", 1)
    assert checkpoints.best() == tmp_path / "step_000001"
    assert "step_000002: state.json has 1 bytes instead of 2" in caplog.text


def test_a_score_that_is_never_logged_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Checkpoints(tmp_path, ALONE, keep_best=KeepBest(metric="grid/rewrad")).save(1, fill, {"grid/reward": 1.0})
    assert "no grid/rewrad was logged by step 1; logged was grid/reward" in caplog.text


def test_best_needs_to_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"training\.keep_best is not set"):
        Checkpoints(tmp_path, ALONE).best()


def truncate(path: Path) -> None:
    os.truncate(path / "weights.safetensors", 20)


def flip_a_bit(path: Path) -> None:
    file = path / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def remove_a_file(path: Path) -> None:
    (path / "state.json").unlink()


def add_a_part_of_another(path: Path) -> None:
    write_tensors(path / "weights-00001-of-00002.safetensors", {"a": torch.zeros(6)})


def remove_the_manifest(path: Path) -> None:
    (path / MANIFEST).unlink()


def truncate_the_manifest(path: Path) -> None:
    os.truncate(path / MANIFEST, 30)


def change_a_score(path: Path) -> None:
    file = path / MANIFEST
    file.write_text(file.read_text().replace("0.25", "9.25"))


def raise_the_format(path: Path) -> None:
    file = path / MANIFEST
    file.write_text(file.read_text().replace('"format": 1', '"format": 2'))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, "weights.safetensors has 20 bytes instead of"),
        (flip_a_bit, "weights.safetensors is damaged: its SHA-256"),
        (remove_a_file, "state.json is missing"),
        (add_a_part_of_another, "weights-00001-of-00002.safetensors is no part of it: manifest.json doesn't list it"),
        (remove_the_manifest, "incomplete"),
        (truncate_the_manifest, "manifest.json is damaged"),
        (change_a_score, "manifest.json is damaged: its SHA-256"),
        (raise_the_format, "manifest.json has format 2, this version reads 1"),
    ],
)
def test_a_damaged_one_is_skipped_with_the_reason_and_later_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], said: str
) -> None:
    checkpoints = Checkpoints(tmp_path, ALONE)
    good, bad = checkpoints.save(1, fill), checkpoints.save(2, fill, {"reward": 0.25})
    damage(bad)
    assert checkpoints.latest() == good
    assert len(caplog.messages) == 1 and str(bad) in caplog.text and said in caplog.text
    checkpoints.save(2, fill)
    assert checkpoints.latest() == bad


def test_a_checkpoint_copied_over_another_is_refused(tmp_path: Path) -> None:
    def write_parts(folder: Path) -> None:
        for number in (1, 2):
            write_tensors(folder / f"weights-0000{number}-of-00002.safetensors", {str(number): torch.zeros(2)})
        (folder / "state.json").write_text("{}")

    one = Checkpoints(tmp_path / "one", ALONE).save(1, fill)
    parts = Checkpoints(tmp_path / "parts", ALONE).save(1, write_parts)
    shutil.copytree(parts, one, dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match=r"weights\.safetensors is no part of it"):
        open_checkpoint(one, ALONE)
    (one / "weights.safetensors").rename(one / ".weights.safetensors")  # hidden files are nobody's
    assert open_checkpoint(one, ALONE) == one


def test_no_byte_of_a_manifest_can_change_unnoticed(tmp_path: Path) -> None:
    publish(tmp_path / "a", fill, ALONE, {"grid/reward": -0.25})
    file = tmp_path / "a" / MANIFEST
    content = file.read_bytes()
    draw = random.Random(0)
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << draw.randrange(8)
        file.write_bytes(flipped)
        with pytest.raises(ValueError, match=MANIFEST):
            read_manifest(tmp_path / "a")
    for length in range(0, len(content), 5):
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match=MANIFEST):
            read_manifest(tmp_path / "a")


def test_bits_flipped_and_files_cut_anywhere_are_found(tmp_path: Path) -> None:
    publish(tmp_path / "a", fill, ALONE)
    draw = random.Random(0)
    for name in ("weights.safetensors", "state.json"):
        file = tmp_path / "a" / name
        content = file.read_bytes()
        for bit in draw.sample(range(8 * len(content)), min(200, 8 * len(content))):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            file.write_bytes(flipped)
            assert find_damage(tmp_path / "a") == f"{name} is damaged: its SHA-256 has changed"
        for length in range(len(content)):
            file.write_bytes(content[:length])
            assert find_damage(tmp_path / "a") == f"{name} has {length} bytes instead of {len(content)}"
        file.write_bytes(content)
    assert find_damage(tmp_path / "a") is None


def test_several_processes_look_at_all_files_between_them(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        for number in range(7):
            (folder / f"{number}").write_text("x" * number)

    publish(tmp_path / "a", write, ALONE)
    for number in range(7):
        (tmp_path / "a" / f"{number}").unlink()
        found = [find_damage(tmp_path / "a", rank, 3) for rank in range(3)]
        assert sorted(map(str, found)) == [f"{number} is missing", "None", "None"]
        (tmp_path / "a" / f"{number}").write_text("x" * number)


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, ALONE, keep=1)
    good = checkpoints.save(1, fill)

    def fail(folder: Path) -> None:
        fill(folder)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(CheckpointError, match=r"can't write .*step_000002: .*No space left on device .* are free"):
        checkpoints.save(2, fail)
    assert list(tmp_path.iterdir()) == [good]
    assert checkpoints.latest() == good


def test_a_real_limit_on_file_size_leaves_what_was_there(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    good = Checkpoints(tmp_path, ALONE).save(1, fill)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match="File too large"):
            Checkpoints(tmp_path, ALONE).save(
                2, lambda folder: write_tensors(folder / "a", {"a": torch.zeros(100_000)})
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == [good] and find_damage(good) is None


def test_another_error_is_raised_as_it_is_and_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        fill(folder)
        raise KeyError("weights")

    with pytest.raises(KeyError, match="weights"):
        publish(tmp_path / "a", fail, ALONE)
    assert names(tmp_path) == []


def test_too_little_room_is_told_in_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage, checkpoints = shutil.disk_usage(tmp_path), Checkpoints(tmp_path, ALONE)
    size = sum(file.stat().st_size for file in checkpoints.save(1, fill).iterdir() if file.name != MANIFEST)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size))
    checkpoints.save(2, fill)
    assert not caplog.messages
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size - 1))
    checkpoints.save(3, fill)
    said = f"takes about {size} bytes, and {size - 1} bytes are free in {tmp_path}: make room"
    # Before and after: the next one is then still some time away.
    assert len(caplog.messages) == 2 and all(said in message for message in caplog.messages)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="Permission denied"):
        Checkpoints(tmp_path / "checkpoints", ALONE).save(1, fill)
    tmp_path.chmod(0o700)


def test_what_a_kill_left_does_not_get_into_the_next(tmp_path: Path) -> None:
    leftover = tmp_path / ".generator.partial"
    leftover.mkdir()
    (leftover / "half").touch()
    publish(tmp_path / "generator", fill, ALONE)
    assert names(tmp_path) == ["generator"]
    assert not (tmp_path / "generator" / "half").exists()


def test_a_replacement_that_fails_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "generator"
    publish(target, fill, ALONE, {"try": 1})
    rename = os.rename

    def fail(source: str, to: str) -> None:
        if Path(source).name == ".generator.partial":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, to)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(CheckpointError, match="Input/output error"):
        publish(target, fill, ALONE, {"try": 2})
    assert names(tmp_path) == ["generator"] and read_scores(target) == {"try": 1}


def test_a_checkpoint_is_opened_by_its_own_folder_or_its_run(tmp_path: Path) -> None:
    first, second = (Checkpoints(tmp_path / "checkpoints", ALONE).save(step, fill) for step in (1, 2))
    assert open_checkpoint(tmp_path, ALONE) == second and open_checkpoint(first, ALONE) == first
    truncate(first)
    with pytest.raises(CheckpointError, match=r"step_000001 is damaged: weights.safetensors has 20 bytes"):
        open_checkpoint(first, ALONE)
    truncate(second)
    with pytest.raises(CheckpointError, match="holds no checkpoint that is whole"):
        open_checkpoint(tmp_path, ALONE)
    with pytest.raises(CheckpointError, match=r"neither a whole checkpoint \(no manifest.json\) nor a run"):
        open_checkpoint(tmp_path / "nowhere", ALONE)


# A child for every call to the file system of `action`, killed right before it. It must leave a good checkpoint.
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from diffpp_fast.training.checkpoint import Checkpoints, read_scores, write_tensors
from diffpp_fast.training.config import KeepBest
from diffpp_fast.training.distributed import World
from diffpp_fast.training.publish import find_damage

WRITES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree"}
root = Path(sys.argv[1])

def fill(folder):
    write_tensors(folder / "weights.safetensors", {"a": torch.zeros(3)})
    (folder / "state.json").write_text("{}")

def kill_at(number, action):
    '''Whether the child was killed before it was done.'''
    child = os.fork()
    if child == 0:
        calls = 0
        def count(event, arguments):
            nonlocal calls
            if event in WRITES and str(root) in str(arguments):
                calls += 1
                if calls == number:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(count)
        action()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0
    return os.WIFSIGNALED(status)

def checkpoints_in(folder):
    return Checkpoints(folder, World.alone("cpu"), keep=2, keep_best=KeepBest(metric="reward"))

for step in (4, 3):  # a new one, and one in the place of another
    seen, number = set(), 1
    while True:
        folder = root / f"{step}_{number}"
        checkpoints = checkpoints_in(folder)
        for before, reward in ((1, 0.9), (2, 0.1), (3, 0.2)):
            checkpoints.save(before, fill, {"reward": reward, "save": 1.0})
        killed = kill_at(number, lambda: checkpoints.save(step, fill, {"reward": 0.3, "save": 2.0}))
        checkpoints.tidy()
        assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
        assert not [path for path in checkpoints.paths() if find_damage(path)]
        latest = checkpoints.latest()
        seen.add((latest.name, read_scores(latest)["save"]))
        assert checkpoints.best().name == "step_000001"
        checkpoints.save(5, fill, {"reward": 0.4})
        assert [path.name[-1] for path in checkpoints.paths()] == ["1", latest.name[-1], "5"]
        if not killed:
            break
        number += 1
    assert seen == {("step_000003", 1.0), (f"step_00000{step}", 2.0)}, seen
    print(number - 1, "kills")
"""


def test_a_kill_before_any_call_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    output = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        env=processes.environments(1)[0] | {"WORLD_SIZE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert output.returncode == 0, output.stderr
    kills = [int(line.split()[0]) for line in output.stdout.splitlines()]
    assert len(kills) == 2 and min(kills) > 20


# Two processes that save together, with what may go wrong in one of them.
TOGETHER = """
import json, logging, resource, sys
from pathlib import Path
import torch
from diffpp_fast.errors import CheckpointError
from diffpp_fast.training.checkpoint import Checkpoints, write_tensors
from diffpp_fast.training.distributed import World
from diffpp_fast.training.publish import find_damage, together

logging.basicConfig(format="%(message)s", stream=sys.stdout)
world = World.join("cpu")
folder = Path(sys.argv[1])
checkpoints = Checkpoints(folder, world, keep=2)

def write(own, size=10):
    write_tensors(own / f"fake-{world.rank}.safetensors", {"a": torch.zeros(size)})
    if world.is_main:
        (own / "state.json").write_text("{}")

def refusal(step, write, kind=CheckpointError):
    try:
        checkpoints.save(step, write)
    except kind as error:
        world.barrier()
        assert not list(folder.glob(".*"))
        world.barrier()
        return str(error)
    raise AssertionError("it was saved")

good = checkpoints.save(1, write)
files = json.loads((good / "manifest.json").read_text())["files"]
assert list(files) == ["fake-0.safetensors", "fake-1.safetensors", "state.json"]
assert find_damage(good) is None and not [path for path in good.iterdir() if path.name.startswith(".")]

# A file too large, in rank 1 alone, with collective work still to come in both.
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
def two_networks(own):
    together(world, lambda: write(own, size=100_000))
    world.sum(torch.zeros(1))
    raise AssertionError("the first one failed")
if world.rank == 1:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
said = refusal(2, two_networks)
print("said", said)
assert "step_000002: rank 1: " in said and "File too large" in said
resource.setrlimit(resource.RLIMIT_FSIZE, limits)

assert "two processes wrote same.json" in refusal(2, lambda own: (own / "same.json").write_text("{}"))

def mistake(own):
    write(own)
    if world.rank == 1:
        raise TypeError("a mistake")
said = refusal(2, mistake, TypeError if world.rank == 1 else CheckpointError)
assert said == "a mistake" if world.rank == 1 else "rank 1: a mistake" in said

assert checkpoints.latest() == good
bad = checkpoints.save(2, write)
assert checkpoints.latest() == bad
world.barrier()
if world.is_main:
    (bad / "fake-1.safetensors").write_bytes((bad / "fake-0.safetensors").read_bytes()[:-1] + b"x")
world.barrier()
assert checkpoints.latest() == good
world.close()
"""


def test_what_one_process_can_not_write_all_give_up_alike(tmp_path: Path) -> None:
    outputs = processes.run_source(TOGETHER, tmp_path, 2, str(tmp_path / "checkpoints"), timeout=120)
    said = [[line for line in output.splitlines() if line.startswith("said")] for output in outputs]
    assert said[0] == said[1] and len(said[0]) == 1
    skips = [[line for line in output.splitlines() if line.startswith("skipping")] for output in outputs]
    assert len(skips[0]) == 1 and "fake-1.safetensors is damaged" in skips[0][0] and not skips[1]


def test_the_manifest_is_json_that_people_can_read(tmp_path: Path) -> None:
    publish(tmp_path / "a", fill, ALONE, {"grid/reward": 0.5})
    manifest = json.loads((tmp_path / "a" / MANIFEST).read_text())
    assert manifest.keys() == {"format", "scores", "files", "sha256"}
    assert manifest["files"]["state.json"]["size"] == 2


def test_tidying_up_twice_changes_nothing(tmp_path: Path) -> None:
    publish(tmp_path / "a", fill, ALONE)
    for _ in range(2):
        tidy(tmp_path / "a")
    assert names(tmp_path) == ["a"] and find_damage(tmp_path / "a") is None
