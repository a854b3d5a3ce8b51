"""The times of a step's parts, measured without waiting for the device in it, and the memory of a process."""

from __future__ import annotations

import ctypes
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import nn

#: The name of the time that belongs to no phase.
OTHER = "other"
#: Bytes of weights from which on memory that was freed is given back on the CPU where a phase begins. Doing so takes
#: milliseconds, and what is allocated next its pages anew: next to a call of so large a network that is nothing.
LARGE = 2**30


class Phases:
    """Times of the named parts of a run, which add up to all of its time.

        phases = Phases(device)
        with phases("reference"):
            ...
        phases.take()  # {"reference": 1.2, "other": 0.1}

    A phase inside another one is taken off the outer. Every change of phase puts a mark into the device's own queue of
    work: a CUDA event, or the clock's time on the CPU. The marks are read when the times are taken, and only that waits
    for the device. Of one thread and of the device's current stream.

    Args:
        device: where the work is done.

    Attributes:
        gives_back: whether memory that was freed goes back to the system where a phase begins.
    """

    def __init__(self, device: torch.device) -> None:
        self.gives_back = False
        self._clock: _Clock | _Events = _Events(device) if device.type == "cuda" else _Clock()
        self._open = [OTHER]
        self._whole = self._muted = 0
        #: In order of time: where a stretch of it begins, and whose it is.
        self._marks: list[tuple[Any, str]] = [(self._clock.mark(), OTHER)]

    @contextmanager
    def __call__(self, name: str, *, whole: bool = False) -> Iterator[None]:
        """Inside, time is counted as `name`; of a `whole` phase also that of those inside of it."""
        self._begin(name)
        self._whole += whole
        try:
            yield
        finally:
            self._whole -= whole
            self._end()

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Inside, no phase begins: what a captured graph does has no marks of its own in a replay."""
        self._muted += 1
        try:
            yield
        finally:
            self._muted -= 1

    def wrap(self, function: Callable[..., Any], name: str) -> Any:
        """Make `function` a phase of its own: a module in place, which stays what it is, or a `Timed` in its place."""
        if not isinstance(function, nn.Module):
            return Timed(self, function, name)
        function.register_forward_pre_hook(lambda *_: self._begin(name))
        function.register_forward_hook(lambda *_: self._end(), always_call=True)
        return function

    def take(self) -> dict[str, float]:
        """Seconds per name since the last taking (or the beginning), `other` included; waits for the device."""
        self._mark()
        marks, self._marks = self._marks, self._marks[-1:]
        self._clock.wait(marks[-1][0])
        seconds = dict.fromkeys(sorted({name for _, name in marks[:-1]}), 0.0)
        for (begin, name), (end, _) in pairwise(marks):
            seconds[name] += self._clock.seconds(begin, end)
        self._clock.reuse([mark for mark, _ in marks[:-1]])
        return seconds

    def _begin(self, name: str) -> None:
        if self.gives_back:
            give_back()
        self._open.append(self._open[-1] if self._whole else name)
        self._mark()

    def _end(self) -> None:
        self._open.pop()
        self._mark()

    def _mark(self) -> None:
        if not self._muted:
            self._marks.append((self._clock.mark(), self._open[-1]))


class Timed:
    """A callable that is a phase whenever it is called; its other attributes are those of what it calls."""

    def __init__(self, phases: Phases, function: Callable[..., Any], name: str) -> None:
        self._phases, self._function, self._name = phases, function, name

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        with self._phases(self._name):
            return self._function(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._function, name)


class _Clock:
    """Marks on the CPU, where a call returns when its work is done."""

    def mark(self) -> float:
        return time.perf_counter()

    def wait(self, mark: float) -> None:
        pass

    def seconds(self, begin: float, end: float) -> float:
        return end - begin

    def reuse(self, marks: list[float]) -> None:
        pass


class _Events:
    """Marks in a CUDA stream, where a call returns before its work is done. Events that were read are used again."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.free: list[torch.cuda.Event] = []

    def mark(self) -> torch.cuda.Event:
        event = self.free.pop() if self.free else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def wait(self, mark: torch.cuda.Event) -> None:
        mark.synchronize()

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return begin.elapsed_time(end) / 1000

    def reuse(self, marks: list[torch.cuda.Event]) -> None:
        self.free += marks


GIB = 2**30


def give_back() -> None:
    """Give freed memory back to the system where the C library keeps it for later, as glibc does."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class Memory:
    """Reads counters that are kept anyway: nothing waits for the device.

    Args:
        device: of the process; the CPU has no figures of its own.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def take(self) -> dict[str, float]:
        """`memory/host_peak` since the process began; on CUDA also `memory/allocated`, `memory/reserved` now and
        `memory/peak`, the most that was allocated since the last taking."""
        # Linux counts in KiB, macOS in bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        taken = {"memory/host_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB}
        if self.device.type == "cuda":
            taken["memory/allocated"] = torch.cuda.memory_allocated(self.device) / GIB
            taken["memory/reserved"] = torch.cuda.memory_reserved(self.device) / GIB
            taken["memory/peak"] = torch.cuda.max_memory_allocated(self.device) / GIB
            torch.cuda.reset_peak_memory_stats(self.device)
        return taken
