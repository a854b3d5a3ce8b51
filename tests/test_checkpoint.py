"""Checkpoints appear whole or not at all, and a damaged one is never taken for a good one."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffpp_fast.training import CheckpointError
from diffpp_fast.training.checkpoint import MANIFEST, Checkpoints, find_damage, publish, read_tensors, write_tensors


def fill(folder: Path) -> None:
    write_tensors(folder / "weights.safetensors", {"a": torch.arange(6.0).view(2, 3).t()})
    (folder / "state.json").write_text("{}")


def test_saved_and_read_back(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    path = checkpoints.save(200, fill)
    assert path.name == "step_000200"
    assert find_damage(path) is None
    assert torch.equal(read_tensors(path / "weights.safetensors")["a"], torch.arange(6.0).view(2, 3).t())
    assert [other.name for other in path.parent.iterdir()] == ["step_000200"]
    modes = {file.stat().st_mode & 0o777 for file in path.iterdir()}
    assert modes == {path.stat().st_mode & 0o666}


def test_the_last_ones_stay(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (8, 999_999, 1_000_000, 1_000_001):
        checkpoints.save(step, fill)
    assert [path.name for path in checkpoints.paths()] == ["step_1000000", "step_1000001"]


def test_a_newer_damaged_one_neither_counts_nor_costs_a_good_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(30, fill)
    checkpoints.save(20, fill)
    assert [path.name for path in checkpoints.paths()] == ["step_000020", "step_000030"]


def truncate(path: Path) -> None:
    os.truncate(path / "weights.safetensors", 20)


def flip_a_bit(path: Path) -> None:
    file = path / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def remove_a_file(path: Path) -> None:
    (path / "state.json").unlink()


def remove_the_manifest(path: Path) -> None:
    (path / MANIFEST).unlink()


def truncate_the_manifest(path: Path) -> None:
    os.truncate(path / MANIFEST, 30)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, "weights.safetensors has 20 bytes instead of"),
        (flip_a_bit, "weights.safetensors is damaged: its SHA-256"),
        (remove_a_file, "state.json is missing"),
        (remove_the_manifest, "incomplete"),
        (truncate_the_manifest, "manifest.json is damaged"),
    ],
)
def test_a_damaged_one_is_skipped_with_the_reason_and_later_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], said: str
) -> None:
    checkpoints = Checkpoints(tmp_path)
    good, bad = checkpoints.save(1, fill), checkpoints.save(2, fill)
    damage(bad)
    assert checkpoints.latest() == good
    assert len(caplog.messages) == 1 and str(bad) in caplog.text and said in caplog.text
    checkpoints.save(2, fill)
    assert checkpoints.latest() == bad


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    good = checkpoints.save(1, fill)

    def fail(folder: Path) -> None:
        fill(folder)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(CheckpointError, match=r"can't write .*step_000002: .*No space left on device"):
        checkpoints.save(2, fail)
    assert list(tmp_path.iterdir()) == [good]
    assert checkpoints.latest() == good


def test_a_real_limit_on_file_size_leaves_what_was_there(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    good = Checkpoints(tmp_path).save(1, fill)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match="File too large"):
            Checkpoints(tmp_path).save(2, lambda folder: write_tensors(folder / "a", {"a": torch.zeros(100_000)}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == [good] and find_damage(good) is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="Permission denied"):
        Checkpoints(tmp_path / "checkpoints").save(1, fill)
    tmp_path.chmod(0o700)


def test_what_a_kill_left_does_not_get_into_the_next(tmp_path: Path) -> None:
    leftover = tmp_path / ".generator.partial"
    leftover.mkdir()
    (leftover / "half").touch()
    publish(tmp_path / "generator", fill)
    assert [path.name for path in tmp_path.iterdir()] == ["generator"]
    assert not (tmp_path / "generator" / "half").exists()
