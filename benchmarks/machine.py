"""Where and with what a measurement was made."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from diffpp_fast.provenance import commit, device_name, package_version
from diffpp_fast.version import __version__

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
    return Provenance(
        *commit(),
        __version__,
        torch.__version__,
        package_version("triton"),
        platform.python_version(),
        device_name(device),
        datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def last_level_cache(device: torch.device) -> int:
    """Bytes of the largest cache between the device's processor and its memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    texts = [
        path.read_text(encoding="utf-8").strip()
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
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
