"""One way to time: every contender in every round, so that a slow minute of the machine is everybody's.

Also where and with what it was timed, and what only a GPU can tell.
"""

from __future__ import annotations

import datetime
import gc
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffpp_fast.provenance import commit, device_name, package_version
from diffpp_fast.version import __version__

T = TypeVar("T")

ROUNDS = 20
LEAST_ROUNDS = 5
#: A contender that is slower than the time per round may stretch the whole measurement by this factor.
STRETCH = 4.0
#: Seconds of warm-up per contender, and the least number of calls.
WARM_UP, LEAST_CALLS = 0.02, 3
#: A spread of the times that casts doubt on a row.
RESTLESS = 0.25
#: Assumed where the system does not tell the size of the last-level cache.
LIKELY_CACHE = 32 * 2**20
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
#: Side of square matrices by the type of the device: large enough that nothing but the multiplication counts.
SIDES = {"cuda": 8192, "cpu": 1024}

Call = Callable[[], object]
#: Returns the seconds from the start to the end of the work that a function starts.
Clock = Callable[[Callable[[], None]], float]


class Contender(NamedTuple):
    """Something to time: `call` does its work once, `context` is entered around many calls."""

    name: str
    call: Call
    context: Callable[[], AbstractContextManager[object]] = nullcontext


@dataclass(frozen=True)
class Timing:
    """Seconds per call: one sample per round, the mean of that round's calls."""

    samples: tuple[float, ...]
    calls: int = 1  # per round

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.samples) == 1:
            return self.samples[0], self.samples[0]
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high

    @property
    def spread(self) -> float:
        """The interquartile range as a part of the median."""
        low, high = self.quartiles
        return (high - low) / self.median


def wall_clock(work: Callable[[], None]) -> float:
    """The clock of a machine that has finished when the call returns."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def event_clock(work: Callable[[], None]) -> float:
    """Seconds between two events around the work: those of the launches, where the device waits for them."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def clock_of(device: torch.device) -> Clock:
    """Return the clock that sees a device's work."""
    return event_clock if device.type == "cuda" else wall_clock


def turns(names: Collection[str], rounds: int, warm_ups: int = 0) -> Iterator[tuple[int, str]]:
    """Yield (round, name): all names in every round, each round begun by the next, so that each follows each.

    Names that are taken away meanwhile are left out from the next round on. Rounds to warm up have negative numbers.
    """
    for turn in range(-warm_ups, rounds):
        chosen = list(names)
        for place in range(len(chosen)):
            yield turn, chosen[(turn + place) % len(chosen)]


def interleave(contenders: Sequence[Contender], min_time: float, clock: Clock = wall_clock) -> dict[str, Timing]:
    """Time the contenders by turns.

    Args:
        contenders: with distinct names.
        min_time: seconds per contender over all rounds. A slow one takes longer, for there are at least
            `LEAST_ROUNDS` rounds.
        clock: how long a block of calls took.
    """
    by_name = {contender.name: contender for contender in contenders}
    with _no_collection():
        once = {name: _warm_up(contender, clock) for name, contender in by_name.items()}
        calls = {name: max(1, math.ceil(min_time / ROUNDS / seconds)) for name, seconds in once.items()}
        per_round = sum(calls[name] * once[name] for name in once)
        rounds = max(LEAST_ROUNDS, min(ROUNDS, int(STRETCH * min_time * len(contenders) / per_round)))
        samples: dict[str, list[float]] = {name: [] for name in once}
        for _, name in turns(list(by_name), rounds):
            samples[name].append(_time_calls(by_name[name], calls[name], clock) / calls[name])
    return {name: Timing(tuple(values), calls[name]) for name, values in samples.items()}


def _warm_up(contender: Contender, clock: Clock) -> float:
    """Seconds per call when warm."""
    times: list[float] = []
    while len(times) < LEAST_CALLS or (sum(times) < WARM_UP and len(times) < 1000):
        times.append(_time_calls(contender, 1, clock))
    return max(statistics.median(times), 1e-9)


def _time_calls(contender: Contender, count: int, clock: Clock) -> float:
    def work() -> None:
        for _ in range(count):
            contender.call()

    with contender.context():
        return clock(work)


@contextmanager
def _no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# The machine


class Provenance(NamedTuple):
    """The last columns of every row of the results."""

    commit: str  # `git describe` of the checkout; empty where the package is installed without one
    dirty: str  # "yes" if tracked files differ from that commit, "no", or empty
    diffpp_fast: str
    torch: str
    triton: str
    python: str
    device_name: str
    date: str  # ISO 8601, UTC, when the run began

    def __str__(self) -> str:
        """Where, when and with what it was measured."""
        described = f", commit {self.commit}" if self.commit else ""
        changed = " with uncommitted changes" if self.dirty == "yes" else ""
        triton = f", triton {self.triton}" if self.triton else ""
        return (
            f"Measured on {self.device_name} on {self.date[:10]}: diffpp_fast "
            f"{self.diffpp_fast}{described}{changed}, torch {self.torch}{triton}, Python {self.python}.\n"
        )


def provenance(device: torch.device) -> Provenance:
    return Provenance(
        *commit(),
        __version__,
        torch.__version__,
        package_version("triton"),
        platform.python_version(),
        device_name(device),
        datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def load_sentence() -> list[str]:
    """Say that other work was running when the measurement began, if it was."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load <= cores / 2:
        return []
    return [f"the machine was busy when this began, with a load of {load:.1f} on {cores} cores: measure again"]


def restless_sentence(spreads: Sequence[float], rows: str) -> list[str]:
    """Say how many of the rows spread so far that their times are in doubt, if any."""
    restless = sum(spread > RESTLESS for spread in spreads)
    if not restless:
        return []
    return [
        f"{restless} of {len(spreads)} {rows} have an interquartile range above {RESTLESS:.0%} of the median: "
        "the machine was busy, measure again"
    ]


def last_level_cache(device: torch.device) -> int:
    """Bytes of the largest cache between the device's processor and its memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    texts = [
        path.read_text(encoding="utf-8").strip()
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max((int(text[:-1]) * UNITS[text[-1]] for text in texts if text[-1:] in UNITS), default=LIKELY_CACHE)


@contextmanager
def setting(read: Callable[[], T], write: Callable[[T], object], value: T) -> Iterator[None]:
    """Within the block, a setting of the process has this value."""
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


def intra_op_threads(count: int) -> AbstractContextManager[None]:
    """Within the block, torch's CPU kernels run on `count` threads."""
    return setting(torch.get_num_threads, torch.set_num_threads, count)


def matrix_peak(dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of one large matrix product, the median of several."""
    side = SIDES[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def multiply() -> None:
        torch.mm(a, b, out=out)

    times = [clock_of(device)(multiply) for _ in range(LEAST_CALLS + ROUNDS)]
    return 2.0 * side**3 / statistics.median(times[LEAST_CALLS:])


@contextmanager
def counted_operations() -> Iterator[Callable[[], int]]:
    """Count multiplications and additions of matrix products, convolutions and attention; the value tells how many.

    Attention counts as the two products that define it and the four of its gradient, whatever a kernel computes again.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield lambda: int(counter.get_total_flops())


# Launches and graphs


def count_launches(call: Call) -> int:
    """Count the kernels, copies and fills that one call puts on the GPU."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    on_device = [event for event in profile.events() or () if event.device_type == torch.autograd.DeviceType.CUDA]
    # torch.compile labels spans of kernels, which the profiler shows beside the kernels themselves.
    return sum(not getattr(event, "is_user_annotation", False) for event in on_device)


def replay_seconds(calls: Sequence[Call]) -> float | None:
    """Seconds per call when the calls are captured one after another in a graph; None where they can't be captured."""
    try:
        graph = _capture(calls)
    except RuntimeError:
        return None
    graph.replay()
    return statistics.median(event_clock(graph.replay) for _ in range(ROUNDS)) / len(calls)


def _capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # All of them: a kernel that is specialised for one alone can't be loaded during the capture.
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph
