"""What results say: each backend against the code that it replaces, and who was wrong or absent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.providers import COMPILE, EAGER
from benchmarks.run import COPY, Record

#: The records of one case, dtype and number of threads, as `run.measure` gives them.
Group = Sequence[Record]


@dataclass(frozen=True)
class Comparison:
    """A backend against the unfused code and the copy, on one case, dtype and number of threads."""

    eager: Record
    compile: Record | None
    copy: Record
    backend: Record | None  # None where no backend was asked for

    @property
    def slower(self) -> bool:
        """Whether the backend loses to eager or to compile."""
        return any(ratio is not None and ratio < 1.0 for ratio in (self.x_eager, self.x_compile))

    @property
    def spread(self) -> float:
        """The largest interquartile range, as a part of its median."""
        records = (self.eager, self.compile, self.copy, self.backend)
        timings = (record.timing for record in records if record is not None)
        return max(timing.spread for timing in timings if timing is not None)

    @property
    def x_eager(self) -> float | None:
        return speed_up(self.eager, self.backend)

    @property
    def x_compile(self) -> float | None:
        return speed_up(self.compile, self.backend)


def speed_up(base: Record | None, record: Record | None) -> float | None:
    """The ratio of the medians; None where one of them was not timed."""
    if base is None or record is None or base.timing is None or record.timing is None:
        return None
    return base.timing.median / record.timing.median


def compare(group: Group) -> list[Comparison]:
    """One comparison per backend that took part, or one without a backend."""
    by_name = {record.provider: record for record in group}
    base = by_name[EAGER], by_name.get(COMPILE), by_name[COPY]
    others = [record for record in group if record.provider not in (EAGER, COMPILE, COPY)]
    backends = [record for record in others if record.left_out is None]
    return [Comparison(*base, backend) for backend in backends or (None,)]


def failures(group: Group) -> list[str]:
    """What the gate found, a sentence each."""
    return [f"{place(record)}: {record.provider} is wrong: {record.wrong}" for record in group if record.wrong]


def absences(groups: Sequence[Group]) -> list[str]:
    """Who did not take part and why, a sentence for each provider, operator and dtype."""
    records = (record for group in groups for record in group if record.left_out is not None)
    sentences = (
        f"{record.case.op}, {dtype_name(record)}, without {record.provider}: {record.left_out}" for record in records
    )
    return list(dict.fromkeys(sentences))


def place(record: Record) -> str:
    """The case, dtype and number of threads."""
    return f"{record.case.name}, {dtype_name(record)}, {record.threads} thread{'s' * (record.threads > 1)}"


def dtype_name(record: Record) -> str:
    return str(record.dtype).removeprefix("torch.")
