"""The compiled library: its file, its operators in `torch.ops`, and why it may not serve."""

import ctypes
from functools import cache
from pathlib import Path

import torch

LIBRARY = Path(__file__).parent / "native" / "_library.so"
#: The name under which torch has the operators.
NAMESPACE = "diffpp_fast"
operators = torch.ops.diffpp_fast


@cache
def library_unavailable() -> str | None:
    """Load the compiled library. Return None, or why it can't be."""
    if not LIBRARY.exists():
        return "csrc was not compiled when the package was installed; install again where a C++17 compiler is"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"{LIBRARY.name} does not load with torch {torch.__version__}: {error}"
    return None


def library_facts() -> dict[str, str]:
    """Return how the library was built, by name: compiler, flags, instruction sets ("built for"), the one in use
    ("running on"), GPUs and the CUDA that compiled for them; nothing where it does not load."""
    if library_unavailable() is not None:
        return {}
    say = ctypes.CDLL(str(LIBRARY)).diffpp_fast_facts
    say.restype = ctypes.c_char_p
    return dict(line.split("\t") for line in say().decode().splitlines())
