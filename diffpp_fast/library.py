"""The compiled library: its file, its operators in `torch.ops`, and why it may not serve."""

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
