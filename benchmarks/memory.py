"""Memory: the peak of a step, what it keeps for its backward pass, and the largest batch that fits."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffpp_fast.selftest import Outputs

#: Read by the profiler when it is first used; without it every use writes lines to stderr.
LOG_LEVEL = "KINETO_LOG_LEVEL"
#: Beyond this batch no search goes.
MOST = 1024
#: The search for a batch ends when the answer is known to one part in so many.
PARTS = 8


def peak_temporary_bytes(call: Callable[[], Outputs], device: torch.device) -> int:
    """Bytes allocated at the peak of a call beyond its inputs, outputs and returned gradients.

    On the CPU every allocation of torch's is seen, and those that outlive the call are its results. On CUDA the bytes
    of the results are taken off the allocator's peak, as if they were all alive at that moment.
    """
    return _cuda(call, device) if device.type == "cuda" else _cpu(call)


def saved_bytes(run: Callable[[], object], *networks: nn.Module, apart: Sequence[Tensor] = ()) -> int:
    """Return the bytes that `run()` keeps for a backward pass, without parameters and buffers of `networks`.

    Every storage counts once and whole, however many saved tensors lie in it; those of `apart` don't count.
    """
    owned = [value for network in networks for value in (*network.parameters(), *network.buffers())]
    uncounted = {_identity(value) for value in (*apart, *owned)}
    storages: dict[int, torch.UntypedStorage] = {}  # alive to the end: no number comes twice

    def pack(tensor: Tensor) -> Tensor:
        storages[_identity(tensor)] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return sum(storage.nbytes() for key, storage in storages.items() if key not in uncounted)


def kept_bytes(forward: Callable[[Tensor], Tensor], x: Tensor, *networks: nn.Module, gradient: bool = True) -> int:
    """Return the bytes that `forward(x)` keeps for the gradient of x, without x and what `networks` own."""
    x = x.detach().requires_grad_(gradient)
    return saved_bytes(lambda: forward(x), *networks, apart=(x,))


def alive_bytes(forward: Callable[[Tensor], Tensor], x: Tensor, *networks: nn.Module) -> int:
    """Return the bytes that are alive after `forward(x)` for the gradient of x, but for x, its result and `networks`.

    Other than `kept_bytes` it sees what selective checkpointing keeps; fake tensors count as if they were real.
    """
    x = x.detach().requires_grad_()
    seen = _Storages()
    with seen:
        result = forward(x)
    owned = [value for network in networks for value in (*network.parameters(), *network.buffers())]
    return seen.alive(apart=[x, result, *owned])


class _Storages(TorchDispatchMode):
    """Remembers the storage of every operator's results, as long as something else holds it."""

    def __init__(self) -> None:
        super().__init__()
        self._found: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._found[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return results

    def alive(self, apart: Sequence[Tensor]) -> int:
        gc.collect()
        uncounted = {_identity(value) for value in apart}
        return sum(size for key, (weak, size) in self._found.items() if key not in uncounted and not weak.expired())


def _cpu(call: Callable[[], Outputs]) -> int:
    with (
        _quiet(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        results = call()
    del results  # alive until here, so that the profile holds no release of theirs
    kineto: Any = profile.profiler
    changes = sorted(
        (event.start_time_ns, order, event.extra_fields.ptr, event.extra_fields.alloc_size)
        for order, event in enumerate(_walk(kineto.kineto_results.experimental_event_tree()))
        if event.tag == torch._C._profiler._EventType.Allocation
    )
    return peak_of_released([(address, size) for _, _, address, size in changes])


def peak_of_released(changes: list[tuple[int, int]]) -> int:
    """The most bytes alive at once among the allocations that are released again.

    Args:
        changes: (address, bytes) in the order of time, the bytes negative for a release.
    """
    begun: dict[int, int] = {}
    released = set()
    for index, (address, size) in enumerate(changes):
        if size > 0:
            begun[address] = index
        elif address in begun:
            released |= {begun.pop(address), index}
    alive = peak = 0
    for index in sorted(released):
        alive += changes[index][1]
        peak = max(peak, alive)
    return peak


def _cuda(call: Callable[[], Outputs], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    results = call()
    torch.cuda.synchronize(device)
    kept = {result.untyped_storage().data_ptr(): result.untyped_storage().nbytes() for result in results}
    return max(0, torch.cuda.max_memory_allocated(device) - before - sum(kept.values()))


def _identity(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _walk(events: list[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _walk(event.children)


@contextmanager
def _quiet() -> Iterator[None]:
    before = os.environ.get(LOG_LEVEL)
    os.environ[LOG_LEVEL] = "99" if before is None else before
    try:
        yield
    finally:
        if before is None:
            del os.environ[LOG_LEVEL]


# The largest batch


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
