"""The checks that every compiled operator must pass, whatever it computes."""

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo.testing
from torch import Tensor

THREADS = (1, 2, 3, 4, 7)


def check_registration(op: Any, *arguments: Any) -> None:
    """Schema, fake and behaviour agree, also under torch.compile's tracing (torch.library.opcheck)."""
    torch.library.opcheck(op, arguments)


def assert_same_bits_for_any_threads(run: Callable[[], Tensor | tuple[Tensor | None, ...]]) -> None:
    """`run` gives equal bits for any number of threads, more than the machine has included."""
    results = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        result = run()
        results.append((result,) if isinstance(result, Tensor) else result)
    for other in results[1:]:
        for value, first in zip(other, results[0], strict=True):
            assert (value is None and first is None) or torch.equal(value, first)


def assert_compiles_once(function: Callable[..., Tensor], *batches: tuple[Any, ...]) -> None:
    """One graph serves all `batches` (same shapes, other values) and agrees with eager, gradients included."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for batch in batches:
        leaves = [value for value in batch if isinstance(value, Tensor) and value.requires_grad]
        actual, expected = compiled(*batch), function(*batch)
        torch.testing.assert_close(actual, expected)
        if leaves:
            probe = torch.randn_like(expected)
            for grad, oracle in zip(
                torch.autograd.grad(actual, leaves, probe), torch.autograd.grad(expected, leaves, probe), strict=True
            ):
                torch.testing.assert_close(grad, oracle)
    assert counter.frame_count == 1
