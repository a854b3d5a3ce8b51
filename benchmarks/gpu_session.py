"""One call of `make gpu-check`: its time budget, its processes, and what is done already."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import backends
from benchmarks.timing import provenance

ROOT = Path(__file__).resolve().parent.parent
#: Seconds for everything, and of those for the report at the end.
SECONDS, REPORT = 460.0, 15.0
#: The part of the time that checks may take before the benchmark begins.
CHECKS = 0.6
SOURCES = ("*.py", "*.cpp", "*.h", "*.cu", "*.cuh")
_running: set[subprocess.Popen[bytes]] = set()


class Ended(NamedTuple):
    """How a process ended."""

    code: int | None  # None: it was stopped at its limit
    output: str
    limit: float

    @property
    def why(self) -> str:
        """In a few words, with the last line of the output."""
        last = next((line for line in reversed(self.output.splitlines()) if line.strip()), "no output")
        ended = f"no end within {self.limit:.0f} s" if self.code is None else f"exit code {self.code}"
        return f"{ended}: {last.strip()[:300]}"


def run_limited(command: Sequence[str], limit: float, environment: Mapping[str, str | None] = {}) -> Ended:
    """Run a process, with all that it starts for at most `limit` seconds. None takes a variable away."""
    merged = {**os.environ, **environment}
    with tempfile.TemporaryFile() as output:
        # A group of its own, so that compilers and workers that it starts end with it.
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={name: value for name, value in merged.items() if value is not None},
            start_new_session=True,
        )
        _running.add(process)
        try:
            code: int | None = process.wait(timeout=max(0.0, limit))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _running.discard(process)
            _stop(process)
        output.seek(0)
        return Ended(code, output.read().decode(errors="replace"), limit)


def stop_all() -> None:
    """End the processes that other threads have started."""
    for process in list(_running):
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Verdict(NamedTuple):
    """The findings about one operator on one backend."""

    op: str
    backend: str
    checked: int  # combinations of options
    wanted: int  # as many hold every pair of options, if no fewer were asked for
    total: int
    wrong: list[str]
    graphs: int = 0  # captured and replayed
    compiled: int = 0  # by torch.compile, in one graph
    fatal: bool = False  # the device can't be used any more, or the process died

    @property
    def summary(self) -> str:
        """In a few words."""
        if self.wrong:
            return "CRASHED" if self.fatal else "WRONG"
        return "right" if self.checked >= self.wanted else "unfinished"

    @property
    def in_words(self) -> str:
        counts = f"{self.checked} of {self.total} combinations of options, {self.wanted} wanted"
        more = f"{self.graphs} captured graphs, {self.compiled} compiled"
        return f"{self.summary} ({counts}; {more})" + "".join(f"\n    {sentence}" for sentence in self.wrong)


class State:
    """Keys and values in an append-only file that several processes may write to: what is done."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, key: tuple[Any, ...], value: object) -> None:
        with self.path.open("ab", buffering=0) as file:
            file.write(pickle.dumps((key, value)))  # one write: it is whole or absent

    def read(self) -> dict[tuple[Any, ...], Any]:
        """Return the last value of every key."""
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
    """Return a digest of all sources and of facts about the machine: results hold as long as it does."""
    hasher = hashlib.sha256()
    for folder in (ROOT / "diffpp_fast", ROOT / "benchmarks", ROOT / "csrc"):
        for path in sorted(path for pattern in SOURCES for path in folder.rglob(pattern)):
            hasher.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    for fact in facts:
        hasher.update(fact.encode() + b"\0")
    return hasher.hexdigest()[:12]


class Session:
    """One call.

    Args:
        rehearse: go through the same steps without a GPU, on tiny tensors.
        seconds: for everything.
        ops: operators; None: all.
        out: the folder of files; None: $OUT or one that suits.
    """

    def __init__(
        self, *, rehearse: bool, seconds: float = SECONDS, ops: Sequence[str] | None = None, out: Path | None = None
    ) -> None:
        self.rehearse = rehearse
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.began = time.monotonic()
        self.deadline = self.began + seconds - REPORT * (not rehearse)
        self.checks_end = self.began + CHECKS * seconds
        # Without a GPU the interpreter stands for Triton's kernels, and the CPU's for those of CUDA.
        self.backends = ("triton", "cpu" if rehearse else "cuda")
        self.ops = [op for op in ops or backends.OPS if any(backends.has_kernel(op, each) for each in self.backends)]
        self.out = Path(out or os.environ.get("OUT") or ("build/rehearsal" if rehearse else "benchmarks/results"))
        self.out = self.out.absolute()
        self.out.mkdir(parents=True, exist_ok=True)
        self.origin = provenance(self.device)
        key = digest(self.origin.device_name, self.origin.torch, self.origin.triton)
        self.state = State(self.out / f"gpu-check-{key}.state")
        # A second copy, for the case that the folder of results is emptied between two calls.
        self._spare = ROOT / "build" / "gpu-check" / self.state.path.name
        if self._spare.exists() and not self.state.path.exists() and not rehearse:
            shutil.copyfile(self._spare, self.state.path)
        self.log = self.out / "gpu-check.log"

    @property
    def environment(self) -> dict[str, str | None]:
        """The environment of all processes: whether Triton interprets, and where the package is."""
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        interpret = "1" if self.rehearse else None
        more = {"DIFFPP_FAST_BACKEND": None, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        return {"TRITON_INTERPRET": interpret, **more}

    def say(self, text: str, *, aside: bool = False) -> None:
        """Write to the log and, unless it is an aside, to the terminal."""
        stamped = f"[{time.monotonic() - self.began:5.0f} s] {text}"
        with self.log.open("a", encoding="utf-8") as file:
            file.write(stamped + "\n")
        if not aside:
            print(stamped, flush=True)

    def run(self, name: str, command: Sequence[str], limit: float, until: float, **more: str | None) -> Ended:
        """Run a process for at most `limit` seconds, and until a moment of `time.monotonic()`."""
        ended = run_limited(command, min(limit, until - time.monotonic()), {**self.environment, **more})
        self.say(f"----- {name}: {' '.join(command)}\n{ended.output}", aside=True)
        return ended

    def verdict(self, op: str, backend: str) -> Verdict | None:
        """Return what tests/gpu_gate.py has found; None if it has not yet."""
        found: Verdict | None = self.state.read().get(("gate", op, backend))
        return found

    def step(self, name: str) -> tuple[str, bool] | None:
        """Say how a step ended, and whether well; None if it did not come to its end."""
        found: tuple[str, bool] | None = self.state.read().get(("step", name))
        return found

    def is_done(self, name: str) -> bool:
        """Say whether a step has ended well."""
        return (self.step(name) or ("", False))[1]

    def keep(self) -> None:
        """Copy what is done to where a later call finds it."""
        if not self.rehearse and self.state.path.exists():
            self._spare.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.state.path, self._spare)


#: The call that this process makes; tests/test_gpu.py takes a session of its own where there is none.
current: Session | None = None
