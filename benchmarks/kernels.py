"""`python -m benchmarks kernels`: every case x dtype x number of threads, through the gate and then on the clock."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks import backends, gate, tables
from benchmarks.cases import Case, Inputs, make_inputs
from benchmarks.gate import COMPILE, EAGER, Gate, Provider
from benchmarks.memory import peak_temporary_bytes
from benchmarks.tables import Outcome, Place, Table, dtype_name, figure, loses, ratio, shown, threads_name
from benchmarks.timing import (
    Contender,
    Provenance,
    Timing,
    clock_of,
    count_launches,
    interleave,
    intra_op_threads,
    last_level_cache,
    replay_seconds,
    restless_sentence,
)

COPY = "copy"
#: Inputs together read this many times the last-level cache, so that none is in it when its turn comes again.
CACHES = 2.0
#: Unless that takes more sets or bytes than this.
MOST_SETS, MOST_BYTES = 1024, 2**30
#: Steps in a captured graph.
CAPTURED = 32


@dataclass(frozen=True)
class KernelPlan:
    """The measurements of one call: cases, backends and dtypes."""

    cases: Sequence[Case]
    backends: Sequence[str]
    dtypes: Sequence[torch.dtype]
    threads: Sequence[int]
    device: torch.device
    min_time: float  # seconds per provider and case
    compile: bool = True
    warm: bool = False  # one set of inputs, which stays in the cache if it fits


@dataclass(frozen=True, kw_only=True)
class KernelOutcome(Outcome):
    """One provider on one case, dtype and number of threads."""

    case: Case
    dtype: torch.dtype
    threads: int
    bytes: int  # the case's traffic; for "copy" what was read and written
    sets: int = 0
    timing: Timing | None = None
    temporary_bytes: int | None = None
    launches: int | None = None
    replay: float | None = None  # seconds per step in a CUDA graph

    @property
    def seconds(self) -> float | None:
        """Seconds per step: in a CUDA graph where it could be captured, for calls one by one show the host's time."""
        return self.replay or (None if self.timing is None else self.timing.median)

    @property
    def bandwidth(self) -> float | None:
        """Bytes per second by the case's traffic."""
        return None if self.seconds is None else self.bytes / self.seconds


#: The outcomes of one case, dtype and number of threads: eager, compile, the backends, copy.
Group = Sequence[KernelOutcome]


def measure(plan: KernelPlan) -> Iterator[list[KernelOutcome]]:
    """Yield a group per case x dtype x number of threads."""
    code = None
    for case in plan.cases:
        if plan.compile and case.unfused_code != code:
            code = case.unfused_code
            torch._dynamo.reset()  # each case needs compiled code of its own, and none of it again
        for dtype in plan.dtypes:
            sets = _input_sets(case, dtype, plan.device, plan.warm)
            judge = Gate(case, dtype, plan.device, sets[0])
            for threads in plan.threads:
                with ExitStack() as stack:
                    stack.enter_context(intra_op_threads(threads))
                    if plan.compile:
                        stack.enter_context(gate.compiler(plan.device, threads))
                    yield _measure_case(plan, case, dtype, threads, sets, judge)


def _measure_case(
    plan: KernelPlan, case: Case, dtype: torch.dtype, threads: int, sets: Sequence[Inputs], judge: Gate
) -> list[KernelOutcome]:
    outcomes: list[KernelOutcome] = []
    passed: dict[str, Provider] = {}
    shared: dict[str, Any] = {"case": case, "dtype": dtype, "threads": threads}
    for name in (EAGER, *([COMPILE] if plan.compile else []), *plan.backends):
        outcome = KernelOutcome(name, bytes=case.bytes(dtype.itemsize), sets=len(sets), **shared)
        reason = None
        if name not in (EAGER, COMPILE):
            reason = backends.why_not(case.op, name, plan.device, dtype)
        if reason is not None:
            outcomes.append(replace(outcome, left_out=reason))
            continue
        try:
            provider = _provider(case, sets[0], name)
            wrong = judge.failure(provider)
        except Exception as error:  # of any kind: it is reported, and the other providers go on
            wrong = gate.first_line(error)
            if name == COMPILE:
                outcomes.append(replace(outcome, left_out=wrong))
                continue
        outcomes.append(replace(outcome, wrong=wrong))
        if wrong is None:
            passed[name] = provider
    size = max(case.bytes(dtype.itemsize) // 2, int(CACHES * last_level_cache(plan.device)) // 2)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=plan.device) for _ in range(2))

    def copy() -> tuple[torch.Tensor, ...]:
        return (target.copy_(source),)

    timings = _time(plan, copy, sets, list(passed.values()))
    replay = replay_seconds([copy]) if plan.device.type == "cuda" else None
    outcomes.append(KernelOutcome(COPY, bytes=2 * size, sets=1, replay=replay, **shared))
    return [
        _complete(replace(outcome, timing=timings.get(outcome.provider)), passed.get(outcome.provider), sets, plan)
        for outcome in outcomes
    ]


def _provider(case: Case, inputs: Inputs, name: str) -> Provider:
    if name == EAGER:
        return gate.eager(case)
    return gate.compiled(case) if name == COMPILE else gate.backend(case, inputs, name)


def _time(
    plan: KernelPlan, copy: Callable[[], object], sets: Sequence[Inputs], passed: Sequence[Provider]
) -> dict[str, Timing]:
    """Time the providers beside a copy."""
    # All providers take from one cycle: the inputs of one are not what the one before it has left in the cache.
    cycle = itertools.cycle(sets)

    def contender(provider: Provider) -> Contender:
        return Contender(provider.name, lambda: provider.step(next(cycle)), provider.context)

    contenders = [*map(contender, passed), Contender(COPY, copy)]
    return interleave(contenders, plan.min_time, clock_of(plan.device))


def _complete(
    outcome: KernelOutcome, provider: Provider | None, sets: Sequence[Inputs], plan: KernelPlan
) -> KernelOutcome:
    """Return the outcome with memory and, on CUDA, launches and replay."""
    if provider is None:
        return outcome

    def call(inputs: Inputs) -> Callable[[], tuple[torch.Tensor, ...]]:
        return lambda: provider.step(inputs)

    with provider.context():
        outcome = replace(outcome, temporary_bytes=peak_temporary_bytes(call(sets[0]), plan.device))
        if plan.device.type == "cuda":
            steps = [call(inputs.fresh()) for inputs in sets[:CAPTURED]]
            outcome = replace(outcome, launches=count_launches(steps[0]), replay=replay_seconds(steps))
    return outcome


def _input_sets(case: Case, dtype: torch.dtype, device: torch.device, warm: bool) -> list[Inputs]:
    """Return as many sets as it takes for what the forward pass reads not to be in the cache."""
    first = make_inputs(case, dtype, device)
    read = case.bytes_read(dtype.itemsize)
    count = 1
    if read and not warm:
        wanted = math.ceil(CACHES * last_level_cache(device) / read)
        count = max(1, min(wanted, MOST_SETS, MOST_BYTES // first.nbytes))
    return [first, *(make_inputs(case, dtype, device, index) for index in range(1, count))]


# Results

COLUMNS = (
    *("op", "variant", "noise", "size", "shape", "layout", "prediction_type", "dtype", "device", "threads"),
    *("provider", "status", "median_ms", "quartile1_ms", "quartile3_ms", "rounds", "calls_per_round", "input_sets"),
    *("x_eager", "x_compile", "traffic", "bytes", "gb_per_s", "percent_of_copy", "temporary_bytes", "launches"),
    "graph_replay_ms",
)
#: The columns of the table in the terminal.
HEADER = (
    "case",
    "dtype",
    "threads",
    "eager ms",
    "compile ms",
    "backend",
    "ms",
    "x eager",
    "x compile",
    "GB/s",
    "% copy",
)
#: In Markdown, further: `temp` and what follows come in pairs, the backend's and eager's.
MORE = ("spread %", "temp MiB", "eager's")
#: On CUDA, further still.
CUDA_HEADER = ("launches", "eager's", "one by one ms", "eager's")
LEGEND = """\
Medians of interleaved rounds; forward and backward where there is a gradient. `x eager` and `x compile` are eager's and
compile's time over the backend's: above 1 the backend is faster. `GB/s` is the least traffic of the case over the
backend's time, `% copy` that over the bandwidth of `Tensor.copy_` in the same rounds. `spread` is the largest
interquartile range of the row, as a part of its median. `temp` is the peak of memory beyond inputs and results, first
the backend's and then eager's. On a GPU times are those of a replayed CUDA graph, wherever a step can be captured;
launches, and the time of calls one by one, which for small tensors is the host's, come in the same order as `temp`.
"""


@dataclass(frozen=True)
class Comparison:
    """A backend against the unfused code and the copy, on one case, dtype and number of threads."""

    eager: KernelOutcome
    compile: KernelOutcome | None
    copy: KernelOutcome
    backend: KernelOutcome | None  # None where no backend was asked for

    @property
    def x_eager(self) -> float | None:
        return speed_up(self.eager, self.backend)

    @property
    def x_compile(self) -> float | None:
        return speed_up(self.compile, self.backend)

    @property
    def slower(self) -> bool:
        """Whether the backend loses to eager or to compile."""
        return loses(self.x_eager, self.x_compile)

    @property
    def spread(self) -> float:
        """The largest interquartile range, as a part of its median."""
        outcomes = (self.eager, self.compile, self.copy, self.backend)
        timings = (outcome.timing for outcome in outcomes if outcome is not None)
        return max(timing.spread for timing in timings if timing is not None)


def speed_up(base: KernelOutcome | None, outcome: KernelOutcome | None) -> float | None:
    """Return the ratio of the times in graphs where both have one, else of the medians; None where one has neither."""
    if base is None or outcome is None:
        return None
    if base.replay is not None and outcome.replay is not None:
        return base.replay / outcome.replay
    return ratio(base.timing, outcome.timing)


def compare(group: Group) -> list[Comparison]:
    """Return one comparison per backend that took part, or one without a backend."""
    by_name = {outcome.provider: outcome for outcome in group}
    base = by_name[EAGER], by_name.get(COMPILE), by_name[COPY]
    others = [outcome for outcome in group if outcome.provider not in (EAGER, COMPILE, COPY)]
    return [Comparison(*base, each) for each in [o for o in others if o.left_out is None] or (None,)]


def failures(group: Group) -> list[str]:
    """Say what the gate found, a sentence each."""
    return [f"{place(outcome)}: {outcome.provider} is wrong: {outcome.wrong}" for outcome in group if outcome.wrong]


def absences(groups: Sequence[Group]) -> list[str]:
    """Say who did not take part and why, a sentence for each provider, operator and dtype."""
    absent = (outcome for group in groups for outcome in group if outcome.left_out is not None)
    sentences = (f"{o.case.op}, {dtype_name(o.dtype)}, without {o.provider}: {o.left_out}" for o in absent)
    return list(dict.fromkeys(sentences))


def place(outcome: KernelOutcome) -> str:
    """Return the case, dtype and number of threads."""
    return f"{outcome.case.name}, {dtype_name(outcome.dtype)}, {threads_name(outcome.threads)}"


def verdict(groups: Sequence[Group]) -> list[str]:
    """Say what the reader of the table has to know: where the backends lose, and what is not to be trusted."""
    comparisons = [comparison for group in groups for comparison in compare(group)]
    backed = [comparison for comparison in comparisons if comparison.backend is not None]
    sentences = []
    if backed:
        slower = sum(comparison.slower for comparison in backed)
        sentences.append(f"{slower} of {len(backed)} rows are slower than eager or compile")
    sentences += restless_sentence([comparison.spread for comparison in comparisons], "rows")
    wrong = sum(len(failures(group)) for group in groups)
    if wrong:
        sentences.append(f"{wrong} results are wrong, and their providers were not timed: see above")
    return sentences


def write(where: Place, groups: Sequence[Group], origin: Provenance, device: torch.device) -> list[Any]:
    """Write CSV, Markdown and a plot. Return the paths."""
    comparisons = [comparison for group in groups for comparison in compare(group)]
    parts: list[Any] = [LEGEND, _summary(comparisons)]
    for op, of_op in itertools.groupby(comparisons, lambda comparison: comparison.eager.case.op):
        members = list(of_op)
        on_cuda = any(comparison.eager.launches is not None for comparison in members)
        header = (*HEADER, *MORE, *(CUDA_HEADER if on_cuda else ()), "")
        parts.append(Table([header, *map(_cells, members)], f"### {op}"))
    if missing := absences(groups):
        parts.append(f"Left out:\n\n{tables.bullets(missing)}")
    rows = [_row(outcome, group, device) for group in groups for outcome in group]
    paths = where.write(rows, COLUMNS, parts, origin)
    if tables.can_plot():
        paths.append(where.stem.with_suffix(".png"))
        tables.write_dots(paths[-1], [_dots(group) for group in groups], origin.device_name)
    else:
        print("the plot is left out: matplotlib is not installed, pip install matplotlib brings it")
    return paths


def text_table(groups: Sequence[Group]) -> str:
    """Return the table for a terminal: one line per case, dtype, number of threads and backend."""
    cells = [_cells(comparison) for group in groups for comparison in compare(group)]
    return tables.text(Table([(*HEADER, ""), *((*row[: len(HEADER)], row[-1]) for row in cells)]))


def _row(outcome: KernelOutcome, group: Group, device: torch.device) -> dict[str, Any]:
    case, by_name = outcome.case, {each.provider: each for each in group}
    row = {
        **{name: getattr(case, name) for name in ("op", "variant", "noise", "size", "layout", "prediction_type")},
        "shape": "x".join(map(str, case.shape)),
        "dtype": dtype_name(outcome.dtype),
        "device": device.type,
        "threads": outcome.threads,
        "provider": outcome.provider,
        "status": outcome.status,
        "input_sets": outcome.sets,
        "traffic": "source -> target" if outcome.provider == COPY else case.traffic,
        "bytes": outcome.bytes,
    }
    if outcome.timing is None:
        return row
    bandwidth, copy = outcome.bandwidth, by_name[COPY].bandwidth
    return {
        **row,
        **tables.times(outcome.timing),
        "calls_per_round": outcome.timing.calls,
        "x_eager": figure(speed_up(by_name.get(EAGER), outcome)),
        "x_compile": figure(speed_up(by_name.get(COMPILE), outcome)),
        "gb_per_s": figure(bandwidth, 1e-9),
        "percent_of_copy": figure(None if bandwidth is None or copy is None else bandwidth / copy, 100.0),
        "temporary_bytes": outcome.temporary_bytes,
        "launches": outcome.launches,
        "graph_replay_ms": figure(outcome.replay, 1e3),
    }


def _cells(comparison: Comparison) -> list[str]:
    eager, backend = comparison.eager, comparison.backend
    bandwidth, copy = None if backend is None else backend.bandwidth, comparison.copy.bandwidth
    cells = [
        eager.case.name,
        dtype_name(eager.dtype),
        str(eager.threads),
        *map(_milliseconds, (eager, comparison.compile)),
        "-" if backend is None else backend.provider,
        _milliseconds(backend),
        *(shown(value, ".2f") for value in (comparison.x_eager, comparison.x_compile)),
        shown(bandwidth, ".1f", 1e-9),
        shown(None if bandwidth is None or copy is None else bandwidth / copy, ".0f", 100.0),
        shown(comparison.spread, ".0f", 100.0),
        *(shown(None if each is None else each.temporary_bytes, ".2f", 2.0**-20) for each in (backend, eager)),
    ]
    if eager.launches is not None:
        cells += [shown(None if each is None else each.launches, "d", 1) for each in (backend, eager)]
        timings = (None if each is None else each.timing for each in (backend, eager))
        cells += [shown(None if timing is None else timing.median, "#.3g", 1e3) for timing in timings]
    return [*cells, tables.SLOWER if comparison.slower else ""]


def _milliseconds(outcome: KernelOutcome | None) -> str:
    if outcome is not None and outcome.wrong is not None:
        return "wrong"
    return "-" if outcome is None or outcome.seconds is None else f"{1e3 * outcome.seconds:#.3g}".rstrip(".")


def _summary(comparisons: Sequence[Comparison]) -> Table:
    """Per operator, backend, dtype and number of threads: the geometric mean and the range of the speed-ups."""
    rows: list[Sequence[str]] = [
        ("op", "backend", "dtype", "threads", "cases", "x eager", "x compile", "slower than either")
    ]
    kinds: dict[tuple[str, ...], list[Comparison]] = {}
    for comparison in comparisons:
        if (one := comparison.backend) is not None:
            key = one.case.op, one.provider, dtype_name(one.dtype), str(one.threads)
            kinds.setdefault(key, []).append(comparison)
    for kind, members in kinds.items():
        ratios = [member.x_eager for member in members], [member.x_compile for member in members]
        slower = sum(member.slower for member in members)
        rows.append((*kind, str(len(members)), *map(_range, ratios), str(slower)))
    return Table(rows)


def _range(ratios: Sequence[float | None]) -> str:
    known = [value for value in ratios if value is not None]
    return f"{mean(known)} ({min(known):.2f} to {max(known):.2f})" if known else "-"


def mean(ratios: Sequence[float | None]) -> str:
    """Return the geometric mean of the ratios that are known; a dash where none is."""
    known = [value for value in ratios if value is not None]
    return f"{statistics.geometric_mean(known):.2f}" if known else "-"


def _dots(group: Group) -> tuple[str, str, str, dict[str, float]]:
    eager = next(outcome for outcome in group if outcome.provider == EAGER)
    ratios = {each.provider: speed_up(eager, each) for each in group if each.provider not in (EAGER, COPY)}
    known = {name: value for name, value in ratios.items() if value is not None}
    panel = f"{dtype_name(eager.dtype)}, {threads_name(eager.threads)}"
    return panel, eager.case.name, eager.case.op, known
