"""The former name of `diffpp_fast.backends`, for importers that have not moved."""

from diffpp_fast.backends import (
    BACKENDS,
    ENVIRONMENT,
    OPS,
    PREFERENCE,
    default_backend,
    requested_backend,
    table,
    use_backend,
    why_not,
)
from diffpp_fast.backends import kernels as select

__all__ = [
    "BACKENDS",
    "ENVIRONMENT",
    "OPS",
    "PREFERENCE",
    "default_backend",
    "requested_backend",
    "select",
    "table",
    "use_backend",
    "why_not",
]
