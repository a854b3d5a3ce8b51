"""Processes with a time limit, and what they leave for the next run: the machinery of `make gpu-check`."""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from diffpp_fast.provenance import PACKAGE

#: Seconds between two looks at the processes.
INTERVAL = 0.1
SOURCES = ("*.py", "*.cpp", "*.h", "*.cu", "*.cuh")


class Job(NamedTuple):
    """A process to run."""

    name: str
    command: Sequence[str]
    limit: float  # seconds
    environment: Mapping[str, str | None] = {}  # None takes a variable away


class Ended(NamedTuple):
    """How a job ended."""

    job: Job
    code: int | None  # None: it was stopped at its limit
    output: str

    @property
    def why(self) -> str:
        """In a few words, with the last line of the output."""
        last = next((line for line in reversed(self.output.splitlines()) if line.strip()), "no output")
        ended = f"no end within {self.job.limit:.0f} s" if self.code is None else f"exit code {self.code}"
        return f"{ended}: {last.strip()[:300]}"


def run_jobs(jobs: Sequence[Job], at_once: int, deadline: float) -> Iterator[Ended]:
    """Runs the jobs, `at_once` at a time, and yields each when it has ended.

    At its limit, or when `time.monotonic()` reaches the deadline, a job is stopped; one that was not started by then is
    left out.
    """
    waiting = list(jobs)
    running: list[_Running] = []
    try:
        while waiting or running:
            while waiting and len(running) < at_once and time.monotonic() < deadline:
                running.append(_Running.start(waiting.pop(0)))
            if not running:
                return
            time.sleep(INTERVAL)
            now = time.monotonic()
            for process in list(running):
                late = now >= min(process.started + process.job.limit, deadline)
                if process.popen.poll() is not None or late:
                    running.remove(process)
                    yield process.end()
    finally:
        for process in running:
            process.end()


@dataclass
class _Running:
    job: Job
    popen: subprocess.Popen[bytes]
    output: IO[bytes]
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def start(cls, job: Job) -> _Running:
        environment = {name: value for name, value in os.environ.items() if name not in job.environment}
        environment |= {name: value for name, value in job.environment.items() if value is not None}
        output = tempfile.TemporaryFile()  # noqa: SIM115 - `end` closes it
        # A group of its own, so that compilers and workers that it starts end with it.
        popen = subprocess.Popen(
            job.command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        return cls(job, popen, output)

    def end(self) -> Ended:
        code = self.popen.poll()
        if code is None:
            os.killpg(self.popen.pid, signal.SIGKILL)
            self.popen.wait()
        self.output.seek(0)
        text = self.output.read().decode(errors="replace")
        self.output.close()
        return Ended(self.job, code, text)


class State:
    """What is done: an append-only file of keys and values that several processes may write to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, key: tuple[Any, ...], value: object) -> None:
        with self.path.open("ab", buffering=0) as file:
            file.write(pickle.dumps((key, value)))  # one write: it is whole or absent

    def read(self) -> dict[tuple[Any, ...], Any]:
        """The last value of every key."""
        entries: dict[tuple[Any, ...], Any] = {}
        if self.path.exists():
            with self.path.open("rb") as file:
                while True:
                    try:
                        key, value = pickle.load(file)
                    except (EOFError, pickle.UnpicklingError):
                        break
                    entries[key] = value
        return entries


def digest(*facts: str) -> str:
    """Return a digest of the package's sources, csrc and facts about the machine: results hold as long as it does."""
    hasher = hashlib.sha256()
    for folder in (PACKAGE, PACKAGE.parent / "csrc"):
        for path in sorted(path for pattern in SOURCES for path in folder.rglob(pattern)):
            hasher.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    for fact in facts:
        hasher.update(fact.encode() + b"\0")
    return hasher.hexdigest()[:12]


@contextmanager
def on_termination(action: Callable[[], object]) -> Iterator[None]:
    """Within the block, SIGTERM calls `action` instead of ending the process."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: action())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
