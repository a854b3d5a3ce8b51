"""The compiled library, where this variant of the package has one: `_ops` loads it when it is imported."""

from functools import cache

import torch

from ._ops import add_op_namespace_prefix
from ._ops import ops as operators

__all__ = ["NAMESPACE", "library_facts", "library_unavailable", "operators"]

NAMESPACE = add_op_namespace_prefix("").removesuffix("::")


@cache
def library_unavailable() -> str | None:
    """Return None, or why the library can't serve."""
    if torch._C._dispatch_has_kernel(f"{NAMESPACE}::add_noise"):
        return None
    return "this variant of the package is pure Python"


def library_facts() -> dict[str, str]:
    """Return the CUDA that compiled for GPUs: torch's own, after which the hub names its variants."""
    return {"CUDA": str(torch.version.cuda)}
