"""Reasons why a backend can't serve: the library was not compiled, there is no GPU, the tensors are elsewhere."""

import ctypes
import os
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from diffpp_fast.library import NAMESPACE, library_facts, library_unavailable

#: The first with the stable ABI that the library asks for (csrc/compilation.py).
OLDEST_TORCH = (2, 11)
CPU = torch.device("cpu")
#: With TRITON_INTERPRET=1 Triton's kernels run on the CPU in its interpreter, for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _numbers(release: str) -> tuple[int, ...]:
    """Major and minor."""
    return tuple(int(part) for part in release.split(".")[:2])


# This module is the first that the package imports: others ask torch for what old ones lack.
if _numbers(torch.__version__) < OLDEST_TORCH:
    raise ImportError(f"diffpp_fast needs torch 2.11 or newer, here is {torch.__version__}: pip install 'torch>=2.11'")


class Limits(NamedTuple):
    """Two functions that return None, or why a backend can't serve."""

    unavailable: Callable[[], str | None]  # in this process
    refuses: Callable[[torch.device, torch.dtype], str | None]  # tensors of a device and dtype


UNLIMITED = Limits(lambda: None, lambda device, dtype: None)


@cache
def cuda_unavailable() -> str | None:
    """Return None if the library's GPU kernels can run here, or why they can't."""
    reason = library_unavailable()
    if reason is not None:
        return reason
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::add_noise", "CUDA"):
        return "csrc was compiled without nvcc; install again where CUDA's compiler is"
    if not torch.cuda.is_available():
        return "PyTorch can use no GPU"
    try:
        driver = cuda_driver()
    except OSError as error:
        return f"there is no driver of CUDA's: {error}"
    return driver_refuses(library_facts()["CUDA"], driver)


def cuda_driver() -> int:
    """Return the newest CUDA that the driver knows, 13000 for 13.0; raise OSError where there is none."""
    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value


def driver_refuses(toolkit: str, driver: int) -> str | None:
    """Return None, or why a driver (13000 for CUDA 13.0) can't run what this toolkit compiled: it is of an older major
    version."""
    major, minor = _numbers(toolkit)
    if driver // 1000 >= major:
        return None
    return (
        f"csrc was compiled with CUDA {major}.{minor}, the driver knows up to {driver // 1000}.{driver % 1000 // 10}: "
        f"install a newer driver, or from source with the nvcc of CUDA {driver // 1000}"
    )


@cache
def triton_unavailable() -> str | None:
    """Return None, or why this process can't run Triton kernels."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if INTERPRETED and (reason := interpreter_refuses(version("triton"), version("numpy"))):
        return reason
    if INTERPRETED or torch.cuda.is_available():
        return None
    return "PyTorch can use no GPU"


def interpreter_refuses(triton: str, numpy: str) -> str | None:
    """Return None, or why these versions do not go together: Triton 3.6 asks numpy for the number in an array."""
    if _numbers(triton) >= (3, 7) or _numbers(numpy) < (2, 4):
        return None
    return f"the interpreter of Triton {triton} needs numpy before 2.4, here is {numpy}: pip install 'numpy<2.4'"


def only_cpu(device: torch.device, dtype: torch.dtype) -> str | None:
    """Refuse tensors that are not on the CPU. On meta there is nothing to compute, and the fakes serve."""
    if device == CPU or device.type == "meta":
        return None
    return f"it serves the CPU, the tensors are on {device.type}"


def only_cuda(device: torch.device, dtype: torch.dtype) -> str | None:
    """Refuse tensors that are not on a GPU."""
    return None if device.type == "cuda" else f"it serves CUDA, the tensors are on {device.type}"


def triton_refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """Refuse float64, whose arithmetic is not float32's, and tensors elsewhere."""
    if device.type != ("cpu" if INTERPRETED else "cuda"):
        return f"it serves {'the interpreter on the CPU' if INTERPRETED else 'CUDA'}, the tensors are on {device.type}"
    return "float64 is served by the other backends" if dtype == torch.float64 else None


def fake(name: str, function: Callable[..., Any]) -> None:
    """Tell torch what the registered operator `name` returns, without computing it."""
    if library_unavailable() is None:
        torch.library.register_fake(f"{NAMESPACE}::{name}", function)
