"""One benchmark: every case x dtype x number of threads, first through the gate and then on the clock."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch

from benchmarks import cuda, providers
from benchmarks.cases import Case
from benchmarks.gate import Gate
from benchmarks.machine import intra_op_threads, last_level_cache
from benchmarks.memory import peak_temporary_bytes
from benchmarks.operators import Inputs, make_inputs
from benchmarks.providers import COMPILE, EAGER, Provider
from benchmarks.timing import Clock, Contender, Timing, interleave, wall_clock

COPY = "copy"
#: Inputs together read this many times the last-level cache, so that none is in it when its turn comes again.
CACHES = 2.0
#: Unless that takes more sets or bytes than this.
MOST_SETS, MOST_BYTES = 1024, 2**30
#: Steps in a captured graph.
CAPTURED = 32


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    cases: Sequence[Case]
    backends: Sequence[str]
    dtypes: Sequence[torch.dtype]
    threads: Sequence[int]
    device: torch.device
    min_time: float  # seconds per provider and case
    compile: bool = True
    warm: bool = False  # one set of inputs, which stays in the cache if it fits


@dataclass(frozen=True)
class Record:
    """One provider on one case, dtype and number of threads."""

    case: Case
    dtype: torch.dtype
    threads: int
    provider: str
    bytes: int  # the case's traffic; for "copy" what was read and written
    sets: int = 0
    wrong: str | None = None  # what the gate found: nothing was timed
    left_out: str | None = None  # why the provider could not take part
    timing: Timing | None = None
    temporary_bytes: int | None = None
    launches: int | None = None
    replay: float | None = None  # seconds per step in a CUDA graph

    @property
    def bandwidth(self) -> float | None:
        """Bytes per second by the case's traffic."""
        return None if self.timing is None else self.bytes / self.timing.median


def measure(plan: Plan) -> Iterator[list[Record]]:
    """One list per case x dtype x number of threads: eager, compile, the backends, copy."""
    code = None
    for case in plan.cases:
        if case.unfused_code != code:
            code = case.unfused_code
            if plan.compile:
                providers.forget_compiled()
        for dtype in plan.dtypes:
            sets = _input_sets(case, dtype, plan.device, plan.warm)
            gate = Gate(case, dtype, plan.device, sets[0])
            for threads in plan.threads:
                with ExitStack() as stack:
                    stack.enter_context(intra_op_threads(threads))
                    if plan.compile:
                        stack.enter_context(providers.compiler(plan.device, threads))
                    yield _measure_case(plan, case, dtype, threads, sets, gate)


def _measure_case(
    plan: Plan, case: Case, dtype: torch.dtype, threads: int, sets: Sequence[Inputs], gate: Gate
) -> list[Record]:
    records, passed = [], []
    for name in _names(plan):
        record = Record(case, dtype, threads, name, case.bytes(dtype.itemsize), len(sets))
        reason = None
        if name not in (EAGER, COMPILE):
            reason = providers.why_not(case, name, plan.device, dtype)
        if reason is not None:
            records.append(replace(record, left_out=reason))
            continue
        provider = _provider(case, name)
        try:
            wrong = gate.failure(provider)
        except Exception as error:  # of any kind: it is reported, and the other providers go on
            wrong = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            if name == COMPILE:
                records.append(replace(record, left_out=wrong))
                continue
        records.append(replace(record, wrong=wrong))
        if wrong is None:
            passed.append(provider)
    timings = _time(plan, case, dtype, sets, passed)
    records.append(Record(case, dtype, threads, COPY, 2 * _copy_bytes(case, dtype, plan.device), 1))
    by_name = {provider.name: provider for provider in passed}
    return [_complete(record, timings, by_name.get(record.provider), sets, plan.device) for record in records]


def _names(plan: Plan) -> list[str]:
    return [EAGER, *([COMPILE] if plan.compile else []), *plan.backends]


def _provider(case: Case, name: str) -> Provider:
    if name == EAGER:
        return providers.eager(case)
    return providers.compiled(case) if name == COMPILE else providers.backend(case, name)


def _time(
    plan: Plan, case: Case, dtype: torch.dtype, sets: Sequence[Inputs], passed: Sequence[Provider]
) -> dict[str, Timing]:
    # All providers take from one cycle: the inputs of one are not what the one before it has left in the cache.
    cycle = itertools.cycle(sets)
    size = _copy_bytes(case, dtype, plan.device)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=plan.device) for _ in range(2))
    contenders = [_contender(provider, cycle) for provider in passed]
    contenders.append(Contender(COPY, lambda: target.copy_(source)))
    clock: Clock = cuda.event_clock if plan.device.type == "cuda" else wall_clock
    return interleave(contenders, plan.min_time, clock)


def _contender(provider: Provider, cycle: Iterator[Inputs]) -> Contender:
    return Contender(provider.name, lambda: provider.step(next(cycle)), provider.context)


def _complete(
    record: Record,
    timings: dict[str, Timing],
    provider: Provider | None,
    sets: Sequence[Inputs],
    device: torch.device,
) -> Record:
    """With time, memory and, on CUDA, launches and replay."""
    record = replace(record, timing=timings.get(record.provider))
    if provider is None:
        return record
    with provider.context():
        record = replace(record, temporary_bytes=peak_temporary_bytes(_step(provider, lambda: sets[0]), device))
        if device.type == "cuda":
            steps = [_step(provider, inputs.fresh) for inputs in sets[:CAPTURED]]
            record = replace(record, launches=cuda.count_launches(steps[0]), replay=cuda.replay_seconds(steps))
    return record


def _step(provider: Provider, inputs: Callable[[], Inputs]) -> Callable[[], tuple[torch.Tensor, ...]]:
    return lambda: provider.step(inputs())


def _input_sets(case: Case, dtype: torch.dtype, device: torch.device, warm: bool) -> list[Inputs]:
    first = make_inputs(case, dtype, device)
    count = 1 if warm else _sets(case, first, dtype, device)
    return [first, *(make_inputs(case, dtype, device, index) for index in range(1, count))]


def _sets(case: Case, first: Inputs, dtype: torch.dtype, device: torch.device) -> int:
    """How many input sets there are: enough that what the forward pass reads is not in the cache."""
    read = case.bytes_read(dtype.itemsize)
    if read == 0:
        return 1
    wanted = math.ceil(CACHES * last_level_cache(device) / read)
    return max(1, min(wanted, MOST_SETS, MOST_BYTES // first.nbytes))


def _copy_bytes(case: Case, dtype: torch.dtype, device: torch.device) -> int:
    """Each of the two buffers: together the case's traffic, but too much for the cache."""
    return max(case.bytes(dtype.itemsize) // 2, int(CACHES * last_level_cache(device)) // 2)
