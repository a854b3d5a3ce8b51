"""The compiled library, and the operators in it that are not yet made of one file.

Each module has the functions of its namesake in `kernels.reference`, passes them on to the compiled operators, and
tells torch the shapes of their results (fakes).
"""

from diffpp_fast.availability import LIBRARY
from diffpp_fast.availability import library_unavailable as unavailable

__all__ = ["LIBRARY", "facts", "unavailable"]


def facts() -> dict[str, str]:
    """Return compiler, flags and instruction sets of the library; nothing where the host module was not built."""
    try:
        from diffpp_fast.kernels.native._host import build_facts
    except ImportError:
        return {}
    return build_facts()
