"""The largest batch that fits into memory."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

#: Beyond this no search goes.
MOST = 1024
#: The search ends when the answer is known to one part in so many.
PARTS = 8


def largest(fits: Callable[[int], bool], most: int = MOST) -> int:
    """The largest batch for which `fits` holds, to an eighth: by doubling from 1, then by bisection.

    Args:
        fits: whether a batch of this size fits; asked in no order that it may count on.
        most: the largest answer.

    Returns:
        A batch that was tried and fits; 0 where not even 1 does.
    """
    good, bad = 0, 1
    while bad <= most and fits(bad):
        good, bad = bad, 2 * bad
    bad = min(bad, most + 1)
    while bad - good > max(1, good // PARTS):
        middle = (good + bad) // 2
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good


def extrapolated(batch: int, temporary: int, free: int) -> int:
    """The batch whose temporary bytes would be `free`, if they grow with the batch from `temporary` at `batch`."""
    return max(batch, batch * free // max(1, temporary))


def is_out_of_memory(error: BaseException) -> bool:
    """Also where a library beneath torch says so in words alone."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


def release(device: torch.device) -> None:
    """Gives back what nothing refers to any more, so that the next attempt begins with whole memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
