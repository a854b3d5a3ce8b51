"""torch.compile's own kernels for a GPU that is not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks.cases import Case, Inputs
from benchmarks.launches import Launch


def passes(
    case: Case, inputs: Inputs, arch: int, multiprocessors: int, launched: Callable[[Launch], None]
) -> Iterator[Callable[[], None]]:
    yield lambda: None
