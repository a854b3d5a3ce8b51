"""environment.json: with which code, on what and when each session of a run was computed."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from diffpp_fast.provenance import commit, device_name, package_version
from diffpp_fast.training.callbacks.base import Callback
from diffpp_fast.training.distributed import World
from diffpp_fast.training.durable import write_whole
from diffpp_fast.version import __version__

#: Whose versions change what a run computes or how fast.
PACKAGES = ("torch", "triton", "numpy", "diffusers", "transformers", "deepspeed", "bitsandbytes", "peft")

logger = logging.getLogger(__name__)


class Environment(Callback):
    """One session for every part of a run, from its start or a resume to its end; earlier ones stay.

    A session that was killed, or that is still going, has null as `ended` and `last_step`.

    Args:
        path: of the file.
        facts: what there is to say of a session besides when it was and from which step to which, as JSON has it.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self.path = path
        self.facts = facts
        self.session: dict[str, Any] | None = None

    def on_start(self, step: int, steps: int) -> None:
        times = {"began": _now(), "ended": None, "first_step": step, "last_step": None, "steps": steps}
        self.session = {**times, **self.facts}
        self._write([*read_sessions(self.path), self.session])

    def on_end(self, step: int) -> None:
        if self.session is None:
            return
        before = read_sessions(self.path)[:-1]
        self.session |= {"ended": _now(), "last_step": step}
        try:
            self._write([*before, self.session])
        except OSError as error:  # a full disk may be what ends the run: that is to be said, not this
            logger.warning("can't write %s: %s", self.path, error.strerror)

    def _write(self, sessions: Sequence[Mapping[str, Any]]) -> None:
        write_whole(self.path, json.dumps({"sessions": sessions}, indent=2) + "\n")


def describe_environment(world: World, grid_prompts: Sequence[str]) -> dict[str, Any]:
    """The facts of a session. `grid_prompts`: of its sample grids, row by row."""
    name, dirty = commit()
    return {
        "processes": world.size,
        "device": device_name(world.device),
        "threads": torch.get_num_threads(),
        "commit": name,
        "dirty": dirty,
        "diffpp_fast": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda": torch.version.cuda or "",
        "packages": {name: version for name in PACKAGES if (version := package_version(name))},
        "grid_prompts": list(grid_prompts),
    }


def read_sessions(path: Path) -> list[dict[str, Any]]:
    """The sessions so far, oldest first; none where the file is missing or damaged."""
    try:
        sessions = json.loads(path.read_text(encoding="utf-8"))["sessions"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [session for session in sessions if isinstance(session, dict)] if isinstance(sessions, list) else []


def _now() -> str:
    """ISO 8601, UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
