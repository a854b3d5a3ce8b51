"""Which code, with which packages and on which device something was computed."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parent


def commit() -> tuple[str, str]:
    """`git describe` of the package's checkout, and "yes" if tracked files differ from that commit, else "no"; twice
    empty where the package is installed without a checkout."""
    # A virtual environment may lie inside somebody else's checkout.
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return "", ""
    changes = _git("status", "--porcelain", "--untracked-files=no", ":/")
    return _git("describe", "--always", "--tags") or "", "yes" if changes else "no"


def package_version(package: str) -> str:
    """Return the version of an installed package; empty where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{_cpu_model()} ({cores} core{'s' * (cores > 1)}, {torch.backends.cpu.get_cpu_capability()})"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    """Return what git prints in the package's folder; None if it fails or is not there."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=PACKAGE,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
