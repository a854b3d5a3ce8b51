"""Which backend serves an operator: the one that is asked for, or the best that can.

An operator has the same functions in every backend, `forward` and mostly `backward`, each with the arguments of its
schema: the definition in plain torch ("reference"), the registered operator of the compiled library ("cpu" and "cuda"),
and a function that launches Triton ("triton").
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from diffpp_fast import availability
from diffpp_fast.availability import Limits
from diffpp_fast.library import library_unavailable, operators
from diffpp_fast.transforms import decided_when_traced

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
    "gated_residual_norm",
    "rms_norm_rope",
)
# In order of preference. On the CPU "cpu" comes before Triton's interpreter; it serves nothing on GPUs.
LIMITS: dict[str, Limits] = {
    "cpu": Limits(library_unavailable, availability.only_cpu),
    "triton": Limits(availability.triton_unavailable, availability.triton_refuses),
    "cuda": Limits(availability.cuda_unavailable, availability.only_cuda),
    "reference": availability.UNLIMITED,
}
PREFERENCE = tuple(LIMITS)
BACKENDS = ("auto", *PREFERENCE)
#: Up to so many elements "cuda" comes before "triton" on GPUs. There a call takes the host longer than its kernels take
#: the GPU: 2^22 elements of bfloat16, at 4 to 10 bytes each, are 4 to 10 us of an H200; a pass is 5 to 14 us of the
#: host in the functions of Triton, and half of that in the compiled library (`python -m benchmarks host` measures
#: calls). With more the GPU is behind, and what counts is the kernels, of which Triton's are tuned first.
SMALL = 2**22
#: What is small where csrc's kernels execute much more. Resizing 512 to 224 pixels in 16 bits takes 162 and 229
#: instructions an element forward and backward in csrc, which gathers, and 15 and 23 in Triton, which multiplies tiles
#: (`python -m benchmarks static`). With 2^20 elements an H200 issues those in 5.7 and 8.1 us, these in 0.5 and 0.8: as
#: much as a call of csrc saves the host.
SMALL_OF = {("reward_pixels", dtype): 2**20 for dtype in (torch.bfloat16, torch.float16)}
PREFERENCE_OF_SMALL = ("cpu", "cuda", "triton", "reference")
ENVIRONMENT = "DIFFPP_FAST_BACKEND"


class Row(NamedTuple):
    """One cell of the operator x backend table: `reason` is None where the backend serves."""

    op: str
    backend: str
    serves: bool
    reason: str | None


#: By operator and backend: how its functions are found.
_sources: dict[str, dict[str, Callable[[], Any]]] = {op: {} for op in OPS}
#: The functions by "operator backend", once an operator was called.
_loaded: dict[str, Any] = {}
#: The key in `_loaded` for (operator, `use_backend`, device, dtype, small).
_chosen: dict[tuple[str, str | None, torch.device, torch.dtype, bool], str] = {}
_requested: ContextVar[str | None] = ContextVar("diffpp_fast_backend", default=None)


def register(
    op: str,
    *,
    triton: str | None = None,
    cpu: SimpleNamespace | None = None,
    cuda: bool = True,
    **definition: Callable[..., Any],
) -> None:
    """Enter an operator with its definition in plain torch.

    Args:
        op: one of `OPS`.
        triton: where Triton's functions are, "module" or "module:object"; None for `diffpp_fast.ops.triton.<op>`.
        cpu: its functions on the CPU where csrc has none of this name, so that "cpu" serves every operator; None for
            csrc's.
        cuda: whether csrc has kernels of it for GPUs.
        definition: its functions by name. `forward` is registered as `diffpp_fast::<op>`, `backward` as
            `diffpp_fast::<op>_backward`, any other by its name.
    """
    if op not in OPS:
        raise ValueError(f"unknown operator {op!r}; known: {', '.join(OPS)}")
    names = {name: {"forward": op, "backward": f"{op}_backward"}.get(name, name) for name in definition}

    def compiled() -> SimpleNamespace:
        return SimpleNamespace(**{name: getattr(operators, schema).default for name, schema in names.items()})

    module = triton or f"{__package__}.ops.triton.{op}"
    _sources[op] = {"cpu": (lambda: cpu) if cpu else compiled, "triton": lambda: resolve_name(module)}
    if cuda:
        _sources[op]["cuda"] = compiled
    _sources[op]["reference"] = lambda: SimpleNamespace(**definition)


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
    """Return the innermost `use_backend`, else the environment's DIFFPP_FAST_BACKEND, else "auto"."""
    return _requested.get() or _from_environment()


# Once: reading a variable takes a tenth of a small call.
@cache
def _from_environment() -> str:
    return _known(os.environ.get(ENVIRONMENT) or "auto", ENVIRONMENT)


def _known(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}; known: {', '.join(BACKENDS)}")
    return name


def kernels(op: str, device: torch.device, dtype: torch.dtype, elements: int | None = None) -> Any:
    """Return the functions that serve `op` on tensors of this device and dtype.

    Args:
        op: the operator.
        device: of the tensors.
        dtype: of the large ones.
        elements: of a large tensor: few of them prefer another backend. None for many, and so are any number under
            torch.compile, which takes the host's time off a call.

    Raises:
        RuntimeError: the requested backend can't serve, or with "auto" none can; the message says why.
    """
    if torch.compiler.is_compiling():
        return _loaded[_choose(op, device, dtype, False)]
    small = elements is not None and elements <= SMALL_OF.get((op, dtype), SMALL)
    chosen = _chosen.get((op, _requested.get(), device, dtype, small))
    return _loaded[_choose(op, device, dtype, small) if chosen is None else chosen]


# torch.compile can't trace context variables and imports: it fixes the choice when it traces.
@decided_when_traced
def _choose(op: str, device: torch.device, dtype: torch.dtype, small: bool) -> str:
    key = op, _requested.get(), device, dtype, small
    chosen = _chosen.get(key)
    if chosen is None:
        chosen = f"{op} {_best(op, requested_backend(), device, dtype, small)}"
        if chosen not in _loaded:
            _load_all()
        _chosen[key] = chosen
    return chosen


def _best(op: str, requested: str, device: torch.device, dtype: torch.dtype, small: bool) -> str:
    reasons = {}
    for backend in _order(small) if requested == "auto" else (requested,):
        reason = why_not(op, backend, device, dtype)
        if reason is None:
            return backend
        reasons[backend] = reason
    said = (f"backend {backend!r} can't serve: {reason}" for backend, reason in reasons.items())
    raise RuntimeError(f"{op}: {'; '.join(said)}")


def _order(small: bool) -> tuple[str, ...]:
    return PREFERENCE_OF_SMALL if small else PREFERENCE


# All at once: torch.compile copies `_loaded` at the first operator of a graph, and would not find the second's.
def _load_all() -> None:
    for op, sources in _sources.items():
        for backend, find in sources.items():
            if f"{op} {backend}" not in _loaded and LIMITS[backend].unavailable() is None:
                _loaded[f"{op} {backend}"] = find()


def has_kernels(op: str, backend: str) -> bool:
    """Return whether `backend` has functions for `op` at all, here or elsewhere."""
    return backend in _sources[op]


def why_not(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None if `backend` serves `op` on tensors of this device and dtype, else the reason."""
    if not has_kernels(op, backend):
        return "it has no kernel for this operator"
    return LIMITS[backend].unavailable() or LIMITS[backend].refuses(device, dtype)


def default_backend(
    op: str, device: torch.device, dtype: torch.dtype = torch.float32, small: bool = False
) -> str | None:
    """Return the backend that serves `op` where none is asked for, None if none does."""
    return next((backend for backend in _order(small) if why_not(op, backend, device, dtype) is None), None)


def table(device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> list[Row]:
    """Return every operator x backend, for tensors of `device` (by default the GPU, if there is one) and `dtype`."""
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for op in OPS:
        for backend in PREFERENCE:
            reason = why_not(op, backend, device, dtype)
            rows.append(Row(op, backend, reason is None, reason))
    return rows
