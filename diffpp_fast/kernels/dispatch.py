"""Which backend serves an operator.

A backend registers one module per operator. The modules of one operator have the same functions with the same
arguments in every backend, so that the operator's autograd can call whichever it was given. `select` returns that
module: the requested backend's, or with "auto" the first of `PREFERENCE` that serves this device and dtype.
"""

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch

OPS = (
    "philox",
    "add_noise",
    "denoising_loss",
    "score_gap",
    "sid_loss",
    "sim_loss",
    "reward_pixels",
    "group_norm_silu",
    "geglu",
    "ada_layer_norm",
)
# On the CPU "cpu" comes before Triton's interpreter; it serves nothing on GPUs. There Triton comes first until both
# were measured.
PREFERENCE = ("cpu", "triton", "cuda", "reference")
BACKENDS = ("auto", *PREFERENCE)
ENVIRONMENT = "DIFFPP_FAST_BACKEND"


def _available() -> str | None:
    return None


def _serves_all(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


@dataclass(frozen=True)
class Kernel:
    """One operator in one backend: where its module is, and what keeps it from serving."""

    module: str
    unavailable: Callable[[], str | None]
    refuses: Callable[[torch.device, torch.dtype], str | None]


class Row(NamedTuple):
    """One cell of the operator x backend table: `reason` is None where the backend serves."""

    op: str
    backend: str
    serves: bool
    reason: str | None


_kernels: dict[tuple[str, str], Kernel] = {}
_loaded: dict[str, ModuleType] = {}
_requested: ContextVar[str | None] = ContextVar("diffpp_fast_backend", default=None)


def register(
    op: str,
    backend: str,
    module: str,
    *,
    unavailable: Callable[[], str | None] = _available,
    refuses: Callable[[torch.device, torch.dtype], str | None] = _serves_all,
) -> None:
    """Enter `backend`'s kernels for `op`.

    Args:
        op: one of `OPS`.
        backend: one of `PREFERENCE`.
        module: dotted name of the module with the kernels, imported when the first operator is called.
        unavailable: returns None, or why this process can't use the module at all (no GPU, not compiled). It runs
            on every selection: cache what is slow.
        refuses: returns None, or why the module can't serve tensors of this device and dtype.
    """
    if op not in OPS:
        raise ValueError(f"unknown operator {op!r}; known: {', '.join(OPS)}")
    if backend not in PREFERENCE:
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(PREFERENCE)}")
    _kernels[op, backend] = Kernel(module, unavailable, refuses)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, operators called in this thread or task use backend `name`.

    Args:
        name: "auto" (the best that serves the tensors at hand), "reference", "cpu", "triton" or "cuda".

    Raises:
        ValueError: unknown name. An operator that the backend can't serve raises RuntimeError when it is called.
    """
    token = _requested.set(_known(name, "use_backend"))
    try:
        yield
    finally:
        _requested.reset(token)


def requested_backend() -> str:
    """The innermost `use_backend`, else the environment's DIFFPP_FAST_BACKEND, else "auto"."""
    name = _requested.get()
    if name is not None:
        return name
    return _known(os.environ.get(ENVIRONMENT) or "auto", ENVIRONMENT)


def select(op: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The kernel module that serves `op` on tensors of this device and dtype.

    Raises:
        RuntimeError: the requested backend can't serve, or with "auto" none can; the message says why.
    """
    return _loaded[_load_best(op, device, dtype)]


# torch.compile can't trace context variables and imports: it fixes the choice when it traces.
@torch.compiler.assume_constant_result
def _load_best(op: str, device: torch.device, dtype: torch.dtype) -> str:
    name = requested_backend()
    candidates = PREFERENCE if name == "auto" else (name,)
    for backend in candidates:
        kernel = _kernels.get((op, backend))
        if kernel is None or kernel.unavailable() or kernel.refuses(device, dtype):
            continue
        if kernel.module not in _loaded:
            _load_all()
        return kernel.module
    reasons = (f"backend {backend!r} can't serve: {why_not(op, backend, device, dtype)}" for backend in candidates)
    raise RuntimeError(f"{op}: {'; '.join(reasons)}")


# All at once: torch.compile copies `_loaded` at the first operator of a graph, and would not find the second's module.
def _load_all() -> None:
    for kernel in _kernels.values():
        if kernel.unavailable() is None:
            _loaded[kernel.module] = importlib.import_module(kernel.module)


def default_backend(op: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """The backend that serves `op` where none is asked for, None if none does."""
    return next((backend for backend in PREFERENCE if why_not(op, backend, device, dtype) is None), None)


def why_not(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None if `backend` serves `op` on tensors of this device and dtype, else the reason."""
    kernel = _kernels.get((op, backend))
    if kernel is None:
        return "it has no kernel for this operator"
    return kernel.unavailable() or kernel.refuses(device, dtype)


def table(device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> list[Row]:
    """Every operator x backend, for tensors of `device` (by default the GPU, if there is one) and `dtype`."""
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for op in OPS:
        for backend in PREFERENCE:
            reason = why_not(op, backend, device, dtype)
            rows.append(Row(op, backend, reason is None, reason))
    return rows


def _known(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}; known: {', '.join(BACKENDS)}")
    return name
