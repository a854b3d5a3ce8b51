"""How much memory a process has taken, in GiB."""

from __future__ import annotations

import resource
import sys

import torch

GIB = 2**30


class Memory:
    """Reads counters that are kept anyway: nothing waits for the device.

    Args:
        device: of the process; the CPU has no figures of its own.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def take(self) -> dict[str, float]:
        """`memory/host_peak` since the process began; on CUDA also `memory/allocated`, `memory/reserved` now and
        `memory/peak`, the most that was allocated since the last taking."""
        # Linux counts in KiB, macOS in bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        taken = {"memory/host_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB}
        if self.device.type == "cuda":
            taken["memory/allocated"] = torch.cuda.memory_allocated(self.device) / GIB
            taken["memory/reserved"] = torch.cuda.memory_reserved(self.device) / GIB
            taken["memory/peak"] = torch.cuda.max_memory_allocated(self.device) / GIB
            torch.cuda.reset_peak_memory_stats(self.device)
        return taken
