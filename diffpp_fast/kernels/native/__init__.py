"""The binding to csrc: the operators of `torch.ops.diffpp_fast`, on every device that they were compiled for.

Each module has the functions of its namesake in `kernels.reference`, passes them on to the compiled operators, and
tells torch the shapes of their results (fakes). Import one after `unavailable` has returned None, which loads the
library.
"""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from diffpp_fast.kernels.reference.philox import Address

CPU = torch.device("cpu")
LIBRARY = Path(__file__).parent / "_library.so"


@cache
def unavailable() -> str | None:
    """Loads the compiled library; None, or why it can't be."""
    if not LIBRARY.exists():
        return "csrc was not compiled when the package was installed; install again where a C++17 compiler is"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"{LIBRARY.name} does not load with torch {torch.__version__}: {error}"
    return None


@cache
def gpu_unavailable() -> str | None:
    """None if the library's GPU kernels can run here, or why they can't."""
    reason = unavailable()
    if reason is not None:
        return reason
    if not torch._C._dispatch_has_kernel_for_dispatch_key("diffpp_fast::add_noise", "CUDA"):
        return "csrc was compiled without nvcc; install again where CUDA's compiler is"
    return None if torch.cuda.is_available() else "PyTorch can use no GPU"


def facts() -> dict[str, str]:
    """Compiler, flags and instruction sets of the library, by name; nothing where the host module was not built."""
    try:
        from diffpp_fast.kernels.native._host import build_facts
    except ImportError:
        return {}
    return build_facts()


def only_gpu(device: torch.device, dtype: torch.dtype) -> str | None:
    """What the GPU kernels refuse: tensors elsewhere."""
    return None if device.type == "cuda" else f"it serves CUDA, the tensors are on {device.type}"


def only_cpu(device: torch.device, dtype: torch.dtype) -> str | None:
    """What the CPU kernels refuse: tensors elsewhere. On meta there is nothing to compute, and the fakes serve."""
    if device == CPU or device.type == "meta":
        return None
    return f"it serves the CPU, the tensors are on {device.type}"


def noise_arguments(noise: Tensor | Address) -> tuple[Tensor, int, int]:
    """Noise as compiled operators take it: eps, or the sample numbers with the seed's bits and the stream."""
    if isinstance(noise, Address):
        return noise.samples, signed(noise.seed), noise.stream
    return noise, 0, 0


def signed(word: int) -> int:
    """An unsigned 64-bit number as the int64 of the same bits: schemas know no other integer."""
    return word - 2**64 if word >= 2**63 else word
