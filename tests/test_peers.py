"""A process that is gone, unreachable or stopped is named, and ends the others within the time that was asked for."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import processes
import pytest
import torch.distributed as dist

from diffpp_fast.cli.main import _fail
from diffpp_fast.training import peers
from diffpp_fast.training.peers import EXIT_CODE, PeerLostError, PeerWatch, Silence

LIMIT = 0.6
NODES = ("node-0", "node-0", "node-1", "node-1")


def test_silence_is_counted_by_the_own_clock() -> None:
    silence = Silence()
    silence.note({1: b"0", 2: b"0"}, 10.0)
    silence.note({1: b"1", 2: b"0"}, 12.0)
    assert silence.longer_than(3.0, 13.5) == [2]
    # A process that was stopped itself can't tell whether others were.
    silence.forgive(3.0)
    assert silence.longer_than(3.0, 15.5) == []
    assert silence.longer_than(3.0, 16.5) == [2]
    silence.note({2: peers.LEFT}, 17.0)
    assert silence.longer_than(3.0, 30.0) == [1] and silence.left() == [2]


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ([1], "rank 1 on node-0"),
        ([3, 2], "ranks 2 and 3 on node-1"),
        ([0, 2, 3], "rank 0 on node-0 and ranks 2 and 3 on node-1"),
        (range(8, 16), "ranks 8 to 15 on node-b"),
        ([8, 10, 11], "ranks 8, 10, 11 on node-b"),
        (
            range(100, 150),
            "rank 100 on m100, rank 101 on m101, rank 102 on m102, rank 103 on m103 and others",
        ),
    ],
)
def test_processes_are_named_by_machine(ranks: range | list[int], said: str) -> None:
    hosts = dict(enumerate(NODES)) | dict.fromkeys(range(8, 16), "node-b") | {n: f"m{n}" for n in range(100, 150)}
    assert peers._named(ranks, hosts).startswith(said)


class Link:
    """The way of one process to the store: it can be cut so that calls fail, or so that they never return."""

    def __init__(self, store: dist.Store) -> None:
        self.store, self.cut, self.hangs, self.made = store, False, threading.Event(), 0

    def connect(self) -> Link:
        self._pass()
        self.made += 1
        return self

    def set(self, name: str, value: str) -> None:
        self._pass()
        self.store.set(name, value)

    def multi_get(self, names: list[str]) -> list[bytes]:
        self._pass()
        return [self.store.get(name) for name in names]

    def _pass(self) -> None:
        while self.hangs.is_set():
            time.sleep(0.01)
        if self.cut:
            raise dist.DistNetworkError("Connection reset by peer")


class Fleet:
    """Four watched processes in one, and the sentences with which each would have ended."""

    def __init__(self) -> None:
        store = dist.HashStore()
        self.links = [Link(store) for _ in NODES]
        self.said: dict[int, list[str]] = {rank: [] for rank in range(4)}
        self.watches = [
            PeerWatch(link.connect, rank, 4, LIMIT, "node-0:1234", host=NODES[rank], end=self.said[rank].append)  # type: ignore[arg-type]
            for rank, link in enumerate(self.links)
        ]
        for watch in self.watches:
            watch.start()

    def sentences(self, *ranks: int) -> list[str]:
        """Return what these ranks end with, as soon as all have said so."""
        until = time.monotonic() + 20.0
        while not all(self.said[rank] for rank in ranks):
            assert time.monotonic() < until, self.said
            time.sleep(0.01)
        return [self.said[rank][0] for rank in ranks]


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    made = Fleet()
    yield made
    for link in made.links:
        link.hangs.clear()
    for watch in made.watches:
        watch.stop()


def test_whoever_is_silent_is_named_in_all_that_are_left(fleet: Fleet) -> None:
    begun = time.monotonic()
    fleet.links[3].hangs.set()
    said = fleet.sentences(0, 1, 2)
    assert time.monotonic() - begun > LIMIT
    assert said[0].startswith("rank 0 on node-0 misses rank 3 on node-1: no sign of life for 0.6 s")
    assert said[1:] == said[:1] * 2 and "--resume latest" in said[0] and "exit code 75" in said[0]


def test_a_store_that_does_not_answer_is_named_with_its_machine(fleet: Fleet) -> None:
    fleet.links[2].hangs.set()
    (said,) = fleet.sentences(2)
    assert said.startswith(
        "rank 2 on node-1 misses the store at node-0:1234 on the machine of rank 0 on node-0: no answer for 0.6 s"
    )


def test_a_connection_that_breaks_for_a_moment_is_made_anew(fleet: Fleet) -> None:
    fleet.links[1].cut = True
    time.sleep(LIMIT / 2)
    fleet.links[1].cut = False
    time.sleep(2 * LIMIT)
    assert fleet.links[1].made > 1 and not any(fleet.said.values())


def test_who_leaves_is_not_missed_and_who_breaks_a_connection_is_named(fleet: Fleet) -> None:
    fleet.watches[3].stop()
    fleet.watches[2].stop()
    time.sleep(2 * LIMIT)
    assert not any(fleet.said.values())
    said = fleet.watches[0].explain(RuntimeError("[pair.cc] Connection closed by peer"))
    assert "misses ranks 2 and 3 on node-1: ended, and told why in its own output" in said
    assert fleet.sentences(1) == [said]


def test_rank_0_with_whom_the_store_ends_leaves_last(fleet: Fleet) -> None:
    begun = time.monotonic()
    leaving = threading.Thread(target=fleet.watches[0].stop)
    leaving.start()
    for watch in fleet.watches[1:]:
        watch.stop()
    leaving.join()
    assert not any(fleet.said.values())
    assert [fleet.links[0].store.get(f"beat/{rank}") for rank in range(4)] == [peers.LEFT] * 4
    assert time.monotonic() - begun < LIMIT


def test_a_broken_connection_is_told_where_nobody_is_missing(fleet: Fleet) -> None:
    said = fleet.watches[1].explain(RuntimeError("[pair.cc] Connection closed by peer\nat 10.0.0.2"))
    assert "rank 1 on node-0 misses another process: a connection broke ([pair.cc] Connection closed by peer)" in said


def test_the_program_s_exit_code_tells_that_others_are_gone() -> None:
    assert _fail(PeerLostError("gone")) == EXIT_CODE == 75 and _fail("wrong") == 2


WORKER = """
import os, signal, sys
import torch
from diffpp_fast.training.distributed import World
from diffpp_fast.training.peers import PeerLostError

world = World.join("cpu", peer_timeout=1.5)
world.barrier()
if world.rank == int(sys.argv[2]):
    os.kill(os.getpid(), int(sys.argv[1]))
try:
    with world.explained():
        for _ in range(3):  # hangs in C++, or finds a connection broken
            world.barrier()
    raise AssertionError("it went on without the one that is gone")
except PeerLostError as error:
    print("explained:", error)
    sys.stdout.flush()
    os._exit(error.exit_code)
"""


@pytest.mark.parametrize(
    ("number", "gone", "said"),
    [
        (signal.SIGSTOP, 2, "rank 0 on HOST misses rank 2 on HOST: no sign of life"),
        (signal.SIGKILL, 1, "misses rank 1 on HOST: no sign of life"),
        # The server of the store is rank 0's.
        pytest.param(
            signal.SIGSTOP, 0, "on the machine of rank 0 on HOST: no answer for 1.5 s", marks=pytest.mark.slow
        ),
    ],
    ids=["stopped", "killed", "the store's machine stopped"],
)
def test_a_process_that_vanishes_ends_the_others(tmp_path: Path, number: int, gone: int, said: str) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    started = processes.start([str(script), str(int(number)), str(gone)], 3)
    left = [process for rank, process in enumerate(started) if rank != gone]
    try:
        ended = processes.finish(left, timeout=60)
    finally:
        started[gone].kill()
        started[gone].communicate()
    for code, output in ended:
        assert code == EXIT_CODE, output
        assert said.replace("HOST", socket.gethostname()) in output, output
