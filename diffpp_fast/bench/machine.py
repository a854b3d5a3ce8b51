"""Where and with what a measurement was made."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

from diffpp_fast.version import __version__

PACKAGE = Path(__file__).resolve().parent.parent
#: Assumed where the system does not tell the size of the last-level cache.
LIKELY_CACHE = 32 * 2**20
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


class Provenance(NamedTuple):
    """What goes into every row of the results."""

    commit: str  # `git describe` of the checkout; empty where the package is installed without one
    dirty: str  # "yes" if tracked files differ from that commit, "no", or empty
    diffpp_fast: str
    torch: str
    triton: str
    python: str
    device_name: str
    date: str  # ISO 8601, UTC, when the run began


def provenance(device: torch.device) -> Provenance:
    commit, dirty = _commit()
    return Provenance(
        commit,
        dirty,
        __version__,
        torch.__version__,
        _version("triton"),
        platform.python_version(),
        device_name(device),
        datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{_cpu_model()} ({cores} core{'s' * (cores > 1)}, {torch.backends.cpu.get_cpu_capability()})"


def last_level_cache(device: torch.device) -> int:
    """Bytes of the largest cache between the device's processor and its memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    texts = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(text[:-1]) * UNITS[text[-1]] for text in texts if text[-1:] in UNITS), default=LIKELY_CACHE)


@contextmanager
def intra_op_threads(count: int) -> Iterator[None]:
    """Within the block, torch's CPU kernels run on `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or platform.machine()


def _commit() -> tuple[str, str]:
    # A virtual environment may lie inside somebody else's checkout.
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return "", ""
    changes = _git("status", "--porcelain", "--untracked-files=no", ":/")
    return _git("describe", "--always", "--tags") or "", "yes" if changes else "no"


def _git(*arguments: str) -> str | None:
    """What git prints in the package's folder; None if it fails or is not there."""
    try:
        done = subprocess.run(["git", *arguments], cwd=PACKAGE, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
