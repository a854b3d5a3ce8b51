"""The package below its public names: the only file here that knows how backends register their kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch

from diffpp_fast import backends, native
from diffpp_fast.availability import INTERPRETED, UNLIMITED
from diffpp_fast.prediction import PREDICTION_TYPES

__all__ = ["OPS", "PREDICTION_TYPES", "PREFERENCE", "native"]

OPS, PREFERENCE = backends.OPS, backends.PREFERENCE
use = backends.use_backend


def has_kernel(op: str, backend: str) -> bool:
    """Say whether the backend knows the operator, on whatever device."""
    return backends.has_kernels(op, backend)


def why_not(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return the reason why a backend can't serve an operator; None if it can."""
    # Noise is made in float32 and then cast.
    return backends.why_not(op, backend, device, torch.float32 if op == "philox" else dtype)


def serving(names: Sequence[str], device: torch.device) -> list[str]:
    """Return those of the backends that serve any operator on the device."""
    return [name for name in names if any(row.backend == name and row.serves for row in backends.table(device))]


def triton_takes(op: str, dtype: torch.dtype) -> bool:
    """Say whether Triton's kernels of an operator take a dtype on a GPU, which need not be there."""
    return has_kernel(op, "triton") and backends.LIMITS["triton"].refuses(torch.device("cuda"), dtype) is None


@contextmanager
def triton_on_cpu_tensors() -> Iterator[None]:
    """Within the block, operators on CPU tensors are served by Triton, whatever it says that it needs."""
    with (
        mock.patch.dict(backends.LIMITS, triton=UNLIMITED),
        mock.patch.dict(backends._chosen, clear=True),
        mock.patch.dict(backends._loaded, clear=True),
        backends.use_backend("triton"),
    ):
        yield


def triton_interprets() -> bool:
    """Say whether Triton's kernels are interpreted in this process, and not compiled."""
    return INTERPRETED
