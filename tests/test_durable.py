"""File systems that lack a call: checkpoints are written and read all the same, and the lost promise is named once."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffpp_fast.errors import CheckpointError
from diffpp_fast.training import durable
from diffpp_fast.training.checkpoint import Checkpoints, open_role, read_tensors, write_tensors
from diffpp_fast.training.distributed import World
from diffpp_fast.training.publish import MANIFEST, find_damage, tidy

ALONE = World.alone("cpu")


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "_warned", set())


def fail(number: int, when: Callable[..., bool] = lambda *_: True) -> Callable[[Any], Any]:
    """A call that fails with this error where `when` says so of its arguments."""

    def wrap(call: Any) -> Any:
        def failing(*arguments: Any, **options: Any) -> Any:
            if when(*arguments):
                raise OSError(number, os.strerror(number))
            return call(*arguments, **options)

        return failing

    return wrap


def is_folder(descriptor: int) -> bool:
    return Path(f"/proc/self/fd/{descriptor}").resolve().is_dir()


def write(folder: Path) -> None:
    (folder / "inner").mkdir()
    write_tensors(folder / "generator.safetensors", {"weight": torch.arange(6.0).view(3, 2)})
    write_tensors(folder / "inner" / "other.safetensors", {"bias": torch.ones(2)})


LACKS = {
    "fsync of a folder (CIFS)": ("fsync", fail(errno.EINVAL, is_folder), "folders can't be synced"),
    "fsync of anything (FUSE)": ("fsync", fail(errno.ENOSYS), "files can't be synced"),
    "permissions (gcsfuse, S3)": ("chmod", fail(errno.EPERM), "permissions can't be set"),
    "renaming a folder (S3)": ("rename", fail(errno.EPERM, lambda path, *_: Path(path).is_dir()), "can't be renamed"),
    "renaming anything": ("rename", fail(errno.ENOSYS), "can't be renamed"),
}


@pytest.mark.parametrize("name", LACKS)
def test_a_checkpoint_is_written_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    call, wrap, said = LACKS[name]
    monkeypatch.setattr(os, call, wrap(getattr(os, call)))
    checkpoints = Checkpoints(tmp_path, ALONE, keep=2)
    for step in (1, 2, 2, 3):  # one of them is replaced, one removed
        checkpoints.save(step, write)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000002", "step_000003"]
    assert [find_damage(path) for path in checkpoints.paths()] == [None, None]
    told = [record.getMessage() for record in caplog.records]
    assert sum(said in line for line in told) == 1 and len(told) <= 2, told


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["fsync", "chmod", "rename"])
def test_a_disk_that_fails_is_no_such_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    monkeypatch.setattr(os, call, fail(number)(getattr(os, call)))
    with pytest.raises(CheckpointError, match=os.strerror(number)):
        Checkpoints(tmp_path, ALONE).save(1, write)
    assert list(tmp_path.iterdir()) == []


def test_a_copy_that_is_cut_off_leaves_the_old_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where folders are copied in place of a rename, stopped before every single file."""
    checkpoints, target = Checkpoints(tmp_path, ALONE), tmp_path / "step_000001"
    checkpoints.save(1, write)
    no_rename = fail(errno.EPERM, lambda path, *_: Path(path).is_dir())(os.rename)
    for stop in range(100):
        monkeypatch.setattr(os, "rename", no_rename)
        copied: list[Any] = []

        def copy(
            source: Path, to: Path, *, stop: int = stop, copied: list[Path] = copied, whole: Any = shutil.copyfile
        ) -> None:
            if len(copied) == stop:
                raise KeyboardInterrupt
            copied.append(to)
            whole(source, to)

        monkeypatch.setattr(durable.shutil, "copyfile", copy)
        try:
            checkpoints.save(1, write)
            break
        except KeyboardInterrupt:
            pass
        finally:
            monkeypatch.undo()
        tidy(target)
        assert find_damage(target) is None, f"stopped before copy {stop}"
    assert stop > 4 and find_damage(target) is None


def test_files_that_can_not_be_mapped_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    write(folder)
    expected = read_tensors(folder / "generator.safetensors")

    def unmapped(*_: Any, **__: Any) -> None:
        raise OSError("No such device (os error 19)")  # as safetensors has it, without a number

    monkeypatch.setattr(durable, "safe_open", unmapped)
    with durable.open_tensors(folder / "generator.safetensors") as file:
        assert torch.equal(file.get_tensor("weight"), expected["weight"]) and list(file.keys()) == list(expected)
        assert file.get_slice("weight")[1:2].tolist() == expected["weight"][1:2].tolist()
    # A checkpoint's tensors are read without mapping their file.
    stored = open_role(folder, "generator")
    assert torch.equal(stored["weight"], expected["weight"])
    assert stored.elements("weight", 1, 3).tolist() == [1.0, 2.0, 3.0]
    assert sum("can't be mapped into memory" in record.getMessage() for record in caplog.records) == 1


def test_a_file_system_that_does_not_say_how_much_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", fail(errno.ENOSYS)(shutil.disk_usage))
    checkpoints = Checkpoints(tmp_path, ALONE)
    checkpoints.save(1, write)
    monkeypatch.setattr(os, "fsync", fail(errno.EIO)(os.fsync))
    with pytest.raises(CheckpointError, match=r"Input/output error. What was saved before"):
        checkpoints.save(2, write)
    assert (tmp_path / "step_000001" / MANIFEST).is_file()
