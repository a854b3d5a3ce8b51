"""Signs of life between the processes of a run: one that is gone, unreachable or stopped is named, and the rest end.

A collective waits for whoever is missing, inside of C++, and NCCL's or Gloo's own time-out has to leave room for an
export by rank 0. So two threads of every process stand aside. One counts up a number in a store that all reach,
and reads those of the others; the other thread alone looks at the clock, since a call to a store whose machine is gone
returns to nobody. Rank 0 watches all others, and they watch rank 0, so that a store serves a few requests a second
for each process. A process that compiles, saves or evaluates goes on counting; one that is stopped does not.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from itertools import groupby
from typing import Any

import torch.distributed as dist

from diffpp_fast.errors import UserError

#: The exit code of a process that ends for want of others: EX_TEMPFAIL of sysexits.h, "try again later".
EXIT_CODE = 75
#: Signs of life within the time after which a process counts as gone, and the most seconds between two of them.
BEATS = 12
BEAT_SECONDS = 2.0
#: The sign of one that has ended by itself.
LEFT = b"left"
#: Machines that are named in a sentence.
SHOWN = 4


class PeerLostError(UserError):
    """Other processes of the run are gone, and it can't go on without them."""

    exit_code = EXIT_CODE


class Silence:
    """How long the values of others have stood still, by this process's own clock."""

    def __init__(self) -> None:
        self._seen: dict[Any, tuple[bytes, float]] = {}

    def note(self, values: Mapping[Any, bytes], now: float) -> None:
        """Take in what was read at a moment."""
        for name, value in values.items():
            if name not in self._seen or self._seen[name][0] != value:
                self._seen[name] = value, now

    def forgive(self, seconds: float) -> None:
        """Leave out a time in which this process itself did not run, and could not hear anybody."""
        self._seen = {name: (value, since + seconds) for name, (value, since) in self._seen.items()}

    def longer_than(self, seconds: float, now: float) -> list[Any]:
        """Return whose values have stood still for longer; those that have left are not silent."""
        return [name for name, (value, since) in self._seen.items() if value != LEFT and now - since > seconds]

    def left(self) -> list[Any]:
        return [name for name, (value, _) in self._seen.items() if value == LEFT]


class PeerWatch:
    """Ends this process, in the middle of whatever it does, when others have given no sign of life for too long.

    All processes make theirs, then start it; in between they wait for each other.

    Args:
        connect: gives a new connection to the store that all share; it may raise RuntimeError or OSError.
        rank, size: of this process, and how many there are.
        limit: seconds of silence after which a process counts as gone.
        store_at: where the store is, for the sentence.
        end: is called with the sentence, in a thread; it must not return to a process that goes on.
    """

    def __init__(
        self,
        connect: Callable[[], dist.Store],
        rank: int,
        size: int,
        limit: float,
        store_at: str,
        *,
        host: str | None = None,
        end: Callable[[str], None] | None = None,
    ) -> None:
        self._connect, self._store_at, self.rank, self.limit = connect, store_at, rank, limit
        self._end = end or end_process
        self.host = host or socket.gethostname()
        self.beat = min(limit / BEATS, BEAT_SECONDS)
        #: Whom this process watches.
        self._watched = range(1, size) if rank == 0 else range(1)
        self._hosts: dict[int, str] = {}
        self._silence, self._lock = Silence(), threading.Lock()
        #: When the store last answered.
        self._answers = 0
        #: The sentence that rank 0 has for all, once it misses somebody: what it tells, and what others were told.
        self._verdict = self._told = ""
        self._stop = threading.Event()
        self._store = connect()
        self._store.set(f"host/{rank}", self.host)
        self._store.set(f"beat/{rank}", "0")
        if rank == 0:
            self._store.set("verdict", "")
        self._threads = [
            threading.Thread(target=run, name=f"peers-{run.__name__}", daemon=True)
            for run in (self._exchange, self._judge)
        ]

    def start(self) -> None:
        """Begin to watch: all others have made theirs."""
        hosts = self._store.multi_get([f"host/{peer}" for peer in self._watched])
        self._hosts = dict(zip(self._watched, (host.decode() for host in hosts), strict=True))
        self._note([b"0"] * len(self._watched))
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Leave: others don't miss a process that has said so."""
        if not self._stop.is_set():
            self._stop.set()
            # The thread may hang in a call to a store that is gone; nobody waits for the farewell either.
            self._threads[0].join(timeout=2 * self.beat)

    def explain(self, broken: BaseException) -> str:
        """Say whose end has broken a connection; takes a few beats in which those that live give a sign.

        Args:
            broken: the error of the call that found it broken.
        """
        # The others hear of it from rank 0.
        until = time.monotonic() + (4 if self.rank == 0 else 8) * self.beat
        while time.monotonic() < until:
            said = self._missing(2.5 * self.beat) or self._departed()
            if said is not None:
                break
            time.sleep(self.beat / 4)
        else:
            said = self._sentence("another process", f"a connection broke ({str(broken).splitlines()[0]})")
        self._tell_others(said)
        return said

    def _exchange(self) -> None:
        """Counts up, and reads the others' numbers."""
        store: dist.Store | None = self._store
        count = 0
        while not self._stop.wait(self.beat):
            count += 1
            try:
                store = store or self._connect()
                store.set(f"beat/{self.rank}", str(count))
                if self._verdict:
                    store.set("verdict", self._verdict)
                *beats, verdict = store.multi_get([*(f"beat/{peer}" for peer in self._watched), "verdict"])
            except (RuntimeError, OSError):
                store = None  # its machine may come back in time
                continue
            self._note(beats)
            self._told = "" if self.rank == 0 else verdict.decode()
        if store is not None:
            self._leave(store)

    def _leave(self, store: dist.Store) -> None:
        names, until = [f"beat/{peer}" for peer in self._watched], time.monotonic() + self.beat
        with suppress(RuntimeError):
            store.set(f"beat/{self.rank}", LEFT.decode())
            # The server may end with rank 0: the others say their farewell first.
            while self.rank == 0 and time.monotonic() < until and set(store.multi_get(names)) != {LEFT}:
                time.sleep(self.beat / 50)

    def _judge(self) -> None:
        """Looks at the clock, and calls nothing that can hang."""
        before = time.monotonic()
        while not self._stop.wait(self.beat / 2):
            now = time.monotonic()
            if now - before > 2 * self.beat:
                with self._lock:
                    self._silence.forgive(now - before)
            before = now
            said = self._missing(self.limit)
            if said is None:
                continue
            self._tell_others(said)
            if not self._stop.is_set():
                self._end(said)
            return

    def _note(self, beats: Iterable[bytes]) -> None:
        with self._lock:
            self._answers += 1
            values: dict[Any, bytes] = dict(zip(self._watched, beats, strict=True))
            self._silence.note({**values, "store": str(self._answers).encode()}, time.monotonic())

    def _tell_others(self, said: str) -> None:
        """Leave rank 0's sentence in the store, long enough that all read it: its server may end with this process."""
        if self.rank == 0:
            self._verdict = self._verdict or said
            time.sleep(3 * self.beat)

    def _missing(self, seconds: float) -> str | None:
        """Say who has been silent for longer; None where nobody has."""
        if self._told:
            return self._told
        with self._lock:
            silent = self._silence.longer_than(seconds, time.monotonic())
        if "store" in silent:
            owner = "" if self.rank == 0 else f" on the machine of {_named([0], self._hosts)}"
            return self._sentence(f"the store at {self._store_at}{owner}", f"no answer for {seconds:g} s")
        return self._sentence(_named(silent, self._hosts), f"no sign of life for {seconds:g} s") if silent else None

    def _departed(self) -> str | None:
        with self._lock:
            left = self._silence.left()
        return self._sentence(_named(left, self._hosts), "ended, and told why in its own output") if left else None

    def _sentence(self, who: str, why: str) -> str:
        return (
            f"rank {self.rank} on {self.host} misses {who}: {why} (distributed.peer_timeout={self.limit:g}). The "
            f"processes that are left end with exit code {EXIT_CODE}, and what was saved stays: start them again with "
            "--resume latest, as torchrun --max-restarts does by itself"
        )


def end_process(sentence: str) -> None:
    """End this process at once with a sentence, whatever its main thread hangs in."""
    with suppress(OSError):
        # Not through sys.stderr, whose lock the main thread may hold.
        os.write(2, f"\nerror: {sentence}\n".encode(errors="backslashreplace"))
    os._exit(EXIT_CODE)


def _named(ranks: Iterable[int], hosts: Mapping[int, str]) -> str:
    """Name processes by machine: "ranks 8 to 15 on node-1"."""
    by_host = groupby(sorted(ranks, key=lambda rank: (hosts[rank], rank)), key=lambda rank: hosts[rank])
    said = [f"{_ranges(list(group))} on {host}" for host, group in by_host]
    more = [f"others on {len(said) - SHOWN} more machines"] if len(said) > SHOWN else []
    *first, last = said[:SHOWN] + more
    return f"{', '.join(first)} and {last}" if first else last


def _ranges(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"ranks {ranks[0]} {'to' if len(ranks) > 2 else 'and'} {ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"
