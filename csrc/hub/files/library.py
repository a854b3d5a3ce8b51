"""The compiled library, where this variant of the package has one: `_ops` loads it when it is imported."""

from functools import cache

import torch

from ._ops import add_op_namespace_prefix
from ._ops import ops as operators

__all__ = ["NAMESPACE", "library_unavailable", "operators"]

NAMESPACE = add_op_namespace_prefix("").removesuffix("::")


@cache
def library_unavailable() -> str | None:
    """Return None, or why the library can't serve."""
    if torch._C._dispatch_has_kernel(f"{NAMESPACE}::add_noise"):
        return None
    return "this variant of the package is pure Python"
