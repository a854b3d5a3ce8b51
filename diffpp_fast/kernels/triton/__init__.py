"""Triton kernels: one module per operator with the functions of its namesake in `kernels.reference`.

With TRITON_INTERPRET=1 in the environment they run on the CPU in Triton's interpreter, for tests; that of Triton 3.6
needs numpy before 2.4.
"""

import os
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec

import numpy as np
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@cache
def unavailable() -> str | None:
    """None, or why this process can't run Triton kernels."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if INTERPRETED and (reason := interpreter_refuses(version("triton"), np.__version__)):
        return reason
    if INTERPRETED or torch.cuda.is_available():
        return None
    return "PyTorch can use no GPU"


def interpreter_refuses(triton: str, numpy: str) -> str | None:
    """None, or why these versions do not go together: Triton 3.6 asks numpy to make a number of an array of one."""
    if _numbers(triton) >= (3, 7) or _numbers(numpy) < (2, 4):
        return None
    return f"the interpreter of Triton {triton} needs numpy before 2.4, here is {numpy}: pip install 'numpy<2.4'"


def _numbers(release: str) -> tuple[int, ...]:
    """Major and minor."""
    return tuple(int(part) for part in release.split(".")[:2])


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """What the kernels can't serve: float64, whose arithmetic is not float32's, and tensors elsewhere."""
    if device.type != ("cpu" if INTERPRETED else "cuda"):
        return f"it serves {'the interpreter on the CPU' if INTERPRETED else 'CUDA'}, the tensors are on {device.type}"
    return "float64 is served by the other backends" if dtype == torch.float64 else None
