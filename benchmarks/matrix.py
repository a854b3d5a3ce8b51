"""How fast a device multiplies matrices, and how many multiplications and additions a step asks for."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import Clock

#: Side of the square matrices by the type of the device: large enough that nothing but the multiplication counts.
SIDES = {"cuda": 8192, "cpu": 1024}
WARM_UPS, ROUNDS = 3, 20


def matrix_peak(dtype: torch.dtype, device: torch.device, clock: Clock) -> float:
    """Operations per second of one large matrix product, the median of several."""
    side = SIDES[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def multiply() -> None:
        torch.mm(a, b, out=out)

    times = [clock(multiply) for _ in range(WARM_UPS + ROUNDS)]
    return 2.0 * side**3 / statistics.median(times[WARM_UPS:])


@contextmanager
def counted_operations() -> Iterator[Callable[[], int]]:
    """Counts multiplications and additions of matrix products, convolutions and attention; the value tells how many.

    Attention counts as the two products that define it and the four of its gradient, whatever a kernel computes again.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield lambda: int(counter.get_total_flops())
