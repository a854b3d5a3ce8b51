"""What is measured on CUDA only: time on the device's clock, launches, and replay of a captured graph."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

from benchmarks.timing import ROUNDS

Call = Callable[[], object]


def event_clock(work: Callable[[], None]) -> float:
    """Seconds between two events around the work: those of the launches, where the device waits for them."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def count_launches(call: Call) -> int:
    """Kernels, copies and fills that one call puts on the device."""
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
