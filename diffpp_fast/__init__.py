"""Diff-Instruct++ and its relatives: one-step text-to-image generators aligned with human preference.

`import diffpp_fast` needs torch alone. `diffpp_fast.networks`, `.rewards` and `.methods` load on first use.
"""

import importlib
from types import ModuleType

from diffpp_fast import availability, ops  # noqa: F401 - availability first: it refuses an old torch
from diffpp_fast.backends import use_backend
from diffpp_fast.noise import Noise
from diffpp_fast.schedule import NoiseSchedule
from diffpp_fast.version import __version__

__all__ = ["Noise", "NoiseSchedule", "__version__", "methods", "networks", "ops", "rewards", "use_backend"]

_LAZY = ("methods", "networks", "rewards")


def __getattr__(name: str) -> ModuleType:
    if name in _LAZY:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
