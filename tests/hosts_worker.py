"""One process of a run on several hosts, which notes how many bytes it has sent over the link after each step.

python hosts_worker.py INTERFACE COUNTS.json CONFIG.yaml KEY=VALUE ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from diffpp_fast.training import Trainer, load_config
from diffpp_fast.training.callbacks import Callback
from diffpp_fast.training.distributed import leave


def bytes_sent(interface: str) -> int:
    """Return what has gone out over an interface, headers included."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    (line,) = (line for line in lines if line.strip().startswith(f"{interface}:"))
    return int(line.split(":")[1].split()[8])


class Counts(Callback):
    """Notes the bytes after each step; of rank 0, which alone is told."""

    def __init__(self, interface: str, path: Path) -> None:
        self.interface, self.path = interface, path
        self.counts: list[int] = []

    def on_step(self, step: int) -> None:
        self.counts.append(bytes_sent(self.interface))

    def on_end(self, step: int) -> None:
        self.path.write_text(json.dumps(self.counts))


if __name__ == "__main__":
    interface, counts, config, *overrides = sys.argv[1:]
    Trainer(load_config(config, overrides), callbacks=[Counts(interface, Path(counts))]).run()
    leave(0)
