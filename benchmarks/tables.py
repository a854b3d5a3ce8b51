"""Results as tables: the one that the command ends with, and Markdown for the documentation."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import torch

from benchmarks.machine import Provenance
from benchmarks.results import Comparison, Group, absences, compare, dtype_name
from benchmarks.run import Record
from diffpp_fast.errors import ConfigurationError

#: The columns of the table in the terminal.
SHORT_HEADER = (
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
HEADER = (*SHORT_HEADER, "spread %", "temp MiB", "eager's")
#: On CUDA, further still.
CUDA_HEADER = ("launches", "eager's", "graph ms", "eager's")
#: What marks a row in which the backend loses to eager or compile.
SLOWER = "slower"
LEGEND = """\
Medians of interleaved rounds; forward and backward where there is a gradient. `x eager` and `x compile` are eager's and
compile's time over the backend's: above 1 the backend is faster. `GB/s` is the least traffic of the case over the
backend's time, `% copy` that over the bandwidth of `Tensor.copy_` in the same rounds. `spread` is the largest
interquartile range of the row, as a part of its median. `temp` is the peak of memory beyond inputs and results, first
the backend's and then eager's; launches and replay of a captured graph, where there are any, come in the same order.
"""


def text_table(groups: Sequence[Group]) -> str:
    """The table for a terminal: one line per case, dtype, number of threads and backend."""
    comparisons = [comparison for group in groups for comparison in compare(group)]
    short = len(SHORT_HEADER)
    cells = (_cells(comparison) for comparison in comparisons)
    rows = [(*SHORT_HEADER, ""), *((*row[:short], row[-1]) for row in cells)]
    columns = []
    for column in zip(*rows, strict=True):
        width = max(map(len, column))
        align = str.rjust if _is_figure(column[0]) else str.ljust
        columns.append([align(cell, width) for cell in column])
    return "\n".join("  ".join(row).rstrip() for row in zip(*columns, strict=True))


def markdown(groups: Sequence[Group], provenance: Provenance) -> str:
    """The same for the documentation, after a summary per operator."""
    comparisons = [comparison for group in groups for comparison in compare(group)]
    parts = [origin_line(provenance), LEGEND, _markdown_table(_summary(comparisons))]
    for op, of_op in groupby(comparisons, lambda comparison: comparison.eager.case.op):
        rows = list(of_op)
        parts.append(f"### {op}\n\n" + _markdown_table([_header(rows), *map(_cells, rows)]))
    missing = absences(groups)
    if missing:
        parts.append("Left out:\n\n" + "\n".join(f"- {sentence}" for sentence in missing) + "\n")
    return "\n".join(parts)


def place_of(device: torch.device, warm: bool) -> str:
    """The name of the place of these tables in the documentation."""
    return f"{device.type}, warm" if warm else device.type


def markers(place: str, subject: str = "kernels") -> tuple[str, str]:
    """The two lines between which a page holds the tables of this kind of device and subject."""
    begin, end = (f"<!-- python -m benchmarks {subject}, {place}: {edge} -->" for edge in ("begin", "end"))
    return begin, end


def check_page(page: Path, place: str, subject: str = "kernels") -> None:
    """Raises ConfigurationError unless the page has a place for the tables."""
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"--docs {page}: {error.strerror}") from error
    begin, end = markers(place, subject)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ConfigurationError(
            f"--docs {page}: the tables need a place; write these two lines where they are to be:\n{begin}\n{end}"
        )


def rewrite_page(page: Path, place: str, tables: str, subject: str = "kernels") -> None:
    """Replaces what is between the markers; `check_page` has passed."""
    begin, end = markers(place, subject)
    text = page.read_text(encoding="utf-8")
    head, rest = text.split(begin)
    page.write_text(f"{head}{begin}\n{tables.strip()}\n{end}{rest.split(end)[1]}", encoding="utf-8")


def _header(comparisons: Sequence[Comparison]) -> list[str]:
    on_cuda = any(comparison.eager.launches is not None for comparison in comparisons)
    return [*HEADER, *(CUDA_HEADER if on_cuda else ()), ""]


def _cells(comparison: Comparison) -> list[str]:
    eager, backend = comparison.eager, comparison.backend
    bandwidth = None if backend is None else backend.bandwidth
    copy = comparison.copy.bandwidth
    cells = [
        eager.case.name,
        dtype_name(eager),
        str(eager.threads),
        _milliseconds(eager),
        _milliseconds(comparison.compile),
        "-" if backend is None else backend.provider,
        _milliseconds(backend),
        _format(comparison.x_eager, ".2f"),
        _format(comparison.x_compile, ".2f"),
        _format(bandwidth, ".1f", 1e-9),
        "-" if bandwidth is None or copy is None else _format(bandwidth / copy, ".0f", 100.0),
        _format(comparison.spread, ".0f", 100.0),
        _mebibytes(backend),
        _mebibytes(eager),
    ]
    if eager.launches is not None:
        cells += [_count(record) for record in (backend, eager)]
        cells += [_format(None if record is None else record.replay, "#.3g", 1e3) for record in (backend, eager)]
    return [*cells, SLOWER if comparison.slower else ""]


def _summary(comparisons: Sequence[Comparison]) -> list[list[str]]:
    """Per operator, backend, dtype and number of threads: the geometric mean and the range of the speed-ups."""
    table = [["op", "backend", "dtype", "threads", "cases", "x eager", "x compile", "slower than either"]]
    kinds: dict[tuple[str, str, str, str], list[Comparison]] = {}
    for comparison in comparisons:
        if comparison.backend is not None:
            record = comparison.backend
            key = record.case.op, record.provider, dtype_name(record), str(record.threads)
            kinds.setdefault(key, []).append(comparison)
    for key, members in kinds.items():
        eager = [member.x_eager for member in members if member.x_eager is not None]
        compiled = [member.x_compile for member in members if member.x_compile is not None]
        slower = sum(member.slower for member in members)
        table.append([*key, str(len(members)), _range(eager), _range(compiled), str(slower)])
    return table


def _range(ratios: Sequence[float]) -> str:
    if not ratios:
        return "-"
    return f"{statistics.geometric_mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def origin_line(provenance: Provenance) -> str:
    """Where, when and with what it was measured."""
    commit = f", commit {provenance.commit}" if provenance.commit else ""
    changed = " with uncommitted changes" if provenance.dirty == "yes" else ""
    triton = f", triton {provenance.triton}" if provenance.triton else ""
    return (
        f"Measured on {provenance.device_name} on {provenance.date[:10]}: diffpp_fast "
        f"{provenance.diffpp_fast}{commit}{changed}, torch {provenance.torch}{triton}, Python {provenance.python}.\n"
    )


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    header, *body = rows
    rule = ["---:" if _is_figure(title) else "---" for title in header]
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, rule, *body))


def _is_figure(title: str) -> bool:
    return title not in ("case", "op", "dtype", "backend", "")


def _milliseconds(record: Record | None) -> str:
    if record is None:
        return "-"
    if record.timing is None:
        return "wrong" if record.wrong is not None else "-"
    return _format(record.timing.median, "#.3g", 1e3).rstrip(".")


def _count(record: Record | None) -> str:
    return "-" if record is None or record.launches is None else str(record.launches)


def _mebibytes(record: Record | None) -> str:
    return _format(None if record is None else record.temporary_bytes, ".2f", 2.0**-20)


def _format(value: float | None, specification: str, unit: float = 1.0) -> str:
    return "-" if value is None else format(value * unit, specification)
