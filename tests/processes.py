"""Real processes for tests: a script started once per rank, on gloo, as a launcher would start it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

#: Where tests lie: workers import tiny.py and the like from here.
TESTS = Path(__file__).parent


def environments(size: int) -> list[dict[str, str]]:
    """One environment per rank; one thread each, for the cores are shared."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(size),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH")))),
    }
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def start(arguments: Sequence[str], size: int, extra: Mapping[str, str] | None = None) -> list[subprocess.Popen[str]]:
    """`python ARGUMENTS` once per rank, their output kept; `extra` variables for all."""
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**environment, **(extra or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for environment in environments(size)
    ]


def finish(processes: Sequence[subprocess.Popen[str]], timeout: float = 300.0) -> list[tuple[int, str]]:
    """Exit code and output of each; all are killed once one takes longer than `timeout` seconds."""
    try:
        ended = [process.communicate(timeout=timeout)[0] for process in processes]
        return [(process.returncode, output) for process, output in zip(processes, ended, strict=True)]
    finally:
        for process in processes:
            process.kill()


def run_source(source: str, folder: Path, size: int, *arguments: str, timeout: float = 300.0) -> list[str]:
    """Runs a script, given as text, as `run`; it is kept in `folder`."""
    script = folder / "worker.py"
    script.write_text(source)
    return run([str(script), *arguments], size, timeout)


def run(arguments: Sequence[str], size: int, timeout: float = 300.0) -> list[str]:
    """Runs a script on `size` ranks to its end and returns their outputs; one that fails fails the test."""
    ended = finish(start(arguments, size), timeout)
    for rank, (code, output) in enumerate(ended):
        assert code == 0, f"rank {rank} ended with {code}:\n{output}"
    return [output for _, output in ended]
