"""Checks of the environment variables that decide about a run."""

from __future__ import annotations

from collections.abc import Mapping

from diffpp_fast.backends import BACKENDS, ENVIRONMENT
from diffpp_fast.errors import ConfigurationError

#: Numbers of threads, which libraries take as they are or crash on.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
#: Whole numbers that launchers set.
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")


def check_environment(variables: Mapping[str, str]) -> None:
    """Raise ConfigurationError for a variable that names no backend, or no number where one is wanted.

    An empty DIFFPP_FAST_BACKEND is one that is not set; so is an empty CUDA_VISIBLE_DEVICES for PyTorch a machine
    without a GPU, as is meant.
    """
    backend = variables.get(ENVIRONMENT, "")
    if backend and backend not in BACKENDS:
        raise ConfigurationError(f"{ENVIRONMENT} is {backend!r}: known are {', '.join(BACKENDS)}")
    for name in (*THREADS, *LAUNCHER):
        value = variables.get(name)
        numbers = (value or "").split(",") if name == "OMP_NUM_THREADS" else [value or ""]  # one for each nesting level
        if value is not None and not all(number.strip().isdecimal() for number in numbers):
            raise ConfigurationError(f"{name} is {value!r}: it should be a whole number; unset it or give it one")
