"""Triton kernels: one module per operator with the functions of its namesake in `kernels.reference`.

With TRITON_INTERPRET=1 in the environment they run on the CPU in Triton's interpreter, for tests.
"""

import os
from functools import cache
from importlib.util import find_spec

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@cache
def unavailable() -> str | None:
    """None, or why this process can't run Triton kernels."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if INTERPRETED or torch.cuda.is_available():
        return None
    return "PyTorch can use no GPU"


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """What the kernels can't serve: float64, whose arithmetic is not float32's, and tensors elsewhere."""
    if device.type != ("cpu" if INTERPRETED else "cuda"):
        return f"it serves {'the interpreter on the CPU' if INTERPRETED else 'CUDA'}, the tensors are on {device.type}"
    return "float64 is served by the other backends" if dtype == torch.float64 else None
