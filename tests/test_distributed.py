"""How processes find each other, and what they agree on."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import processes
import pytest
import torch
import torch.distributed as dist

from diffpp_fast.cli import main as program
from diffpp_fast.training import ConfigurationError, distributed
from diffpp_fast.training.distributed import World, choose_device

WORKER = """
import torch
from diffpp_fast.training.distributed import World

world = World.join("cpu")
assert (world.size, world.device.type) == (3, "cpu")
assert world.is_main == (world.rank == 0)
assert world.share(torch.arange(10, 22)).tolist() == [10 + 4 * world.rank + place for place in range(4)]
assert world.any(world.rank == 2) and not world.any(False)
mine = torch.tensor([1.0, float(world.rank)])
assert world.sum(mine).tolist() == [3.0, 3.0] and mine.tolist() == [1.0, float(world.rank)]
assert world.first_error(None) is None
assert world.first_error(ValueError(f"rank {world.rank}: schön") if world.rank else None) == "rank 1: schön"
assert world.first_error(ValueError() if world.rank == 2 else None) == "ValueError"
assert len(world.first_error(ValueError("x" * 10_000))) < 10_000
try:
    with world.together(RuntimeError, OSError):
        if world.rank == 1:
            raise OSError("a full disk")
    raise AssertionError("it failed in one process alone")
except RuntimeError as error:
    assert str(error) == "a full disk" and (error.__cause__ is not None) == (world.rank == 1)
world.barrier()
world.close()
print("agreed")
"""


def test_processes_agree(tmp_path: Path) -> None:
    assert [output.strip() for output in processes.run_source(WORKER, tmp_path, 3)] == ["agreed"] * 3


LEAVE = """
import atexit, sys
from diffpp_fast.training.distributed import leave

class Late:
    def __del__(self): print("the interpreter ended")

sys.late = Late()  # dies with the interpreter, as a process group does that something still names
atexit.register(print, "exit functions ran")
print("whole", end=" ")
leave(7)
"""


def test_a_process_leaves_before_the_interpreter_ends(tmp_path: Path) -> None:
    script = tmp_path / "leave.py"
    script.write_text(LEAVE)
    assert processes.finish(processes.start([str(script)], 1)) == [(7, "whole exit functions ran\n")]


@pytest.mark.parametrize(("size", "left"), [("2", True), ("1", False), (None, False)])
def test_the_program_leaves_so_where_it_is_one_of_many(
    size: str | None, left: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gloo's threads have aborted processes at their end, of runs that were whole."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    codes: list[int] = []
    monkeypatch.setattr(program, "main", lambda: 3)
    monkeypatch.setattr(distributed, "leave", codes.append)
    with pytest.raises(SystemExit) as ended:
        program.run()
    assert ended.value.code == 3 and codes == [3] * left


def test_alone_nothing_is_distributed() -> None:
    world = World.join("cpu", {})
    assert (world.rank, world.size, world.is_main) == (0, 1, True)
    assert world.any(True) and not world.any(False)
    assert world.first_error(None) is None and world.first_error(ValueError("no")) == "no"
    with pytest.raises(ConfigurationError, match="no"), world.together(ConfigurationError):
        raise ValueError("no")
    with pytest.raises(ValueError, match="other"), world.together(ConfigurationError, OSError):
        raise ValueError("other")
    numbers = torch.arange(5)
    assert torch.equal(world.share(numbers), numbers) and torch.equal(world.sum(numbers), numbers)
    world.barrier()
    world.close()
    assert not torch.distributed.is_initialized()


def test_one_process_under_a_launcher_is_alone() -> None:
    assert World.join("cpu", {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}).size == 1
    assert not torch.distributed.is_initialized()


def test_half_a_launch_environment_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"RANK and WORLD_SIZE are set, but not LOCAL_RANK and MASTER_ADDR"):
        World.join("cpu", {"RANK": "1", "WORLD_SIZE": "2"})


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", 1) == torch.device("cuda", 1)
    with pytest.raises(ConfigurationError, match="LOCAL_RANK is 2, but PyTorch sees 2 GPUs"):
        choose_device("cuda", 2)


def test_processes_that_are_started_again_meet_only_each_other() -> None:
    """The store keeps what earlier ones left there, and rank 0 may come last."""
    store, met = dist.HashStore(), list[dict[int, str]]()
    store.add("starts/asked", 1)  # by one that was killed while it waited

    def join(rank: int) -> None:
        met[-1][rank] = distributed._agree_on_start(store, rank, 4)

    for order in ((0, 1, 2, 3), (3, 1, 2, 0)):
        met.append({})
        joining = [threading.Thread(target=join, args=(rank,), daemon=True) for rank in order]
        for thread in joining:
            thread.start()
            time.sleep(0.05)
        for thread in joining:
            thread.join(timeout=10)
    first, second = met
    assert sorted(first) == sorted(second) == [0, 1, 2, 3]
    assert len(set(first.values())) == len(set(second.values())) == 1 and first[0] != second[0]
