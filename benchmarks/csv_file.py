"""Results as CSV: everything that was measured, with where and with what."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.machine import Provenance
from benchmarks.providers import COMPILE, EAGER
from benchmarks.results import Group, dtype_name, speed_up
from benchmarks.run import COPY, Record

COLUMNS = (
    "op",
    "variant",
    "noise",
    "size",
    "shape",
    "layout",
    "prediction_type",
    "dtype",
    "device",
    "threads",
    "provider",
    "status",
    "median_ms",
    "quartile1_ms",
    "quartile3_ms",
    "rounds",
    "calls_per_round",
    "input_sets",
    "x_eager",
    "x_compile",
    "traffic",
    "bytes",
    "gb_per_s",
    "percent_of_copy",
    "temporary_bytes",
    "launches",
    "graph_replay_ms",
    *Provenance._fields,
)


def write_csv(path: Path, groups: Sequence[Group], provenance: Provenance, device: torch.device) -> None:
    """One row per case, dtype, number of threads and provider. What was not measured is empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for group in groups:
            by_name = {record.provider: record for record in group}
            for record in group:
                row = {**_identity(record), "device": device.type, **_figures(record, by_name)}
                writer.writerow({**row, **provenance._asdict()})


def _identity(record: Record) -> dict[str, object]:
    case = record.case
    return {
        "op": case.op,
        "variant": case.variant,
        "noise": case.noise,
        "size": case.size,
        "shape": "x".join(map(str, case.shape)),
        "layout": case.layout,
        "prediction_type": case.prediction_type,
        "dtype": dtype_name(record),
        "threads": record.threads,
        "provider": record.provider,
        "status": _status(record),
        "input_sets": record.sets,
        "traffic": "source -> target" if record.provider == COPY else case.traffic,
        "bytes": record.bytes,
    }


def _status(record: Record) -> str:
    if record.wrong is not None:
        return f"wrong: {record.wrong}"
    return "ok" if record.left_out is None else f"left out: {record.left_out}"


def _figures(record: Record, group: Mapping[str, Record]) -> dict[str, object]:
    """What was measured of one provider, and its ratios to the others of its group."""
    if record.timing is None:
        return {}
    low, high = record.timing.quartiles
    bandwidth, copy = record.bandwidth, group[COPY].bandwidth
    return {
        "median_ms": _number(record.timing.median, 1e3),
        "quartile1_ms": _number(low, 1e3),
        "quartile3_ms": _number(high, 1e3),
        "rounds": len(record.timing.samples),
        "calls_per_round": record.timing.calls,
        "x_eager": _number(speed_up(group.get(EAGER), record)),
        "x_compile": _number(speed_up(group.get(COMPILE), record)),
        "gb_per_s": _number(bandwidth, 1e-9),
        "percent_of_copy": "" if bandwidth is None or copy is None else _number(bandwidth / copy, 100.0),
        "temporary_bytes": record.temporary_bytes,
        "launches": record.launches,
        "graph_replay_ms": _number(record.replay, 1e3),
    }


def _number(value: float | None, unit: float = 1.0) -> str:
    return "" if value is None else f"{value * unit:.5g}"
