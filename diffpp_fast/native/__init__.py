"""The folder of the compiled library, and how it was built."""

from diffpp_fast.library import LIBRARY
from diffpp_fast.library import library_unavailable as unavailable

__all__ = ["LIBRARY", "facts", "unavailable"]


def facts() -> dict[str, str]:
    """Return compiler, flags and instruction sets of the library; nothing where the host module was not built."""
    try:
        from diffpp_fast.native._host import build_facts
    except ImportError:
        return {}
    return build_facts()
