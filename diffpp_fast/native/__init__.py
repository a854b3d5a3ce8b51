"""The folder of the compiled library, and how it was built."""

from diffpp_fast.library import LIBRARY
from diffpp_fast.library import library_facts as facts
from diffpp_fast.library import library_unavailable as unavailable

__all__ = ["LIBRARY", "facts", "unavailable"]
